// The norms of the rows of a transform: a product whose rows are squared and summed as they come,
// and are never written.
#pragma once

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "simd.h"

namespace weightops::fourier {

// matrix [2, frequencies, tokens], real and imaginary parts; embeddings [tokens, size].
struct Shape {
  int64_t frequencies, tokens, size;
};

template <class Arithmetic>
class Signal {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  // Frequencies of a tile; both parts of each, times two vectors, are its sums.
  static constexpr int kHeight = Arithmetic::bytes == 64 ? 6 : 3;
  static constexpr int kRows = 2 * kHeight;
  static constexpr int kWidth = 2 * Arithmetic::lanes;
  // Embeddings of more bytes are not read in place: their columns lie on too many pages.
  static constexpr int64_t kCacheBytes = 1 << 15;

 public:
  Signal(const Shape& shape, const Number* matrix)
      : shape_(shape), tiles_((shape.frequencies + kHeight - 1) / kHeight) {
    Number* to = room_.get(tiles_ * shape.tokens * kRows);
    factors_ = to;
    for (int64_t tile = 0; tile < tiles_; ++tile)
      for (int64_t token = 0; token < shape.tokens; ++token)
        for (int row = 0; row < kRows; ++row) {
          const int64_t k = tile * kHeight + row % kHeight;
          const int64_t at = row / kHeight * shape.frequencies + k;
          *to++ = k < shape.frequencies ? matrix[at * shape.tokens + token] : Number(0);
        }
  }

  int64_t tiles() const { return tiles_; }

  struct Workspace {
    Buffer<Number> columns;
    Buffer<Vector> squares;
  };

  // Signals of the frequencies of tiles [begin, end), to their places in `to` [frequencies].
  void operator()(const Number* embedding, int64_t begin, int64_t end, Number* to,
                  Workspace& workspace) const {
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      Vector* const squares = workspace.squares.get((end - begin) * kHeight);
      std::fill_n(squares, (end - begin) * kHeight, Vector{});
      const bool in_place = shape_.tokens * shape_.size * int64_t(sizeof(Number)) <= kCacheBytes;
      for (int64_t column = 0; column < shape_.size; column += kWidth) {
        const int64_t width = std::min<int64_t>(kWidth, shape_.size - column);
        const Number* columns = embedding + column;
        int64_t stride = shape_.size;
        if (!in_place || width < kWidth) {
          columns = copy(columns, width, workspace.columns.get(shape_.tokens * kWidth));
          stride = kWidth;
        }
        for (int64_t tile = begin; tile < end; ++tile)
          add(tile, columns, stride, squares + (tile - begin) * kHeight);
      }
      const int64_t first = begin * kHeight;
      for (int64_t k = first; k < std::min(end * kHeight, shape_.frequencies); ++k)
        to[k] = std::sqrt(Arithmetic::total(squares[k - first]));
    });
  }

 private:
  // Some columns of an embedding side by side, and zeros behind them.
  WEIGHTOPS_INLINE const Number* copy(const Number* from, int64_t width, Number* to) const {
    for (int64_t token = 0; token < shape_.tokens; ++token, from += shape_.size)
      std::fill(std::copy_n(from, width, to + token * kWidth), to + (token + 1) * kWidth,
                Number(0));
    return to;
  }

  WEIGHTOPS_INLINE void add(int64_t tile, const Number* columns, int64_t stride,
                            Vector* squares) const {
    const Number* factors = factors_ + tile * shape_.tokens * kRows;
    Vector sums[kRows][2] = {};
    for (int64_t token = 0; token < shape_.tokens; ++token, factors += kRows, columns += stride) {
      const Vector low = Arithmetic::load(columns);
      const Vector high = Arithmetic::load(columns + Arithmetic::lanes);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
        sums[row][0] += low * factors[row];
        sums[row][1] += high * factors[row];
      }
    }
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row)
      squares[row % kHeight] += sums[row][0] * sums[row][0] + sums[row][1] * sums[row][1];
  }

  Shape shape_;
  int64_t tiles_;
  Buffer<Number> room_;
  const Number* factors_;
};

}  // namespace weightops::fourier
