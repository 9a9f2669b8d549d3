// The layers of small networks on a block of images. A value lies as value[feature * width +
// image], features as torch has them, [channels, height, width]; `width` images are whole vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "elementary.h"
#include "population_plan.h"

namespace weightops::population {

// A convolution's tile: so many outputs times so many columns, which are neighbouring pixels, or
// neighbouring vectors of images.
constexpr int kMostOutputs = 8, kMostColumns = 6;

template <int Bytes>
struct Tile {
  static constexpr int registers = Bytes == 64 ? 32 : 16;
  static constexpr int outputs = Bytes == 64 ? 8 : 4;
  static constexpr int columns(int outputs) {
    return std::min(kMostColumns, (registers - 1) / (outputs + 1));
  }
};

// [0, total) in as few parts of at most `most` as there can be, whose sizes differ by one at most.
struct Parts {
  int64_t count, size, larger;  // the first `larger` ones have one more
  Parts(int64_t total, int64_t most) : count((total + most - 1) / most) {
    size = total / count;
    larger = total % count;
  }
  int64_t begin(int64_t part) const { return part * size + std::min(part, larger); }
  int64_t length(int64_t part) const { return size + (part < larger); }
};

// One row of tiles: for outputs c and columns x,
// to[c * output_stride + x * to_step] = bias[c] + sum over taps of weight[tap][c] * from[tap + x *
// step].
template <class Number>
struct Strip {
  const Number *from, *weight, *bias;  // bias may be null
  Number* to;
  int64_t taps[3], tap_strides[3];
  int64_t step, to_step, output_stride;
  Number least;  // of what is written: 0 where ReLU follows
  const Number*
      times;  // what is written is multiplied by this, which lies as `to` does; may be null
};

template <class Arithmetic, int outputs, int columns>
WEIGHTOPS_INLINE void run_strip(const Strip<typename Arithmetic::Number>& given, int64_t count) {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  const Strip<Number> strip = given;
  const int64_t step = strip.step;
  const Vector least = elementary::spread<Arithmetic>(&strip.least);
  for (int64_t tile = 0; tile < count; ++tile) {
    Vector sum[outputs][columns];
#pragma GCC unroll 8
    for (int c = 0; c < outputs; ++c) {
      const Vector bias = strip.bias ? elementary::spread<Arithmetic>(strip.bias + c) : Vector{};
#pragma GCC unroll 8
      for (int x = 0; x < columns; ++x) sum[c][x] = bias;
    }
    const Number* weight = strip.weight;
    const Number* channel = strip.from + tile * columns * step;
    for (int64_t i = 0; i < strip.taps[0]; ++i, channel += strip.tap_strides[0]) {
      const Number* row = channel;
      for (int64_t j = 0; j < strip.taps[1]; ++j, row += strip.tap_strides[1]) {
        const Number* from = row;
        for (int64_t k = 0; k < strip.taps[2]; ++k, from += strip.tap_strides[2]) {
          Vector taken[columns];
#pragma GCC unroll 8
          for (int x = 0; x < columns; ++x) taken[x] = Arithmetic::load(from + x * step);
#pragma GCC unroll 8
          for (int c = 0; c < outputs; ++c) {
            const Vector factor = elementary::spread<Arithmetic>(weight + c);
#pragma GCC unroll 8
            for (int x = 0; x < columns; ++x) sum[c][x] += taken[x] * factor;
          }
          weight += outputs;
        }
      }
    }
    const int64_t begin = tile * columns * strip.to_step;
    const auto each = [&](auto&& f) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int c = 0; c < outputs; ++c)
#pragma GCC unroll 8
        for (int x = 0; x < columns; ++x)
          f(sum[c][x], begin + c * strip.output_stride + x * strip.to_step);
    };
    if (strip.times)
      each([&](const Vector& made, int64_t at) __attribute__((always_inline)) {
        Arithmetic::store(strip.to + at, made * Arithmetic::load(strip.times + at));
      });
    else
      each([&](const Vector& made, int64_t at) __attribute__((always_inline)) {
        Arithmetic::store(strip.to + at, elementary::larger<Arithmetic>(least, made));
      });
  }
}

template <class Arithmetic, int outputs, int columns>
void enter_strip(const Strip<typename Arithmetic::Number>& strip, int64_t count) {
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    run_strip<Arithmetic, outputs, columns>(strip, count);
  });
}

