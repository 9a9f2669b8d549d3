// Weights of 3 x 3 convolutions, [out, in, 3, 3]: the types of the weights, of their sums over
// rows, over columns and over all nine taps in one pass. A pair (out, in) is 9 + 3 + 3 + 1 rows of
// products, which are added up in registers.
#pragma once

#include "equivariant_job.h"

namespace weightops::equivariant {

template <class T, int Bytes>
struct TapsKernel {
  using Arithmetic = Tile<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  using Right = typename Arithmetic::Right;
  static constexpr int lanes = Arithmetic::lanes, depth = kDepth;
  static constexpr int64_t kPairs = kTile / 16;  // of a tile
  // A chunk of a tile's channels: rows of the weights and of their three sums.
  static constexpr int64_t kBegin[4] = {0, 9 * kPairs, 12 * kPairs, 15 * kPairs};
  static constexpr int64_t kRows[4] = {9, 3, 3, 1};

  // Packs the channels of `pairs` by chunks, and sums them; what is one chunk only stays in place.
  static WEIGHTOPS_INLINE void pack(const T* from, int64_t channels, int64_t pairs, bool mean,
                                    T* packed) {
    const T third = mean ? T(1) / T(3) : T(1);
    for (int64_t p = 0; p < pairs; ++p, from += 9 * channels)
      for (int64_t c = 0; c < channels; c += lanes) {
        T* to = packed + c / depth * kTile * depth + c % depth;
        Vector weights[9], rows[3];
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) weights[t] = Arithmetic::load(from + t * channels + c);
        if (channels > depth)
#pragma GCC unroll 9
          for (int t = 0; t < 9; ++t) Arithmetic::store(to + (p * 9 + t) * depth, weights[t]);
#pragma GCC unroll 3
        for (int a = 0; a < 3; ++a) {
          rows[a] = (weights[3 * a] + weights[3 * a + 1] + weights[3 * a + 2]) * third;
          Arithmetic::store(to + (kBegin[1] + p * 3 + a) * depth, rows[a]);
          Arithmetic::store(to + (kBegin[2] + p * 3 + a) * depth,
                            (weights[a] + weights[a + 3] + weights[a + 6]) * third);
        }
        Arithmetic::store(to + (kBegin[3] + p) * depth, (rows[0] + rows[1] + rows[2]) * third);
      }
  }

  // A tile's rows: chunk c of part q begins at rows[q] + c * kTile * depth.
  struct Rows {
    const T* parts[4];
    int64_t chunks;
  };
  static WEIGHTOPS_INLINE Rows rows(const T* from, int64_t channels, const T* packed) {
    Rows rows{{}, channels / depth};
    for (int q = 0; q < 4; ++q) rows.parts[q] = packed + kBegin[q] * depth;
    if (channels == depth) rows.parts[0] = from;
    return rows;
  }

  // Where a column of a pair's nine rows begins, and where it goes.
  struct Column {
    const T *blocks, *start, *broadcast;  // of one chunk's first row; [9, lanes]; [9, width]
    int64_t broadcast_stride;
    T scale;
    T* out;
    bool activate;
  };

  // Blocks are [4, channels, width].
  template <bool streams>
  static WEIGHTOPS_INLINE void multiply(const Rows& rows, int64_t pair, int64_t width,
                                        const Column& column) {
    Vector sum[9], across[3], down[3], all = {};
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t)
      sum[t] = Arithmetic::load(column.start + t * lanes) +
               Arithmetic::load(column.broadcast + t * column.broadcast_stride) * column.scale;
#pragma GCC unroll 3
    for (int a = 0; a < 3; ++a) across[a] = down[a] = Vector{};
    const int64_t part = rows.chunks * depth * width;
    const T* block = column.blocks;
    for (int64_t c = 0; c < rows.chunks; ++c) {
      const T* own[4];
      for (int q = 0; q < 4; ++q) own[q] = rows.parts[q] + (c * kTile + pair * kRows[q]) * depth;
#pragma GCC unroll 1
      for (int k = 0; k < depth; ++k, block += width) {
        // Not to be loaded anew for every product.
        Vector weights = Arithmetic::load(block), by_row = Arithmetic::load(block + part),
               by_column = Arithmetic::load(block + 2 * part),
               total = Arithmetic::load(block + 3 * part);
        Arithmetic::keep(weights), Arithmetic::keep(by_row), Arithmetic::keep(by_column);
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) sum[t] += weights * own[0][t * depth + k];
#pragma GCC unroll 3
        for (int a = 0; a < 3; ++a) {
          across[a] += by_row * own[1][a * depth + k];
          down[a] += by_column * own[2][a * depth + k];
        }
        all += total * own[3][k];
      }
    }
