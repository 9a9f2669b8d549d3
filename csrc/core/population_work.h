// How a batch runs through one network and back: in which blocks of images, which layers do others'
// part on the way, where values and sums lie.
#pragma once

#include <vector>

#include "population_layers.h"
#include "population_loss.h"

namespace weightops::population {

template <class Arithmetic>
struct Work {
  using Number = typename Arithmetic::Number;
  static constexpr int64_t lanes = Arithmetic::lanes;

  struct Step {
    bool packs;              // a product whose weights are packed first
    bool followed;           // by a ReLU in place
    bool skips, skips_back;  // forward or backward: another layer has done its part
    bool fresh[2];           // backward: nothing is in its inputs' gradients yet
    bool rectifies;          // backward: a max pool, for the ReLU before it
    bool keeps_slope;        // an activation: its slope takes the place of what it reads
    int64_t weight, bias;    // where sums of gradients lie
    int64_t product, packed, transposed;
    // A linear layer's inputs: so many whole vectors of them, and those behind, whose gradients are
    // sums of lanes.
    int64_t columns, tail;
    bool packs_back;  // a linear layer whose input's gradient is a product of packed weights
    // The activation, if any, that is done with a product's outputs as they are made, and the one
    // whose slope a linear layer multiplies its input's gradient by.
    int64_t activation, sloped;
  };

  const Plan& plan;
  std::vector<Step> steps;     // of layers
  std::vector<int64_t> place;  // of a value: which one's memory it has
  std::vector<int64_t> norms;  // layers that go by the batch's own statistics, which cut it
  int64_t vectors, width;      // of a block
  int64_t blocks;              // whose values are kept
  int64_t taken_blocks;        // whose inputs are kept
  bool keeps;                  // those of all samples, for the next step or network
  int64_t sums = 0, products = 0, packed = 0, room = 0, widest = 0;
  bool reads_rows = false;  // a linear layer reads the network's input

  // `whole`: the rows are all samples, always. In `training` batch norm goes by the batch's own
  // statistics.
  Work(const Plan& given, int64_t most_rows, bool whole, bool training)
      : plan(given), steps(layers()) {
    find_places();
    set_width(most_rows);
    for (int64_t l = 0; training && l < layers(); ++l)
      if (plan.layers[l].kind == Kind::batch_norm) norms.push_back(l);
    const int64_t all = (most_rows + width - 1) / width;
    blocks = norms.empty() ? 1 : all;
    keeps = whole && 2 * all * width * padded(plan.taken) * int64_t(sizeof(Number)) <= kInputs;
    taken_blocks = keeps ? all : blocks;
    find_room(most_rows);
    plan_backward();
  }

  int64_t layers() const { return plan.layers.size(); }
  // Whether layer l is a ReLU in its input's memory.
  bool in_place(int64_t l) const { return place[l + 1] != l + 1; }
  static int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

 private:
  static constexpr int64_t kCache = 1 << 20, kInputs = 1 << 26;

  std::vector<int> count_readers() const {
    std::vector<int> readers(layers() + 1, 0);
    for (const Layer& layer : plan.layers)
      for (const int64_t input : layer.inputs)
        if (input >= 0) ++readers[input];
    return readers;
  }

  void find_places() {
    const std::vector<int> readers = count_readers();
    place.resize(layers() + 1);
    for (int64_t value = 0; value <= layers(); ++value) {
      place[value] = value;
      if (value == 0 || !rectifies(plan.layers[value - 1], readers)) continue;
      place[value] = place[plan.layers[value - 1].inputs[0]];
      steps[place[value] - 1].followed = true;
    }
  }

  bool rectifies(const Layer& layer, const std::vector<int>& readers) const {
    return layer.kind == Kind::relu && owns_input(layer, readers);
  }

  // Whether a layer may write over what it reads: nobody else reads that, and the layer that made
  // it does not look at it again.
  bool owns_input(const Layer& layer, const std::vector<int>& readers) const {
    const int64_t input = layer.inputs[0];
    if (input == 0 || readers[input] > 1) return false;
    switch (plan.layers[input - 1].kind) {
      case Kind::linear:
      case Kind::conv:
      case Kind::token_pair:
      case Kind::batch_norm:
      case Kind::group_norm:
      case Kind::layer_norm:
      case Kind::add:
      case Kind::average_pool: return true;
      default: return false;
    }
  }

  // Activations whose slope costs as much as they do.
  static bool has_slope(Kind kind) {
    return kind == Kind::silu || kind == Kind::gelu || kind == Kind::gelu_tanh ||
           kind == Kind::sine;
  }