template <class Number>
using StripKernel = void (*)(const Strip<Number>&, int64_t);

template <class Arithmetic, int outputs = 1, int columns = 1>
StripKernel<typename Arithmetic::Number> strip_kernel(int64_t wanted, int64_t wide) {
  using Limits = Tile<Arithmetic::bytes>;
  if constexpr (outputs < Limits::outputs)
    if (wanted > outputs) return strip_kernel<Arithmetic, outputs + 1>(wanted, wide);
  if constexpr (columns < Limits::columns(outputs))
    if (wide > columns) return strip_kernel<Arithmetic, outputs, columns + 1>(wanted, wide);
  return enter_strip<Arithmetic, outputs, columns>;
}

inline int64_t padded_numel(const Layer& layer) {
  return layer.taken.channels * (layer.taken.height + 2 * layer.padding[0]) *
         (layer.taken.width + 2 * layer.padding[1]);
}

// Numbers of room that forward_layer works in, of which it keeps nothing.
inline int64_t workspace_size(const Layer& layer, int64_t width) {
  const bool pads = layer.kind == Kind::conv && (layer.padding[0] > 0 || layer.padding[1] > 0);
  return pads ? padded_numel(layer) * width : 0;
}

inline bool multiplies(const Layer& layer) {
  return layer.kind == Kind::linear || layer.kind == Kind::conv;
}

// Numbers of a token's row in the tables of population_pairs.h: a multiple of every vector's.
inline int64_t table_row(const Layer& layer) { return (layer.made.channels + 15) / 16 * 16; }

// Numbers of what forward reads instead of a layer's weights.
inline int64_t packed_size(const Layer& layer) {
  if (layer.kind == Kind::token_pair) return 2 * layer.tokens * table_row(layer);
  return multiplies(layer) ? layer.weight_size() : 0;
}

// How the outputs of a convolution, or of a linear layer, are cut: `taps` numbers of a weight each.
struct Outputs {
  int64_t groups, outputs, taps;  // of one group
  Parts chunks;
  Outputs(const Layer& layer, int64_t most)
      : groups(layer.kind == Kind::conv ? layer.groups : 1),
        outputs(layer.made.channels / groups),
        taps(layer.weight_size() / layer.made.channels),
        chunks(outputs, most) {}
};

// The weights of a layer in one network's row, in the order in which forward_layer reads them:
// group after group, chunk of outputs after chunk, [tap][output].
template <class Arithmetic, class Number = typename Arithmetic::Number>
void pack_layer(const Layer& layer, const Number* row, Number* packed) {
  if (!multiplies(layer)) return;
  const Outputs all(layer, Tile<Arithmetic::bytes>::outputs);
  const Number* weight = row + layer.weight;
  for (int64_t group = 0; group < all.groups; ++group)
    for (int64_t chunk = 0; chunk < all.chunks.count; ++chunk) {
      const int64_t size = all.chunks.length(chunk);
      for (int64_t tap = 0; tap < all.taps; ++tap)
        for (int64_t c = 0; c < size; ++c) *packed++ = weight[c * all.taps + tap];
      weight += size * all.taps;
    }
}

// As pack_layer for the gradient of a linear layer's input: another one, whose outputs those are.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void pack_transposed(const Layer& layer, const Number* row, Number* packed) {
  const int64_t inputs = layer.taken.numel();
  const Parts chunks(inputs, Tile<Arithmetic::bytes>::outputs);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
    for (int64_t o = 0; o < layer.made.channels; ++o)
      packed = std::copy_n(row + layer.weight + o * inputs + chunks.begin(chunk),
                           chunks.length(chunk), packed);
}

template <class Number>
void pad(const Layer& layer, const Number* from, int64_t width, Number* to) {
  const int64_t across = layer.padding[1] * width, row = layer.taken.width * width;
  const int64_t down = layer.padding[0] * (row + 2 * across);
  for (int64_t channel = 0; channel < layer.taken.channels; ++channel) {
    to = std::fill_n(to, down, Number(0));
    for (int64_t y = 0; y < layer.taken.height; ++y, from += row) {
      to = std::fill_n(to, across, Number(0));
      to = std::copy_n(from, row, to);
      to = std::fill_n(to, across, Number(0));
    }
    to = std::fill_n(to, down, Number(0));
  }
}

// A linear layer or a convolution on blocks of one width: what does not depend on the network.
template <class Arithmetic>
class Products {
  using Number = typename Arithmetic::Number;
  using Limits = Tile<Arithmetic::bytes>;

