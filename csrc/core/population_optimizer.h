// Optimisation steps of weights in a row.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace weightops::population {

enum class Method { adamw, sgd };

struct Optimizer {
  Method method;
  double decay, settings[3];  // adamw: beta1, beta2, eps; sgd: momentum, nesterov
};

template <class Arithmetic, class Vector = typename Arithmetic::Vector>
WEIGHTOPS_INLINE Vector root(const Vector& x) {
  Vector made;
#if WEIGHTOPS_X86
  constexpr bool single = sizeof(typename Arithmetic::Number) == 4;
  if constexpr (sizeof(Vector) == 64 && single) asm("vsqrtps %1, %0" : "=v"(made) : "v"(x));
  if constexpr (sizeof(Vector) == 64 && !single) asm("vsqrtpd %1, %0" : "=v"(made) : "v"(x));
  if constexpr (sizeof(Vector) == 32 && single) asm("vsqrtps %1, %0" : "=x"(made) : "x"(x));
  if constexpr (sizeof(Vector) == 32 && !single) asm("vsqrtpd %1, %0" : "=x"(made) : "x"(x));
  if constexpr (sizeof(Vector) >= 32) return made;
#endif
  for (int k = 0; k < Arithmetic::lanes; ++k) made[k] = std::sqrt(x[k]);
  return made;
}

// One optimisation step of `count` weights in a row, as torch.optim.AdamW and SGD write it.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void update(const Optimizer& optimizer, double rate, int64_t step, int64_t count, Number* weights,
            const Number* grads, Number* first, Number* second) {
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    using Vector = typename Arithmetic::Vector;
    constexpr int lanes = Arithmetic::lanes;
    const double *settings = optimizer.settings, decay = optimizer.decay;
    const bool adamw = optimizer.method == Method::adamw;
    const Number kept = adamw ? 1 - rate * decay : decay;
    const Number share = 1 - settings[0], beta2 = settings[1], share2 = 1 - settings[1];
    const Number eps = settings[2], momentum = settings[0], lr = rate;
    const Number size = adamw ? rate / (1 - std::pow(settings[0], step)) : 0;
    const Number correction = adamw ? std::sqrt(1 - std::pow(settings[1], step)) : 1;
    const bool nesterov = settings[1] != 0;
    const auto advance = [&](Number* w, const Number* g, Number* m,
                             Number* v) __attribute__((always_inline)) {
      Vector weight = Arithmetic::load(w), grad = Arithmetic::load(g), mean = Arithmetic::load(m);
      if (adamw) {
        mean += (grad - mean) * share;
        const Vector square = Arithmetic::load(v) * beta2 + grad * grad * share2;
        Arithmetic::store(v, square);
        weight = weight * kept - mean * size / (root<Arithmetic>(square) / correction + eps);
      } else {
        grad += weight * kept;
        mean = mean * momentum + grad;
        weight -= (nesterov ? grad + mean * momentum : mean) * lr;
      }
      Arithmetic::store(m, mean);
      Arithmetic::store(w, weight);
    };
    int64_t at = 0;
    for (; at + lanes <= count; at += lanes)
      advance(weights + at, grads + at, first + at, second + at);
    if (at == count) return;
    Number tails[4][lanes] = {};
    Number* whole[] = {weights, first, adamw ? second : first};
    for (int i = 0; i < 3; ++i) std::copy_n(whole[i] + at, count - at, tails[i]);
    std::copy_n(grads + at, count - at, tails[3]);
    advance(tails[0], tails[3], tails[1], tails[2]);
    for (int i = 0; i < (adamw ? 3 : 2); ++i) std::copy_n(tails[i], count - at, whole[i] + at);
  });
}

}  // namespace weightops::population
