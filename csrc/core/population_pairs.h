// The first layer of networks that read pairs of tokens (a, b): A[a] + B[b], of the tables A = E
// Wa^T and B = E Wb^T + bias. Its gradients are sums over the pairs of each token, then products of
// tables.
#pragma once

#include "population_layout.h"
#include "population_multiply.h"

namespace weightops::population {

// Rows of `size` numbers, filled up with zeros to `wide` ones.
template <class Number>
void widen(const Number* from, int64_t rows, int64_t size, int64_t wide, Number* to) {
  for (int64_t r = 0; r < rows; ++r, from += size, to += wide)
    std::fill(std::copy_n(from, size, to), to + wide, Number(0));
}

// Adds rows of `size` numbers, of `wide` ones each.
template <class Number>
void add_rows(const Number* from, int64_t rows, int64_t size, int64_t wide, Number* to) {
  for (int64_t r = 0; r < rows; ++r, from += wide, to += size)
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

// The tables [half][token][output].
template <class Arithmetic, class Number = typename Arithmetic::Number>
void make_tables(const Layer& layer, const Number* row, Number* tables) {
  const int64_t outputs = layer.made.channels, features = layer.features, stride = table_row(layer);
  const int64_t lanes = Arithmetic::lanes, tokens = layer.tokens;
  Number* weight = room_of<Number, 4>(2 * features * stride);  // [half][feature][output]
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    lay_out<Arithmetic>(row + layer.weight, outputs, 2 * features, stride, weight);
  });
  for (int64_t half = 0; half < 2; ++half) {
    Number* to = tables + half * tokens * stride;
    for (int64_t t = 0; t < tokens; ++t) {
      Number* end = to + t * stride;
      if (half == 1 && layer.bias >= 0) end = std::copy_n(row + layer.bias, outputs, end);
      std::fill(end, to + (t + 1) * stride, Number(0));
    }
    Product<Number> product{};
    product.a = row + layer.embedding;
    product.row = features;
    product.left[1] = 1;
    product.b = weight + half * features * stride;
    product.column = product.to_column = lanes;
    product.right[1] = product.to_row = stride;
    product.depth[0] = 1;
    product.depth[1] = features;
    product.to = to;
    product.adds = true;
    multiply<Arithmetic>(product, tokens, stride / lanes);
  }
}

// What forward reads of any layer instead of its weights.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void pack(const Layer& layer, const Number* row, Number* packed) {
  if (layer.kind == Kind::token_pair) return make_tables<Arithmetic>(layer, row, packed);
  pack_layer<Arithmetic>(layer, row, packed);
}

// pairs[which * width + image] -> out[output * width + image].
template <class Arithmetic, class Number = typename Arithmetic::Number>
void add_tables(const Layer& layer, const Number* tables, const Number* pairs, Number* out,
                int64_t width) {
  constexpr int lanes = Arithmetic::lanes;
  const int64_t outputs = layer.made.channels, stride = table_row(layer);
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    for (int64_t image = 0; image < width; image += lanes) {
      const Number *first[lanes], *second[lanes];
      for (int k = 0; k < lanes; ++k) {
        first[k] = tables + int64_t(pairs[image + k]) * stride;
        second[k] = tables + (layer.tokens + int64_t(pairs[width + image + k])) * stride;
      }
      for (int64_t o = 0; o < outputs; o += lanes) {
        typename Arithmetic::Vector square[lanes];
        for (int k = 0; k < lanes; ++k)
          square[k] = Arithmetic::load(first[k] + o) + Arithmetic::load(second[k] + o);
        Arithmetic::transpose(square);
        for (int64_t k = 0; k < std::min<int64_t>(lanes, outputs - o); ++k)
          Arithmetic::store(out + (o + k) * width + image, square[k]);
      }
    }
  });
}

// Adds gradients[output * width + image] of a block to those of the tables.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void gather_tables(const Layer& layer, const Number* pairs, const Number* grad, int64_t width,
                   Number* sums) {
  using Vector = typename Arithmetic::Vector;
  constexpr int lanes = Arithmetic::lanes;
  const int64_t outputs = layer.made.channels, stride = table_row(layer);
  enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
    for (int64_t image = 0; image < width; image += lanes) {
      Number* to[2 * lanes];
      for (int k = 0; k < lanes; ++k) {
        to[k] = sums + int64_t(pairs[image + k]) * stride;
        to[lanes + k] = sums + (layer.tokens + int64_t(pairs[width + image + k])) * stride;
      }
      for (int64_t o = 0; o < outputs; o += lanes) {
        Vector square[lanes];
        for (int64_t k = 0; k < lanes; ++k)
          square[k] = o + k < outputs ? Arithmetic::load(grad + (o + k) * width + image) : Vector{};
        Arithmetic::transpose(square);
        for (int k = 0; k < lanes; ++k) {
          Arithmetic::store(to[k] + o, Arithmetic::load(to[k] + o) + square[k]);
          Number* other = to[lanes + k] + o;
          Arithmetic::store(other, Arithmetic::load(other) + square[k]);
        }
      }
    }
  });
}

// Gradients of the embedding, the weight and the bias, of those of the tables.
template <class Arithmetic, class Number = typename Arithmetic::Number>
void collect_tables(const Layer& layer, const Number* row, const Number* sums, Number* grads) {
  const int64_t outputs = layer.made.channels, features = layer.features, tokens = layer.tokens;
  const int64_t stride = table_row(layer), lanes = Arithmetic::lanes;
  const int64_t wide = (features + lanes - 1) / lanes * lanes;
  Number* weight =
      room_of<Number, 4>((2 * outputs + tokens + std::max(2 * outputs, tokens)) * wide);
  Number *embedding = weight + 2 * outputs * wide, *made = embedding + tokens * wide;
  widen(row + layer.weight, 2 * outputs, features, wide, weight);
  widen(row + layer.embedding, tokens, features, wide, embedding);

  Product<Number> product{};
  product.column = product.to_column = lanes;
  product.a = sums;
  product.row = stride;
  product.left[0] = tokens * stride;
  product.left[1] = 1;
  product.b = weight;
  product.right[0] = wide;
  product.right[1] = 2 * wide;
  product.depth[0] = 2;
  product.depth[1] = outputs;
  product.to = made;
  product.to_row = wide;
  multiply<Arithmetic>(product, tokens, wide / lanes);
  add_rows(made, tokens, features, wide, grads + layer.embedding);

  product.row = 1;
  product.left[1] = stride;
  product.b = embedding;
  product.right[1] = wide;
  product.depth[0] = 1;
  product.depth[1] = tokens;
  product.to_row = 2 * wide;
  for (int64_t half = 0; half < 2; ++half) {
    product.a = sums + half * tokens * stride;
    product.to = made + half * wide;
    multiply<Arithmetic>(product, outputs, wide / lanes);
  }
  add_rows(made, 2 * outputs, features, wide, grads + layer.weight);

  for (int64_t t = 0; layer.bias >= 0 && t < tokens; ++t)
    for (int64_t o = 0; o < outputs; ++o) grads[layer.bias + o] += sums[(tokens + t) * stride + o];
}

}  // namespace weightops::population
