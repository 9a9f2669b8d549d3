// Gradients of small networks' layers on a block of images, laid out as in population_layers.h.
//
// Gradients of weights are sums over images and pixels: each lane sums its own images, and lanes
// are summed once, at the end of a batch. Those of linear layers, which have no pixels, are
// products with features in the lanes.
#pragma once

#include "population_layers.h"

namespace weightops::population {

// to[m][n] (+)= sum over s and k of a[m * row + s * left[0] + k * left[1]] * b[n * column + s *
// right[0] + k * right[1]], b and to in whole vectors.
template <class Number>
struct Product {
  const Number *a, *b;
  Number* to;
  int64_t row, left[2];
  int64_t column, right[2];
  int64_t depth[2];
  int64_t to_row, to_column;
  bool adds;
};

template <class Arithmetic, int rows, int columns>
WEIGHTOPS_INLINE void multiply_tile(const Product<typename Arithmetic::Number>& product) {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  Vector sum[rows][columns];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n)
      sum[m][n] = product.adds
                      ? Arithmetic::load(product.to + m * product.to_row + n * product.to_column)
                      : Vector{};
  const Number *outer_a = product.a, *outer_b = product.b;
  for (int64_t s = 0; s < product.depth[0]; ++s) {
    const Number *a = outer_a, *b = outer_b;
    for (int64_t k = 0; k < product.depth[1]; ++k) {
      Vector taken[columns];
#pragma GCC unroll 8
      for (int n = 0; n < columns; ++n) taken[n] = Arithmetic::load(b + n * product.column);
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) {
        const Vector factor = elementary::spread<Arithmetic>(a + m * product.row);
#pragma GCC unroll 8
        for (int n = 0; n < columns; ++n) sum[m][n] += taken[n] * factor;
      }
      a += product.left[1];
      b += product.right[1];
    }
    outer_a += product.left[0];
    outer_b += product.right[0];
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n)
      Arithmetic::store(product.to + m * product.to_row + n * product.to_column, sum[m][n]);
}

// sum over pixels of left[m] * right[n], each lane's own: gradients of a convolution's weights at
// one tap.
template <class Number>
struct Correlation {
  const Number *left, *right;
  Number* to;
  int64_t left_channel, left_row, left_pixel;
  int64_t right_channel, right_row, right_pixel;
  int64_t height, width;
  int64_t to_left, to_right;
};

template <class Arithmetic, int lefts, int rights>
WEIGHTOPS_INLINE void correlate_tile(const Correlation<typename Arithmetic::Number>& c) {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  Vector sum[lefts][rights];
#pragma GCC unroll 8
  for (int m = 0; m < lefts; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < rights; ++n)
      sum[m][n] = Arithmetic::load(c.to + m * c.to_left + n * c.to_right);
  for (int64_t y = 0; y < c.height; ++y) {
    const Number *left = c.left + y * c.left_row, *right = c.right + y * c.right_row;
    for (int64_t x = 0; x < c.width; ++x) {
      Vector taken[rights];
#pragma GCC unroll 8
      for (int n = 0; n < rights; ++n) taken[n] = Arithmetic::load(right + n * c.right_channel);
#pragma GCC unroll 8
      for (int m = 0; m < lefts; ++m) {
        const Vector factor = Arithmetic::load(left + m * c.left_channel);
#pragma GCC unroll 8
        for (int n = 0; n < rights; ++n) sum[m][n] += taken[n] * factor;
      }
      left += c.left_pixel;
      right += c.right_pixel;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < lefts; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < rights; ++n)
      Arithmetic::store(c.to + m * c.to_left + n * c.to_right, sum[m][n]);
}

struct MultiplyTile {
  template <class Arithmetic, int rows, int columns>
  static void run(const Product<typename Arithmetic::Number>& product) {
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      multiply_tile<Arithmetic, rows, columns>(product);
    });
  }
};

struct CorrelateTile {
  template <class Arithmetic, int lefts, int rights>
  static void run(const Correlation<typename Arithmetic::Number>& correlation) {
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      correlate_tile<Arithmetic, lefts, rights>(correlation);
    });
  }
};

