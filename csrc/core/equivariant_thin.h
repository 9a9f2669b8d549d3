// Layers to one channel: a dot product a row, of which a vector takes as many as it has lanes.
#pragma once

#include <utility>

#include "equivariant_tile.h"

namespace weightops::equivariant {

template <class T, int Bytes>
struct DotProducts {
  using Arithmetic = Tile<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  static constexpr int lanes = Arithmetic::lanes;

  // sums[r] += rows[r] * block, lane by lane.
  static WEIGHTOPS_INLINE void add(const T* const* rows, const T* block, int64_t channels,
                                   Vector* sums) {
    for (int64_t k = 0; k < channels; k += lanes) {
      const Vector weights = Arithmetic::load(block + k);
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) sums[r] += Arithmetic::load(rows[r] + k) * weights;
    }
  }

  // What the nine taps at `from` and their sums over columns, rows and both come to: one vector.
  static WEIGHTOPS_INLINE Vector taps(const T* from, int64_t channels, const T* blocks) {
    static_assert(lanes == 16);
    Vector sums[16] = {};
    for (int64_t k = 0; k < channels; k += lanes) {
      Vector weights[9], block[4];
      for (int q = 0; q < 4; ++q) block[q] = Arithmetic::load(blocks + q * channels + k);
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        weights[t] = Arithmetic::load(from + t * channels + k);
        sums[t] += weights[t] * block[0];
      }
      Vector all = {};
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) {
        const Vector row = weights[3 * a] + weights[3 * a + 1] + weights[3 * a + 2];
        sums[9 + a] += row * block[1];
        sums[12 + a] += (weights[a] + weights[a + 3] + weights[a + 6]) * block[2];
        all += row;
      }
      sums[15] += all * block[3];
    }
    const Vector found = across(sums);
    return found +
           __builtin_shufflevector(found, found, 9, 9, 9, 10, 10, 10, 11, 11, 11, 9, 9, 9, 9, 9, 9,
                                   9) +
           __builtin_shufflevector(found, found, 12, 13, 14, 12, 13, 14, 12, 13, 14, 9, 9, 9, 9, 9,
                                   9, 9) +
           found[15];
  }

  // Lane r of the result is the sum of the lanes of sums[r].
  static WEIGHTOPS_INLINE Vector across(Vector* sums) {
    halve<1>(sums);
    return sums[0];
  }

 private:
  // Groups of `width` lanes are sums of as many vectors already.
  template <int width>
  static WEIGHTOPS_INLINE void halve(Vector* sums) {
    if constexpr (width < lanes) {
#pragma GCC unroll 8
      for (int r = 0; r < lanes / width / 2; ++r)
        sums[r] =
            join<width>(sums[2 * r], sums[2 * r + 1], std::make_integer_sequence<int, lanes>());
      halve<2 * width>(sums);
    }
  }
  template <int width, int... lane>
  static WEIGHTOPS_INLINE Vector join(const Vector& a, const Vector& b,
                                      std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, from<width>(lane)...) +
           __builtin_shufflevector(a, b, from<width>(lane) + width...);
  }
  template <int width>
  static constexpr int from(int lane) {
    const int group = lane / (2 * width) * 2 * width, within = lane % (2 * width);
    return within < width ? group + within : lanes + group + within - width;
  }
};

}  // namespace weightops::equivariant
