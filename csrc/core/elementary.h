// Exponentials of vectors, and the functions of networks that are made of them.
#pragma once

#include <cmath>
#include <type_traits>

#include "simd.h"

namespace weightops::elementary {

template <class Arithmetic>
using Vector = typename Arithmetic::Vector;

template <class Arithmetic>
struct Integers {
  using Number = std::conditional_t<sizeof(typename Arithmetic::Number) == 4, int32_t, int64_t>;
  typedef Number Vector __attribute__((vector_size(Arithmetic::bytes)));
};
template <class Arithmetic>
using BitsOf = typename Integers<Arithmetic>::Vector;

// The number at `from` in every lane, by the load itself: a shuffle would take turns with
// multiply-adds.
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> spread(const typename Arithmetic::Number* from) {
#if WEIGHTOPS_X86
  if constexpr (Arithmetic::bytes > 16) {
    Vector<Arithmetic> value;
    if constexpr (std::is_same_v<typename Arithmetic::Number, float>)
      asm("vbroadcastss %1, %0" : "=v"(value) : "m"(*from));
    else
      asm("vbroadcastsd %1, %0" : "=v"(value) : "m"(*from));
    return value;
  }
#endif
  return Vector<Arithmetic>{} + *from;
}

// a > b ? x : y, lane by lane. GCC 12 takes comparisons of vectors that the file's own instruction
// set lacks to pieces before it inlines them, hence the instructions.
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> where_greater(const Vector<Arithmetic>& a,
                                                  const Vector<Arithmetic>& b,
                                                  const Vector<Arithmetic>& x,
                                                  const Vector<Arithmetic>& y) {
#if WEIGHTOPS_X86
  constexpr bool single = std::is_same_v<typename Arithmetic::Number, float>;
  Vector<Arithmetic> chosen;
  if constexpr (Arithmetic::bytes == 64) {
    if constexpr (single)
      asm("vcmpps $30, %2, %1, %%k1\n\tvblendmps %3, %4, %0%{%%k1%}"
          : "=v"(chosen)
          : "v"(a), "v"(b), "v"(x), "v"(y)
          : "k1");
    else
      asm("vcmppd $30, %2, %1, %%k1\n\tvblendmpd %3, %4, %0%{%%k1%}"
          : "=v"(chosen)
          : "v"(a), "v"(b), "v"(x), "v"(y)
          : "k1");
    return chosen;
  }
  if constexpr (Arithmetic::bytes == 32) {
    if constexpr (single)
      asm("vcmpps $30, %2, %1, %0\n\tvblendvps %0, %3, %4, %0"
          : "=&x"(chosen)
          : "x"(a), "x"(b), "x"(x), "x"(y));
    else
      asm("vcmppd $30, %2, %1, %0\n\tvblendvpd %0, %3, %4, %0"
          : "=&x"(chosen)
          : "x"(a), "x"(b), "x"(x), "x"(y));
    return chosen;
  }
#endif
  return a > b ? x : y;
}

// a > b ? a : b, lane by lane: b where either is NaN.
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> larger(const Vector<Arithmetic>& a,
                                           const Vector<Arithmetic>& b) {
#if WEIGHTOPS_X86
  if constexpr (Arithmetic::bytes > 16) {
    Vector<Arithmetic> most;
    if constexpr (std::is_same_v<typename Arithmetic::Number, float>)
      asm("vmaxps %2, %1, %0" : "=v"(most) : "v"(a), "v"(b));
    else
      asm("vmaxpd %2, %1, %0" : "=v"(most) : "v"(a), "v"(b));
    return most;
  }
#endif
  return a > b ? a : b;
}

// a < b ? a : b, lane by lane: b where either is NaN.
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> smaller(const Vector<Arithmetic>& a,
                                            const Vector<Arithmetic>& b) {
#if WEIGHTOPS_X86
  if constexpr (Arithmetic::bytes > 16) {
    Vector<Arithmetic> least;
    if constexpr (std::is_same_v<typename Arithmetic::Number, float>)
      asm("vminps %2, %1, %0" : "=v"(least) : "v"(a), "v"(b));
    else
      asm("vminpd %2, %1, %0" : "=v"(least) : "v"(a), "v"(b));
    return least;
  }
#endif
  return a < b ? a : b;
}

// The larger one, NaN where either is.
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> larger_or_nan(const Vector<Arithmetic>& a,
                                                  const Vector<Arithmetic>& b) {
  using Bits = BitsOf<Arithmetic>;
  // Where one is NaN the two differ, and its bits are in one of them.
  return (Vector<Arithmetic>)((Bits)larger<Arithmetic>(a, b) | (Bits)larger<Arithmetic>(b, a));
}

// factors[0] x^(count - 1) + ... + factors[count - 1].
template <class Arithmetic, class Factor, int count>
WEIGHTOPS_INLINE Vector<Arithmetic> polynomial(const Vector<Arithmetic>& x,
                                               const Factor (&factors)[count]) {
  Vector<Arithmetic> sum = x * factors[0] + factors[1];
#pragma GCC unroll 32
  for (int i = 2; i < count; ++i) sum = sum * x + factors[i];
  return sum;
}

// e^x within 2 units of the last place; what lies outside of where that is a normal number is taken
// for the nearest that is inside. Cephes' reductions and coefficients.
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> exp(const Vector<Arithmetic>& given) {
  using Number = typename Arithmetic::Number;
  constexpr bool single = std::is_same_v<Number, float>;
  using Bits = BitsOf<Arithmetic>;
  constexpr Number most = single ? 88 : 709, least = single ? -87 : -708;
  // In this order NaN stays.
  Vector<Arithmetic> x = larger<Arithmetic>(least - Vector<Arithmetic>{}, given);
  x = smaller<Arithmetic>(most - Vector<Arithmetic>{}, x);
  // Adding this leaves the nearest integer in the last bits.
  constexpr Number round = single ? Number(3 << 22) : Number(int64_t(3) << 51);
  const Vector<Arithmetic> shifted = x * Number(1.4426950408889634) + round, n = shifted - round;
  const Bits power =
      ((Bits)shifted << (single ? 23 : 52)) + (Bits)(Number(1) - Vector<Arithmetic>{});
  if constexpr (single) {
    x -= n * Number(0.693359375);
    x += n * Number(2.12194440e-4);
    // In pairs, which do not wait for each other.
    const Vector<Arithmetic> square = x * x;
    const Vector<Arithmetic> rest = polynomial<Arithmetic>(
        square, {x * 1.9875691500e-4f + 1.3981999507e-3f, x * 8.3334519073e-3f + 4.1665795894e-2f,
                 x * 1.6666665459e-1f + 5.0000001201e-1f});
    return (rest * square + x + Number(1)) * (Vector<Arithmetic>)power;
  } else {
    x -= n * Number(6.93145751953125e-1);
    x -= n * Number(1.42860682030941723212e-6);
    const Vector<Arithmetic> square = x * x;
    const Vector<Arithmetic> above =
        x * polynomial<Arithmetic>(square, {1.26177193074810590878e-4, 3.02994407707441961300e-2,
                                            9.99999999999999999910e-1});
    const Vector<Arithmetic> below =
        polynomial<Arithmetic>(square, {3.00198505138664455042e-6, 2.52448340349684104192e-3,
                                        2.27265548208155028766e-1, 2.00000000000000000009e0});
    return (above / (below - above) * Number(2) + Number(1)) * (Vector<Arithmetic>)power;
  }
}

// 1 / x of normal numbers within 2 units of the last place.
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> reciprocal(const Vector<Arithmetic>& x) {
  using Number = typename Arithmetic::Number;
#if WEIGHTOPS_X86
  if constexpr (Arithmetic::bytes == 64 && std::is_same_v<Number, float>) {
    // Newton's step on an estimate of 14 bits, for half of a division's time.
    Vector<Arithmetic> near;
    asm("vrcp14ps %1, %0" : "=v"(near) : "v"(x));
    return near + near * (Number(1) - x * near);
  }
#endif
  return Number(1) / x;
}

// 1 / (1 + e^-x)
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> sigmoid(const Vector<Arithmetic>& x) {
  return reciprocal<Arithmetic>(exp<Arithmetic>(-x) + typename Arithmetic::Number(1));
}

template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> tanh(const Vector<Arithmetic>& x) {
  using Number = typename Arithmetic::Number;
  const Vector<Arithmetic> size = larger<Arithmetic>(-x, x), square = x * x;
  const Vector<Arithmetic> large =
      Number(1) - Number(2) / (exp<Arithmetic>(size * Number(2)) + Number(1));
  // Near zero the difference above has few digits.
  const Vector<Arithmetic> above = polynomial<Arithmetic>(
      square, {Number(-9.64399179425052238628e-1), Number(-9.92877231001918586564e1),
               Number(-1.61468768441708447952e3)});
  const Vector<Arithmetic> below = polynomial<Arithmetic>(
      square, {Number(1), Number(1.12811678491632931402e2), Number(2.23548839060100448583e3),
               Number(4.84406305325125486048e3)});
  const Vector<Arithmetic> small = x + x * square * above / below;
  const Vector<Arithmetic> zero = {};
  return where_greater<Arithmetic>(Number(0.625) - zero, size, small,
                                   where_greater<Arithmetic>(zero, x, -large, large));
}

// Whether a lane is greater than that of the limit.
template <class Arithmetic>
WEIGHTOPS_INLINE bool any_greater(const Vector<Arithmetic>& x, const Vector<Arithmetic>& limit) {
#if WEIGHTOPS_X86
  constexpr bool single = std::is_same_v<typename Arithmetic::Number, float>;
  bool found;
  if constexpr (Arithmetic::bytes == 64) {
    if constexpr (single)
      asm("vcmpps $30, %2, %1, %%k1\n\tkortestw %%k1, %%k1"
          : "=@ccnz"(found)
          : "v"(x), "v"(limit)
          : "k1");
    else
      asm("vcmppd $30, %2, %1, %%k1\n\tkortestw %%k1, %%k1"
          : "=@ccnz"(found)
          : "v"(x), "v"(limit)
          : "k1");
    return found;
  }
  if constexpr (Arithmetic::bytes == 32) {
    Vector<Arithmetic> is;
    if constexpr (single)
      asm("vcmpps $30, %3, %2, %1\n\tvtestps %1, %1"
          : "=@ccnz"(found), "=&x"(is)
          : "x"(x), "x"(limit));
    else
      asm("vcmppd $30, %3, %2, %1\n\tvtestpd %1, %1"
          : "=@ccnz"(found), "=&x"(is)
          : "x"(x), "x"(limit));
    return found;
  }
#endif
  for (int k = 0; k < Arithmetic::lanes; ++k)
    if (x[k] > limit[k]) return true;
  return false;
}

template <class Vector>
struct SineCosine {
  Vector sine, cosine;
};

// Quarter turns are taken away in three parts; Cephes' parts and coefficients. Where that would
// lose digits, the library's functions.
template <class Arithmetic>
WEIGHTOPS_INLINE SineCosine<Vector<Arithmetic>> sine_cosine(const Vector<Arithmetic>& x) {
  using Number = typename Arithmetic::Number;
  constexpr bool single = std::is_same_v<Number, float>;
  using Bits = BitsOf<Arithmetic>;
  using Made = SineCosine<Vector<Arithmetic>>;
  constexpr Number most = single ? 8192 : 1e8;
  if (any_greater<Arithmetic>(larger<Arithmetic>(-x, x), most - Vector<Arithmetic>{})) {
    Made made;
    for (int k = 0; k < Arithmetic::lanes; ++k) {
      made.sine[k] = std::sin(x[k]);
      made.cosine[k] = std::cos(x[k]);
    }
    return made;
  }
  constexpr Number round = single ? Number(3 << 22) : Number(int64_t(3) << 51);
  const Vector<Arithmetic> shifted = x * Number(0.63661977236758134308) + round;
  const Vector<Arithmetic> n = shifted - round;
  Vector<Arithmetic> r, sine, cosine;
  if constexpr (single) {
    r = x - n * Number(1.5703125);
    r -= n * Number(4.837512969970703125e-4);
    r -= n * Number(7.54978995489188216e-8);
    const Vector<Arithmetic> z = r * r;
    sine = polynomial<Arithmetic>(z, {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f});
    cosine = polynomial<Arithmetic>(
        z, {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f});
  } else {
    r = x - n * Number(2 * 7.85398125648498535156e-1);
    r -= n * Number(2 * 3.77489470793079817668e-8);
    r -= n * Number(2 * 2.69515142907905952645e-15);
    const Vector<Arithmetic> z = r * r;
    sine = polynomial<Arithmetic>(
        z, {1.58962301576546568060e-10, -2.50507477628578072866e-8, 2.75573136213857245213e-6,
            -1.98412698295895385996e-4, 8.33333333332211858878e-3, -1.66666666666666307295e-1});
    cosine = polynomial<Arithmetic>(
        z, {-1.13585365213876817300e-11, 2.08757008419747316778e-9, -2.75573141792967388112e-7,
            2.48015872888517045348e-5, -1.38888888888730564116e-3, 4.16666666666665929218e-2});
  }
  const Vector<Arithmetic> z = r * r;
  sine = sine * z * r + r;
  cosine = cosine * z * z - z * Number(0.5) + Number(1);
  // An odd number of quarter turns swaps the two; the signs follow from its last two bits.
  constexpr int top = single ? 30 : 62;
  const Bits quarter = (Bits)shifted & 3, odd = -(quarter & 1);
  const Bits differ = ((Bits)sine ^ (Bits)cosine) & odd;
  const Bits flip = (quarter & 2) << top, other = ((quarter + 1) & 2) << top;
  return {(Vector<Arithmetic>)((Bits)sine ^ differ ^ flip),
          (Vector<Arithmetic>)((Bits)cosine ^ differ ^ other)};
}

// The standard normal distribution up to x: erfc(-x / sqrt 2) / 2. Of z = |x| / sqrt 2,
// (1 + 2 z) exp(z^2) erfc(z) is a polynomial in (z - c) / (z + c) that was fitted for this.
template <class Arithmetic>
WEIGHTOPS_INLINE Vector<Arithmetic> normal(const Vector<Arithmetic>& x) {
  using Number = typename Arithmetic::Number;
  constexpr bool single = std::is_same_v<Number, float>;
  constexpr Number centre = single ? 2 : 2.5;
  const Vector<Arithmetic> z = larger<Arithmetic>(-x, x) * Number(0.70710678118654752440);
  const Vector<Arithmetic> t = (z - centre) / (z + centre);
  Vector<Arithmetic> fitted;
  if constexpr (single) {
    fitted = polynomial<Arithmetic>(
        t, {8.5054996062693803e-5f, 1.7824501070931798e-4f, -4.0442536381851473e-4f,
            -1.4300450288497835e-3f, 1.2536774827090141e-3f, 8.7126993824855083e-3f,
            -8.0313225488468110e-3f, -5.4218489933903426e-2f, 1.6405116850274329e-1f,
            -1.6603046962999375e-1f, -9.2763829017705369e-2f, 1.2769783819094265f});
  } else {
    fitted = polynomial<Arithmetic>(
        t, {1.3225641577045184e-9,  7.3842360633019688e-9,  7.3317897304819152e-9,
            -3.7602699254865295e-8, -1.0262126771356384e-7, 3.2953114528352616e-8,
            5.0808111125507754e-7,  5.2484731911052887e-7,  -1.5676574269652488e-6,
            -4.2157386570072145e-6, 2.6009666736884184e-6,  2.2698620717705488e-5,
            6.2683870429226911e-6,  -1.1352207396865196e-4, -8.8479693207557126e-5,
            6.3212428858229897e-4,  4.9186586775721721e-4,  -4.3820783344231236e-3,
            9.3189281347309165e-4,  3.2760893268288766e-2,  -1.0296705603843219e-1,
            1.5762991902332290e-1,  -9.9024539573603786e-2, -1.2235676308240439e-1,
            1.2648381843668615});
  }
  const Vector<Arithmetic> tail =
      exp<Arithmetic>(-z * z) * fitted / (z * Number(2) + Number(1)) * Number(0.5);
  return where_greater<Arithmetic>(Vector<Arithmetic>{}, x, tail, Number(1) - tail);
}

}  // namespace weightops::elementary
