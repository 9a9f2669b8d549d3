// Multiply-adds of vectors in registers: what no kernel without matrix units is faster than.
#include "../csrc/core/simd.h"

// Operations of `rounds` rounds.
extern "C" double multiply_add(int64_t rounds, float* result) {
  double operations = 0;
  weightops::with_arithmetic<float>([&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    // As many chains hide the latency of two units and leave two registers free.
    constexpr int chains = Arithmetic::bytes == 64 ? 24 : 12;
    weightops::enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      typename Arithmetic::Vector sums[chains], factor, term;
#pragma GCC unroll 24
      for (int i = 0; i < chains; ++i) sums[i] = typename Arithmetic::Vector{} + float(i);
      factor = sums[0] + result[0];
      term = sums[0] + result[1];
      for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 24
        for (int i = 0; i < chains; ++i) sums[i] = sums[i] * factor + term;
      for (int i = 0; i < chains; ++i) result[0] += Arithmetic::total(sums[i]);
    });
    operations = 2.0 * rounds * chains * Arithmetic::lanes;
  });
  return operations;
}
