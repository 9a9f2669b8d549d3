// Gradients of norms on a block of images, whose statistics do not depend on other images.
#pragma once

#include "population_backward_job.h"
#include "population_layers.h"

namespace weightops::population {

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

}  // namespace weightops::population