  // Blocks of several vectors are fewer calls, but must lie in the cache with all their values.
  void set_width(int64_t most_rows) {
    int64_t numbers = 0;
    for (int64_t value = 0; value <= layers(); ++value)
      if (place[value] == value) numbers += 2 * plan.numel(value);
    // Not eight: rows whose distance is a power of two share few sets of the first-level cache.
    const auto fewer = [](int64_t count) { return count == kMostVectors ? 4 : count / 2; };
    vectors = kMostVectors;
    while (vectors > 1 && (vectors * lanes * numbers * int64_t(sizeof(Number)) > kCache ||
                           fewer(vectors) * lanes >= most_rows))
      vectors = fewer(vectors);
    width = vectors * lanes;
  }

  void find_room(int64_t most_rows) {
    for (int64_t l = 0; l < layers(); ++l) {
      const Layer& layer = plan.layers[l];
      Step& step = steps[l];
      const bool linear = layer.kind == Kind::linear;
      step.weight = sums;
      step.product = products;
      step.packed = packed;
      if (linear) {
        const int64_t inputs = layer.taken.numel();
        step.tail = inputs % lanes;
        // A sum of lanes costs its multiply-adds and some four more, another vector one an image.
        if (step.tail * (vectors + 4) > width) step.tail = 0;
        step.columns = padded(inputs - step.tail) / lanes;
        products += layer.made.channels * step.columns * lanes;
        widest = std::max(widest, step.columns * lanes);
        sums += layer.made.channels * step.tail * lanes;
        reads_rows |= layer.inputs[0] == 0;
      } else if (layer.kind == Kind::token_pair) {
        sums += packed_size(layer);
      } else if (layer.weight >= 0) {
        sums += layer.weight_size() * lanes;
      }
      step.bias = sums;
      if (layer.bias >= 0 && layer.kind != Kind::token_pair) sums += layer.bias_size() * lanes;
      // Packing a linear layer is as much work as a block of images, and repaid by several.
      step.packs = layer.kind == Kind::conv || layer.kind == Kind::token_pair ||
                   (linear && most_rows > width);
      if (step.packs) packed += packed_size(layer);
      step.transposed = packed;
      step.packs_back = linear && step.packs && layer.inputs[0] > 0;
      if (step.packs_back) packed += layer.weight_size();
      room = std::max(room, workspace_size(layer, width));
    }
  }

  // The products before and behind activation l do its part.
  void share_activation(int64_t l, int64_t reader) {
    const int64_t maker = plan.layers[l].inputs[0] - 1;
    if (steps[maker].packs && multiplies(plan.layers[maker])) {
      steps[maker].activation = l;
      steps[l].skips = true;
    }
    if (reader >= 0 && steps[reader].packs_back) {
      steps[reader].sloped = l;
      steps[l].skips_back = true;
    }
  }

  void plan_backward() {
    const std::vector<int> readers = count_readers();
    std::vector<char> pooled(layers() + 1, 0), reached(layers() + 1, 0);
    for (const Layer& layer : plan.layers)
      if (layer.kind == Kind::max_pool && readers[layer.inputs[0]] == 1)
        pooled[layer.inputs[0]] = 1;
    std::vector<int64_t> reader(layers() + 1, -1);  // of values that only one layer reads
    for (int64_t l = 0; l < layers(); ++l) {
      steps[l].activation = steps[l].sloped = -1;
      for (const int64_t input : plan.layers[l].inputs)
        if (input >= 0 && readers[input] == 1) reader[input] = l;
    }
    reached[place[layers()]] = 1;
    for (int64_t l = layers() - 1; l >= 0; --l) {
      const Layer& layer = plan.layers[l];
      Step& step = steps[l];
      step.keeps_slope = has_slope(layer.kind) && owns_input(layer, readers);
      step.skips = in_place(l) && steps[layer.inputs[0] - 1].packs &&
                   multiplies(plan.layers[layer.inputs[0] - 1]);
      // Nothing comes of what the output does not depend on, and a pool that alone reads what a
      // ReLU made has done its part.
      step.skips_back = !reached[place[l + 1]] || (in_place(l) && pooled[l + 1]);
      if (step.skips_back) continue;
      for (int i = 0; i < 2; ++i) {
        if (layer.inputs[i] < 0) continue;
        char& there = reached[place[layer.inputs[i]]];
        step.fresh[i] = in_place(l) || !there;
        there = 1;
      }
      step.packs_back &= step.fresh[0];
      if (step.keeps_slope) share_activation(l, reader[l + 1]);
      step.rectifies =
          layer.inputs[0] > 0 && pooled[layer.inputs[0]] && in_place(layer.inputs[0] - 1);
    }
  }
};

}  // namespace weightops::population
