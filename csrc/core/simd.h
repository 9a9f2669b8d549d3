// Vectors of one width: one source for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#define WEIGHTOPS_INLINE inline __attribute__((always_inline))

// How a vector goes by value depends on the instruction set, but here nothing is called.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace weightops {

// `Bytes` is the width of a vector. All is always_inline, to be compiled anew into each of the
// functions that name an instruction set.
template <class T, int Bytes>
struct Simd {
  typedef T Number;
  typedef T Vector __attribute__((vector_size(Bytes)));
  static constexpr int bytes = Bytes;
  static constexpr int lanes = Bytes / sizeof(T);

  static WEIGHTOPS_INLINE Vector load(const T* from) {
    Vector value;
    std::memcpy(&value, from, Bytes);
    return value;
  }
  static WEIGHTOPS_INLINE void store(T* to, const Vector& value) { std::memcpy(to, &value, Bytes); }
  // Past the cache; `to` lies on a multiple of Bytes.
  static WEIGHTOPS_INLINE void stream(T* to, const Vector& value) {
#if WEIGHTOPS_X86
    if constexpr (Bytes == 64) {
      asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vector*>(to)) : "v"(value));
      return;
    }
    if constexpr (Bytes == 32) {
      asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vector*>(to)) : "x"(value));
      return;
    }
#endif
    store(to, value);
  }
  static WEIGHTOPS_INLINE T total(const Vector& value) {
    T sum = 0;
    for (int k = 0; k < lanes; ++k) sum += value[k];
    return sum;
  }

  // rows[i][j] becomes rows[j][i].
  static WEIGHTOPS_INLINE void transpose(Vector* rows) { exchange<1>(rows); }

 private:
  typedef decltype(Vector{} < Vector{}) Mask;

  template <int width>
  static WEIGHTOPS_INLINE void exchange(Vector* rows) {
    if constexpr (width < lanes) {
      Mask left, right;
      for (int k = 0; k < lanes; ++k) {
        left[k] = k & width ? lanes + k - width : k;
        right[k] = k & width ? lanes + k : k + width;
      }
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r)
        if (!(r & width)) {
          const Vector a = rows[r], b = rows[r + width];
          rows[r] = __builtin_shuffle(a, b, left);
          rows[r + width] = __builtin_shuffle(a, b, right);
        }
      exchange<2 * width>(rows);
    }
  }
};

// Calls f compiled for the instruction set of vectors of so many bytes: f is a lambda that is
// always_inline, as is all that it calls there.
template <class F>
void enter_generic(const F& f) {
  f();
}
#if WEIGHTOPS_X86
template <class F>
WEIGHTOPS_AVX2 void enter_avx2(const F& f) {
  f();
}
template <class F>
WEIGHTOPS_AVX512 void enter_avx512(const F& f) {
  f();
}
#endif
template <int Bytes, class F>
void enter(const F& f) {
#if WEIGHTOPS_X86
  if constexpr (Bytes == 64) return enter_avx512(f);
  if constexpr (Bytes == 32) return enter_avx2(f);
#endif
  enter_generic(f);
}

// f(arithmetic) with the widest vectors that the machine has.
template <class Number, class F>
void with_arithmetic(F&& f) {
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return f(Simd<Number, 64>{});
  if (isa() == Isa::avx2) return f(Simd<Number, 32>{});
#endif
  f(Simd<Number, 16>{});
}

}  // namespace weightops
