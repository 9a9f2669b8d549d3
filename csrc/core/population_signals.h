// The signal of each frequency in an embedding of cyclic tokens: norms of the rows of its Fourier
// transform, during a training.
#pragma once

#include <cmath>
#include <vector>

#include "population_pairs.h"

namespace weightops::population {

template <class Number>
struct Signals {
  int64_t embedding, tokens, features, every;
  std::vector<Number> matrix;  // [real and imaginary of 1, of 2, ...][token]

  Signals(int64_t place, int64_t p, int64_t d, int64_t steps)
      : embedding(place), tokens(p), features(d), every(steps) {
    for (int64_t k = 1; k <= frequencies(); ++k)
      for (const double quarter : {0.0, 0.25})
        for (int64_t n = 0; n < p; ++n)
          // Whole turns are left out in integers.
          matrix.push_back(std::cos(2 * M_PI * (double(k * n % p) / double(p) + quarter)));
  }

  int64_t frequencies() const { return (tokens - 1) / 2; }

  template <class Arithmetic>
  void measure(const Number* row, Number* signals) const {
    constexpr int lanes = Arithmetic::lanes;
    const int64_t wide = (features + lanes - 1) / lanes * lanes, rows = 2 * frequencies();
    Number* table = room_of<Number, 4>((tokens + rows) * wide);
    widen(row + embedding, tokens, features, wide, table);
    Product<Number> product{};
    product.a = matrix.data();
    product.row = tokens;
    product.left[1] = 1;
    product.b = table;
    product.column = product.to_column = lanes;
    product.right[1] = product.to_row = wide;
    product.depth[0] = 1;
    product.depth[1] = tokens;
    product.to = table + tokens * wide;
    multiply<Arithmetic>(product, rows, wide / lanes);
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      const Number* from = product.to;
      for (int64_t k = 0; k < frequencies(); ++k, from += 2 * wide) {
        typename Arithmetic::Vector sum[2] = {};
        for (int64_t at = 0; at < wide; at += lanes)
          for (int half = 0; half < 2; ++half) {
            const auto found = Arithmetic::load(from + half * wide + at);
            sum[half] += found * found;
          }
        signals[k] = std::sqrt(Arithmetic::total(sum[0] + sum[1]));
      }
    });
  }
};

}  // namespace weightops::population
