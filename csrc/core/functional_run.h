// A functional's network from beginning to end, by one thread or several.
#pragma once

#include <cmath>
#include <functional>

#include "functional.h"

namespace weightops::functional {

// Compiled once for each instruction set.
template <class T>
struct Kernels {
  void (*square)(const Task<T>&, int64_t network, int64_t part, State<T>&);
  void (*read)(const Task<T>&, int64_t network, int64_t part, State<T>&, Scratch<T>&);
  void (*pool)(const Task<T>&, State<T>&);
  void (*write)(const Task<T>&, int64_t network, const equivariant::Step&, int64_t begin,
                int64_t end, State<T>&);
};

#define WEIGHTOPS_FUNCTIONAL_KERNELS(suffix, attribute, bytes)                             \
  template <class T>                                                                       \
  struct Kernels_##suffix {                                                                \
    using Single = Kernel<T, bytes>;                                                       \
    attribute static void square(const Task<T>& task, int64_t network, int64_t part,       \
                                 State<T>& state) {                                        \
      Single::square(task, network, part, state);                                          \
    }                                                                                      \
    attribute static void read(const Task<T>& task, int64_t network, int64_t part,         \
                               State<T>& state, Scratch<T>& scratch) {                     \
      Single::read(task, network, part, state, scratch);                                   \
    }                                                                                      \
    attribute static void pool(const Task<T>& task, State<T>& state) {                     \
      Single::pool(task, state);                                                           \
    }                                                                                      \
    attribute static void write(const Task<T>& task, int64_t network,                      \
                                const equivariant::Step& step, int64_t begin, int64_t end, \
                                State<T>& state) {                                         \
      Single::write(task, network, step, begin, end, state);                               \
    }                                                                                      \
    static constexpr Kernels<T> all{square, read, pool, write};                            \
  };
WEIGHTOPS_FUNCTIONAL_KERNELS(generic, , 16)
#if WEIGHTOPS_X86
WEIGHTOPS_FUNCTIONAL_KERNELS(avx2, WEIGHTOPS_AVX2, 32)
WEIGHTOPS_FUNCTIONAL_KERNELS(avx512, WEIGHTOPS_AVX512, 64)
#endif
#undef WEIGHTOPS_FUNCTIONAL_KERNELS

template <class T>
const Kernels<T>& kernels() {
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return Kernels_avx512<T>::all;
  if (isa() == Isa::avx2) return Kernels_avx2<T>::all;
#endif
  return Kernels_generic<T>::all;
}

// Calls f(begin, end, a thread's own room) on ranges that make up [0, count).
template <class T>
using Team =
    std::function<void(int64_t count, const std::function<void(int64_t, int64_t, Scratch<T>&)>& f)>;

// A network's parameters, rows padded with zeros. theta is all layers' matrices, then their biases.
template <class T>
void set_parameters(const Task<T>& task, int64_t network, State<T>& state) {
  const int64_t layers = task.layers(), hidden = task.hidden(), width = task.widths[layers - 1];
  const int64_t terms = task.readout.plan.terms;
  int64_t size = hidden == width ? 0 : terms * hidden;
  for (int64_t l = 0; l + 1 < layers; ++l)
    size += (task.widths[l] + 1) * padded(task.widths[l + 1]);
  T* to = state.room.get(size);
  const T* from = task.theta + network * task.theta_stride;
  const auto take = [&](int64_t rows, int64_t columns) {
    const T* const begin = to;
    for (int64_t r = 0; r < rows; ++r, from += columns)
      to = std::fill_n(std::copy_n(from, columns, to), padded(columns) - columns, T(0));
    return begin;
  };
  state.weights.clear();
  state.biases.clear();
  for (int64_t l = 0; l + 1 < layers; ++l)
    state.weights.push_back(take(task.widths[l], task.widths[l + 1]));
  if (hidden == width) {
    state.blocks = from;
    from += terms * hidden;
  } else {
    state.blocks = take(terms, width);
  }
  for (int64_t l = 0; l + 1 < layers; ++l) state.biases.push_back(take(1, task.widths[l + 1]));
  state.bias = from;
  // What all weights share is summed once, with the bias.
  const int64_t columns = padded(task.widths[1]);
  T* bias = const_cast<T*>(state.biases[0]);
  const T* shared = task.shared + network * task.shared_stride;
  for (int64_t s = 0; s < task.shared_size; ++s)
    for (int64_t k = 0; k < columns; ++k)
      bias[k] += shared[s] * state.weights[0][(task.channels() + s) * columns + k];
}

template <class T>
void set_scales(const Task<T>& task, State<T>& state) {
  const int64_t segments = task.segments.size() - 1, channels = task.channels();
  const double* squares = state.squares.get(0);
  T* scales = state.scales.get(segments * channels);
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t c = 0; c < channels; ++c, ++squares) {
      double sum = 0;
      for (int64_t p = 0; p < task.parts; ++p) sum += squares[p * segments * channels];
      const T mean = T(sum / double(task.segments[s + 1] - task.segments[s]));
      scales[s * channels + c] = T(1) / std::sqrt(mean + T(task.eps));
    }
}

template <class T>
void run(const Task<T>& task, int64_t network, State<T>& state, const Team<T>& team) {
  constexpr int64_t kWorthSharing = 1 << 13;  // numbers that are written
  const Kernels<T>& with = kernels<T>();
  const Readout& readout = task.readout;
  state.squares.get(task.parts * (task.segments.size() - 1) * task.channels());
  state.sums.get(task.parts * readout.plan.sides[0].slots * task.hidden());
  state.fields.get(readout.numbers);
  state.broadcast.get(readout.plan.sides[1].write_slots);
  set_parameters(task, network, state);
  team(task.parts, [&](int64_t begin, int64_t end, Scratch<T>&) {
    for (int64_t part = begin; part < end; ++part) with.square(task, network, part, state);
  });
  set_scales(task, state);
  team(task.parts, [&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    for (int64_t part = begin; part < end; ++part) with.read(task, network, part, state, scratch);
  });
  with.pool(task, state);
  for (const equivariant::Step& step : readout.program->steps) {
    if (task.parts == 1 || step.outer * step.run < kWorthSharing) {
      with.write(task, network, step, 0, step.outer, state);
      continue;
    }
    team(step.outer, [&](int64_t begin, int64_t end, Scratch<T>&) {
      with.write(task, network, step, begin, end, state);
    });
  }
}

}  // namespace weightops::functional