 public:
  Products(const Layer& given, int64_t block)
      : layer_(given), width_(block), all_(given, Limits::outputs), strip_{} {
    Shape taken = layer_.taken;
    int64_t across = 1;
    if (layer_.kind == Kind::linear) {
      strip_.taps[0] = strip_.taps[1] = 1;
      strip_.taps[2] = taken.numel();
      strip_.tap_strides[2] = width_;
    } else {
      taken.height += 2 * layer_.padding[0];
      taken.width += 2 * layer_.padding[1];
      across = layer_.stride[1];
      down_ = layer_.stride[0] * taken.width * width_;
      strip_.taps[0] = taken.channels / all_.groups;
      strip_.tap_strides[0] = taken.pixels() * width_;
      strip_.taps[1] = layer_.kernel[0];
      strip_.tap_strides[1] = layer_.dilation[0] * taken.width * width_;
      strip_.taps[2] = layer_.kernel[1];
      strip_.tap_strides[2] = layer_.dilation[1] * width_;
    }
    strip_.output_stride = layer_.made.pixels() * width_;
    // Columns are pixels of a row, or vectors of images where there are more of those.
    const int64_t vectors = width_ / Arithmetic::lanes, pixels = layer_.made.width;
    const bool images = vectors >= pixels;
    columns_ = images ? vectors : pixels;
    others_ = images ? pixels : vectors;
    strip_.step = other_step_ = Arithmetic::lanes;
    strip_.to_step = other_to_step_ = Arithmetic::lanes;
    (images ? other_step_ : strip_.step) = across * width_;
    (images ? other_to_step_ : strip_.to_step) = width_;
    for (int more = 0; more < 2; ++more) {
      const int64_t outputs = all_.chunks.size + more;
      tiles_[more] = Parts(columns_, Limits::columns(outputs));
      for (int wider = 0; wider < 2; ++wider)
        kernels_[more][wider] = strip_kernel<Arithmetic>(outputs, tiles_[more].size + wider);
    }
  }

  void run(const Number* row, const Number* packed, const Number* from, Number* out,
           Number* workspace, bool rectify) const {
    run(row, packed, from, out, workspace, rectify, nullptr, [](int64_t, int64_t) {});
  }

  // What is made is multiplied by `times`, if that is not null; done(from, to) is told of channels
  // that have just been made.
  template <class F>
  void run(const Number* row, const Number* packed, const Number* from, Number* out,
           Number* workspace, bool rectify, const Number* times, F&& done) const {
    if (workspace_size(layer_, width_) > 0) {
      pad(layer_, from, width_, workspace);
      from = workspace;
    }
    Strip<Number> strip = strip_;
    strip.least = rectify ? 0 : -std::numeric_limits<Number>::infinity();
    strip.weight = packed;
    int64_t output = 0;
    for (int64_t group = 0; group < all_.groups; ++group)
      for (int64_t chunk = 0; chunk < all_.chunks.count; ++chunk) {
        const int64_t outputs = all_.chunks.length(chunk);
        const bool more = outputs > all_.chunks.size;
        const Parts& tiles = tiles_[more];
        const auto& kernels = kernels_[more];
        strip.bias = layer_.bias < 0 ? nullptr : row + layer_.bias + output;
        for (int64_t y = 0; y < layer_.made.height; ++y)
          for (int64_t other = 0; other < others_; ++other) {
            strip.from = from + group * strip.taps[0] * strip.tap_strides[0] + y * down_ +
                         other * other_step_;
            const int64_t at = output * strip.output_stride + y * layer_.made.width * width_ +
                               other * other_to_step_;
            const int64_t behind = tiles.larger * (tiles.size + 1);
            strip.to = out + at;
            strip.times = times ? times + at : nullptr;
            if (tiles.larger > 0) kernels[1](strip, tiles.larger);
            strip.from += behind * strip.step;
            strip.to += behind * strip.to_step;
            if (times) strip.times += behind * strip.to_step;
            kernels[0](strip, tiles.count - tiles.larger);
          }
        done(output, output + outputs);
        output += outputs;
        strip.weight += outputs * all_.taps;
      }
  }

