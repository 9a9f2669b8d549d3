// Gradients of linear layers and convolutions on a block of images.
#pragma once

#include "population_backward_job.h"
#include "population_multiply.h"

namespace weightops::population {

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
            c.left = job.grad +
                     (group * outputs * made.pixels() + y * made.width + columns.begin) * width +
                     image;
            c.right =
                job.from[0] +
                (group * inputs * taken.pixels() + from_y * taken.width + columns.first) * width +
                image;
            c.to =
                job.weight + (group * outputs * inputs * taps + ky * layer.kernel[1] + kx) * lanes;
            correlate<Arithmetic>(c, outputs, inputs);
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

}  // namespace weightops::population
