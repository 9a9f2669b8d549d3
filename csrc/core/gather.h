// Gathers blocks of bytes through an index.
//
// An element of 1, 2, 4 or 8 bytes takes a vector gather where the machine has one; a longer block
// (convolution taps) is copied by two overlapping moves, which neither read nor write outside it.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace weightops {

// Rows gathered through one index: destination[r * count + j] = rows[r][index[j]], j < count, in
// blocks of `bytes` bytes. Each row holds `columns` blocks. With `stream`, whole lines are written past
// the cache where they can be (4- and 8-byte elements, aligned rows). Several rows at once share the loads of
// the index and the cost of a call: 1.2 times faster for rows of 128 elements.
constexpr int kMaxRows = 4;

struct RowGather {
  const char* rows[kMaxRows];
  int num_rows;
  const int32_t* index;
  int64_t count, bytes, columns;
  bool stream;
};

namespace detail {

template <int kWidth>
inline void copy_exact(char* destination, const char* source, const RowGather& job, int64_t begin) {
  for (int64_t j = begin; j < job.count; ++j)
    std::memcpy(destination + j * kWidth, source + int64_t{job.index[j]} * kWidth, kWidth);
}

#define WEIGHTOPS_COPY_OVERLAPPING(name, attribute)                                         \
  template <int kWidth>                                                                     \
  attribute inline void name(char* destination, const char* source, const RowGather& job) { \
    for (int64_t j = 0; j < job.count; ++j) {                                               \
      const char* from = source + job.index[j] * job.bytes;                                 \
      char* to = destination + j * job.bytes;                                               \
      std::memcpy(to, from, kWidth);                                                        \
      std::memcpy(to + job.bytes - kWidth, from + job.bytes - kWidth, kWidth);              \
    }                                                                                       \
  }
WEIGHTOPS_COPY_OVERLAPPING(copy_overlapping, )
#if WEIGHTOPS_X86
WEIGHTOPS_COPY_OVERLAPPING(copy_overlapping_avx2, WEIGHTOPS_AVX2)
#endif
#undef WEIGHTOPS_COPY_OVERLAPPING

// Blocks [begin, count) of one row, on any machine.
inline void gather_row(char* destination, const char* row, const RowGather& job, int64_t begin) {
  switch (job.bytes) {
    case 1: return copy_exact<1>(destination, row, job, begin);
    case 2: return copy_exact<2>(destination, row, job, begin);
    case 4: return copy_exact<4>(destination, row, job, begin);
    case 8: return copy_exact<8>(destination, row, job, begin);
    case 16: return copy_exact<16>(destination, row, job, begin);
    case 3: return copy_overlapping<2>(destination, row, job);
  }
  if (job.bytes <= 8) return copy_overlapping<4>(destination, row, job);
  if (job.bytes <= 16) return copy_overlapping<8>(destination, row, job);
  if (job.bytes <= 32) return copy_overlapping<16>(destination, row, job);
#if WEIGHTOPS_X86
  if (job.bytes <= 64 && isa() != Isa::generic)
    return copy_overlapping_avx2<32>(destination, row, job);
#endif
  for (int64_t j = 0; j < job.count; ++j)
    std::memcpy(destination + j * job.bytes, row + job.index[j] * job.bytes, job.bytes);
}

#if WEIGHTOPS_X86

WEIGHTOPS_AVX512 inline void store_line(char* to, __m512i value, bool stream) {
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value);
  else
    _mm512_storeu_si512(to, value);
}

// The vector gathers return how many of a row's elements they did: whole vectors only.
//
// A 32-bit gather serves shorter elements too: it reads the word that ends with the element (the
// first word for the leading elements), shifts the element down and narrows.
template <int kBytes>
WEIGHTOPS_AVX512 inline int64_t gather_narrow_avx512(char* destination, const RowGather& job) {
  const __m512i size = _mm512_set1_epi32(kBytes), before = _mm512_set1_epi32(4 - kBytes);
  int64_t j = 0;
  for (; j + 16 <= job.count; j += 16) {
    const __m512i start = _mm512_mullo_epi32(_mm512_loadu_si512(job.index + j), size);
    const __m512i word = _mm512_max_epi32(_mm512_sub_epi32(start, before), _mm512_setzero_si512());
    const __m512i shift = _mm512_slli_epi32(_mm512_sub_epi32(start, word), 3);
    for (int r = 0; r < job.num_rows; ++r) {
      const __m512i value = _mm512_srlv_epi32(_mm512_i32gather_epi32(word, job.rows[r], 1), shift);
      char* to = destination + (r * job.count + j) * kBytes;
      if constexpr (kBytes == 2)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(value));
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
    }
  }
  return j;
}

WEIGHTOPS_AVX512 inline int64_t gather_4_avx512(char* destination, const RowGather& job,
                                                bool stream) {
  int64_t j = 0;
  for (; j + 16 <= job.count; j += 16) {
    const __m512i at = _mm512_loadu_si512(job.index + j);
    for (int r = 0; r < job.num_rows; ++r)
      store_line(destination + (r * job.count + j) * 4,
                 _mm512_i32gather_epi32(at, job.rows[r], 4), stream);
  }
  return j;
}

WEIGHTOPS_AVX512 inline int64_t gather_8_avx512(char* destination, const RowGather& job,
                                                bool stream) {
  int64_t j = 0;
  for (; j + 8 <= job.count; j += 8) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(job.index + j));
    for (int r = 0; r < job.num_rows; ++r)
      store_line(destination + (r * job.count + j) * 8,
                 _mm512_i32gather_epi64(at, job.rows[r], 8), stream);
  }
  return j;
}

WEIGHTOPS_AVX2 inline int64_t gather_4_avx2(char* destination, const RowGather& job) {
  int64_t j = 0;
  for (; j + 8 <= job.count; j += 8) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(job.index + j));
    for (int r = 0; r < job.num_rows; ++r)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination + (r * job.count + j) * 4),
                          _mm256_i32gather_epi32(reinterpret_cast<const int*>(job.rows[r]), at, 4));
  }
  return j;
}

inline int64_t gather_vector(char* destination, const RowGather& job) {
  // The narrow gather reads whole words and forms byte offsets in 32 bits.
  const int64_t row_bytes = job.columns * job.bytes;
  const bool narrow = row_bytes >= 4 && row_bytes < INT32_MAX;
  const bool lines = reinterpret_cast<uintptr_t>(destination) % 64 == 0 &&
                     job.count * job.bytes % 64 == 0;
  const bool stream = job.stream && lines;
  if (isa() == Isa::avx512) switch (job.bytes) {
      case 1: return narrow ? gather_narrow_avx512<1>(destination, job) : 0;
      case 2: return narrow ? gather_narrow_avx512<2>(destination, job) : 0;
      case 4: return gather_4_avx512(destination, job, stream);
      case 8: return gather_8_avx512(destination, job, stream);
    }
  if (isa() == Isa::avx2 && job.bytes == 4) return gather_4_avx2(destination, job);
  return 0;
}

#endif

}  // namespace detail

inline void gather(char* destination, const RowGather& job) {
  int64_t done = 0;
#if WEIGHTOPS_X86
  if (job.bytes <= 8 && job.count >= 8) done = detail::gather_vector(destination, job);
  if (done == job.count) return;
#endif
  for (int r = 0; r < job.num_rows; ++r)
    detail::gather_row(destination + r * job.count * job.bytes, job.rows[r], job, done);
}

// Orders streamed lines before what follows; each thread calls it after its last gather.
inline void stream_fence() {
#if WEIGHTOPS_X86
  _mm_sfence();
#endif
}

}  // namespace weightops