#pragma GCC unroll 3
    for (int a = 0; a < 3; ++a) across[a] += all;
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
      Vector value = sum[t] + (across[t / 3] + down[t % 3]);
      if (column.activate) value = Arithmetic::relu(value);
      if constexpr (streams)
        Arithmetic::stream(column.out + t * width, value);
      else
        Arithmetic::store(column.out + t * width, value);
    }
  }

  // The gradient of the four terms, [term, channels of left, channels of right].
  static WEIGHTOPS_INLINE void outer(const Rows& left, const Rows& right, int64_t pairs,
                                     const int64_t* terms, T* gradient) {
    const int64_t height = left.chunks * depth, width = right.chunks * depth;
    for (int q = 0; q < 4; ++q)
      for (int64_t i = 0; i < left.chunks; ++i)
        for (int64_t k = 0; k < width; k += 2 * lanes) {
          Right columns[2];
          const int count = k + lanes < width ? 2 : 1;
          for (int v = 0; v < count; ++v) {
            const int64_t at = k + v * lanes;
            columns[v] = {right.parts[q] + at / depth * kTile * depth + at % depth,
                          gradient + (terms[q] * height + i * depth) * width + at};
          }
          const T* rows = left.parts[q] + i * kTile * depth;
          if (count == 2)
            Arithmetic::template outer<2>(rows, depth, columns, pairs * kRows[q], width);
          else
            Arithmetic::template outer<1>(rows, depth, columns, pairs * kRows[q], width);
        }
  }
};

template <class T, int Bytes>
struct TapsLayer {
  using Kernel = TapsKernel<T, Bytes>;
  using Arithmetic = Tile<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  static constexpr int lanes = Arithmetic::lanes;

  // The blocks of a group's four types. Means over rows and columns are their business, both when
  // reading and when broadcasting.
  static WEIGHTOPS_INLINE T* blocks_of(const Job<T>& job, const Taps& taps, int64_t more) {
    const Program& program = job.program;
    const int64_t size = program.channels_read * program.channels_written;
    T* blocks = job.workspace.taps.get(4 * size + more);
    const T third = program.mean || program.share ? T(1) / T(3) : T(1);
    const T scales[4] = {1, third, third, third * third};
    for (int q = 0; q < 4 && job.out; ++q)
      for (int64_t i = 0; i < size; ++i)
        blocks[q * size + i] = job.parameters.blocks[taps.terms[q] * size + i] * scales[q];
    return blocks;
  }

  // One group's types all at once.
  static WEIGHTOPS_INLINE void run(const Job<T>& job, const Taps& taps, const Features<T>* other,
                                   bool mean, int64_t begin, int64_t end) {
    const Program& program = job.program;
    const int64_t own = program.channels_read, width = program.channels_written;
    T* packed = job.workspace.packed.get(0);
    T* other_packed = packed + own * kTile;
    T* blocks = blocks_of(job, taps, 9 * width + lanes);
    T *start = blocks + 4 * own * width, *zeros = start + 9 * width;
    Arithmetic::store(zeros, Vector{});
    const T* broadcast = job.broadcast;
    // This tile and the next are in the first-level cache.
    const int64_t most = std::max<int64_t>(3, Kernel::kPairs * kDepth / own);
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t lane = 0; lane < width && job.out; lane += lanes)
        for (int t = 0; t < 9; ++t) {
          Vector sum = {};
          if (job.parameters.bias) sum = Arithmetic::load(job.parameters.bias + taps.bias + lane);
          if (taps.broadcast[1] >= 0)
            sum += Arithmetic::load(broadcast + taps.broadcast[1] + (o * 9 + t) * width + lane) *
                   T(taps.scales[1]);
          Arithmetic::store(start + lane * 9 + t * lanes, sum);
        }
      for (int64_t i = 0; i < taps.sizes[1]; i += most) {
        const int64_t pairs = std::min(most, taps.sizes[1] - i);
        const T* from = job.from.values + taps.from_offset + o * taps.from_stride + i * 9 * own;
        const int64_t at = taps.to_offset + o * taps.to_stride + i * 9 * width;
        Kernel::pack(from, own, pairs, false, packed);
        const auto rows = Kernel::rows(from, own, packed);
        for (int64_t lane = 0; lane < width && job.out; lane += lanes) {
          typename Kernel::Column column{blocks + lane, start + lane * 9,    zeros,       0,
                                         T(0),          job.out + at + lane, job.activate};
          if (taps.broadcast[0] >= 0) {
            column.broadcast = broadcast + taps.broadcast[0] + i * 9 * width + lane;
            column.broadcast_stride = width;
            column.scale = taps.scales[0];
          }
          const bool streams = job.stream && reinterpret_cast<uintptr_t>(column.out) % Bytes == 0;
          for (int64_t p = 0; p < pairs; ++p) {
            for (int64_t t = 0; t < 9; ++t)
              __builtin_prefetch(from + (pairs * 9 + p * 9 + t) * own + lane % own);
            if (streams)
              Kernel::template multiply<true>(rows, p, width, column);
            else
              Kernel::template multiply<false>(rows, p, width, column);
            column.out += 9 * width;
            column.broadcast += 9 * column.broadcast_stride;
          }
        }
        if (!job.outer) continue;
        const T* left = other->values + at;
        Kernel::pack(left, width, pairs, mean, other_packed);
        Kernel::outer(Kernel::rows(left, width, other_packed), rows, pairs, taps.terms,
                      job.outer->gradient);
      }
    }
  }
};

}  // namespace weightops::equivariant
