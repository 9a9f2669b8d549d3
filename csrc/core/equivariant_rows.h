// How the rows of a tile are read, begun and put away; and what a thread needs for that.
#pragma once

#include "buffer.h"
#include "equivariant_pool.h"

namespace weightops::equivariant {

// A network's share of a layer: blocks are [term, channels read, padded channels written].
template <class T>
struct Parameters {
  const T* blocks;
  const T* bias;  // [tensor, padded], or null
};

// What one thread needs for one network after the other.
template <class T>
struct Workspace {
  Buffer<T> sums[2], broadcast, packed, tile, gradients, taps;
  Buffer<T> between[2];                 // what a layer of a stack makes for the next
  std::vector<Buffer<T>> blocks, bias;  // of every layer
  Buffer<const T*> rows;
  Buffer<Factor<T>> factors;
  Buffer<int64_t> second;
  Buffer<Right<T>> right;
  void layers(size_t count) {
    blocks.resize(std::max(count, blocks.size()));
    bias.resize(blocks.size());
  }
};

template <class T, int Bytes>
struct Rows {
  using Arithmetic = Tile<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  using Frame = typename Arithmetic::Frame;
  static constexpr int lanes = Arithmetic::lanes;

  static WEIGHTOPS_INLINE int64_t at(const Place& place, const int64_t* outer) {
    int64_t offset = place.offset;
    for (size_t dim = 0; dim < place.outer_strides.size(); ++dim)
      offset += outer[dim] * place.outer_strides[dim];
    return offset;
  }

  // A tile: positions [begin, end) of the run at the outer coordinates `at`.
  struct Span {
    const int64_t* at;
    int64_t outer, begin, end, ahead, pitch;  // pitch: of packed chunks, in rows
    int64_t size() const { return end - begin; }
  };

  // A tile's rows of one operand, `depth` channels after the other: as they lie, where they lie
  // like that, else packed, with zeros behind the last channel.
  static WEIGHTOPS_INLINE const T* rows_of(const Source& source, const Features<T>& features,
                                           const Span& span, T* packed) {
    constexpr int depth = kDepth;
    const Place& place = source.place;
    const int64_t channels = features.channels, rows = span.size();
    const T* from = (source.whole ? features.values : features.sums) + at(place, span.at);
    const bool even = place.table.empty();
    if (even && channels == depth && place.stride == depth) {
      from += span.begin * depth;
      for (int64_t m = 0; m < rows; ++m) __builtin_prefetch(from + span.ahead * depth + m * depth);
      return from;
    }
    if (even && channels == depth && place.stride == depth) return from + span.begin * depth;
    // A few channels: what lies behind them was cleared when the room was made.
    if (channels < depth) {
      from += even ? span.begin * place.stride : 0;
      const int64_t* table = even ? nullptr : place.table.data() + span.begin;
      for (int64_t m = 0; m < rows; ++m) {
        const T* row = from + (even ? m * place.stride : table[m]);
        for (int64_t k = 0; k < channels; ++k) packed[m * depth + k] = row[k];
      }
      return packed;
    }
    const auto pack = [&](const T* row, T* to) __attribute__((always_inline)) {
      for (int64_t k = 0; k < channels; k += depth, to += span.pitch * depth) {
        if (k + depth <= channels) {
#pragma GCC unroll 16
          for (int v = 0; v < depth; v += lanes)
            Arithmetic::store(to + v, Arithmetic::load(row + k + v));
        } else {
          for (int v = 0; v < depth; ++v) to[v] = k + v < channels ? row[k + v] : T(0);
        }
      }
    };
    if (!even) {
      const int64_t* table = place.table.data() + span.begin;
      for (int64_t m = 0; m < rows; ++m) pack(from + table[m], packed + m * depth);
      return packed;
    }
    from += span.begin * place.stride;
    for (int64_t m = 0; m < rows; ++m, from += place.stride) pack(from, packed + m * depth);
    return packed;
  }

  // Where the next tile most often lies, which is too far for the hardware to guess.
  static WEIGHTOPS_INLINE const T* ahead_of(const Place& place, const Features<T>& features,
                                            const Span& span) {
    const T* from = features.values + at(place, span.at);
    const bool turned = place.stride > features.channels && !place.outer_strides.empty();
    return from + (turned ? span.begin * place.stride + place.outer_strides.back()
                          : (span.begin + span.ahead) * place.stride);
  }

  // to[m] (+)= a's rows (+ b's rows) at a tile's positions.
  template <bool first, bool both>
  static WEIGHTOPS_INLINE void add_rows(const Addend& a, const Addend& b, const T* broadcast,
                                        const Span& span, T* to) {
    const T *from_a = broadcast + at(a.place, span.at), *from_b = broadcast + at(b.place, span.at);
    const T scale_a = a.scale, scale_b = b.scale;
    const auto add = [&](int64_t m, int64_t i, int64_t j) __attribute__((always_inline)) {
      Vector sum = Arithmetic::load(from_a + i) * scale_a;
      if constexpr (both) sum += Arithmetic::load(from_b + j) * scale_b;
      if constexpr (!first) sum += Arithmetic::load(to + m * lanes);
      Arithmetic::store(to + m * lanes, sum);
    };
    const int64_t count = span.size(), begin = span.begin;
    if (a.place.table.empty()) {
      const int64_t i = a.place.stride, j = b.place.stride;
      for (int64_t m = 0; m < count; ++m) add(m, (begin + m) * i, (begin + m) * j);
    } else {
      const int64_t *i = a.place.table.data() + begin, *j = b.place.table.data() + begin;
      for (int64_t m = 0; m < count; ++m) add(m, i[m], j[m]);
    }
  }

