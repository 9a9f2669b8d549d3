// left^T * right of two narrow matrices [depth, n], without packing: their rows, wherever they lie,
// are read as they are.
#pragma once

#include <algorithm>

#include "simd.h"

namespace weightops::gram {

// Numbers behind the last row that may be read, and come to nothing.
constexpr int64_t kMargin = 64;

// to[i][j] = sum over k of left[rows[k]][i] * right[others[k]][j]; null stands for 0, 1, 2 ...
template <class T>
struct Problem {
  const T *left, *right;
  const int64_t *rows, *others;
  int64_t depth, n;
  T* to;
};

template <class T, int Bytes>
WEIGHTOPS_INLINE void compute(const Problem<T>& problem) {
  using Arithmetic = Simd<T, Bytes>;
  constexpr int lanes = Arithmetic::lanes, width = 2 * lanes, height = Bytes == 64 ? 12 : 4;
  const int64_t n = problem.n;
  for (int64_t i = 0; i < n; i += height)
    for (int64_t j = 0; j < n; j += width) {
      typename Arithmetic::Vector sum[height][2] = {};
      for (int64_t k = 0; k < problem.depth; ++k) {
        const T* a = problem.left + (problem.rows ? problem.rows[k] : k) * n + i;
        const T* b = problem.right + (problem.others ? problem.others[k] : k) * n + j;
        const auto low = Arithmetic::load(b), high = Arithmetic::load(b + lanes);
#pragma GCC unroll 12
        for (int m = 0; m < height; ++m) {
          sum[m][0] += low * a[m];
          sum[m][1] += high * a[m];
        }
      }
      T tile[width];
      for (int m = 0; m < height && i + m < n; ++m) {
        Arithmetic::store(tile, sum[m][0]);
        Arithmetic::store(tile + lanes, sum[m][1]);
        std::copy_n(tile, std::min<int64_t>(width, n - j), problem.to + (i + m) * n + j);
      }
    }
}

#if WEIGHTOPS_X86
template <class T>
WEIGHTOPS_AVX512 void compute_avx512(const Problem<T>& problem) {
  compute<T, 64>(problem);
}
template <class T>
WEIGHTOPS_AVX2 void compute_avx2(const Problem<T>& problem) {
  compute<T, 32>(problem);
}
#endif

template <class T>
void run(const Problem<T>& problem) {
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return compute_avx512(problem);
  if (isa() == Isa::avx2) return compute_avx2(problem);
#endif
  compute<T, 16>(problem);
}

}  // namespace weightops::gram
