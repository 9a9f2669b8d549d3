// Whole networks at points of a manifold, and the way back: streams of bases read once.
#pragma once

#include <algorithm>
#include <vector>

#include "number.h"
#include "simd.h"

namespace weightops::manifold {

// out[g] = sum_k coeffs[g, k] bases[k], elements [begin, end).
template <class T, class Sum>
struct Synthesis {
  int64_t points, bases;
  const Sum* coeffs;  // [points, bases]
  const T* from;
  int64_t from_stride;
  T* out;
  int64_t out_stride;
  bool stream;  // the result is too large to find in the cache later
};

// dots[g, k] += <grad[g], bases[k]>; bases[k] -= sum_g step[g, k] grad[g].
template <class T, class Sum>
struct Descent {
  int64_t points, bases;
  const T* grad;
  int64_t grad_stride;
  T* from;
  int64_t from_stride;
  const Sum* step;
};

template <class T, class Sum, int Bytes>
struct Streams {
  using Arithmetic = Simd<Sum, Bytes>;
  using Vector = typename Arithmetic::Vector;
  static constexpr int lanes = Arithmetic::lanes;
  // Elements of every stream that are dealt with at a time; they stay in the first-level cache.
  static constexpr int64_t kBlock = 1024;

  static WEIGHTOPS_INLINE Vector load(const T* from) {
    if constexpr (std::is_same_v<T, Sum>) {
      return Arithmetic::load(from);
    } else {
      Sum values[lanes];
      for (int c = 0; c < lanes; ++c) values[c] = widen(from[c]);
      return Arithmetic::load(values);
    }
  }
  static WEIGHTOPS_INLINE void store(T* to, const Vector& value) {
    if constexpr (std::is_same_v<T, Sum>) {
      Arithmetic::store(to, value);
    } else {
      Sum values[lanes];
      Arithmetic::store(values, value);
      for (int c = 0; c < lanes; ++c) narrow(values[c], to[c]);
    }
  }

  static WEIGHTOPS_INLINE void synthesize(const Synthesis<T, Sum>& job, int64_t begin,
                                          int64_t end) {
    for (int64_t block = begin; block < end; block += kBlock)
      for (int64_t g = 0; g < job.points; ++g) one(job, g, block, std::min(block + kBlock, end));
  }

  static WEIGHTOPS_INLINE void descend(const Descent<T, Sum>& job, int64_t begin, int64_t end,
                                       Sum* dots) {
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t last = std::min(block + kBlock, end);
      if (job.points == 1) {
        int64_t k = 0;
        for (; k + 3 <= job.bases; k += 3) down<3>(job, k, block, last, dots + k);
        for (; k < job.bases; ++k) down<1>(job, k, block, last, dots + k);
        continue;
      }
      for (int64_t g = 0; g < job.points; ++g)
        for (int64_t k = 0; k < job.bases; ++k)
          dots[g * job.bases + k] += dot(job.grad + g * job.grad_stride + block,
                                         job.from + k * job.from_stride + block, last - block);
      for (int64_t k = 0; k < job.bases; ++k)
        for (int64_t g = 0; g < job.points; ++g)
          subtract(job.from + k * job.from_stride + block, job.grad + g * job.grad_stride + block,
                   job.step[g * job.bases + k], last - block);
    }
  }