// The kernel of a tile of `tall` times `wide`.
template <class Kernel, class Arithmetic, class Job, int rows = 1, int columns = 1>
auto tile_kernel(int64_t tall, int64_t wide) -> void (*)(const Job&) {
  using Limits = Tile<Arithmetic::bytes>;
  if constexpr (rows < Limits::outputs)
    if (tall > rows) return tile_kernel<Kernel, Arithmetic, Job, rows + 1, columns>(tall, wide);
  if constexpr (columns < Limits::columns(rows))
    if (wide > columns) return tile_kernel<Kernel, Arithmetic, Job, rows, columns + 1>(tall, wide);
  return Kernel::template run<Arithmetic, rows, columns>;
}

// Calls f(kernel, row, column) for tiles that cover rows times columns.
template <class Kernel, class Arithmetic, class Job, class F>
void cover(int64_t rows, int64_t columns, F&& f) {
  using Limits = Tile<Arithmetic::bytes>;
  const Parts heights(rows, Limits::outputs);
  for (int64_t i = 0; i < heights.count; ++i) {
    const Parts widths(columns, Limits::columns(int(heights.length(i))));
    for (int64_t j = 0; j < widths.count; ++j)
      f(tile_kernel<Kernel, Arithmetic, Job>(heights.length(i), widths.length(j)), heights.begin(i),
        widths.begin(j));
  }
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
void multiply(const Product<Number>& product, int64_t rows, int64_t columns) {
  if (columns == 0 || rows == 0) return;
  cover<MultiplyTile, Arithmetic, Product<Number>>(
      rows, columns, [&](auto kernel, int64_t m, int64_t n) {
        Product<Number> tile = product;
        tile.a += m * product.row;
        tile.b += n * product.column;
        tile.to += m * product.to_row + n * product.to_column;
        kernel(tile);
      });
}

// What a layer's backward reads and writes.
template <class Number>
struct Backward {
  const Number* row;  // the network's weights
  const Number *from[2], *out, *grad;
  Number* into[2];  // gradients of the inputs, null where nobody asks
  bool fresh[2];    // nothing is in them yet
  bool rectifies;   // a pool: its input is what a ReLU made, whose part is done here, on fewer
                    // numbers
  Number *weight, *bias;  // sums of every lane, null without
  int64_t width;
};

// The pixels of a window's tap `k` along an axis: outputs [begin, end) read inputs from first on.
struct Range {
  int64_t begin, end, first;
  Range(const Layer& layer, int axis, int64_t k, int64_t taken, int64_t made) {
    const int64_t stride = layer.stride[axis],
                  shift = k * layer.dilation[axis] - layer.padding[axis];
    begin = std::min(made, shift < 0 ? (-shift + stride - 1) / stride : 0);
    end =
        shift >= taken ? begin : std::max(begin, std::min(made, (taken - 1 - shift) / stride + 1));
    first = begin * stride + shift;
  }
  int64_t length() const { return end - begin; }
};

template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void add_bias(const Layer& layer, const Backward<Number>& job) {
  const int64_t pixels = layer.made.pixels() * job.width;
  const int64_t lanes = Arithmetic::lanes;
  for (int64_t c = 0; c < layer.made.channels; ++c) {
    // Several sums, since one would wait for itself.
    typename Arithmetic::Vector sum[4] = {Arithmetic::load(job.bias + c * lanes)};
    const Number* from = job.grad + c * pixels;
    int64_t at = 0;
    for (; at + 4 * lanes <= pixels; at += 4 * lanes)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] += Arithmetic::load(from + at + i * lanes);
    for (; at < pixels; at += lanes) sum[0] += Arithmetic::load(from + at);
    Arithmetic::store(job.bias + c * lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// The gradient of a linear layer's input; that of its weights needs images in rows.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void backward_linear(const Layer& layer, const Backward<Number>& job) {
  if (job.into[0] == nullptr) return;
  const int64_t inputs = layer.taken.numel(), outputs = layer.made.channels;
  Product<Number> product{};
  product.a = job.row + layer.weight;
  product.row = 1;
  product.left[1] = inputs;
  product.b = job.grad;
  product.column = product.to_column = Arithmetic::lanes;
  product.right[1] = product.to_row = job.width;
  product.depth[0] = 1;
  product.depth[1] = outputs;
  product.to = job.into[0];
  product.adds = !job.fresh[0];
  multiply<Arithmetic>(product, inputs, job.width / Arithmetic::lanes);
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
void backward_conv_weight(const Layer& layer, const Backward<Number>& job) {
  const Shape taken = layer.taken, made = layer.made;
  const int64_t width = job.width, lanes = Arithmetic::lanes, groups = layer.groups;
  const int64_t outputs = made.channels / groups, inputs = taken.channels / groups;
  const int64_t taps = layer.kernel[0] * layer.kernel[1];
  // As many rows of pixels at a time as leave the first-level cache to the taps that read them.
  const int64_t most =
      std::max<int64_t>(1, (24 << 10) / int64_t(outputs * made.width * lanes * sizeof(Number)));
  Correlation<Number> c{};
  c.left_channel = made.pixels() * width;
  c.left_row = made.width * width;
  c.left_pixel = width;
  c.right_channel = taken.pixels() * width;
  c.right_row = layer.stride[0] * taken.width * width;
  c.right_pixel = layer.stride[1] * width;
  c.to_left = inputs * taps * lanes;
  c.to_right = taps * lanes;
  for (int64_t image = 0; image < width; image += lanes)
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t top = 0; top < made.height; top += most)
        for (int64_t ky = 0; ky < layer.kernel[0]; ++ky) {
          const Range rows(layer, 0, ky, taken.height, made.height);
          const int64_t y = std::max(top, rows.begin), bottom = std::min(top + most, rows.end);
          if (y >= bottom) continue;
          const int64_t from_y = rows.first + (y - rows.begin) * layer.stride[0];
          for (int64_t kx = 0; kx < layer.kernel[1]; ++kx) {
            const Range columns(layer, 1, kx, taken.width, made.width);
            if (columns.length() <= 0) continue;
            c.height = bottom - y;
            c.width = columns.length();
            const Number* left =
                job.grad +
                (group * outputs * made.pixels() + y * made.width + columns.begin) * width + image;
            const Number* right =
                job.from[0] +
                (group * inputs * taken.pixels() + from_y * taken.width + columns.first) * width +
                image;
            Number* to =
                job.weight + (group * outputs * inputs * taps + ky * layer.kernel[1] + kx) * lanes;
            cover<CorrelateTile, Arithmetic, Correlation<Number>>(
                outputs, inputs, [&](auto kernel, int64_t m, int64_t n) {
                  c.left = left + m * c.left_channel;
                  c.right = right + n * c.right_channel;
                  c.to = to + m * c.to_left + n * c.to_right;
                  kernel(c);
                });
          }
        }
}

// Row by row of the input: all outputs and rows of taps in one sum, a column of taps at a time.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void backward_conv_input(const Layer& layer, const Backward<Number>& job) {
  const Shape taken = layer.taken, made = layer.made;
  const int64_t width = job.width, groups = layer.groups;
  const int64_t outputs = made.channels / groups, inputs = taken.channels / groups;
  const int64_t taps = layer.kernel[0] * layer.kernel[1];
  const int64_t stride = layer.stride[0], dilation = layer.dilation[0];
  if (job.fresh[0]) std::fill_n(job.into[0], taken.numel() * width, Number(0));
  Product<Number> product{};
  product.row = taps;
  product.left[1] = inputs * taps;
  product.column = width;
  product.right[1] = made.pixels() * width;
  product.depth[1] = outputs;
  product.to_row = taken.pixels() * width;
  product.to_column = layer.stride[1] * width;
  product.adds = true;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t y = 0; y < taken.height; ++y) {
      // Rows of taps that read row y: (y + padding - ky * dilation) / stride is an output.
      int64_t first = -1, step = 0, count = 0, output = 0;
      for (int64_t ky = 0; ky < layer.kernel[0]; ++ky) {
        const int64_t at = y + layer.padding[0] - ky * dilation;
        if (at < 0 || at % stride != 0 || at / stride >= made.height) continue;
        if (count == 0) {
          first = ky;
          output = at / stride;
        } else if (count == 1) {
          step = ky - first;
        }
        ++count;
      }
      if (count == 0) continue;
      product.depth[0] = count;
      product.left[0] = step * layer.kernel[1];
      product.right[0] = -(step * dilation / stride) * made.width * width;
      for (int64_t kx = 0; kx < layer.kernel[1]; ++kx) {
        const Range columns(layer, 1, kx, taken.width, made.width);
        if (columns.length() <= 0) continue;
        for (int64_t image = 0; image < width; image += Arithmetic::lanes) {
          product.a = job.row + layer.weight + group * outputs * inputs * taps +
                      first * layer.kernel[1] + kx;
          product.b =
              job.grad +
              (group * outputs * made.pixels() + output * made.width + columns.begin) * width +
              image;
          product.to = job.into[0] +
                       (group * inputs * taken.pixels() + y * taken.width + columns.first) * width +
                       image;
          multiply<Arithmetic>(product, inputs, columns.length());
        }
      }
    }
}

