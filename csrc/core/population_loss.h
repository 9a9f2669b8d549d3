// The loss of a block of images, and its gradient by what the network made of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "elementary.h"

namespace weightops::population {

// Of a block of images.
constexpr int64_t kMostVectors = 6;

// One network's samples. Targets are classes [rows] or values [rows, outputs].
template <class Number>
struct Samples {
  const Number* x;
  const int64_t* classes;
  const Number* values;
  int64_t rows;
};

// The first `here` images of a block of `width`, which are rows `indices` of the samples; logits
// and their gradients as [output * width + image]. The loss is a mean over `count` images, of which
// these give their share; the others have no gradient.
template <class Arithmetic>
struct Loss {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  static constexpr int64_t lanes = Arithmetic::lanes;

  const Number* logits;
  Number* grads;
  int64_t outputs, width;
  const int64_t* indices;
  int64_t here, count;

  double squared_error(const Number* values) const {
    const Number scale = 2 / (Number(count) * Number(outputs));
    double squares = 0;
    for (int64_t k = 0; k < outputs; ++k)
      for (int64_t i = 0; i < width; ++i) {
        const Number rest = i < here ? logits[k * width + i] - values[indices[i] * outputs + k] : 0;
        grads[k * width + i] = rest * scale;
        squares += double(rest) * double(rest);
      }
    return squares / (double(count) * double(outputs));
  }

  double cross_entropy(const int64_t* classes) const {
    Number tops[kMostVectors * lanes], totals[kMostVectors * lanes];
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      const Number share = Number(1) / Number(count);
      for (int64_t image = 0; image < width; image += lanes) {
        Vector top = Arithmetic::load(logits + image), total = {};
        for (int64_t k = 1; k < outputs; ++k)
          top = elementary::larger<Arithmetic>(Arithmetic::load(logits + k * width + image), top);
        for (int64_t k = 0; k < outputs; ++k) {
          const Vector power =
              elementary::exp<Arithmetic>(Arithmetic::load(logits + k * width + image) - top);
          total += power;
          Arithmetic::store(grads + k * width + image, power);
        }
        Vector scale = share / total;
        for (int64_t i = std::max<int64_t>(0, here - image); i < lanes; ++i) scale[i] = 0;
        for (int64_t k = 0; k < outputs; ++k) {
          Number* at = grads + k * width + image;
          Arithmetic::store(at, Arithmetic::load(at) * scale);
        }
        Arithmetic::store(tops + image, top);
        Arithmetic::store(totals + image, total);
      }
      for (int64_t i = 0; i < here; ++i) grads[classes[indices[i]] * width + i] -= share;
    });
    // One logarithm of what some make together: each total is between 1 and the number of outputs.
    double loss = 0;
    for (int64_t begin = 0; begin < here; begin += lanes) {
      double product = 1;
      for (int64_t i = begin; i < std::min(here, begin + lanes); ++i) {
        product *= double(totals[i]);
        loss += double(tops[i] - logits[classes[indices[i]] * width + i]);
      }
      loss += std::log(product);
    }
    return loss / double(count);
  }
};

}  // namespace weightops::population
