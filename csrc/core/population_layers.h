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
};

template <class Arithmetic, int outputs, int columns>
WEIGHTOPS_INLINE void run_strip(const Strip<typename Arithmetic::Number>& strip, int64_t count) {
  using Number = typename Arithmetic::Number;
  const int64_t step = strip.step;
  for (int64_t tile = 0; tile < count; ++tile) {
    typename Arithmetic::Vector sum[outputs][columns];
#pragma GCC unroll 8
    for (int c = 0; c < outputs; ++c)
#pragma GCC unroll 8
      for (int x = 0; x < columns; ++x)
        sum[c][x] = typename Arithmetic::Vector{} + (strip.bias ? strip.bias[c] : Number(0));
    const Number* weight = strip.weight;
    const Number* channel = strip.from + tile * columns * step;
    for (int64_t i = 0; i < strip.taps[0]; ++i, channel += strip.tap_strides[0]) {
      const Number* row = channel;
      for (int64_t j = 0; j < strip.taps[1]; ++j, row += strip.tap_strides[1]) {
        const Number* from = row;
        for (int64_t k = 0; k < strip.taps[2]; ++k, from += strip.tap_strides[2]) {
          typename Arithmetic::Vector taken[columns];
#pragma GCC unroll 8
          for (int x = 0; x < columns; ++x) taken[x] = Arithmetic::load(from + x * step);
#pragma GCC unroll 8
          for (int c = 0; c < outputs; ++c) {
            const typename Arithmetic::Vector factor = typename Arithmetic::Vector{} + weight[c];
#pragma GCC unroll 8
            for (int x = 0; x < columns; ++x) sum[c][x] += taken[x] * factor;
          }
          weight += outputs;
        }
      }
    }
    Number* to = strip.to + tile * columns * strip.to_step;
#pragma GCC unroll 8
    for (int c = 0; c < outputs; ++c)
#pragma GCC unroll 8
      for (int x = 0; x < columns; ++x)
        Arithmetic::store(
            to + c * strip.output_stride + x * strip.to_step,
            sum[c][x] < strip.least ? typename Arithmetic::Vector{} + strip.least : sum[c][x]);
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

// Numbers of what pack_layer writes.
inline int64_t packed_size(const Layer& layer) {
  const bool weighs = layer.kind == Kind::linear || layer.kind == Kind::conv;
  return weighs ? layer.weight_size() : 0;
}

// A convolution, or a linear layer as one: `taps` numbers of a weight for each output.
struct Products {
  int64_t groups, outputs, taps;  // of one group
  explicit Products(const Layer& layer) {
    groups = layer.kind == Kind::conv ? layer.groups : 1;
    outputs = layer.made.channels / groups;
    taps = layer.weight_size() / layer.made.channels;
  }
};

// The weights of a layer in one network's row, in the order in which forward_layer reads them:
// group after group, chunk of outputs after chunk, [tap][output].
template <class Arithmetic, class Number = typename Arithmetic::Number>
void pack_layer(const Layer& layer, const Number* row, Number* packed) {
  if (packed_size(layer) == 0) return;
  const Products products(layer);
  const Parts chunks(products.outputs, Tile<Arithmetic::bytes>::outputs);
  const Number* weight = row + layer.weight;
  for (int64_t group = 0; group < products.groups; ++group)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t size = chunks.length(chunk);
      for (int64_t tap = 0; tap < products.taps; ++tap)
        for (int64_t c = 0; c < size; ++c) *packed++ = weight[c * products.taps + tap];
      weight += size * products.taps;
    }
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

template <class Arithmetic, class Number = typename Arithmetic::Number>
void forward_products(const Layer& layer, const Number* row, const Number* packed,
                      const Number* from, Number* out, int64_t width, Number* workspace,
                      bool rectify) {
  constexpr int bytes = Arithmetic::bytes;
  const Products products(layer);
  Strip<Number> strip{};
  strip.least = rectify ? 0 : -std::numeric_limits<Number>::infinity();
  Shape taken = layer.taken, made = layer.made;
  int64_t stride[2] = {1, 1};
  if (layer.kind == Kind::linear) {
    taken = {1, 1, layer.taken.numel()};
    strip.taps[0] = strip.taps[1] = 1;
    strip.taps[2] = taken.width;
    strip.tap_strides[2] = width;
  } else {
    if (workspace_size(layer, width) > 0) {
      pad(layer, from, width, workspace);
      from = workspace;
      taken.height += 2 * layer.padding[0];
      taken.width += 2 * layer.padding[1];
    }
    std::copy_n(layer.stride, 2, stride);
    strip.taps[0] = taken.channels / products.groups;
    strip.tap_strides[0] = taken.pixels() * width;
    strip.taps[1] = layer.kernel[0];
    strip.tap_strides[1] = layer.dilation[0] * taken.width * width;
    strip.taps[2] = layer.kernel[1];
    strip.tap_strides[2] = layer.dilation[1] * width;
  }
  strip.output_stride = made.pixels() * width;
  // Columns are pixels of a row, or vectors of images where there are more of those.
  const int64_t vectors = width / Arithmetic::lanes;
  const bool images = vectors >= made.width;
  const int64_t columns = images ? vectors : made.width, others = images ? made.width : vectors;
  strip.step = images ? Arithmetic::lanes : stride[1] * width;
  strip.to_step = images ? Arithmetic::lanes : width;
  const int64_t other_step = images ? stride[1] * width : Arithmetic::lanes;
  const int64_t other_to_step = images ? width : Arithmetic::lanes;
  const Parts chunks(products.outputs, Tile<bytes>::outputs);
  for (int64_t group = 0; group < products.groups; ++group)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t size = chunks.length(chunk);
      const int64_t output = group * products.outputs + chunks.begin(chunk);
      const Parts tiles(columns, Tile<bytes>::columns(size));
      const auto narrow = strip_kernel<Arithmetic>(size, tiles.size),
                 broad = strip_kernel<Arithmetic>(size, tiles.size + 1);
      strip.weight = packed + output * products.taps;
      strip.bias = layer.bias < 0 ? nullptr : row + layer.bias + output;
      const Number* channels = from + group * strip.taps[0] * strip.tap_strides[0];
      for (int64_t y = 0; y < made.height; ++y)
        for (int64_t other = 0; other < others; ++other) {
          strip.from = channels + y * stride[0] * taken.width * width + other * other_step;
          strip.to =
              out + output * strip.output_stride + y * made.width * width + other * other_to_step;
          if (tiles.larger > 0) broad(strip, tiles.larger);
          strip.from += tiles.larger * (tiles.size + 1) * strip.step;
          strip.to += tiles.larger * (tiles.size + 1) * strip.to_step;
          if (tiles.larger < tiles.count) narrow(strip, tiles.count - tiles.larger);
        }
    }
}

template <class Arithmetic, bool largest, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void forward_pool(const Layer& layer, const Number* from, Number* out,
                                   int64_t width) {
  using Vector = typename Arithmetic::Vector;
  const Shape taken = layer.taken, made = layer.made;
  // The taps of the window at `place` that lie inside.
  const auto inside = [&](int axis, int64_t place, int64_t length, int64_t* begin, int64_t* end) {
    const int64_t first = place * layer.stride[axis] - layer.padding[axis],
                  d = layer.dilation[axis];
    *begin = first < 0 ? (-first + d - 1) / d : 0;
    *end = std::min(layer.kernel[axis], first < length ? (length - first + d - 1) / d : 0);
    return first;
  };
  for (int64_t channel = 0; channel < taken.channels; ++channel, from += taken.pixels() * width)
    for (int64_t y = 0; y < made.height; ++y)
      for (int64_t x = 0; x < made.width; ++x, out += width) {
        int64_t rows[2], columns[2];
        const int64_t top = inside(0, y, taken.height, rows, rows + 1);
        const int64_t left = inside(1, x, taken.width, columns, columns + 1);
        const int64_t counted = layer.counts_padding
                                    ? layer.kernel[0] * layer.kernel[1]
                                    : (rows[1] - rows[0]) * (columns[1] - columns[0]);
        const Number share = Number(1) / Number(counted);
        for (int64_t image = 0; image < width; image += Arithmetic::lanes) {
          Vector sum = Vector{} - (largest ? std::numeric_limits<Number>::infinity() : Number(0));
          for (int64_t i = rows[0]; i < rows[1]; ++i)
            for (int64_t j = columns[0]; j < columns[1]; ++j) {
              const Vector value = Arithmetic::load(
                  from +
                  ((top + i * layer.dilation[0]) * taken.width + left + j * layer.dilation[1]) *
                      width +
                  image);
              // Not one condition of the two: GCC 12 takes a disjunction lane by lane.
              if constexpr (largest) {
                sum = value > sum ? value : sum;
                sum = value != value ? Vector{} + std::numeric_limits<Number>::quiet_NaN() : sum;
              } else {
                sum += value;
              }
            }
          Arithmetic::store(out + image, largest ? sum : sum * share);
        }
      }
}

template <class Arithmetic, Kind kind>
WEIGHTOPS_INLINE typename Arithmetic::Vector activate(const typename Arithmetic::Vector& x) {
  using Number = typename Arithmetic::Number;
  if constexpr (kind == Kind::relu) return x < 0 ? typename Arithmetic::Vector{} : x;
  if constexpr (kind == Kind::silu) return x * elementary::sigmoid<Arithmetic>(x);
  if constexpr (kind == Kind::gelu) return x * elementary::normal<Arithmetic>(x);
  if constexpr (kind == Kind::tanh) return elementary::tanh<Arithmetic>(x);
  if constexpr (kind == Kind::gelu_tanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const auto u = (x + x * x * x * Number(0.044715)) * Number(1.5957691216057308);
    return x * elementary::sigmoid<Arithmetic>(u);
  }
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
  if (layer.kind == Kind::linear || layer.kind == Kind::conv)
    return forward_products<Arithmetic>(layer, row, packed, inputs[0], out, width, workspace,
                                        rectify);
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    forward_other<Arithmetic>(layer, row, inputs, out, width);
  });
}

}  // namespace weightops::population
