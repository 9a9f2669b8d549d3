// Layers to one channel: a dot product a row, of which a vector takes as many as it has lanes.
#pragma once

#include <utility>

#include "equivariant_taps.h"

namespace weightops::equivariant {

template <class T, int Bytes>
struct DotProducts {
  using Arithmetic = Tile<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  static constexpr int lanes = Arithmetic::lanes;

  // sums[r] += rows[r] * block, lane by lane.
  static WEIGHTOPS_INLINE void add(const T* const* rows, const T* block, int64_t channels,
                                   Vector* sums) {
    for (int64_t k = 0; k < channels; k += lanes) {
      const Vector weights = Arithmetic::load(block + k);
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) sums[r] += Arithmetic::load(rows[r] + k) * weights;
    }
  }

  // What the nine taps at `from` and their sums over columns, rows and both come to: one vector.
  static WEIGHTOPS_INLINE Vector taps(const T* from, int64_t channels, const T* blocks) {
    static_assert(lanes == 16);
    Vector sums[16] = {};
    for (int64_t k = 0; k < channels; k += lanes) {
      Vector weights[9], block[4];
      for (int q = 0; q < 4; ++q) block[q] = Arithmetic::load(blocks + q * channels + k);
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        weights[t] = Arithmetic::load(from + t * channels + k);
        sums[t] += weights[t] * block[0];
      }
      Vector all = {};
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) {
        const Vector row = weights[3 * a] + weights[3 * a + 1] + weights[3 * a + 2];
        sums[9 + a] += row * block[1];
        sums[12 + a] += (weights[a] + weights[a + 3] + weights[a + 6]) * block[2];
        all += row;
      }
      sums[15] += all * block[3];
    }
    const Vector found = across(sums);
    return found +
           __builtin_shufflevector(found, found, 9, 9, 9, 10, 10, 10, 11, 11, 11, 9, 9, 9, 9, 9, 9,
                                   9) +
           __builtin_shufflevector(found, found, 12, 13, 14, 12, 13, 14, 12, 13, 14, 9, 9, 9, 9, 9,
                                   9, 9) +
           found[15];
  }

  // Lane r of the result is the sum of the lanes of sums[r].
  static WEIGHTOPS_INLINE Vector across(Vector* sums) {
    halve<1>(sums);
    return sums[0];
  }

 private:
  // Groups of `width` lanes are sums of as many vectors already.
  template <int width>
  static WEIGHTOPS_INLINE void halve(Vector* sums) {
    if constexpr (width < lanes) {
#pragma GCC unroll 8
      for (int r = 0; r < lanes / width / 2; ++r)
        sums[r] =
            join<width>(sums[2 * r], sums[2 * r + 1], std::make_integer_sequence<int, lanes>());
      halve<2 * width>(sums);
    }
  }
  template <int width, int... lane>
  static WEIGHTOPS_INLINE Vector join(const Vector& a, const Vector& b,
                                      std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, from<width>(lane)...) +
           __builtin_shufflevector(a, b, from<width>(lane) + width...);
  }
  template <int width>
  static constexpr int from(int lane) {
    const int group = lane / (2 * width) * 2 * width, within = lane % (2 * width);
    return within < width ? group + within : lanes + group + within - width;
  }
};

template <class T, int Bytes>
struct ThinLayer {
  using Dots = DotProducts<T, Bytes>;
  using Arithmetic = Tile<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  using Span = typename Rows<T, Bytes>::Span;
  static constexpr int lanes = Arithmetic::lanes;

  // to[m] += scale * numbers at a tile's positions.
  static WEIGHTOPS_INLINE void add(const Place& place, const Span& span, const T* numbers, T scale,
                                   T* to) {
    const T* from = numbers + Rows<T, Bytes>::at(place, span.at);
    if (place.table.empty() && place.stride == 1)
      for (int64_t m = 0; m < span.size(); ++m) to[m] += from[span.begin + m] * scale;
    else
      for (int64_t m = 0; m < span.size(); ++m) to[m] += from[place.along(span.begin + m)] * scale;
  }

