// A network's layers, as weightops/ops/population/program.py writes them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace weightops::population {

enum class Kind {
  linear,
  conv,
  max_pool,
  average_pool,
  relu,
  silu,
  gelu,
  gelu_tanh,
  tanh,
  batch_norm,
  group_norm,
  layer_norm,
  add,
  token_pair,
  sine,
  count
};

// Of one sample's value: features are channels alone.
struct Shape {
  int64_t channels, height, width;
  int64_t pixels() const { return height * width; }
  int64_t numel() const { return channels * pixels(); }
};

struct Layer {
  Kind kind;
  int64_t inputs[2];  // values: 0 is the network's input, i + 1 what layer i makes; -1: none
  Shape taken, made;
  int64_t weight, bias, mean, variance;  // where they begin in a network's row; -1: none
  int64_t embedding, tokens, features;   // of token_pair: where [tokens, features] begins
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;       // of convolutions and group norm
  bool counts_padding;  // average pools
  double eps;           // of norms; of sine the factor of its argument
  double momentum;      // of running statistics; below 0: they are means over all steps

  // Numbers of its weight, the largest of its tensors.
  int64_t weight_size() const {
    switch (kind) {
      case Kind::linear: return taken.numel() * made.numel();
      case Kind::conv: return made.channels * (taken.channels / groups) * kernel[0] * kernel[1];
      case Kind::layer_norm: return taken.numel();
      case Kind::token_pair: return made.channels * 2 * features;
      default: return taken.channels;
    }
  }
  int64_t bias_size() const {
    return kind == Kind::linear || kind == Kind::conv || kind == Kind::token_pair ? made.channels
           : kind == Kind::layer_norm                                             ? taken.numel()
                                                                                  : taken.channels;
  }
};

struct Plan {
  int64_t taken;  // numbers of a sample
  std::vector<Layer> layers;

  int64_t outputs() const { return layers.back().made.numel(); }
  // How many tokens a sample's numbers name; 0: they are no tokens.
  int64_t tokens() const {
    int64_t least = 0;
    for (const Layer& layer : layers)
      if (layer.kind == Kind::token_pair)
        least = least ? std::min(least, layer.tokens) : layer.tokens;
    return least;
  }
  // Numbers of a value of one sample.
  int64_t numel(int64_t value) const { return value == 0 ? taken : layers[value - 1].made.numel(); }

  // Throws where the code is not whole, or reads past `weights` numbers of a network.
  static Plan parse(const int64_t* code, int64_t count, int64_t weights) {
    const int64_t* end = code + count;
    const auto next = [&] {
      check(code != end);
      return *code++;
    };
    Plan plan;
    plan.taken = next();
    const int64_t layers = next();
    check(plan.taken > 0 && layers > 0 && layers <= count);
    for (int64_t l = 0; l < layers; ++l) {
      Layer layer{};
      const int64_t kind = next();
      check(kind >= 0 && kind < int64_t(Kind::count));
      layer.kind = Kind(kind);
      for (int64_t& input : layer.inputs) input = next();
      for (Shape* shape : {&layer.taken, &layer.made}) *shape = {next(), next(), next()};
      int64_t* places[] = {&layer.weight, &layer.bias, &layer.mean, &layer.variance};
      for (int64_t* place : places) *place = next();
      int64_t settings[10];
      for (int64_t& setting : settings) setting = next();
      for (int axis = 0; axis < 2; ++axis) {
        layer.kernel[axis] = settings[axis];
        layer.stride[axis] = settings[2 + axis];
        layer.padding[axis] = settings[4 + axis];
        layer.dilation[axis] = settings[6 + axis];
      }
      layer.groups = layer.kind == Kind::group_norm ? settings[0] : settings[8];
      layer.embedding = -1;
      if (layer.kind == Kind::token_pair) {
        std::swap(layer.embedding, layer.mean);
        layer.tokens = settings[0];
        layer.features = settings[1];
      }
      layer.counts_padding = settings[8] == 1;
      for (double* number : {&layer.eps, &layer.momentum}) {
        const int64_t bits = next();
        std::memcpy(number, &bits, sizeof bits);
      }
      plan.check_layer(layer, l, weights);
      plan.layers.push_back(layer);
    }
    check(code == end);
    return plan;
  }

 private:
  void check_layer(const Layer& layer, int64_t l, int64_t weights) const {
    for (const Shape* shape : {&layer.taken, &layer.made})
      check(shape->channels > 0 && shape->height > 0 && shape->width > 0 &&
            shape->channels < kMost && shape->height < kMost && shape->width < kMost &&
            shape->numel() < kMost);
    const int64_t inputs = layer.kind == Kind::add ? 2 : 1;
    for (int64_t i = 0; i < inputs; ++i)
      check(layer.inputs[i] >= 0 && layer.inputs[i] <= l &&
            numel(layer.inputs[i]) == layer.taken.numel());
    const bool windows = layer.kind == Kind::conv || layer.kind == Kind::max_pool ||
                         layer.kind == Kind::average_pool;
    if (windows) {
      const int64_t into[] = {layer.taken.height, layer.taken.width},
                    out[] = {layer.made.height, layer.made.width};
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t kernel = layer.kernel[axis], stride = layer.stride[axis],
                      padding = layer.padding[axis], dilation = layer.dilation[axis];
        check(kernel > 0 && kernel < kMost && stride > 0 && stride < kMost && padding >= 0 &&
              padding < kMost && dilation > 0 && dilation < kMost &&
              (layer.kind == Kind::conv || 2 * padding <= kernel) &&
              out[axis] == (into[axis] + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1);
      }
      check(layer.kind == Kind::conv
                ? layer.groups > 0 && layer.taken.channels % layer.groups == 0 &&
                      layer.made.channels % layer.groups == 0
                : layer.made.channels == layer.taken.channels);
    } else if (layer.kind == Kind::token_pair) {
      check(layer.inputs[0] == 0 && layer.taken.numel() == 2 && layer.made.pixels() == 1 &&
            layer.tokens > 0 && layer.tokens < kMost && layer.features > 0 &&
            layer.features < kMost && layer.embedding >= 0);
    } else if (layer.kind == Kind::linear) {
      check(layer.made.pixels() == 1);
    } else {
      check(layer.made.numel() == layer.taken.numel());
    }
    if (layer.kind == Kind::group_norm)
      check(layer.groups > 0 && layer.taken.channels % layer.groups == 0);
    const bool weighs =
        layer.kind == Kind::linear || layer.kind == Kind::conv || layer.kind == Kind::token_pair;
    const bool runs = layer.kind == Kind::batch_norm;
    const auto held = [&](int64_t place, int64_t size) {
      check(place == -1 || (place >= 0 && size <= weights && place <= weights - size));
    };
    check((!weighs || layer.weight >= 0) && (!runs || (layer.mean >= 0 && layer.variance >= 0)));
    held(layer.weight, layer.weight_size());
    held(layer.bias, layer.bias_size());
    held(layer.mean, layer.taken.channels);
    held(layer.variance, layer.taken.channels);
    held(layer.embedding, layer.tokens * layer.features);
  }

  static void check(bool fits) {
    if (!fits) throw std::out_of_range("the program does not fit the networks");
  }

  static constexpr int64_t kMost = int64_t(1) << 31;
};

}  // namespace weightops::population
