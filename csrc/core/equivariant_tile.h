// The arithmetic of equivariant layers on vectors of channels: sums of rows, and small matrix
// products whose accumulators stay in registers. One source for every instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "equivariant_program.h"
#include "simd.h"

namespace weightops::equivariant {

// One factor of a tile's product: rows of up to kDepth channels times a block of as many rows. Rows
// are kDepth apart, which lets the compiler address all of a tile from one register.
template <class T>
struct Factor {
  const T* rows;
  const T* block;
  int64_t channels;
  const T* ahead;  // fetched meanwhile: rows that are wanted next, `ahead_stride` apart
  int64_t ahead_stride;
};

// A vector of channels of a tile's rows, and where its products with others are added up.
template <class T>
struct Right {
  const T* rows;
  T* to;
};

template <class T, int Bytes>
struct Tile : Simd<T, Bytes> {
  using typename Simd<T, Bytes>::Vector;
  using Simd<T, Bytes>::lanes, Simd<T, Bytes>::load, Simd<T, Bytes>::store, Simd<T, Bytes>::stream;

  static WEIGHTOPS_INLINE int64_t padded(int64_t channels) {
    return (channels + lanes - 1) / lanes * lanes;
  }

  // A value that is to stay in a register.
  static WEIGHTOPS_INLINE void keep(Vector& value) {
#if WEIGHTOPS_X86
    if constexpr (Bytes == 64) asm("" : "+v"(value));
#endif
  }

  // NaN is kept: of the instruction's operands it is the second that is taken then.
  static WEIGHTOPS_INLINE Vector relu(const Vector& x) {
#if WEIGHTOPS_X86
    if constexpr (Bytes == 64) {
      Vector larger;
      if constexpr (sizeof(T) == 4)
        asm("vmaxps %2, %1, %0" : "=v"(larger) : "v"(Vector{}), "v"(x));
      else
        asm("vmaxpd %2, %1, %0" : "=v"(larger) : "v"(Vector{}), "v"(x));
      return larger;
    }
#endif
    return x < Vector{} ? Vector{} : x;
  }

  // to[0:length] (+)= scale * sum over `count` rows of from, `stride` elements apart.
  static WEIGHTOPS_INLINE void sum_rows(const T* from, int64_t stride, int64_t count,
                                        int64_t length, T* to, bool accumulate, T scale) {
    int64_t l = 0;
    for (; l + 4 * lanes <= length; l += 4 * lanes)
      sum_block<4>(from + l, stride, count, to + l, accumulate, scale);
    for (; l + lanes <= length; l += lanes)
      sum_block<1>(from + l, stride, count, to + l, accumulate, scale);
    if (l == length) return;
    if (length == 1 && stride == 1) {
      Vector sum = {};
      int64_t d = 0;
      for (; d + lanes <= count; d += lanes) sum += load(from + d);
      T total = 0;
      for (int k = 0; k < lanes; ++k) total += sum[k];
      for (; d < count; ++d) total += from[d];
      to[0] = (accumulate ? to[0] : T(0)) + scale * total;
      return;
    }
    // In sum_block's order, so that it makes no difference which of them takes an element.
    T rest[2][lanes] = {};
    const int64_t left = length - l;
    for (int64_t d = 0; d < count; ++d)
      for (int64_t k = 0; k < left; ++k) rest[d % 2][k] += from[d * stride + l + k];
    for (int64_t k = 0; k < left; ++k) {
      const T sum = (rest[0][k] + rest[1][k]) * scale;
      to[l + k] = accumulate ? sum + to[l + k] : sum;
    }
  }

  template <int width>
  static WEIGHTOPS_INLINE void sum_block(const T* from, int64_t stride, int64_t count, T* to,
                                         bool accumulate, T scale) {
    // Two chains a vector hide the addition's latency.
    Vector even[width] = {}, odd[width] = {};
    int64_t d = 0;
    for (; d + 2 <= count; d += 2)
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) {
        even[v] += load(from + d * stride + v * lanes);
        odd[v] += load(from + (d + 1) * stride + v * lanes);
      }
    if (d < count)
      for (int v = 0; v < width; ++v) even[v] += load(from + d * stride + v * lanes);
    for (int v = 0; v < width; ++v) {
      Vector sum = (even[v] + odd[v]) * scale;
      if (accumulate) sum += load(to + v * lanes);
      store(to + v * lanes, sum);
    }
  }

  static constexpr int depth = kDepth;
  using Factor = equivariant::Factor<T>;
  using Right = equivariant::Right<T>;

  // What a tile's product begins with, common + scale * rows[m], and where it goes.
  struct Frame {
    const T* rows;
    int64_t rows_stride;
    T scale;
    Vector common;
    bool activate;  // relu
    T* out;
    int64_t out_stride;
  };