 private:
  Layer layer_;
  int64_t width_;
  Outputs all_;
  Strip<Number> strip_;
  int64_t down_ = 0, columns_, others_, other_step_, other_to_step_;
  // Of chunks of the smaller and the larger size, and of tiles.
  Parts tiles_[2] = {Parts(1, 1), Parts(1, 1)};
  StripKernel<Number> kernels_[2][2];
};

// The taps of a pool's window that lie inside, along one axis.
struct Window {
  int64_t place, begin, end;
  Window(const Layer& layer, int axis, int64_t at, int64_t length)
      : place(at * layer.stride[axis] - layer.padding[axis]), begin(0), end(layer.kernel[axis]) {
    const int64_t step = layer.dilation[axis];
    if (place < 0) begin = (-place + step - 1) / step;
    if (place + (end - 1) * step >= length)
      end = place < length ? (length - place + step - 1) / step : 0;
  }
};

template <class Arithmetic, bool largest, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void forward_pool(const Layer& layer, const Number* from, Number* out,
                                   int64_t width) {
  using Vector = typename Arithmetic::Vector;
  const Shape taken = layer.taken, made = layer.made;
  const int64_t row = taken.width * width, down = layer.dilation[0] * row,
                across = layer.dilation[1] * width;
  for (int64_t channel = 0; channel < taken.channels; ++channel, from += taken.height * row)
    for (int64_t y = 0; y < made.height; ++y) {
      const Window rows(layer, 0, y, taken.height);
      for (int64_t x = 0; x < made.width; ++x, out += width) {
        const Window columns(layer, 1, x, taken.width);
        const Number* first = from + rows.place * row + columns.place * width;
        Number share = 1;
        if constexpr (!largest)
          share /= Number(layer.counts_padding
                              ? layer.kernel[0] * layer.kernel[1]
                              : (rows.end - rows.begin) * (columns.end - columns.begin));
        for (int64_t image = 0; image < width; image += Arithmetic::lanes) {
          Vector sum = Vector{} - (largest ? std::numeric_limits<Number>::infinity() : Number(0));
          for (int64_t i = rows.begin; i < rows.end; ++i)
            for (int64_t j = columns.begin; j < columns.end; ++j) {
              const Vector value = Arithmetic::load(first + i * down + j * across + image);
              if constexpr (largest)
                sum = elementary::larger_or_nan<Arithmetic>(sum, value);
              else
                sum += value;
            }
          Arithmetic::store(out + image, largest ? sum : sum * share);
        }
      }
    }
}