template <class Arithmetic, bool largest, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void backward_pool(const Layer& layer, const Backward<Number>& job) {
  using Vector = typename Arithmetic::Vector;
  const Shape taken = layer.taken, made = layer.made;
  const int64_t width = job.width, row = taken.width * width;
  const int64_t down = layer.dilation[0] * row, across = layer.dilation[1] * width;
  bool once = job.fresh[0];  // windows that take every pixel once
  const int64_t ends[2][2] = {{taken.height, made.height}, {taken.width, made.width}};
  for (int axis = 0; axis < 2; ++axis)
    once &= layer.stride[axis] == layer.kernel[axis] && layer.dilation[axis] == 1 &&
            layer.padding[axis] == 0 && ends[axis][0] == ends[axis][1] * layer.kernel[axis];
  if (job.fresh[0] && !once) std::fill_n(job.into[0], taken.numel() * width, Number(0));
  const Number *grad = job.grad, *out = job.out, *from = job.from[0];
  Number* into = job.into[0];
  for (int64_t channel = 0; channel < taken.channels; ++channel) {
    for (int64_t y = 0; y < made.height; ++y) {
      const Window rows(layer, 0, y, taken.height);
      for (int64_t x = 0; x < made.width; ++x, grad += width, out += width) {
        const Window columns(layer, 1, x, taken.width);
        const int64_t first = rows.place * row + columns.place * width;
        Number share = 1;
        if constexpr (!largest)
          share /= Number(layer.counts_padding
                              ? layer.kernel[0] * layer.kernel[1]
                              : (rows.end - rows.begin) * (columns.end - columns.begin));
        for (int64_t image = 0; image < width; image += Arithmetic::lanes) {
          Vector rest = Arithmetic::load(grad + image);
          if constexpr (!largest) rest *= share;
          const Vector best = largest ? Arithmetic::load(out + image) : Vector{};
          if (largest && job.rectifies) rest = best > 0 ? rest : Vector{};
          for (int64_t i = rows.begin; i < rows.end; ++i)
            for (int64_t j = columns.begin; j < columns.end; ++j) {
              const int64_t at = first + i * down + j * across + image;
              Vector given = rest;
              if constexpr (largest) {
                // The first of equal ones takes it all.
                const auto hit = Arithmetic::load(from + at) == best;
                given = hit ? rest : Vector{};
                rest = hit ? Vector{} : rest;
              }
              if (!once) given += Arithmetic::load(into + at);
              Arithmetic::store(into + at, given);
            }
        }
      }
    }
    from += taken.pixels() * width;
    into += taken.pixels() * width;
  }
}

