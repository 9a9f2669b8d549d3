// A network of any layers on a block of samples, layer by layer, images in the lanes of vectors.
#pragma once

#include <optional>

#include "population_pairs.h"
#include "population_schedule.h"

namespace weightops::population {

template <class Arithmetic_>
class LayerByLayer {
 public:
  using Arithmetic = Arithmetic_;
  using Number = typename Arithmetic::Number;

  LayerByLayer(const Plan& plan, int64_t samples)
      : plan_(plan), schedule_(plan), width_(width_of(samples)), products_(schedule_.steps.size()) {
    for (size_t s = 0; s < products_.size(); ++s) {
      const Layer& layer = layer_of(s);
      if (multiplies(layer)) products_[s].emplace(layer, width_);
      working_ = std::max(working_, workspace_size(layer, width_));
    }
  }

  int64_t width() const { return width_; }
  int64_t packed_size() const { return schedule_.packed; }
  int64_t block_size() const { return plan_.taken * width_; }

  void pack(const Number* row, Number* packed) const {
    for (size_t s = 0; s < products_.size(); ++s)
      population::pack<Arithmetic>(layer_of(s), row, packed + schedule_.steps[s].packed);
  }

  void prepare(const Number* x, int64_t images, Number* block) const {
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      lay_out<Arithmetic>(x, images, plan_.taken, width_, block);
    });
  }

  // rows[image][output].
  void logits(const Number* row, const Number* packed, const Number* block, int64_t images,
              Number* rows) const {
    const Number* found = columns(row, packed, block, images);
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      write_rows<Arithmetic>(found, images, plan_.outputs(), width_, rows);
    });
  }

  // columns[output * width() + image].
  const Number* columns(const Number* row, const Number* packed, const Number* block,
                        int64_t) const {
    Number* room = room_of<Number, 2>(schedule_.room * width_);
    Number* workspace = room_of<Number, 3>(working_);
    const auto at = [&](int64_t place) { return place < 0 ? block : room + place * width_; };
    for (size_t s = 0; s < products_.size(); ++s) {
      const auto& step = schedule_.steps[s];
      const Number* inputs[] = {at(step.inputs[0]), at(step.inputs[1])};
      Number* out = room + step.out * width_;
      if (products_[s])
        products_[s]->run(row, packed + step.packed, inputs[0], out, workspace, step.rectify);
      else if (layer_of(s).kind == Kind::token_pair)
        add_tables<Arithmetic>(layer_of(s), packed + step.packed, inputs[0], out, width_);
      else
        forward_layer<Arithmetic>(layer_of(s), row, packed, inputs, out, width_, workspace);
    }
    return room + schedule_.steps.back().out * width_;
  }

 private:
  // Of a block's values.
  static constexpr int64_t kRoomBytes = 1 << 20;

  const Layer& layer_of(size_t step) const { return plan_.layers[schedule_.steps[step].layer]; }

  int64_t width_of(int64_t samples) const {
    // Of convolutions a single vector fills the registers, with several pixels.
    const bool flat = std::all_of(plan_.layers.begin(), plan_.layers.end(),
                                  [](const Layer& layer) { return layer.made.pixels() == 1; });
    const int64_t most = Tile<Arithmetic::bytes>::columns(Tile<Arithmetic::bytes>::outputs);
    const int64_t fits = kRoomBytes / (Arithmetic::bytes * schedule_.room);
    const int64_t wide = flat ? std::clamp<int64_t>(fits, 1, most) : 1;
    const int64_t vectors = (samples + Arithmetic::lanes - 1) / Arithmetic::lanes;
    const int64_t blocks = (vectors + wide - 1) / wide;
    return (vectors + blocks - 1) / blocks * Arithmetic::lanes;
  }

  const Plan& plan_;
  Schedule schedule_;
  int64_t width_;
  std::vector<std::optional<Products<Arithmetic>>> products_;
  int64_t working_ = 0;
};

}  // namespace weightops::population