  // What a tile's dot products are added to.
  static WEIGHTOPS_INLINE void begin(const Target& target, const Span& span, const T* bias,
                                     const T* broadcast, T* start) {
    T common = target.bias >= 0 && bias ? bias[target.bias] : T(0);
    for (const Addend& each : target.addends)
      if (!each.place.moves())
        common += broadcast[Rows<T, Bytes>::at(each.place, span.at)] * T(each.scale);
    std::fill_n(start, span.size(), common);
    for (const Addend& each : target.addends)
      if (each.place.moves()) add(each.place, span, broadcast, each.scale, start);
    if (!target.diagonal_begin.empty())
      for (int64_t d = target.diagonal_begin[span.outer]; d < target.diagonal_begin[span.outer + 1];
           ++d) {
        const OnDiagonal& each = target.diagonal[d];
        if (each.at >= span.begin && each.at < span.end)
          start[each.at - span.begin] += broadcast[each.offset];
      }
  }

  static WEIGHTOPS_INLINE void run_tile(const Job<T>& job, const Step& step, const Span& span) {
    T* broadcast = job.broadcast;
    T start[kTile];
    for (const Column& column : step.columns) {
      const Target& target = step.targets[column.target];
      begin(target, span, job.parameters.bias, broadcast, start);
      T* to = (target.whole ? job.out : broadcast) + Rows<T, Bytes>::at(target.place, span.at);
      for (int64_t m = 0; m < span.size(); m += lanes) {
        const int64_t count = std::min<int64_t>(lanes, span.size() - m);
        Vector sums[lanes] = {};
        for (size_t f = 0; f < column.readers.size(); ++f) {
          const Source& source = step.readers[column.readers[f]];
          const T* from = (source.whole ? job.from.values : job.from.sums) +
                          Rows<T, Bytes>::at(source.place, span.at);
          const T* rows[lanes];
          for (int64_t r = 0; r < lanes; ++r)
            rows[r] = from + source.place.along(span.begin + m + std::min(r, count - 1));
          Dots::add(rows, job.parameters.blocks + column.blocks[f], job.from.channels, sums);
        }
        const Vector found = Dots::across(sums);
        for (int64_t r = 0; r < count; ++r) {
          const T value = start[m + r] + found[r];
          const bool cut = job.activate && target.whole && value < 0;
          to[target.place.along(span.begin + m + r)] = cut ? T(0) : value;
        }
      }
    }
  }

  static WEIGHTOPS_INLINE void run_taps(const Job<T>& job, const Taps& taps, int64_t begin,
                                        int64_t end) {
    const int64_t own = job.from.channels;
    const T *blocks = TapsLayer<T, Bytes>::blocks_of(job, taps, 0), *broadcast = job.broadcast;
    for (int64_t o = begin; o < end; ++o) {
      Vector start = {};
      for (int t = 0; t < 9; ++t) {
        start[t] = job.parameters.bias ? job.parameters.bias[taps.bias] : T(0);
        if (taps.broadcast[1] >= 0)
          start[t] += broadcast[taps.broadcast[1] + o * 9 + t] * T(taps.scales[1]);
      }
      const T* from = job.from.values + taps.from_offset + o * taps.from_stride;
      T* to = job.out + taps.to_offset + o * taps.to_stride;
      for (int64_t i = 0; i < taps.sizes[1]; ++i, from += 9 * own, to += 9) {
        Vector sum = start;
        if (taps.broadcast[0] >= 0) {
          Vector nine = {};
          std::memcpy(&nine, broadcast + taps.broadcast[0] + i * 9, 9 * sizeof(T));
          sum += nine * T(taps.scales[0]);
        }
        sum += Dots::taps(from, own, blocks);
        if (job.activate) sum = Arithmetic::relu(sum);
        std::memcpy(to, &sum, 9 * sizeof(T));
      }
    }
  }
};

}  // namespace weightops::equivariant
