// A learned optimizer's functional, a network [P] at a time: every weight's channels over their
// root mean squares through layers that see one weight each; and of their last features, a chunk of
// weights at a time, what the layer behind them reads. No features are written.
#pragma once

#include "equivariant_thin.h"
#include "functional_readout.h"

namespace weightops::functional {

constexpr int64_t kDepth = equivariant::kDepth;
constexpr int64_t kChunk = 96;  // weights whose features are in the first-level cache

inline int64_t padded(int64_t channels) { return (channels + kDepth - 1) / kDepth * kDepth; }

template <class T>
struct Task {
  const Readout& readout;
  std::vector<int64_t> segments;  // where tensors begin whose mean squares are taken, and P
  std::vector<int64_t> widths;    // of all layers: channels and shared ones, ..., 1
  int64_t networks, momenta, shared_size, parts;
  double eps;
  const T *flat, *grads, *momentum, *shared, *theta;
  int64_t flat_stride, grads_stride, momentum_strides[2], shared_stride, theta_stride;
  T* out;
  // What is to become of the momenta first, if `moving` is not null, as of `momentum`: of each of
  // so many rows a share of what it is away from the gradient.
  T* moving = nullptr;
  const T* shares = nullptr;  // [rows, networks], or strides of 0
  int64_t moving_rows = 0, share_strides[2] = {0, 0};

  int64_t numel() const { return segments.back(); }
  int64_t channels() const { return 2 + momenta; }
  int64_t layers() const { return widths.size() - 1; }
  int64_t hidden() const { return padded(widths[layers() - 1]); }
  int64_t most_channels() const {
    return padded(*std::max_element(widths.begin() + 1, widths.end()));
  }
  const T* channel(int64_t network, int64_t c) const {
    return c == 0   ? flat + network * flat_stride
           : c == 1 ? grads + network * grads_stride
                    : momentum + (c - 2) * momentum_strides[0] + network * momentum_strides[1];
  }
};

// What is held of one network.
template <class T>
struct State {
  Buffer<double> squares;                 // [parts, segments, channels]
  Buffer<T> scales;                       // [segments, channels]
  Buffer<T> room;                         // of parameters
  std::vector<const T*> weights, biases;  // of the layers that see one weight; rows are padded
  const T *blocks, *bias;                 // of the last one: [terms, hidden], [tensors]
  Buffer<T> sums;                         // [parts, slots, hidden]; sums and rows that are kept
  Buffer<T> fields, broadcast;
};

// What one thread needs.
template <class T>
struct Scratch {
  Buffer<T> features[2], first;
  Buffer<equivariant::Factor<T>> factors;
  Buffer<int64_t> second;
};

template <class T, int Bytes>
struct Kernel {
  using Arithmetic = equivariant::Tile<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  using Factor = equivariant::Factor<T>;
  using Frame = typename Arithmetic::Frame;
  using Dots = equivariant::DotProducts<T, Bytes>;
  using Rows = equivariant::Rows<T, Bytes>;
  using Thin = equivariant::ThinLayer<T, Bytes>;
  using Pooling = equivariant::Pool<T, Bytes>;
  using Step = equivariant::Step;
  static constexpr int lanes = Arithmetic::lanes;
  static constexpr int64_t kMoved = 512;

  // The last segment that begins at `position` or before: empty ones are over then.
  static WEIGHTOPS_INLINE int64_t segment_at(const Task<T>& task, int64_t position) {
    return std::upper_bound(task.segments.begin(), task.segments.end() - 1, position) -
           task.segments.begin() - 1;
  }

