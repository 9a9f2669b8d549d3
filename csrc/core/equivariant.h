// Equivariant linear layers on weight-space features [P, C], one network at a time: sums of every
// tensor over its indices (pool), one small matrix product per type on tiles of positions (mix),
// and one pass over the output that adds what is broadcast (write). Arithmetic: equivariant_tile.h.
#pragma once

#include <cmath>
#include <memory>

#include "equivariant_taps.h"
#include "equivariant_thin.h"

namespace weightops::equivariant {

// A buffer that is neither cleared nor given back between networks.
template <class T>
class Buffer {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      data_.reset(new (std::align_val_t(64)) T[count]);
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete[](data, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

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
struct Network {
  using Arithmetic = Tile<T, Bytes>;
  using Pooling = Pool<T, Bytes>;
  using TapsRows = TapsKernel<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  using Factor = typename Arithmetic::Factor;
  using Frame = typename Arithmetic::Frame;
  using Right = typename Arithmetic::Right;
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

  // The gradient of a layer's parameters: `other` is what the layer reads, where its transpose
  // runs.
  struct Outer {
    const Features<T>* other;
    T* gradient;  // [term, channels of other, padded channels of from]
    bool sums;    // whether other's sums are taken on the way
  };

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

  // Compiled once for each instruction set.
  struct Job;
  struct Kernels {
    void (*run_step)(const Job&, const Step&, int64_t, int64_t);
    void (*run_taps)(const Job&, const Taps&, const Features<T>*, bool);
  };

  // What all tiles of one network share.
  struct Job {
    const Program& program;
    const Features<T>& from;
    const Parameters<T>& parameters;
    T* out;  // may be null
    bool stream, activate;
    Workspace<T>& workspace;
    const Outer* outer;       // may be null
    const Features<T>* next;  // what becomes of `out`, where its sums are taken on the way, or null
    const Kernels& kernels;
  };

  static WEIGHTOPS_INLINE void run_tile(const Job& job, const Step& step, const Span& span) {
    constexpr int depth = kDepth;
    const Program& program = job.program;
    const int64_t own = job.from.channels,
                  own_rows = (own + depth - 1) / depth * depth * span.pitch;
    T* packed = job.workspace.packed.get(0);
    T* other_packed = packed + program.max_readers * ((own + depth - 1) / depth * depth * kTile);
    const T** rows = job.workspace.rows.get(0);
    Factor* factors = job.workspace.factors.get(0);
    int64_t* second = job.workspace.second.get(0);
    for (size_t r = 0; r < step.readers.size(); ++r)
      rows[r] = rows_of(step.readers[r], job.from, span, packed + int64_t(r) * own_rows);
    if (job.out) {
      T* broadcast = job.workspace.broadcast.get(0);
      T* buffers = job.workspace.tile.get(0);
      for (size_t c = 0; c < step.columns.size();) {
        const Column* columns = &step.columns[c];
        const bool two = c + 1 < step.columns.size() && columns[1].readers == columns[0].readers;
        const int64_t width = two ? 2 : 1;
        int64_t count = 0;
        for (size_t f = 0; f < columns->readers.size(); ++f)
          for (int64_t k = 0; k < own; k += depth) {
            const int64_t r = columns->readers[f];
            factors[count] = {rows[r] + k * span.pitch,
                              job.parameters.blocks + columns->blocks[f] + k * program.padded,
                              std::min<int64_t>(depth, own - k), rows[r], 0};
            // Spread over the columns: lines come more slowly than products are done.
            const int64_t pairs = (step.columns.size() + 1) / 2;
            if (int64_t(c / 2) % pairs == count % pairs && step.readers[r].whole &&
                step.readers[r].place.table.empty()) {
              factors[count].ahead = ahead_of(step.readers[r].place, job.from, span) + k;
              factors[count].ahead_stride = step.readers[r].place.stride;
            }
            second[count++] = two ? columns[1].blocks[f] - columns[0].blocks[f] : 0;
          }
        Frame frames[2];
        bool direct[2] = {true, true}, streams = job.stream;
        T* to[2];
        for (int64_t v = 0; v < width; ++v) {
          const Target& target = step.targets[columns[v].target];
          const int64_t lane = columns[v].lane;
          begin_with(target, lane, span, job.parameters, broadcast, buffers + v * kTile * lanes,
                     frames[v]);
          frames[v].activate = job.activate && target.whole;
          to[v] = (target.whole ? job.out : broadcast) + at(target.place, span.at) + lane;
          direct[v] = target.place.table.empty() && target.width - lane >= lanes;
          T* even = to[v] + span.begin * target.place.stride;
          frames[v].out = direct[v] ? even : buffers + (2 + v) * kTile * lanes;
          frames[v].out_stride = direct[v] ? target.place.stride : lanes;
          streams = streams && direct[v] && target.whole && target.width % lanes == 0 &&
                    reinterpret_cast<uintptr_t>(even) % Bytes == 0;
        }
        const auto multiply = [&](auto w, auto s) __attribute__((always_inline)) {
          Arithmetic::template multiply_rows<decltype(w)::value, decltype(s)::value>(
              span.size(), factors, count, second, program.padded, frames);
        };
        using One = std::integral_constant<int, 1>;
        using Two = std::integral_constant<int, 2>;
        if (two)
          streams ? multiply(Two(), std::true_type()) : multiply(Two(), std::false_type());
        else
          streams ? multiply(One(), std::true_type()) : multiply(One(), std::false_type());
        for (int64_t v = 0; v < width; ++v)
          if (!direct[v])
            scatter(step.targets[columns[v].target], columns[v].lane, span, frames[v].out, to[v]);
        if (job.next && step.streams)
          for (int64_t v = 0; v < width; ++v)
            for (const Place& sum : step.others[columns[v].target].sums)
              add_to_sum(frames[v].out, frames[v].out_stride, sum, span, lanes,
                         job.next->sums + columns[v].lane);
        c += width;
      }
    }
    if (job.outer == nullptr) return;
    const int64_t other = job.outer->other->channels,
                  other_rows = (other + depth - 1) / depth * depth * span.pitch;
    const int64_t ld = Arithmetic::padded(own), count = step.others.size();
    Right* right = job.workspace.right.get(0);
    for (int64_t o = 0; o < count; ++o) {
      const T* left =
          rows_of(step.others[o], *job.outer->other, span, other_packed + o * other_rows);
      for (int64_t i = 0; i < other; i += depth) {
        if (job.outer->sums)
          for (const Place& sum : step.others[o].sums)
            add_to_sum(left + i * span.pitch, depth, sum, span, std::min<int64_t>(depth, other - i),
                       job.outer->other->sums + i);
        int64_t found = 0;
        for (size_t r = 0; r < step.readers.size(); ++r)
          if (const int64_t t = step.terms[r * count + o]; t >= 0)
            for (int64_t k = 0; k < ld; k += lanes)
              right[found++] = {rows[r] + k / depth * depth * span.pitch + k % depth,
                                job.outer->gradient + (t * other + i) * ld + k};
        const Place& place = step.others[o].place;
        const bool fetches = step.others[o].whole && place.table.empty();
        const T* ahead = fetches ? ahead_of(place, *job.outer->other, span) + i : left;
        const int64_t channels = std::min<int64_t>(depth, other - i),
                      rows_ahead = fetches ? span.size() : 0;
        for (int64_t f = 0; f < found; f += 2) {
          // As above, a share of the lines with every product.
          for (int64_t m = rows_ahead * f / found; m < rows_ahead * std::min(f + 2, found) / found;
               ++m)
            __builtin_prefetch(ahead + m * place.stride);
          if (f + 1 < found)
            Arithmetic::template outer<2>(left + i * span.pitch, channels, right + f, span.size(),
                                          ld);
          else
            Arithmetic::template outer<1>(left + i * span.pitch, channels, right + f, span.size(),
                                          ld);
        }
      }
    }
  }

  static WEIGHTOPS_INLINE void run_thin_tile(const Job& job, const Step& step, const Span& span) {
    using Dots = DotProducts<T, Bytes>;
    T* broadcast = job.workspace.broadcast.get(0);
    T start[kTile];
    for (const Column& column : step.columns) {
      const Target& target = step.targets[column.target];
      T common = target.bias >= 0 && job.parameters.bias ? job.parameters.bias[target.bias] : T(0);
      for (const Addend& each : target.addends)
        if (!each.place.moves()) common += broadcast[at(each.place, span.at)] * T(each.scale);
      std::fill_n(start, span.size(), common);
      for (const Addend& each : target.addends) {
        if (!each.place.moves()) continue;
        const T *from = broadcast + at(each.place, span.at), scale = each.scale;
        for (int64_t m = 0; m < span.size(); ++m)
          start[m] += from[each.place.along(span.begin + m)] * scale;
      }
      if (!target.diagonal_begin.empty())
        for (int64_t d = target.diagonal_begin[span.outer];
             d < target.diagonal_begin[span.outer + 1]; ++d) {
          const OnDiagonal& each = target.diagonal[d];
          if (each.at >= span.begin && each.at < span.end)
            start[each.at - span.begin] += broadcast[each.offset];
        }
      T* to = (target.whole ? job.out : broadcast) + at(target.place, span.at);
      for (int64_t m = 0; m < span.size(); m += lanes) {
        const int64_t count = std::min<int64_t>(lanes, span.size() - m);
        Vector sums[lanes] = {};
        for (size_t f = 0; f < column.readers.size(); ++f) {
          const Source& source = step.readers[column.readers[f]];
          const T* from =
              (source.whole ? job.from.values : job.from.sums) + at(source.place, span.at);
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

  // Outer positions [from, to) of a step.
  static WEIGHTOPS_INLINE void run_step(const Job& job, const Step& step, int64_t from,
                                        int64_t to) {
    const int64_t rank = step.outer_sizes.size();
    // Tiles below each other share the pages and lines of operands that lie the other way round.
    const int64_t band = step.turns ? 8 : 1;
    int64_t coordinates[64];
    for (int64_t first = from; first < to; first += band)
      for (int64_t begin = 0; begin < step.run; begin += step.tile)
        for (int64_t outer = first; outer < std::min(to, first + band); ++outer) {
          int64_t rest = outer;
          for (int64_t dim = rank; dim-- > 0;) {
            coordinates[dim] = rest % step.outer_sizes[dim];
            rest /= step.outer_sizes[dim];
          }
          const Span span{coordinates,
                          outer,
                          begin,
                          std::min(begin + step.tile, step.run),
                          step.turns ? step.run : step.tile,
                          step.tile};
          job.program.thin ? run_thin_tile(job, step, span) : run_tile(job, step, span);
        }
  }

  // Room for any step of the program; to be called before the first network.
  static WEIGHTOPS_INLINE void reserve(const Program& program, Workspace<T>& workspace) {
    const auto rows = [](int64_t channels) {
      return (channels + kDepth - 1) / kDepth * kDepth * kTile;
    };
    const int64_t packed = program.max_readers * rows(program.channels_read) +
                           program.max_targets * rows(program.channels_written);
    T* room = workspace.packed.get(packed);
    if (std::min(program.channels_read, program.channels_written) < kDepth)
      std::fill_n(room, packed, T(0));
    workspace.tile.get(4 * kTile * lanes);
    workspace.broadcast.get(program.plan->sides[1 - program.reads].write_slots * program.padded);
    workspace.rows.get(program.max_readers);
    const int64_t factors = program.max_readers * (rows(program.channels_read) / kDepth / kTile);
    workspace.factors.get(factors);
    workspace.second.get(factors);
    workspace.right.get(program.max_readers * rows(program.channels_read) / kTile);
  }

  // out = layer(from).
  static WEIGHTOPS_INLINE void run(const Job& job) {
    for (const Step& step : job.program.steps) job.kernels.run_step(job, step, 0, step.outer);
    for (const Group& group : job.program.groups) run_group(job, group, nullptr, false);
  }

  // The blocks of a group's four types. Means over rows and columns are their business, both when
  // reading and when broadcasting.
  static WEIGHTOPS_INLINE T* taps_blocks(const Job& job, const Taps& taps, int64_t more) {
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
  static WEIGHTOPS_INLINE void run_taps(const Job& job, const Taps& taps, const Features<T>* other,
                                        bool mean) {
    const Program& program = job.program;
    const int64_t own = program.channels_read, width = program.channels_written;
    T* packed = job.workspace.packed.get(0);
    T* other_packed = packed + own * kTile;
    T* blocks = taps_blocks(job, taps, 9 * width + lanes);
    T *start = blocks + 4 * own * width, *zeros = start + 9 * width;
    Arithmetic::store(zeros, Vector{});
    const T* broadcast = job.workspace.broadcast.get(0);
    // This tile and the next are in the first-level cache.
    const int64_t most = std::max<int64_t>(3, TapsRows::kPairs * kDepth / own);
    for (int64_t o = 0; o < taps.sizes[0]; ++o) {
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
        TapsRows::pack(from, own, pairs, false, packed);
        const auto rows = TapsRows::rows(from, own, packed);
        for (int64_t lane = 0; lane < width && job.out; lane += lanes) {
          typename TapsRows::Column column{blocks + lane, start + lane * 9,    zeros,       0,
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
              TapsRows::template multiply<true>(rows, p, width, column);
            else
              TapsRows::template multiply<false>(rows, p, width, column);
            column.out += 9 * width;
            column.broadcast += 9 * column.broadcast_stride;
          }
        }
        if (!job.outer) continue;
        const T* left = other->values + at;
        TapsRows::pack(left, width, pairs, mean, other_packed);
        TapsRows::outer(TapsRows::rows(left, width, other_packed), rows, pairs, taps.terms,
                        job.outer->gradient);
      }
    }
  }

  static WEIGHTOPS_INLINE void run_thin_taps(const Job& job, const Taps& taps) {
    const int64_t own = job.from.channels;
    const T *blocks = taps_blocks(job, taps, 0), *broadcast = job.workspace.broadcast.get(0);
    for (int64_t o = 0; o < taps.sizes[0]; ++o) {
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
        sum += DotProducts<T, Bytes>::taps(from, own, blocks);
        if (job.activate) sum = Arithmetic::relu(sum);
        std::memcpy(to, &sum, 9 * sizeof(T));
      }
    }
  }

  static WEIGHTOPS_INLINE void run_any_taps(const Job& job, const Taps& taps,
                                            const Features<T>* other, bool mean) {
    if constexpr (lanes == 16)
      if (job.program.thin) return run_thin_taps(job, taps);
    run_taps(job, taps, other, mean);
  }

  static WEIGHTOPS_INLINE void run_group(const Job& job, const Group& group,
                                         const Features<T>* other, bool mean) {
    const Program& program = job.program;
    if constexpr (Bytes == 64)
      if (group.taps.found && !(program.thin && lanes != 16))
        return job.kernels.run_taps(job, group.taps, other, mean);
    for (int64_t band = 0; band < group.bands; ++band) {
      Pooling::pool_band(job.from, group, group.nodes[program.reads], band, program.mean);
      if (other) Pooling::pool_band(*other, group, group.nodes[1 - program.reads], band, mean);
      for (const Step& step : group.steps) {
        const int64_t outer = step.outer / group.bands;
        job.kernels.run_step(job, step, band * outer, (band + 1) * outer);
      }
    }
  }

  // The sums that are taken on the way begin with zero.
  static WEIGHTOPS_INLINE void clear(const Program& program, const Features<T>& features) {
    for (const Node& node : features.side->nodes)
      if (node.whole && program.streamed[node.tensor])
        for (int64_t child : node.children) {
          const Node& sum = features.side->nodes[child];
          std::fill_n(features.sums + sum.slot * features.channels, sum.numel * features.channels,
                      T(0));
        }
  }

  // out = layer(from), which may be left out, and the parameters' gradient, for which `other` is
  // read once: what is not a whole tensor waits for the sums that are taken meanwhile.
  static WEIGHTOPS_INLINE void run_backward(const Job& job, const Features<T>& other, bool mean,
                                            T* gradient) {
    const Program& program = job.program;
    clear(program, other);
    const Outer now{&other, gradient, true}, later{&other, gradient, false};
    Job streaming = job, rest = job;
    streaming.outer = &now;
    rest.outer = &later;
    rest.out = nullptr;
    for (const Step& step : program.steps)
      if (job.out && !step.streams) job.kernels.run_step(job, step, 0, step.outer);
    for (const Step& step : program.steps)
      if (step.streams) job.kernels.run_step(streaming, step, 0, step.outer);
    Pooling::pool(other, mean, program.sliced[1 - program.reads], &program.streamed);
    for (const Step& step : program.steps)
      if (!step.streams) job.kernels.run_step(rest, step, 0, step.outer);
    rest.out = job.out;
    for (const Group& group : program.groups) run_group(rest, group, &other, mean);
  }
};

}  // namespace weightops::equivariant