// d activation / dx, of the input x and the output y.
template <class Arithmetic, Kind kind, class Vector = typename Arithmetic::Vector>
WEIGHTOPS_INLINE Vector slope(const Vector& x, const Vector& y) {
  using Number = typename Arithmetic::Number;
  if constexpr (kind == Kind::relu) return y > 0 ? Vector{} + Number(1) : Vector{};
  if constexpr (kind == Kind::tanh) return Number(1) - y * y;
  if constexpr (kind == Kind::silu) {
    const Vector share = elementary::sigmoid<Arithmetic>(x);
    return share * (Number(1) + x * (Number(1) - share));
  }
  if constexpr (kind == Kind::gelu) {
    const Vector density =
        elementary::exp<Arithmetic>(x * x * Number(-0.5)) * Number(0.39894228040143267794);
    return elementary::normal<Arithmetic>(x) + x * density;
  }
  if constexpr (kind == Kind::gelu_tanh) {
    const Vector u = (x + x * x * x * Number(0.044715)) * Number(1.5957691216057308);
    const Vector share = elementary::sigmoid<Arithmetic>(u);
    const Vector rise = (Number(1) + x * x * Number(3 * 0.044715)) * Number(1.5957691216057308);
    return share + x * share * (Number(1) - share) * rise;
  }
}

