// Gradients of small networks' layers on a block of images, laid out as in population_layers.h.
//
// Gradients of weights are sums over images and pixels: each lane sums its own images, and lanes
// are summed once, at the end of a batch. Those of linear layers, which have no pixels, are
// products with features in the lanes.
#pragma once

#include "population_backward_norm.h"
#include "population_backward_product.h"

namespace weightops::population {

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

// An activation and its slope at x.
template <class Vector>
struct Activated {
  Vector value, slope;
};

// The long half of an activation at x: its exponential.
template <class Arithmetic, Kind kind, class Vector = typename Arithmetic::Vector>
WEIGHTOPS_INLINE Vector begin_activation(const Vector& x) {
  using Number = typename Arithmetic::Number;
  if constexpr (kind == Kind::silu) return elementary::exp<Arithmetic>(-x);
  if constexpr (kind == Kind::gelu) return elementary::exp<Arithmetic>(x * x * Number(-0.5));
  if constexpr (kind == Kind::gelu_tanh)
    return elementary::exp<Arithmetic>((x + x * x * x * Number(0.044715)) *
                                       Number(-1.5957691216057308));
}

template <class Arithmetic, Kind kind, class Vector = typename Arithmetic::Vector>
WEIGHTOPS_INLINE Activated<Vector> end_activation(const Vector& x, const Vector& power) {
  using Number = typename Arithmetic::Number;
  if constexpr (kind == Kind::gelu) {
    const Vector below = elementary::normal<Arithmetic>(x);
    return {x * below, below + x * power * Number(0.39894228040143267794)};
  } else {
    const Vector share = elementary::reciprocal<Arithmetic>(power + Number(1)), value = x * share;
    Vector rise = value * (Number(1) - share);
    if constexpr (kind == Kind::gelu_tanh)
      rise *= (Number(1) + x * x * Number(3 * 0.044715)) * Number(1.5957691216057308);
    return {value, share + rise};
  }
}

template <class Arithmetic, class Vector = typename Arithmetic::Vector>
WEIGHTOPS_INLINE Activated<Vector> sine_with_slope(const Vector& x,
                                                   typename Arithmetic::Number factor) {
  const auto made = elementary::sine_cosine<Arithmetic>(x * factor);
  return {made.sine, made.cosine * factor};
}

// begun(x) and ended(x, what that is) are an activation: one vector ends while the next one begins,
// since a long chain of instructions would wait for itself.
template <class Arithmetic, class F, class G, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void forward_slope_of(int64_t count, Number* from, Number* out, F&& begun,
                                       G&& ended) {
  auto x = Arithmetic::load(from);
  auto part = begun(x);
  for (int64_t at = 0; at < count; at += Arithmetic::lanes) {
    const auto next =
        Arithmetic::load(from + std::min(at + Arithmetic::lanes, count - Arithmetic::lanes));
    const auto next_part = begun(next);
    const auto made = ended(x, part);
    Arithmetic::store(out + at, made.value);
    Arithmetic::store(from + at, made.slope);
    x = next;
    part = next_part;
  }
}

// An activation whose slope takes the place of what it reads, so that nothing is computed twice.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void forward_slope(const Layer& layer, Number* from, Number* out, int64_t count) {
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    using Vector = typename Arithmetic::Vector;
    const auto of = [&](auto kind) __attribute__((always_inline)) {
      forward_slope_of<Arithmetic>(
          count, from, out,
          [](const Vector& x) __attribute__((always_inline)) {
            return begin_activation<Arithmetic, decltype(kind)::value>(x);
          },
          [](const Vector& x, const Vector& power) __attribute__((always_inline)) {
            return end_activation<Arithmetic, decltype(kind)::value>(x, power);
          });
    };
    switch (layer.kind) {
      case Kind::silu: return of(std::integral_constant<Kind, Kind::silu>{});
      case Kind::gelu: return of(std::integral_constant<Kind, Kind::gelu>{});
      case Kind::gelu_tanh: return of(std::integral_constant<Kind, Kind::gelu_tanh>{});
      default:
        forward_slope_of<Arithmetic>(
            count, from, out,
            [&](const Vector& x) __attribute__((always_inline)) {
              return sine_with_slope<Arithmetic>(x, Number(layer.eps));
            },
            [](const Vector&, const Activated<Vector>& made)
                __attribute__((always_inline)) { return made; });
    }
  });
}

// d activation / dx, of the input x and the output y.
template <class Arithmetic, Kind kind, class Vector = typename Arithmetic::Vector>
WEIGHTOPS_INLINE Vector slope(const Vector& x, const Vector& y) {
  using Number = typename Arithmetic::Number;
  if constexpr (kind == Kind::tanh)
    return Number(1) - y * y;
  else
    return end_activation<Arithmetic, kind>(x, begin_activation<Arithmetic, kind>(x)).slope;
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
    else if (job.slope)
      grad *= x;
    else
      grad *= slope<Arithmetic, kind>(x, y);
    if (!job.fresh[0]) grad += Arithmetic::load(job.into[0] + at);
    Arithmetic::store(job.into[0] + at, grad);
  }
}

template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void backward_sine(int64_t count, Number factor, const Backward<Number>& job) {
  for (int64_t at = 0; at < count; at += Arithmetic::lanes) {
    auto slope = Arithmetic::load(job.from[0] + at);
    if (!job.slope) slope = sine_with_slope<Arithmetic>(slope, factor).slope;
    auto grad = Arithmetic::load(job.grad + at) * slope;
    if (!job.fresh[0]) grad += Arithmetic::load(job.into[0] + at);
    Arithmetic::store(job.into[0] + at, grad);
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
    case Kind::sine: return backward_sine<Arithmetic>(count, Number(layer.eps), job);
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