  // out[m] = frame's rows[m] + sum over factors of rows[m] @ block, for `height` rows and a vector
  // for each of `width` frames; the block of the second lies second[f] behind the first's.
  // Rows are `pitch` apart.
  template <int height, int width, bool streams, int pitch>
  static WEIGHTOPS_INLINE void multiply(const Factor* factors, int64_t count, const int64_t* second,
                                        int64_t row, int64_t ld, const Frame* frames) {
    Vector sum[height][width];
#pragma GCC unroll 2
    for (int v = 0; v < width; ++v) {
      const Frame& frame = frames[v];
      const T* from = frame.rows + row * frame.rows_stride;
      if (frame.scale == 0) {
#pragma GCC unroll 32
        for (int m = 0; m < height; ++m) sum[m][v] = frame.common;
        continue;
      }
#pragma GCC unroll 32
      for (int m = 0; m < height; ++m, from += frame.rows_stride)
        sum[m][v] = load(from) * frame.scale + frame.common;
    }
    for (int64_t f = 0; f < count; ++f) {
      const T* rows = factors[f].rows + row * pitch;
      const T* block = factors[f].block;
      const int64_t other = width == 2 ? second[f] : 0;
      const int64_t ahead_stride = factors[f].ahead_stride;
      const T* ahead = factors[f].ahead + row * ahead_stride;
      for (const T* end = rows + factors[f].channels; rows != end; ++rows, block += ld) {
#pragma GCC unroll 2
        for (int p = 0; p < (height > depth ? 2 : 1); ++p, ahead += ahead_stride)
          __builtin_prefetch(ahead);
        Vector b[width];
        b[0] = load(block);
        if constexpr (width == 2) b[1] = load(block + other);
#pragma GCC unroll 32
        for (int m = 0; m < height; ++m) {
          const T a = rows[m * pitch];
#pragma GCC unroll 2
          for (int v = 0; v < width; ++v) sum[m][v] += b[v] * a;
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < width; ++v) {
      T* to = frames[v].out + row * frames[v].out_stride;
      if (frames[v].activate)
#pragma GCC unroll 32
        for (int m = 0; m < height; ++m) sum[m][v] = relu(sum[m][v]);
#pragma GCC unroll 32
      for (int m = 0; m < height; ++m, to += frames[v].out_stride)
        if constexpr (streams)
          stream(to, sum[m][v]);
        else
          store(to, sum[m][v]);
    }
  }

  // Rows are covered by blocks of decreasing height; where it saves work the last one overlaps the
  // one before, and writes the same again.
  template <int width, bool streams, int pitch = depth>
  static WEIGHTOPS_INLINE void multiply_rows(int64_t rows, const Factor* factors, int64_t count,
                                             const int64_t* second, int64_t ld,
                                             const Frame* frames) {
    constexpr int tall = (Bytes == 64 ? 24 : 12) / width, half = tall / 2;
    int64_t row = 0;
    const auto step = [&](auto height) __attribute__((always_inline)) {
      constexpr int h = decltype(height)::value;
      const int64_t at = std::min(row, rows - h);
      multiply<h, width, streams, pitch>(factors, count, second, at, ld, frames);
      row = at + h;
    };
    while (row < rows) {
      const int64_t left = rows - row;
      if (left > half && rows >= tall)
        step(std::integral_constant<int, tall>());
      else if (left > 2 && rows >= half)
        step(std::integral_constant<int, half>());
      else if (left >= 2)
        step(std::integral_constant<int, 2>());
      else
        step(std::integral_constant<int, 1>());
    }
  }

  // right[v].to[i] += sum over rows m of left[m][i] * right[v].rows[m], i < height.
  template <int height, int width>
  static WEIGHTOPS_INLINE void accumulate_outer(const T* left, const Right* right, int64_t rows,
                                                int64_t offset, int64_t ld) {
    Vector sum[height][width];
#pragma GCC unroll 2
    for (int v = 0; v < width; ++v)
#pragma GCC unroll 32
      for (int i = 0; i < height; ++i) sum[i][v] = load(right[v].to + offset + i * ld);
    for (int64_t m = 0; m < rows; ++m) {
      Vector b[width];
#pragma GCC unroll 2
      for (int v = 0; v < width; ++v) b[v] = load(right[v].rows + m * depth);
#pragma GCC unroll 32
      for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < width; ++v) sum[i][v] += b[v] * left[m * depth + i];
    }
#pragma GCC unroll 2
    for (int v = 0; v < width; ++v)
#pragma GCC unroll 32
      for (int i = 0; i < height; ++i) store(right[v].to + offset + i * ld, sum[i][v]);
  }

  // The same for all of up to `depth` channels of left.
  template <int width>
  static WEIGHTOPS_INLINE void outer(const T* left, int64_t channels, const Right* right,
                                     int64_t rows, int64_t ld) {
    constexpr int tall = (Bytes == 64 ? 16 : 8) / width;
    int64_t i = 0;
    for (; i + tall <= channels; i += tall)
      accumulate_outer<tall, width>(left + i, right, rows, i * ld, ld);
    for (; i + 2 <= channels; i += 2) accumulate_outer<2, width>(left + i, right, rows, i * ld, ld);
    if (i < channels) accumulate_outer<1, width>(left + i, right, rows, i * ld, ld);
  }
};

}  // namespace weightops::equivariant