template <class Arithmetic, Kind kind>
WEIGHTOPS_INLINE typename Arithmetic::Vector activate(const typename Arithmetic::Vector& x) {
  using Number = typename Arithmetic::Number;
  if constexpr (kind == Kind::relu)
    return elementary::larger<Arithmetic>(typename Arithmetic::Vector{}, x);
  if constexpr (kind == Kind::silu) return x * elementary::sigmoid<Arithmetic>(x);
  if constexpr (kind == Kind::gelu) return x * elementary::normal<Arithmetic>(x);
  if constexpr (kind == Kind::tanh) return elementary::tanh<Arithmetic>(x);
  if constexpr (kind == Kind::gelu_tanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const auto u = (x + x * x * x * Number(0.044715)) * Number(1.5957691216057308);
    return x * elementary::sigmoid<Arithmetic>(u);
  }
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void forward_sine(int64_t count, Number factor, const Number* from, Number* out) {
  for (int64_t at = 0; at < count; at += Arithmetic::lanes)
    Arithmetic::store(
        out + at, elementary::sine_cosine<Arithmetic>(Arithmetic::load(from + at) * factor).sine);
}

template <class Arithmetic, Kind kind, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void forward_activation(int64_t count, const Number* from, Number* out) {
  for (int64_t at = 0; at < count; at += Arithmetic::lanes)
    Arithmetic::store(out + at, activate<Arithmetic, kind>(Arithmetic::load(from + at)));
}

// (x - mean) / sqrt(variance + eps), of each image over `features` in a row.
template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void standardize(int64_t features, Number eps, const Number* from, Number* out,
                                  int64_t width) {
  using Vector = typename Arithmetic::Vector;
  for (int64_t image = 0; image < width; image += Arithmetic::lanes) {
    Vector mean = {}, variance = {};
    for (int64_t f = 0; f < features; ++f) mean += Arithmetic::load(from + f * width + image);
    mean /= Number(features);
    for (int64_t f = 0; f < features; ++f) {
      const Vector rest = Arithmetic::load(from + f * width + image) - mean;
      variance += rest * rest;
    }
    variance = variance / Number(features) + eps;
    Vector scale;
    for (int k = 0; k < Arithmetic::lanes; ++k) scale[k] = 1 / std::sqrt(variance[k]);
    for (int64_t f = 0; f < features; ++f)
      Arithmetic::store(out + f * width + image,
                        (Arithmetic::load(from + f * width + image) - mean) * scale);
  }
}

// x * scale + shift, of `count` numbers.
template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void rescale(int64_t count, Number scale, Number shift, const Number* from,
                              Number* out) {
  for (int64_t at = 0; at < count; at += Arithmetic::lanes)
    Arithmetic::store(out + at, Arithmetic::load(from + at) * scale + shift);
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void forward_norm(const Layer& layer, const Number* row, const Number* from,
                                   Number* out, int64_t width) {
  const int64_t channels = layer.taken.channels, pixels = layer.taken.pixels();
  const auto at = [&](int64_t place, int64_t i, Number otherwise) {
    return place < 0 ? otherwise : row[place + i];
  };
  if (layer.kind == Kind::batch_norm) {
    for (int64_t c = 0; c < channels; ++c) {
      const Number scale =
          at(layer.weight, c, 1) / std::sqrt(row[layer.variance + c] + Number(layer.eps));
      const Number shift = at(layer.bias, c, 0) - row[layer.mean + c] * scale;
      rescale<Arithmetic>(pixels * width, scale, shift, from + c * pixels * width,
                          out + c * pixels * width);
    }
    return;
  }
  const bool layers = layer.kind == Kind::layer_norm;
  const int64_t groups = layers ? 1 : layer.groups, features = channels / groups * pixels;
  for (int64_t group = 0; group < groups; ++group)
    standardize<Arithmetic>(features, Number(layer.eps), from + group * features * width,
                            out + group * features * width, width);
  if (layer.weight < 0 && layer.bias < 0) return;
  const int64_t scaled = layers ? channels * pixels : channels;
  const int64_t count = channels * pixels / scaled * width;
  for (int64_t i = 0; i < scaled; ++i)
    rescale<Arithmetic>(count, at(layer.weight, i, 1), at(layer.bias, i, 0), out + i * count,
                        out + i * count);
}

// All kinds but linear and conv.
template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void forward_other(const Layer& layer, const Number* row,
                                    const Number* const inputs[2], Number* out, int64_t width) {
  const Number* from = inputs[0];
  const int64_t count = layer.taken.numel() * width;
  switch (layer.kind) {
    case Kind::max_pool: return forward_pool<Arithmetic, true>(layer, from, out, width);
    case Kind::average_pool: return forward_pool<Arithmetic, false>(layer, from, out, width);
    case Kind::relu: return forward_activation<Arithmetic, Kind::relu>(count, from, out);
    case Kind::silu: return forward_activation<Arithmetic, Kind::silu>(count, from, out);
    case Kind::gelu: return forward_activation<Arithmetic, Kind::gelu>(count, from, out);
    case Kind::gelu_tanh: return forward_activation<Arithmetic, Kind::gelu_tanh>(count, from, out);
    case Kind::tanh: return forward_activation<Arithmetic, Kind::tanh>(count, from, out);
    case Kind::sine: return forward_sine<Arithmetic>(count, Number(layer.eps), from, out);
    case Kind::add:
      for (int64_t at = 0; at < count; at += Arithmetic::lanes)
        Arithmetic::store(out + at, Arithmetic::load(from + at) + Arithmetic::load(inputs[1] + at));
      return;
    default: return forward_norm<Arithmetic>(layer, row, from, out, width);
  }
}

// One layer of one network: `row` is the network's weights as they are, `packed` what pack_layer
// made of this layer's, `out` may be an input where the kind works number by number or is a norm.
// `rectify` lets ReLU follow linear layers and convolutions. To be called from anywhere: the
// instruction set is that of Arithmetic.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void forward_layer(const Layer& layer, const Number* row, const Number* packed,
                   const Number* const inputs[2], Number* out, int64_t width, Number* workspace,
                   bool rectify = false) {
  if (multiplies(layer))
    return Products<Arithmetic>(layer, width).run(row, packed, inputs[0], out, workspace, rectify);
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    forward_other<Arithmetic>(layer, row, inputs, out, width);
  });
}

}  // namespace weightops::population