 private:
  static WEIGHTOPS_INLINE void one(const Synthesis<T, Sum>& job, int64_t g, int64_t begin,
                                   int64_t end) {
    const Sum* coeffs = job.coeffs + g * job.bases;
    T* out = job.out + g * job.out_stride;
    const auto single = [&](int64_t at) __attribute__((always_inline)) {
      Sum sum = 0;
      for (int64_t k = 0; k < job.bases; ++k)
        sum += coeffs[k] * widen(job.from[k * job.from_stride + at]);
      narrow(sum, out[at]);
    };
    const auto vectors = [&](int64_t at, auto streams) __attribute__((always_inline)) {
      Vector sum[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] = load(job.from + at + v * lanes) * coeffs[0];
      for (int64_t k = 1; k < job.bases; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
          sum[v] += load(job.from + k * job.from_stride + at + v * lanes) * coeffs[k];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        if constexpr (std::is_same_v<T, Sum> && decltype(streams)::value)
          Arithmetic::stream(out + at + v * lanes, sum[v]);
        else
          store(out + at + v * lanes, sum[v]);
    };
    const bool stream = job.stream && std::is_same_v<T, Sum>;
    if (stream)
      while (begin < end && reinterpret_cast<uintptr_t>(out + begin) % Bytes != 0) single(begin++);
    if (stream)
      for (; begin + 4 * lanes <= end; begin += 4 * lanes) vectors(begin, std::true_type());
    for (; begin + 4 * lanes <= end; begin += 4 * lanes) vectors(begin, std::false_type());
    while (begin < end) single(begin++);
    if (stream) stream_fence();
  }

  // One gradient against `count` bases: they are read and written once.
  template <int count>
  static WEIGHTOPS_INLINE void down(const Descent<T, Sum>& job, int64_t k, int64_t begin,
                                    int64_t end, Sum* dots) {
    Vector sum[count] = {};
    T* bases = job.from + k * job.from_stride;
    int64_t at = begin;
    for (; at + lanes <= end; at += lanes) {
      const Vector grad = load(job.grad + at);
#pragma GCC unroll 4
      for (int j = 0; j < count; ++j) {
        T* to = bases + j * job.from_stride + at;
        const Vector old = load(to);
        sum[j] += grad * old;
        store(to, old - grad * job.step[k + j]);
      }
    }
    for (int j = 0; j < count; ++j) {
      Sum total = Arithmetic::total(sum[j]);
      T* to = bases + j * job.from_stride;
      for (int64_t c = at; c < end; ++c) {
        const Sum grad = widen(job.grad[c]), old = widen(to[c]);
        total += grad * old;
        narrow(old - grad * job.step[k + j], to[c]);
      }
      dots[j] += total;
    }
  }

  static WEIGHTOPS_INLINE Sum dot(const T* a, const T* b, int64_t count) {
    Vector sum = {};
    int64_t at = 0;
    for (; at + lanes <= count; at += lanes) sum += load(a + at) * load(b + at);
    Sum total = Arithmetic::total(sum);
    for (; at < count; ++at) total += widen(a[at]) * widen(b[at]);
    return total;
  }

  static WEIGHTOPS_INLINE void subtract(T* from, const T* value, Sum factor, int64_t count) {
    int64_t at = 0;
    for (; at + lanes <= count; at += lanes)
      store(from + at, load(from + at) - load(value + at) * factor);
    for (; at < count; ++at) {
      const Sum left = widen(from[at]) - widen(value[at]) * factor;
      narrow(left, from[at]);
    }
  }
};

#define WEIGHTOPS_STREAMS_ENTRY(isa, attribute, bytes)                                        \
  template <class T, class Sum>                                                               \
  attribute void synthesize_##isa(const Synthesis<T, Sum>& job, int64_t begin, int64_t end) { \
    Streams<T, Sum, bytes>::synthesize(job, begin, end);                                      \
  }                                                                                           \
  template <class T, class Sum>                                                               \
  attribute void descend_##isa(const Descent<T, Sum>& job, int64_t begin, int64_t end,        \
                               Sum* dots) {                                                   \
    Streams<T, Sum, bytes>::descend(job, begin, end, dots);                                   \
  }
WEIGHTOPS_STREAMS_ENTRY(generic, , 16)
#if WEIGHTOPS_X86
WEIGHTOPS_STREAMS_ENTRY(avx2, WEIGHTOPS_AVX2, 32)
WEIGHTOPS_STREAMS_ENTRY(avx512, WEIGHTOPS_AVX512, 64)
#endif
#undef WEIGHTOPS_STREAMS_ENTRY

template <class T, class Sum>
void synthesize(const Synthesis<T, Sum>& job, int64_t begin, int64_t end) {
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return synthesize_avx512(job, begin, end);
  if (isa() == Isa::avx2) return synthesize_avx2(job, begin, end);
#endif
  synthesize_generic(job, begin, end);
}

template <class T, class Sum>
void descend(const Descent<T, Sum>& job, int64_t begin, int64_t end, Sum* dots) {
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return descend_avx512(job, begin, end, dots);
  if (isa() == Isa::avx2) return descend_avx2(job, begin, end, dots);
#endif
  descend_generic(job, begin, end, dots);
}

}  // namespace weightops::manifold
