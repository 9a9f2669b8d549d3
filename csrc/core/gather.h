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
// blocks of `bytes` bytes. Each row holds `columns` blocks. With `stream`, whole lines are written
// past the cache where they can be (4- and 8-byte elements, aligned rows). Several rows at once
// share the loads of the index and the cost of a call: 1.2 times faster for rows of 128 elements.
constexpr int kMaxRows = 4;

struct RowGather {
  const char* rows[kMaxRows];
  const char* ahead[kMaxRows];  // what will be read next, at the same pace; may repeat `rows`
  int num_rows;
  const int32_t* index;
  int64_t count, bytes, columns;
  bool stream;
  char* scratch;  // kScratchBytes, 64-byte aligned
};

constexpr int64_t kScratchBytes = 1 << 16;

namespace detail {

template <int kWidth>
inline void copy_exact(char* destination, const char* source, const RowGather& job, int64_t begin) {
  for (int64_t j = begin; j < job.count; ++j)
    std::memcpy(destination + j * kWidth, source + int64_t{job.index[j]} * kWidth, kWidth);
}

#define WEIGHTOPS_COPY_OVERLAPPING(name, attribute)                            \
  template <int kWidth>                                                        \
  attribute inline void name(char* destination, int r, const RowGather& job) { \
    const char* source = job.rows[r];                                          \
    const char* ahead = job.ahead[r];                                          \
    for (int64_t j = 0; j < job.count; ++j) {                                  \
      __builtin_prefetch(ahead + j * job.bytes);                               \
      const char* from = source + job.index[j] * job.bytes;                    \
      char* to = destination + j * job.bytes;                                  \
      std::memcpy(to, from, kWidth);                                           \
      std::memcpy(to + job.bytes - kWidth, from + job.bytes - kWidth, kWidth); \
    }                                                                          \
  }
WEIGHTOPS_COPY_OVERLAPPING(copy_overlapping, )
#if WEIGHTOPS_X86
WEIGHTOPS_COPY_OVERLAPPING(copy_overlapping_avx2, WEIGHTOPS_AVX2)
#endif
#undef WEIGHTOPS_COPY_OVERLAPPING

// Blocks [begin, count) of one row, on any machine.
inline void gather_row(char* destination, int r, const RowGather& job, int64_t begin) {
  const char* row = job.rows[r];
  switch (job.bytes) {
    case 1: return copy_exact<1>(destination, row, job, begin);
    case 2: return copy_exact<2>(destination, row, job, begin);
    case 4: return copy_exact<4>(destination, row, job, begin);
    case 8: return copy_exact<8>(destination, row, job, begin);
    case 16: return copy_exact<16>(destination, row, job, begin);
    case 3: return copy_overlapping<2>(destination, r, job);
  }
  if (job.bytes <= 8) return copy_overlapping<4>(destination, r, job);
  if (job.bytes <= 16) return copy_overlapping<8>(destination, r, job);
  if (job.bytes <= 32) return copy_overlapping<16>(destination, r, job);
#if WEIGHTOPS_X86
  if (job.bytes <= 64 && isa() != Isa::generic)
    return copy_overlapping_avx2<32>(destination, r, job);
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
    for (int r = 0; r < job.num_rows; ++r) {
      __builtin_prefetch(job.ahead[r] + j * 4);
      store_line(destination + (r * job.count + j) * 4, _mm512_i32gather_epi32(at, job.rows[r], 4),
                 stream);
    }
  }
  return j;
}

WEIGHTOPS_AVX512 inline int64_t gather_8_avx512(char* destination, const RowGather& job,
                                                bool stream) {
  int64_t j = 0;
  for (; j + 8 <= job.count; j += 8) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(job.index + j));
    for (int r = 0; r < job.num_rows; ++r) {
      __builtin_prefetch(job.ahead[r] + j * 8);
      store_line(destination + (r * job.count + j) * 8, _mm512_i32gather_epi64(at, job.rows[r], 8),
                 stream);
    }
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

// Of the four rows read ahead, this many while the present ones are interleaved and the others
// while they are gathered, which takes longer: memory is then busy all the time.
constexpr int kAheadWhileReading = 1;