template <class Arithmetic, Kind kind, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void backward_activation(int64_t count, const Backward<Number>& job) {
  using Vector = typename Arithmetic::Vector;
  for (int64_t at = 0; at < count; at += Arithmetic::lanes) {
    const Vector x = Arithmetic::load(job.from[0] + at), y = Arithmetic::load(job.out + at);
    Vector grad = Arithmetic::load(job.grad + at);
    // ReLU passes nothing on, not even what is not finite.
    if constexpr (kind == Kind::relu)
      grad = y > 0 ? grad : Vector{};
    else
      grad *= slope<Arithmetic, kind>(x, y);
    if (!job.fresh[0]) grad += Arithmetic::load(job.into[0] + at);
    Arithmetic::store(job.into[0] + at, grad);
  }
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void backward_batch_norm(const Layer& layer, const Backward<Number>& job) {
  const int64_t count = layer.taken.pixels() * job.width, lanes = Arithmetic::lanes;
  for (int64_t c = 0; c < layer.taken.channels; ++c) {
    const Number inverse = 1 / std::sqrt(job.row[layer.variance + c] + Number(layer.eps));
    const Number mean = job.row[layer.mean + c];
    const Number scale = (layer.weight < 0 ? 1 : job.row[layer.weight + c]) * inverse;
    typename Arithmetic::Vector weight = {}, bias = {};
    for (int64_t at = c * count; at < (c + 1) * count; at += lanes) {
      const auto grad = Arithmetic::load(job.grad + at);
      bias += grad;
      weight += grad * (Arithmetic::load(job.from[0] + at) - mean);
      if (job.into[0] == nullptr) continue;
      auto passed = grad * scale;
      if (!job.fresh[0]) passed += Arithmetic::load(job.into[0] + at);
      Arithmetic::store(job.into[0] + at, passed);
    }
    if (job.weight)
      Arithmetic::store(job.weight + c * lanes,
                        Arithmetic::load(job.weight + c * lanes) + weight * inverse);
    if (job.bias)
      Arithmetic::store(job.bias + c * lanes, Arithmetic::load(job.bias + c * lanes) + bias);
  }
}

// Layer norm, of one group whose every number has a weight, and group norm.
template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void backward_group_norm(const Layer& layer, const Backward<Number>& job) {
  using Vector = typename Arithmetic::Vector;
  const bool layers = layer.kind == Kind::layer_norm;
  const int64_t groups = layers ? 1 : layer.groups, width = job.width, lanes = Arithmetic::lanes;
  const int64_t features = layer.taken.numel() / groups;
  const int64_t shares = layers ? 1 : layer.taken.pixels();  // numbers of one weight
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t image = 0; image < width; image += lanes) {
      const int64_t begin = group * features, end = begin + features;
      Vector mean = {}, variance = {};
      for (int64_t f = begin; f < end; ++f)
        mean += Arithmetic::load(job.from[0] + f * width + image);
      mean /= Number(features);
      for (int64_t f = begin; f < end; ++f) {
        const Vector rest = Arithmetic::load(job.from[0] + f * width + image) - mean;
        variance += rest * rest;
      }
      variance = variance / Number(features) + Number(layer.eps);
      Vector inverse;
      for (int k = 0; k < lanes; ++k) inverse[k] = 1 / std::sqrt(variance[k]);
      Vector plain = {}, along = {};
      for (int64_t f = begin; f < end; ++f) {
        const Vector grad = Arithmetic::load(job.grad + f * width + image);
        const Vector x = (Arithmetic::load(job.from[0] + f * width + image) - mean) * inverse;
        Number* sums[] = {job.weight, job.bias};
        const Vector parts[] = {grad * x, grad};
        for (int i = 0; i < 2; ++i)
          if (sums[i]) {
            Number* to = sums[i] + f / shares * lanes;
            Arithmetic::store(to, Arithmetic::load(to) + parts[i]);
          }
        const Vector scaled = grad * (layer.weight < 0 ? 1 : job.row[layer.weight + f / shares]);
        plain += scaled;
        along += scaled * x;
      }
      if (job.into[0] == nullptr) continue;
      plain /= Number(features);
      along /= Number(features);
      for (int64_t f = begin; f < end; ++f) {
        const Vector x = (Arithmetic::load(job.from[0] + f * width + image) - mean) * inverse;
        const Vector scaled = Arithmetic::load(job.grad + f * width + image) *
                              (layer.weight < 0 ? 1 : job.row[layer.weight + f / shares]);
        Vector passed = (scaled - plain - x * along) * inverse;
        Number* to = job.into[0] + f * width + image;
        if (!job.fresh[0]) passed += Arithmetic::load(to);
        Arithmetic::store(to, passed);
      }
    }
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void backward_add(int64_t count, const Backward<Number>& job) {
  for (int i = 0; i < 2; ++i) {
    if (job.into[i] == nullptr) continue;
    for (int64_t at = 0; at < count; at += Arithmetic::lanes) {
      auto grad = Arithmetic::load(job.grad + at);
      if (!job.fresh[i]) grad += Arithmetic::load(job.into[i] + at);
      Arithmetic::store(job.into[i] + at, grad);
    }
  }
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void backward_other(const Layer& layer, const Backward<Number>& job) {
  const int64_t count = layer.taken.numel() * job.width;
  const bool passes = job.into[0] != nullptr;
  switch (layer.kind) {
    case Kind::linear:
    case Kind::conv:
      if (job.bias) add_bias<Arithmetic>(layer, job);
      return;
    case Kind::batch_norm: return backward_batch_norm<Arithmetic>(layer, job);
    case Kind::group_norm:
    case Kind::layer_norm: return backward_group_norm<Arithmetic>(layer, job);
    case Kind::add: return backward_add<Arithmetic>(count, job);
    default: break;
  }
  if (!passes) return;
  switch (layer.kind) {
    case Kind::max_pool: return backward_pool<Arithmetic, true>(layer, job);
    case Kind::average_pool: return backward_pool<Arithmetic, false>(layer, job);
    case Kind::relu: return backward_activation<Arithmetic, Kind::relu>(count, job);
    case Kind::silu: return backward_activation<Arithmetic, Kind::silu>(count, job);
    case Kind::gelu: return backward_activation<Arithmetic, Kind::gelu>(count, job);
    case Kind::gelu_tanh: return backward_activation<Arithmetic, Kind::gelu_tanh>(count, job);
    default: return backward_activation<Arithmetic, Kind::tanh>(count, job);
  }
}

// All of a layer's gradients but that of a linear layer's weight.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void backward_layer(const Layer& layer, const Backward<Number>& job) {
  if (layer.kind == Kind::linear) backward_linear<Arithmetic>(layer, job);
  if (layer.kind == Kind::conv) {
    backward_conv_weight<Arithmetic>(layer, job);
    if (job.into[0]) backward_conv_input<Arithmetic>(layer, job);
  }
  enter<Arithmetic::bytes>(
      [&]() __attribute__((always_inline)) { backward_other<Arithmetic>(layer, job); });
}

}  // namespace weightops::population