  // What a tile's product begins with; sums of several things are put into `start`.
  static WEIGHTOPS_INLINE void begin_with(const Target& target, int64_t lane, const Span& span,
                                          const Parameters<T>& parameters, const T* broadcast,
                                          T* start, Frame& frame) {
    Vector common = {};
    if (target.bias >= 0 && parameters.bias)
      common = Arithmetic::load(parameters.bias + target.bias + lane);
    const Addend* moving[64];
    int64_t count = 0;
    for (const Addend& addend : target.addends) {
      if (addend.place.moves())
        moving[count++] = &addend;
      else
        common += Arithmetic::load(broadcast + at(addend.place, span.at) + lane) * T(addend.scale);
    }
    frame.scale = 1;
    frame.common = common;
    const bool crossed = !target.diagonal_begin.empty() &&
                         target.diagonal_begin[span.outer] < target.diagonal_begin[span.outer + 1];
    if (!crossed && count == 0) {
      frame.rows = start;
      frame.rows_stride = 0;
      frame.scale = 0;
      Arithmetic::store(start, Vector{});
      return;
    }
    if (!crossed && count == 1 && moving[0]->place.table.empty()) {
      const Place& place = moving[0]->place;
      frame.rows = broadcast + at(place, span.at) + lane + span.begin * place.stride;
      frame.rows_stride = place.stride;
      frame.scale = moving[0]->scale;
      return;
    }
    if (count == 0)
      for (int64_t m = 0; m < span.size(); ++m) Arithmetic::store(start + m * lanes, Vector{});
    broadcast += lane;
    for (int64_t a = 0; a < count; a += 2) {
      const Addend &one = *moving[a], &two = *moving[std::min(a + 1, count - 1)];
      if (a == 0)
        count > 1 ? add_rows<true, true>(one, two, broadcast, span, start)
                  : add_rows<true, false>(one, two, broadcast, span, start);
      else
        a + 1 < count ? add_rows<false, true>(one, two, broadcast, span, start)
                      : add_rows<false, false>(one, two, broadcast, span, start);
    }
    if (crossed)
      for (int64_t d = target.diagonal_begin[span.outer]; d < target.diagonal_begin[span.outer + 1];
           ++d) {
        const OnDiagonal& each = target.diagonal[d];
        if (each.at < span.begin || each.at >= span.end) continue;
        T* to = start + (each.at - span.begin) * lanes;
        Arithmetic::store(to, Arithmetic::load(to) + Arithmetic::load(broadcast + each.offset));
      }
    frame.rows = start;
    frame.rows_stride = lanes;
  }

  // Where the rows of a tile go that can't be stored as whole, evenly spaced vectors.
  static WEIGHTOPS_INLINE void scatter(const Target& target, int64_t lane, const Span& span,
                                       const T* result, T* to) {
    const int64_t width = std::min<int64_t>(lanes, target.width - lane);
    for (int64_t m = 0; m < span.size(); ++m, result += lanes) {
      T* row = to + target.place.along(span.begin + m);
      if (width == lanes)
        Arithmetic::store(row, Arithmetic::load(result));
      else
        for (int64_t k = 0; k < width; ++k) row[k] = result[k];
    }
  }

  // Adds `channels` of a tile's rows, `stride` apart, to the slots of their sum.
  static WEIGHTOPS_INLINE void add_to_sum(const T* rows, int64_t stride, const Place& place,
                                          const Span& span, int64_t channels, T* sums) {
    T* to = sums + at(place, span.at);
    if (channels % lanes != 0) {
      for (int64_t m = 0; m < span.size(); ++m)
        for (int64_t k = 0; k < channels; ++k)
          to[place.along(span.begin + m) + k] += rows[m * stride + k];
      return;
    }
    for (int64_t v = 0; v < channels; v += lanes) {
      if (!place.moves()) {
        Arithmetic::sum_rows(rows + v, stride, span.size(), lanes, to + v, true, T(1));
        continue;
      }
      const auto add = [&](T* sum, const T* row) __attribute__((always_inline)) {
        Arithmetic::store(sum, Arithmetic::load(sum) + Arithmetic::load(row));
      };
      const int64_t* table = place.table.empty() ? nullptr : place.table.data() + span.begin;
      T* even = to + span.begin * place.stride + v;
      if (table)
        for (int64_t m = 0; m < span.size(); ++m) add(to + table[m] + v, rows + m * stride + v);
      else
        for (int64_t m = 0; m < span.size(); ++m)
          add(even + m * place.stride, rows + m * stride + v);
    }
  }
};

}  // namespace weightops::equivariant
