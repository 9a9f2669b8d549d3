// Vectors of floats and of doubles, the same source for every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "isa.h"

#define WEIGHTOPS_INLINE inline __attribute__((always_inline))

namespace weightops::assign::internal {

template <typename Element, int lanes>
struct Vectors;

template <int lanes>
struct Vectors<float, lanes> {
  typedef float Values __attribute__((vector_size(4 * lanes)));
  typedef int32_t Integers __attribute__((vector_size(4 * lanes)));
};

template <int lanes>
struct Vectors<double, lanes> {
  typedef double Values __attribute__((vector_size(8 * lanes)));
  typedef int64_t Integers __attribute__((vector_size(8 * lanes)));
};

// A float that is no less than the double, and not -infinity, which padding is; a double stays.
template <typename T>
WEIGHTOPS_INLINE T rounded_up(double value) {
  if constexpr (sizeof(T) == 8) return value;
  return static_cast<T>(std::max<double>(value + (std::abs(value) * 0x1p-22 + 0x1p-126),
                                         -std::numeric_limits<T>::max()));
}

template <typename T>
WEIGHTOPS_INLINE T rounded_down(double value) {
  return -rounded_up<T>(-value);
}

// All of this is always_inline, to be compiled anew into each of the functions that name an
// instruction set; vectors go by reference, for how they go by value depends on the set.
template <typename Element, int lanes>
struct Arithmetic {
  using Values = typename Vectors<Element, lanes>::Values;
  using Integers = typename Vectors<Element, lanes>::Integers;
  using Integer = std::conditional_t<sizeof(Element) == 8, int64_t, int32_t>;
  using Lanes = std::make_integer_sequence<int, lanes>;

  template <typename From>
  static WEIGHTOPS_INLINE void load(const From* from, Values& to) {
    if constexpr (sizeof(From) == sizeof(Element)) {
      std::memcpy(&to, from, sizeof to);
    } else {
      typedef float Floats __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
      const Floats& floats = *reinterpret_cast<const Floats*>(from);
#if WEIGHTOPS_X86  // GCC 12 makes five instructions of this conversion.
      if constexpr (lanes > 2) asm("vcvtps2pd %1, %0" : "=v"(to) : "m"(floats));
      if constexpr (lanes > 2) return;
#endif
      to = __builtin_convertvector(floats, Values);
    }
  }

  static WEIGHTOPS_INLINE void store(const Values& from, Element* to) {
    std::memcpy(to, &from, sizeof from);
  }

  static WEIGHTOPS_INLINE void lower(Values& to, const Values& by) { to = by < to ? by : to; }

  // Bits of the lanes in which the comparison holds; GCC would take them out one by one.
  template <int predicate>  // 0: ==, 1: <
  static WEIGHTOPS_INLINE unsigned compare(const Values& a, const Values& b) {
    constexpr int bytes = sizeof(Values);
    unsigned bits = 0;
    if constexpr (bytes == 16) {
      for (int k = 0; k < lanes; ++k) bits |= (predicate == 0 ? a[k] == b[k] : a[k] < b[k]) << k;
    }
#if WEIGHTOPS_X86
    if constexpr (bytes == 32 && lanes == 4) {
      Values holds;
      asm("vcmppd %3, %2, %1, %0" : "=x"(holds) : "x"(a), "x"(b), "i"(predicate));
      asm("vmovmskpd %1, %0" : "=r"(bits) : "x"(holds));
    }
    if constexpr (bytes == 32 && lanes == 8) {
      Values holds;
      asm("vcmpps %3, %2, %1, %0" : "=x"(holds) : "x"(a), "x"(b), "i"(predicate));
      asm("vmovmskps %1, %0" : "=r"(bits) : "x"(holds));
    }
    if constexpr (bytes == 64 && lanes == 8) {
      unsigned char holds;
      asm("vcmppd %3, %2, %1, %0" : "=k"(holds) : "v"(a), "v"(b), "i"(predicate));
      bits = holds;
    }
    if constexpr (bytes == 64 && lanes == 16) {
      unsigned short holds;
      asm("vcmpps %3, %2, %1, %0" : "=k"(holds) : "v"(a), "v"(b), "i"(predicate));
      bits = holds;
    }
#endif
    return bits;
  }

  static WEIGHTOPS_INLINE unsigned equal(const Values& a, const Values& b) {
    return compare<0>(a, b);
  }

  static WEIGHTOPS_INLINE unsigned less(const Values& a, const Values& b) {
    return compare<1>(a, b);
  }

  // Lane i of the result is lane i + distance of the vector, going round.
  template <int distance, int... lane>
  static WEIGHTOPS_INLINE void rotate(const Values& from, Values& to,
                                      std::integer_sequence<int, lane...>) {
    to = __builtin_shufflevector(from, from, ((lane + distance) % lanes)...);
  }

  template <int half = lanes / 2>
  static WEIGHTOPS_INLINE void lower_all(Values& minima) {
    if constexpr (half > 0) {
      Values other;
      rotate<half>(minima, other, Lanes());
      lower(minima, other);
      lower_all<half / 2>(minima);
    }
  }

  template <int half = lanes / 2>
  static WEIGHTOPS_INLINE void lower_all_two(Values& best, Values& next) {
    if constexpr (half > 0) {
      Values other, other_next;
      rotate<half>(best, other, Lanes());
      rotate<half>(next, other_next, Lanes());
      lower(next, other_next);
      lower(next, other > best ? other : best);
      lower(best, other);
      lower_all_two<half / 2>(best, next);
    }
  }

  // a and b hold `width` interleaved groups each; the result holds the groups of both.
  template <int width, int... lane>
  static WEIGHTOPS_INLINE void join(const Values& a, const Values& b, Values& joined,
                                    std::integer_sequence<int, lane...>) {
    const Values one = __builtin_shufflevector(
        a, b, (lane / (2 * width) * 2 * width + lane % width + (lane / width % 2 ? lanes : 0))...);
    const Values other = __builtin_shufflevector(a, b,
                                                 (lane / (2 * width) * 2 * width + lane % width +
                                                  width + (lane / width % 2 ? lanes : 0))...);
    joined = other < one ? other : one;
  }

  // Lane i of the result is the least lane of minima[i].
  template <int width = 1>
  static WEIGHTOPS_INLINE void lower_each(Values* minima) {
    if constexpr (width < lanes) {
      for (int k = 0; k < lanes / width; k += 2)
        join<width>(minima[k], minima[k + 1], minima[k / 2], Lanes());
      lower_each<2 * width>(minima);
    }
  }
};

}  // namespace weightops::assign::internal
