// Sums of products in register tiles: gradients of linear layers and convolutions are made of them.
#pragma once

#include "population_layers.h"

namespace weightops::population {

// to[m][n] (+)= sum over s and k of a[m * row + s * left[0] + k * left[1]] * b[n * column + s *
// right[0] + k * right[1]], b and to in whole vectors.
template <class Number>
struct Product {
  const Number *a, *b;
  Number* to;
  int64_t row, left[2];
  int64_t column, right[2];
  int64_t depth[2];
  int64_t to_row, to_column;
  bool adds;
};

template <class Arithmetic, int rows, int columns>
WEIGHTOPS_INLINE void multiply_tile(const Product<typename Arithmetic::Number>& product) {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  Vector sum[rows][columns];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n)
      sum[m][n] = product.adds
                      ? Arithmetic::load(product.to + m * product.to_row + n * product.to_column)
                      : Vector{};
  const Number *outer_a = product.a, *outer_b = product.b;
  for (int64_t s = 0; s < product.depth[0]; ++s) {
    const Number *a = outer_a, *b = outer_b;
    for (int64_t k = 0; k < product.depth[1]; ++k) {
      Vector taken[columns];
#pragma GCC unroll 8
      for (int n = 0; n < columns; ++n) taken[n] = Arithmetic::load(b + n * product.column);
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) {
        const Vector factor = elementary::spread<Arithmetic>(a + m * product.row);
#pragma GCC unroll 8
        for (int n = 0; n < columns; ++n) sum[m][n] += taken[n] * factor;
      }
      a += product.left[1];
      b += product.right[1];
    }
    outer_a += product.left[0];
    outer_b += product.right[0];
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n)
      Arithmetic::store(product.to + m * product.to_row + n * product.to_column, sum[m][n]);
}

// sum over pixels of left[m] * right[n], each lane's own: gradients of a convolution's weights at
// one tap.
template <class Number>
struct Correlation {
  const Number *left, *right;
  Number* to;
  int64_t left_channel, left_row, left_pixel;
  int64_t right_channel, right_row, right_pixel;
  int64_t height, width;
  int64_t to_left, to_right;
};

template <class Arithmetic, int lefts, int rights>
WEIGHTOPS_INLINE void correlate_tile(const Correlation<typename Arithmetic::Number>& c) {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  Vector sum[lefts][rights];
#pragma GCC unroll 8
  for (int m = 0; m < lefts; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < rights; ++n)
      sum[m][n] = Arithmetic::load(c.to + m * c.to_left + n * c.to_right);
  for (int64_t y = 0; y < c.height; ++y) {
    const Number *left = c.left + y * c.left_row, *right = c.right + y * c.right_row;
    for (int64_t x = 0; x < c.width; ++x) {
      Vector taken[rights];
#pragma GCC unroll 8
      for (int n = 0; n < rights; ++n) taken[n] = Arithmetic::load(right + n * c.right_channel);
#pragma GCC unroll 8
      for (int m = 0; m < lefts; ++m) {
        const Vector factor = Arithmetic::load(left + m * c.left_channel);
#pragma GCC unroll 8
        for (int n = 0; n < rights; ++n) sum[m][n] += taken[n] * factor;
      }
      left += c.left_pixel;
      right += c.right_pixel;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < lefts; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < rights; ++n)
      Arithmetic::store(c.to + m * c.to_left + n * c.to_right, sum[m][n]);
}

struct MultiplyTile {
  template <class Arithmetic, int rows, int columns>
  static void run(const Product<typename Arithmetic::Number>& product) {
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      multiply_tile<Arithmetic, rows, columns>(product);
    });
  }
};

struct CorrelateTile {
  template <class Arithmetic, int lefts, int rights>
  static void run(const Correlation<typename Arithmetic::Number>& correlation) {
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      correlate_tile<Arithmetic, lefts, rights>(correlation);
    });
  }
};

// The kernel of a tile of `tall` times `wide`.
template <class Kernel, class Arithmetic, class Job, int rows = 1, int columns = 1>
auto tile_kernel(int64_t tall, int64_t wide) -> void (*)(const Job&) {
  using Limits = Tile<Arithmetic::bytes>;
  if constexpr (rows < Limits::outputs)
    if (tall > rows) return tile_kernel<Kernel, Arithmetic, Job, rows + 1, columns>(tall, wide);
  if constexpr (columns < Limits::columns(rows))
    if (wide > columns) return tile_kernel<Kernel, Arithmetic, Job, rows, columns + 1>(tall, wide);
  return Kernel::template run<Arithmetic, rows, columns>;
}

// Calls f(kernel, row, column) for tiles that cover rows times columns.
template <class Kernel, class Arithmetic, class Job, class F>
void cover(int64_t rows, int64_t columns, F&& f) {
  using Limits = Tile<Arithmetic::bytes>;
  const Parts heights(rows, Limits::outputs);
  const Parts widths(columns, Limits::columns(int(heights.length(0))));
  for (int64_t j = 0; j < widths.count; ++j)
    for (int64_t i = 0; i < heights.count; ++i)
      f(tile_kernel<Kernel, Arithmetic, Job>(heights.length(i), widths.length(j)), heights.begin(i),
        widths.begin(j));
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
void multiply(const Product<Number>& product, int64_t rows, int64_t columns) {
  if (columns == 0 || rows == 0) return;
  cover<MultiplyTile, Arithmetic, Product<Number>>(
      rows, columns, [&](auto kernel, int64_t m, int64_t n) {
        Product<Number> tile = product;
        tile.a += m * product.row;
        tile.b += n * product.column;
        tile.to += m * product.to_row + n * product.to_column;
        kernel(tile);
      });
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
void correlate(const Correlation<Number>& correlation, int64_t lefts, int64_t rights) {
  cover<CorrelateTile, Arithmetic, Correlation<Number>>(
      lefts, rights, [&](auto kernel, int64_t m, int64_t n) {
        Correlation<Number> tile = correlation;
        tile.left += m * correlation.left_channel;
        tile.right += n * correlation.right_channel;
        tile.to += m * correlation.to_left + n * correlation.to_right;
        kernel(tile);
      });
}

}  // namespace weightops::population
