// The signal of each frequency in an embedding of cyclic tokens, during a training.
#pragma once

#include <cmath>
#include <vector>

#include "fourier.h"

namespace weightops::population {

// Where in a network's row the embedding [tokens, features] begins, and of how many steps, counted
// from 0, its signals are recorded.
struct Probe {
  int64_t place, tokens, features, every;
  int64_t frequencies() const { return (tokens - 1) / 2; }

  // Cosines, and then sines, [2, frequencies, tokens].
  template <class Number>
  std::vector<Number> transform() const {
    std::vector<Number> matrix;
    for (const double quarter : {0.0, 0.25})
      for (int64_t k = 1; k <= frequencies(); ++k)
        for (int64_t n = 0; n < tokens; ++n)
          // Whole turns are left out in integers.
          matrix.push_back(
              std::cos(2 * M_PI * (double(k * n % tokens) / double(tokens) + quarter)));
    return matrix;
  }
};

template <class Arithmetic>
class Signals {
  using Number = typename Arithmetic::Number;

 public:
  explicit Signals(const Probe& probe)
      : probe_(probe),
        signal_({probe.frequencies(), probe.tokens, probe.features},
                probe.transform<Number>().data()) {}

  // Of a network's row before step `step`, if it is recorded: whether it was.
  bool record(int64_t step, const Number* row, Number* signals) {
    if (step % probe_.every != 0) return false;
    signal_(row + probe_.place, 0, signal_.tiles(), signals, workspace_);
    return true;
  }

 private:
  Probe probe_;
  fourier::Signal<Arithmetic> signal_;
  typename fourier::Signal<Arithmetic>::Workspace workspace_;
};

}  // namespace weightops::population
