// Vectors of doubles, the same source for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "isa.h"

#define WEIGHTOPS_INLINE inline __attribute__((always_inline))

namespace weightops::assign::internal {

template <int lanes>
struct Vectors {
  typedef double Doubles __attribute__((vector_size(8 * lanes)));
  typedef float Floats __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
  typedef int64_t Integers __attribute__((vector_size(8 * lanes)));
};

// All of this is always_inline, to be compiled anew into each of the functions that name an
// instruction set; vectors go by reference, for how they go by value depends on the set.
template <int lanes>
struct Arithmetic {
  using Doubles = typename Vectors<lanes>::Doubles;
  using Floats = typename Vectors<lanes>::Floats;
  using Integers = typename Vectors<lanes>::Integers;
  using Lanes = std::make_integer_sequence<int, lanes>;

  template <typename From>
  static WEIGHTOPS_INLINE void load(const From* from, Doubles& to) {
    if constexpr (sizeof(From) == sizeof(double)) {
      std::memcpy(&to, from, sizeof to);
    } else {
      const Floats& floats = *reinterpret_cast<const Floats*>(from);
#if WEIGHTOPS_X86  // GCC 12 makes five instructions of this conversion.
      if constexpr (lanes > 2) asm("vcvtps2pd %1, %0" : "=v"(to) : "m"(floats));
      if constexpr (lanes > 2) return;
#endif
      to = __builtin_convertvector(floats, Doubles);
    }
  }

  static WEIGHTOPS_INLINE void store(const Doubles& from, double* to) {
    std::memcpy(to, &from, sizeof from);
  }

  static WEIGHTOPS_INLINE void lower(Doubles& to, const Doubles& by) { to = by < to ? by : to; }

  // Bits of the lanes in which the comparison holds; GCC would take them out one by one.
  template <int predicate>  // 0: ==, 1: <
  static WEIGHTOPS_INLINE unsigned compare(const Doubles& a, const Doubles& b) {
    unsigned bits = 0;
    if constexpr (lanes == 2) {
      for (int k = 0; k < lanes; ++k) bits |= (predicate == 0 ? a[k] == b[k] : a[k] < b[k]) << k;
    }
#if WEIGHTOPS_X86
    if constexpr (lanes == 4) {
      Doubles holds;
      asm("vcmppd %3, %2, %1, %0" : "=x"(holds) : "x"(a), "x"(b), "i"(predicate));
      asm("vmovmskpd %1, %0" : "=r"(bits) : "x"(holds));
    }
    if constexpr (lanes == 8) {
      unsigned char holds;
      asm("vcmppd %3, %2, %1, %0" : "=k"(holds) : "v"(a), "v"(b), "i"(predicate));
      bits = holds;
    }
#endif
    return bits;
  }

  static WEIGHTOPS_INLINE unsigned equal(const Doubles& a, const Doubles& b) {
    return compare<0>(a, b);
  }

  static WEIGHTOPS_INLINE unsigned less(const Doubles& a, const Doubles& b) {
    return compare<1>(a, b);
  }

  // Lane i of the result is lane i + distance of the vector, going round.
  template <int distance, int... lane>
  static WEIGHTOPS_INLINE void rotate(const Doubles& from, Doubles& to,
                                      std::integer_sequence<int, lane...>) {
    to = __builtin_shufflevector(from, from, ((lane + distance) % lanes)...);
  }

  template <int half = lanes / 2>
  static WEIGHTOPS_INLINE void lower_all(Doubles& minima) {
    if constexpr (half > 0) {
      Doubles other;
      rotate<half>(minima, other, Lanes());
      lower(minima, other);
      lower_all<half / 2>(minima);
    }
  }

  template <int half = lanes / 2>
  static WEIGHTOPS_INLINE void lower_all_two(Doubles& best, Doubles& next) {
    if constexpr (half > 0) {
      Doubles other, other_next;
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
  static WEIGHTOPS_INLINE void join(const Doubles& a, const Doubles& b, Doubles& joined,
                                    std::integer_sequence<int, lane...>) {
    const Doubles one = __builtin_shufflevector(
        a, b, (lane / (2 * width) * 2 * width + lane % width + (lane / width % 2 ? lanes : 0))...);
    const Doubles other = __builtin_shufflevector(a, b,
                                                  (lane / (2 * width) * 2 * width + lane % width +
                                                   width + (lane / width % 2 ? lanes : 0))...);
    joined = other < one ? other : one;
  }

  // Lane i of the result is the least lane of minima[i].
  template <int width = 1>
  static WEIGHTOPS_INLINE void lower_each(Doubles* minima) {
    if constexpr (width < lanes) {
      for (int k = 0; k < lanes / width; k += 2)
        join<width>(minima[k], minima[k + 1], minima[k / 2], Lanes());
      lower_each<2 * width>(minima);
    }
  }
};

}  // namespace weightops::assign::internal
