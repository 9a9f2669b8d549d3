// In which order a network's layers run, and where their values lie meanwhile.
#pragma once

#include "population_layers.h"

namespace weightops::population {

// Values share room: one whose last reader has run gives its place away, to the reader itself where
// that works in place.
struct Schedule {
  struct Step {
    int64_t layer;
    bool rectify;            // the next layer is ReLU, and done on the way
    int64_t inputs[2], out;  // where the values lie in the room, per image; -1: the network's input
    int64_t packed;
  };
  std::vector<Step> steps;
  int64_t room = 0, packed = 0;

  explicit Schedule(const Plan& plan) {
    const int64_t layers = plan.layers.size();
    std::vector<int64_t> last(layers + 1, -1), readers(layers + 1, 0);
    for (int64_t l = 0; l < layers; ++l)
      for (int64_t i = 0; i < inputs_of(plan.layers[l]); ++i) {
        last[plan.layers[l].inputs[i]] = l;
        ++readers[plan.layers[l].inputs[i]];
      }
    last[layers] = layers;

    struct Slot {
      int64_t size, until;  // the layer that reads it last
    };
    std::vector<Slot> slots;
    std::vector<int64_t> slot_of(layers + 1, -1);
    for (int64_t l = 0; l < layers; ++l) {
      const Layer& layer = plan.layers[l];
      const bool rectify = multiplies(layer) && l + 1 < layers && readers[l + 1] == 1 &&
                           plan.layers[l + 1].kind == Kind::relu && last[l + 1] == l + 1;
      Step step{l, rectify, {-1, -1}, 0, packed};
      packed += packed_size(layer);
      for (int64_t i = 0; i < inputs_of(layer); ++i) step.inputs[i] = slot_of[layer.inputs[i]];
      const int64_t value = l + 1 + rectify, size = layer.made.numel();
      const bool in_place = !multiplies(layer) && layer.kind != Kind::max_pool &&
                            layer.kind != Kind::average_pool && step.inputs[0] >= 0 &&
                            last[layer.inputs[0]] == l;
      int64_t slot = in_place ? step.inputs[0] : 0;
      if (!in_place)
        while (slot < int64_t(slots.size()) && slots[slot].until >= l) ++slot;
      if (slot == int64_t(slots.size())) slots.push_back({0, 0});
      slots[slot] = {std::max(slots[slot].size, size), std::max(l, last[value])};
      step.out = slot_of[value] = slot;
      steps.push_back(step);
      l += rectify;
    }
    std::vector<int64_t> begins;
    for (const Slot& slot : slots) {
      begins.push_back(room);
      room += slot.size;
    }
    for (Step& step : steps) {
      for (int64_t& input : step.inputs) input = input < 0 ? -1 : begins[input];
      step.out = begins[step.out];
    }
  }

 private:
  static int64_t inputs_of(const Layer& layer) { return layer.kind == Kind::add ? 2 : 1; }
};

}  // namespace weightops::population