// Four rows of 4-byte elements: interleaved in scratch, a column of them is one 128-bit load
// instead of four gathered words, which halves the time. All columns of the rows are wanted.
// emit(destination, line) takes each 16 elements.
template <class Emit>
WEIGHTOPS_AVX512 inline void gather_interleaved_avx512(char* destination, const RowGather& job,
                                                       const Emit& emit) {
  char* const columns = job.scratch;
  // Rows may lie at any byte, scratch lies on a line.
  const auto quad = [&](int r, int64_t column) WEIGHTOPS_AVX512 {
    return _mm_loadu_ps(reinterpret_cast<const float*>(job.rows[r] + 4 * column));
  };
  const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t j = 0;
  for (; j + 4 <= job.columns; j += 4) {
    if (j % 16 == 0)
      for (int r = 0; r < kAheadWhileReading; ++r) __builtin_prefetch(job.ahead[r] + 4 * j, 0, 2);
    __m512 block = _mm512_castps128_ps512(quad(0, j));
    block = _mm512_insertf32x4(block, quad(1, j), 1);
    block = _mm512_insertf32x4(block, quad(2, j), 2);
    block = _mm512_insertf32x4(block, quad(3, j), 3);
    _mm512_store_ps(columns + 16 * j, _mm512_permutexvar_ps(transpose, block));
  }
  for (; j < job.columns; ++j)
    for (int r = 0; r < 4; ++r) std::memcpy(columns + 16 * j + 4 * r, job.rows[r] + 4 * j, 4);
  const int32_t* const index = job.index;
  const auto column = [&](int64_t i) WEIGHTOPS_AVX512 {
    return _mm_load_ps(reinterpret_cast<const float*>(columns + 16 * int64_t{index[i]}));
  };
  for (j = 0; j + 16 <= job.count; j += 16) {
    __m512 four[4];  // four[k]: columns j + k, j + k + 4, ... of the output, a lane each
    for (int k = 0; k < 4; ++k) {
      four[k] = _mm512_castps128_ps512(column(j + k));
      four[k] = _mm512_insertf32x4(four[k], column(j + k + 4), 1);
      four[k] = _mm512_insertf32x4(four[k], column(j + k + 8), 2);
      four[k] = _mm512_insertf32x4(four[k], column(j + k + 12), 3);
    }
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(four[0], four[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(four[0], four[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(four[2], four[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(four[2], four[3]));
    const __m512d lines[4] = {_mm512_unpacklo_pd(low01, low23), _mm512_unpackhi_pd(low01, low23),
                              _mm512_unpacklo_pd(high01, high23),
                              _mm512_unpackhi_pd(high01, high23)};
    for (int r = kAheadWhileReading; r < 4; ++r) __builtin_prefetch(job.ahead[r] + 4 * j, 0, 2);
    for (int r = 0; r < 4; ++r)
      emit(destination + (r * job.count + j) * 4, _mm512_castpd_ps(lines[r]));
  }
  for (; j < job.count; ++j)
    for (int r = 0; r < 4; ++r)
      std::memcpy(destination + (r * job.count + j) * 4, columns + 16 * int64_t{index[j]} + 4 * r,
                  4);
}

WEIGHTOPS_AVX512 inline void add_interleaved_avx512(float* sums, const RowGather& job,
                                                    float weight) {
  const __m512 weights = _mm512_set1_ps(weight);
  gather_interleaved_avx512(
      reinterpret_cast<char*>(sums), job, [&](char* to, __m512 line) WEIGHTOPS_AVX512 {
        float* sum = reinterpret_cast<float*>(to);
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(weights, line, _mm512_loadu_ps(sum)));
      });
}

inline bool interleaves(const RowGather& job) {
  return isa() == Isa::avx512 && job.bytes == 4 && job.num_rows == 4 && job.count == job.columns &&
         job.columns * 16 <= kScratchBytes;
}

WEIGHTOPS_AVX512 inline void stream_lines_avx512(char* destination, const char* source,
                                                 int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    store_line(destination + i, _mm512_loadu_si512(source + i), true);
}

inline int64_t gather_vector(char* destination, const RowGather& job) {
  // The narrow gather reads whole words and forms byte offsets in 32 bits.
  const int64_t row_bytes = job.columns * job.bytes;
  const bool narrow = row_bytes >= 4 && row_bytes < INT32_MAX;
  const bool lines =
      reinterpret_cast<uintptr_t>(destination) % 64 == 0 && job.count * job.bytes % 64 == 0;
  const bool stream = job.stream && lines;
  if (interleaves(job)) {
    gather_interleaved_avx512(destination, job, [&](char* to, __m512 line) WEIGHTOPS_AVX512 {
      store_line(to, _mm512_castps_si512(line), stream);
    });
    return job.count;
  }
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
    detail::gather_row(destination + r * job.count * job.bytes, r, job, done);
}

// sums += weight * what gather would write, without writing it; false where that can't be done
// here.
inline bool gather_add([[maybe_unused]] float* sums, [[maybe_unused]] const RowGather& job,
                       [[maybe_unused]] float weight) {
#if WEIGHTOPS_X86
  if (detail::interleaves(job) && job.columns % 16 == 0) {
    detail::add_interleaved_avx512(sums, job, weight);
    return true;
  }
#endif
  return false;
}

// Copies whole lines past the cache; the destination lies on a line.
inline void stream_lines(char* destination, const char* source, int64_t bytes) {
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return detail::stream_lines_avx512(destination, source, bytes);
#endif
  std::memcpy(destination, source, bytes);
}

}  // namespace weightops
