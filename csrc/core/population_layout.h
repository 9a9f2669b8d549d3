// Samples as rows, as a caller has them, and as columns, in which vectors run over images.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "simd.h"

namespace weightops::population {

// Room that each thread has once.
template <class T, int which>
T* room_of(int64_t count) {
  static thread_local Buffer<T> own;
  return own.get(count);
}

// Where the next one's numbers begin: on a cache line.
template <class Number>
int64_t line_up(int64_t numbers) {
  constexpr int64_t line = 64 / sizeof(Number);
  return (numbers + line - 1) / line * line;
}

// rows[image * size + i] -> columns[i * width + image]; images that are not there repeat the last.
template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void lay_out(const Number* rows, int64_t images, int64_t size, int64_t width,
                              Number* columns) {
  constexpr int lanes = Arithmetic::lanes;
  for (int64_t image = 0; image < width; image += lanes) {
    const Number* from[lanes];
    for (int64_t k = 0; k < lanes; ++k) from[k] = rows + std::min(image + k, images - 1) * size;
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
      typename Arithmetic::Vector square[lanes];
      for (int k = 0; k < lanes; ++k) square[k] = Arithmetic::load(from[k] + i);
      Arithmetic::transpose(square);
      for (int k = 0; k < lanes; ++k)
        Arithmetic::store(columns + (i + k) * width + image, square[k]);
    }
    for (; i < size; ++i)
      for (int64_t k = 0; k < lanes; ++k) columns[i * width + image + k] = from[k][i];
  }
}

// columns[k * width + image] -> rows[image * size + k].
template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void write_rows(const Number* columns, int64_t images, int64_t size, int64_t width,
                                 Number* rows) {
  constexpr int lanes = Arithmetic::lanes;
  for (int64_t image = 0; image < images; image += lanes) {
    const int64_t height = std::min<int64_t>(lanes, images - image);
    for (int64_t k = 0; k < size; k += lanes) {
      const int64_t count = std::min<int64_t>(lanes, size - k);
      typename Arithmetic::Vector square[lanes];
      for (int i = 0; i < lanes; ++i)
        square[i] =
            Arithmetic::load(columns + (k + std::min<int64_t>(i, count - 1)) * width + image);
      Arithmetic::transpose(square);
      for (int64_t i = 0; i < height; ++i) {
        Number* row = rows + (image + i) * size + k;
        // What is written too much belongs to the next row, and is overwritten by that.
        const bool fits =
            count == lanes || (size < lanes && (image + i) * size + lanes <= images * size);
        if (fits) {
          Arithmetic::store(row, square[i]);
        } else {
          Number tile[lanes];
          Arithmetic::store(tile, square[i]);
          std::copy_n(tile, count, row);
        }
      }
    }
  }
}

}  // namespace weightops::population