  static WEIGHTOPS_INLINE double squares(const T* from, int64_t count) {
    Vector sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * lanes <= count; i += 4 * lanes)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vector x = Arithmetic::load(from + i + v * lanes);
        sums[v] += x * x;
      }
    double total = 0;
    for (int v = 0; v < 4; ++v)
      for (int k = 0; k < lanes; ++k) total += sums[v][k];
    for (; i < count; ++i) total += from[i] * from[i];
    return total;
  }

  // Moves momenta by their share towards the gradient, as torch.lerp does.
  static WEIGHTOPS_INLINE void move(T* momenta, const T* grads, T share, int64_t count) {
    const bool near = share < T(0.5);
    const T factor = near ? share : share - T(1);
    const T* from = near ? momenta : grads;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const Vector m = Arithmetic::load(momenta + i), g = Arithmetic::load(grads + i);
      Arithmetic::store(momenta + i, Arithmetic::load(from + i) + (g - m) * factor);
    }
    for (; i < count; ++i) momenta[i] = from[i] + (grads[i] - momenta[i]) * factor;
  }

  // Sums of squares of a part's share of every segment, [segments, channels].
  static WEIGHTOPS_INLINE void square(const Task<T>& task, int64_t network, int64_t part,
                                      State<T>& state) {
    const int64_t end = task.readout.begin(part + 1, task.parts), channels = task.channels();
    const int64_t size = (task.segments.size() - 1) * channels;
    double* to = state.squares.get(0) + part * size;
    std::fill_n(to, size, 0.0);
    for (int64_t at = task.readout.begin(part, task.parts); at < end;) {
      const int64_t s = segment_at(task, at), past = std::min(end, task.segments[s + 1]);
      // What was moved is in the first-level cache.
      const int64_t stop = task.moving ? std::min(past, at + kMoved) : past;
      for (int64_t r = 0; task.moving && r < task.moving_rows; ++r)
        move(task.moving + r * task.momentum_strides[0] + network * task.momentum_strides[1] + at,
             task.channel(network, 1) + at,
             task.shares[r * task.share_strides[0] + network * task.share_strides[1]], stop - at);
      for (int64_t c = 0; c < channels; ++c)
        to[s * channels + c] += squares(task.channel(network, c) + at, stop - at);
      at = stop;
    }
  }

  // relu(bias + the factors' products), `width` channels of it. Features of a chunk lie kDepth
  // channels after the other: [width / kDepth, kChunk, kDepth].
  template <int pitch>
  static WEIGHTOPS_INLINE void layer(int64_t rows, Factor* factors, int64_t count, int64_t* second,
                                     int64_t width, const T* bias, T* to) {
    std::fill_n(second, count, lanes);
    for (int64_t lane = 0; lane < width;) {
      const int64_t vectors = lane + 2 * lanes <= width ? 2 : 1;
      Frame frames[2];
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = lane + v * lanes;
        frames[v].rows = bias;
        frames[v].rows_stride = 0;
        frames[v].scale = 0;
        frames[v].common = Arithmetic::load(bias + at);
        frames[v].activate = true;
        frames[v].out = to + at / kDepth * kChunk * kDepth + at % kDepth;
        frames[v].out_stride = kDepth;
      }
      if (vectors == 2)
        Arithmetic::template multiply_rows<2, false, pitch>(rows, factors, count, second, width,
                                                            frames);
      else
        Arithmetic::template multiply_rows<1, false, pitch>(rows, factors, count, second, width,
                                                            frames);
      lane += vectors * lanes;
      for (int64_t f = 0; f < count; ++f) factors[f].block += vectors * lanes;
    }
  }

  // The features of weights [at, at + rows) of a segment: where they lie. Those that come next are
  // `ahead` of them.
  static WEIGHTOPS_INLINE const T* features(const Task<T>& task, const State<T>& state,
                                            int64_t network, int64_t at, int64_t rows,
                                            int64_t ahead, Scratch<T>& scratch) {
    Factor* factors = scratch.factors.get(0);
    int64_t* second = scratch.second.get(0);
    const T *from = nullptr, *first = scratch.first.get(0);
    for (int64_t l = 0; l + 1 < task.layers(); ++l) {
      const int64_t width = padded(task.widths[l + 1]);
      T* to = scratch.features[l % 2].get(0);
      int64_t count = 0;
      if (l == 0) {
        // A channel's numbers lie side by side: it is a factor of its own.
        for (int64_t c = 0; c < task.channels(); ++c) {
          const T* numbers = task.channel(network, c) + at;
          factors[count++] = {numbers, first + c * width, 1, numbers + ahead, 1};
        }
        layer<1>(rows, factors, count, second, width, state.biases[l], to);
      } else {
        for (int64_t k = 0; k < task.widths[l]; k += kDepth) {
          const T* numbers = from + k * kChunk;
          factors[count++] = {numbers, state.weights[l] + k * width,
                              std::min(kDepth, task.widths[l] - k), numbers, 0};
        }
        layer<kDepth>(rows, factors, count, second, width, state.biases[l], to);
      }
      from = to;
    }
    return from;
  }

  // Adds the rows of a chunk that begins at position `at` of a tensor to a sum's.
  static WEIGHTOPS_INLINE void add_to(const Sum& sum, int64_t at, int64_t rows, const T* from,
                                      int64_t hidden, T* sums) {
    for (int64_t m = 0; m < rows;) {
      const int64_t block = sum.size * sum.inner, outer = (at + m) / block,
                    within = (at + m) % block, along = within % sum.inner;
      T* to = sums + (sum.slot + outer * sum.inner + along) * hidden;
      const bool one = sum.inner == 1;
      const int64_t run = std::min(rows - m, one ? block - within : sum.inner - along);
      for (int64_t k = 0; k < hidden; k += kDepth) {
        const T* row = from + k * kChunk + m * kDepth;
        if (one) {
          Arithmetic::sum_rows(row, kDepth, run, kDepth, to + k, true, T(1));
          continue;
        }
        for (int64_t r = 0; r < run; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < kDepth; v += lanes)
            Arithmetic::store(to + r * hidden + k + v, Arithmetic::load(to + r * hidden + k + v) +
                                                           Arithmetic::load(row + r * kDepth + v));
      }
      m += run;
    }
  }

  static WEIGHTOPS_INLINE void copy(const T* from, int64_t hidden, T* to) {
    for (int64_t k = 0; k < hidden; k += kDepth)
      std::memcpy(to + k, from + k * kChunk, kDepth * sizeof(T));
  }

  // Every row's dot product with a term's matrix.
  static WEIGHTOPS_INLINE void multiply(const T* from, int64_t rows, const T* block, int64_t hidden,
                                        T* to) {
    for (int64_t m = 0; m < rows; m += lanes) {
      Vector sums[lanes] = {};
      for (int64_t k = 0; k < hidden; k += kDepth) {
        const T* row = from + k * kChunk + m * kDepth;
#pragma GCC unroll 8
        for (int v = 0; v < kDepth; v += lanes) {
          const Vector weights = Arithmetic::load(block + k + v);
#pragma GCC unroll 16
          for (int r = 0; r < lanes; ++r)
            sums[r] += Arithmetic::load(row + r * kDepth + v) * weights;
        }
      }
      const Vector found = Dots::across(sums);
      if (m + lanes <= rows)
        Arithmetic::store(to + m, found);
      else
        std::memcpy(to + m, &found, (rows - m) * sizeof(T));
    }
  }

  // What the last layer reads of a part's weights.
  static WEIGHTOPS_INLINE void read(const Task<T>& task, int64_t network, int64_t part,
                                    State<T>& state, Scratch<T>& scratch) {
    const Readout& readout = task.readout;
    const int64_t channels = task.channels(), hidden = task.hidden();
    const int64_t width = padded(task.widths[1]), most = task.most_channels();
    for (Buffer<T>& each : scratch.features) each.get(most * kChunk);
    T* first = scratch.first.get(channels * width);
    scratch.factors.get(std::max(channels, most / kDepth));
    scratch.second.get(std::max(channels, most / kDepth));
    T *kept = state.sums.get(0), *fields = state.fields.get(0);
    T* sums = kept + part * readout.plan.sides[0].slots * hidden;
    const int64_t begin = readout.begin(part, task.parts),
                  end = readout.begin(part + 1, task.parts);
    for (const Tensor& tensor : readout.tensors) {
      int64_t at = std::max(begin, tensor.offset);
      const int64_t to = std::min(end, tensor.offset + tensor.numel);
      if (at >= to) continue;
      for (const Sum& sum : tensor.sums)
        std::fill_n(sums + sum.slot * hidden, tensor.numel / sum.size * hidden, T(0));
      auto next =
          std::lower_bound(tensor.kept.begin(), tensor.kept.end(), at - tensor.offset,
                           [](const Kept& each, int64_t position) { return each.at < position; });
      const int64_t from = at - tensor.offset;
      while (at < to) {
        const int64_t segment = segment_at(task, at),
                      stop = std::min(to, task.segments[segment + 1]);
        const T* scales = state.scales.get(0) + segment * channels;
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t k = 0; k < width; ++k)
            first[c * width + k] = state.weights[0][c * width + k] * scales[c];
        // Of wide rows the same columns one after another: the sums over rows stay in the cache.
        const bool turns = tensor.wide > 0 && tensor.kept.empty();
        const int64_t wide = turns ? tensor.wide : stop - at;
        const int64_t row = turns ? at - (at - tensor.offset) % wide : at;
        for (int64_t column = 0; column < wide; column += kChunk)
          for (int64_t top = row; top < stop; top += wide) {
            const int64_t begin = std::max(at, top + column);
            const int64_t rows = std::min({top + wide, top + column + kChunk, stop}) - begin;
            if (rows <= 0) continue;
            const int64_t ahead = turns ? wide : kChunk, place = begin - tensor.offset;
            const T* found = features(task, state, network, begin, rows, ahead, scratch);
            for (const Sum& sum : tensor.sums) add_to(sum, place, rows, found, hidden, sums);
            for (; next != tensor.kept.end() && next->at < place + rows; ++next)
              copy(found + (next->at - place) * kDepth, hidden, kept + next->slot * hidden);
            for (int64_t m = 0; tensor.copy >= 0 && m < rows; ++m)
              copy(found + m * kDepth, hidden, kept + (tensor.copy + place + m) * hidden);
            for (const Field& field : tensor.fields)
              multiply(found, rows, state.blocks + field.term * hidden, hidden,
                       fields + field.at + place);
          }
        at = stop;
      }
      fold(tensor, from, to - tensor.offset, fields);
    }
  }

  // Sums of positions [begin, end), which are whole rows.
  static WEIGHTOPS_INLINE void fold(const Tensor& tensor, int64_t begin, int64_t end, T* fields) {
    int64_t taken = 1;
    for (const Fold& each : tensor.folds) {
      if (each.first) taken = 1;
      const int64_t blocks = (end - begin) / taken / (each.size * each.inner);
      const T* from = fields + each.from + begin / taken;
      taken *= each.size;
      T* to = fields + each.to + begin / taken;
      for (int64_t b = 0; b < blocks; ++b, from += each.size * each.inner)
        for (int64_t i = 0; i < each.inner; ++i) {
          T sum = 0;
          for (int64_t n = 0; n < each.size; ++n) sum += from[n * each.inner + i];
          *to++ = sum * T(each.scale);
        }
    }
  }

  // The sums of all parts, in their order, and those of sums.
  static WEIGHTOPS_INLINE void pool(const Task<T>& task, State<T>& state) {
    const Readout& readout = task.readout;
    const equivariant::Side& side = readout.plan.sides[0];
    const int64_t hidden = task.hidden(), size = side.slots * hidden;
    T* sums = state.sums.get(0);
    for (const Tensor& tensor : readout.tensors) {
      bool begun = false;
      for (int64_t p = 0; p < task.parts; ++p) {
        const int64_t begin = std::max(readout.begin(p, task.parts), tensor.offset);
        if (begin >= std::min(readout.begin(p + 1, task.parts), tensor.offset + tensor.numel))
          continue;
        for (const Sum& sum : tensor.sums) {
          T* to = sums + sum.slot * hidden;
          const T* from = to + p * size;
          const int64_t length = tensor.numel / sum.size * hidden;
          if (begun)
            for (int64_t i = 0; i < length; i += lanes)
              Arithmetic::store(to + i, Arithmetic::load(to + i) + Arithmetic::load(from + i));
          else if (p > 0)
            std::copy_n(from, length, to);
        }
        begun = true;
      }
    }
    Pooling::pool({&side, nullptr, hidden, sums}, readout.plan.mean, readout.folded(),
                  &readout.streamed);
  }

  // Outer positions [begin, end) of a type of the last layer.
  static WEIGHTOPS_INLINE void write(const Task<T>& task, int64_t network, const Step& step,
                                     int64_t begin, int64_t end, State<T>& state) {
    int64_t coordinates[64];
    for (int64_t outer = begin; outer < end; ++outer) {
      int64_t rest = outer;
      for (int64_t dim = step.outer_sizes.size(); dim-- > 0;) {
        coordinates[dim] = rest % step.outer_sizes[dim];
        rest /= step.outer_sizes[dim];
      }
      for (int64_t at = 0; at < step.run; at += step.tile)
        write_tile(task, network, step,
                   {coordinates, outer, at, std::min(at + step.tile, step.run), 0, 0}, state);
    }
  }

  static WEIGHTOPS_INLINE void write_tile(const Task<T>& task, int64_t network, const Step& step,
                                          const typename Rows::Span& span, State<T>& state) {
    const Readout& readout = task.readout;
    const int64_t hidden = task.hidden();
    T* broadcast = state.broadcast.get(0);
    alignas(64) T values[equivariant::kTile + lanes];
    for (const equivariant::Column& column : step.columns) {
      const equivariant::Target& target = step.targets[column.target];
      Thin::begin(target, span, state.bias, broadcast, values);
      bool products = false;
      for (size_t f = 0; f < column.readers.size(); ++f) {
        const int64_t term = column.blocks[f];
        products |= !readout.is_field[term];
        if (readout.is_field[term])
          Thin::add(step.readers[column.readers[f]].place, span,
                    state.fields.get(0) + readout.base[term], T(1), values);
      }
      for (int64_t m = 0; products && m < span.size(); m += lanes) {
        Vector sums[lanes] = {};
        for (size_t f = 0; f < column.readers.size(); ++f) {
          if (readout.is_field[column.blocks[f]]) continue;
          const equivariant::Place& place = step.readers[column.readers[f]].place;
          const int64_t from = Rows::at(place, span.at);
          const T* rows[lanes];
          for (int64_t r = 0; r < lanes; ++r)
            rows[r] = state.sums.get(0) +
                      (from + place.along(std::min(span.begin + m + r, span.end - 1))) * hidden;
          Dots::add(rows, state.blocks + column.blocks[f] * hidden, hidden, sums);
        }
        Arithmetic::store(values + m, Arithmetic::load(values + m) + Dots::across(sums));
      }
      T* to = (target.whole ? task.out + network * task.numel() : broadcast) +
              Rows::at(target.place, span.at);
      for (int64_t m = 0; m < span.size(); ++m) to[target.place.along(span.begin + m)] = values[m];
    }
  }
};

}  // namespace weightops::functional
