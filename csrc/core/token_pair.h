// Rows of tables read at pairs of tokens, and rows summed into tables, token by token.
#pragma once

#include <algorithm>

#include "simd.h"

namespace weightops::token_pair {

// Of each network: tables [2, tokens, width], one row of `width` for each of its pairs [count, 2].
// A network's pairs lie `stride` behind those of the one before: 0 where all have the same.
struct Shape {
  int64_t tokens, width, count, stride;
};

// As many rows fill whole cache lines, whatever their width.
constexpr int64_t kRows = 16;

namespace detail {

constexpr int64_t kStageBytes = 1 << 14;

// f(arithmetic, i) for [begin, end) by vectors, as wide ones as there is room for.
template <class Arithmetic, class F>
WEIGHTOPS_INLINE void by_vectors(int64_t begin, int64_t end, const F& f) {
  using Number = typename Arithmetic::Number;
  for (; begin + Arithmetic::lanes <= end; begin += Arithmetic::lanes) f(Arithmetic(), begin);
  if constexpr (Arithmetic::lanes > 1)
    by_vectors<Simd<Number, (Arithmetic::bytes > 16 ? 16 : int(sizeof(Number)))>>(begin, end, f);
}

}  // namespace detail

// Rows [begin, end) of all networks' pairs: the first token's row of the first table and the
// second's of the second. With `stream` they gather in the first-level cache and leave it in whole
// lines, `to` lying on one; `begin` is a multiple of kRows then.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void add(const Shape& shape, const Number* tables, const int64_t* pairs, int64_t begin, int64_t end,
         Number* to, bool stream) {
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    const int64_t width = shape.width, bytes = width * int64_t(sizeof(Number));
    alignas(64) char stage[detail::kStageBytes];
    const bool fits = kRows * bytes <= detail::kStageBytes;
    const int64_t most = stream && fits ? detail::kStageBytes / bytes / kRows * kRows : end - begin;
    while (begin < end) {
      const int64_t rows = std::min(most, end - begin);
      const bool staged = stream && fits && rows % kRows == 0;
      Number* row = staged ? reinterpret_cast<Number*>(stage) : to + begin * width;
      for (int64_t r = begin; r < begin + rows; ++r, row += width) {
        const int64_t network = r / shape.count;
        const int64_t* pair = pairs + network * shape.stride + 2 * (r % shape.count);
        const Number* first = tables + (2 * network * shape.tokens + pair[0]) * width;
        const Number* second = tables + ((2 * network + 1) * shape.tokens + pair[1]) * width;
        detail::by_vectors<Arithmetic>(
            0, width, [&](auto vectors, int64_t i) __attribute__((always_inline)) {
              using Vectors = decltype(vectors);
              Vectors::store(row + i, Vectors::load(first + i) + Vectors::load(second + i));
            });
      }
      if (staged)
        for (int64_t at = 0; at < rows * width; at += Arithmetic::lanes)
          Arithmetic::stream(to + begin * width + at,
                             Arithmetic::load(reinterpret_cast<const Number*>(stage) + at));
      begin += rows;
    }
    if (stream) stream_fence();
  });
}

// The transpose: columns [begin, end) of one network's tables, each the sum of the rows of the
// pairs that have its token, in their order. `pairs`, `values` and `tables` are the network's.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void sum(const Shape& shape, const Number* values, const int64_t* pairs, int64_t begin, int64_t end,
         Number* tables) {
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    const int64_t width = shape.width;
    for (int64_t row = 0; row < 2 * shape.tokens; ++row)
      std::fill(tables + row * width + begin, tables + row * width + end, Number(0));
    for (int64_t r = 0; r < shape.count; ++r) {
      const Number* value = values + r * width;
      Number* first = tables + pairs[2 * r] * width;
      Number* second = tables + (shape.tokens + pairs[2 * r + 1]) * width;
      detail::by_vectors<Arithmetic>(begin, end,
                                     [&](auto vectors, int64_t i) __attribute__((always_inline)) {
                                       using Vectors = decltype(vectors);
                                       const auto more = Vectors::load(value + i);
                                       Vectors::store(first + i, Vectors::load(first + i) + more);
                                       Vectors::store(second + i, Vectors::load(second + i) + more);
                                     });
    }
  });
}

}  // namespace weightops::token_pair
