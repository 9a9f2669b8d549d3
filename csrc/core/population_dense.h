// Chains of linear layers by bfloat16 tiles: images are a tile's rows and outputs its columns, so
// that what a layer makes is packed for the next one row by row, while the next product runs.
#pragma once

#include "population_layers.h"
#include "population_layout.h"
#include "product_pack.h"

#if WEIGHTOPS_X86

namespace weightops::population {

class DenseTiles {
  using Kernel = product::Bfloat16Tiles<3>;
  using Packed = Kernel::Packed;
  using Vector = Kernel::Vector;

 public:
  using Arithmetic = Kernel::Arithmetic;
  using Number = float;

  // Whether a network is such a chain, and full enough tiles make it faster than multiply-adds.
  static bool takes(const Plan& plan, int64_t samples) {
    if (!Kernel::available() || samples < kRows) return false;
    int64_t products = 0, formed = 0;
    for (size_t l = 0; l < plan.layers.size(); ++l) {
      const Layer& layer = plan.layers[l];
      const bool linear = layer.kind == Kind::linear;
      const bool follows = l > 0 && plan.layers[l - 1].kind == Kind::linear && activates(layer);
      if (!(linear || follows) || layer.inputs[0] != int64_t(l)) return false;
      if (!linear) continue;
      products += layer.weight_size();
      const int64_t halves = (layer.made.numel() + kNarrow - 1) / kNarrow;
      formed += Kernel::padded(layer.taken.numel()) * halves * kNarrow;
    }
    return kAdvantage * products > formed;
  }

  DenseTiles(const Plan& plan, int64_t samples) : taken_(plan.taken) {
    const int64_t blocks = (samples + kMostImages - 1) / kMostImages;
    width_ = ((samples + blocks - 1) / blocks + kTwo - 1) / kTwo * kTwo;
    for (const Layer& layer : plan.layers) {
      if (layer.kind != Kind::linear) {
        layers_.back().activation = layer.kind;
        continue;
      }
      const int64_t inputs = layer.taken.numel(), outputs = layer.made.numel();
      layers_.push_back({Kind::linear, inputs, outputs, layer.weight, layer.bias, packed_});
      packed_ += layers_.back().panels() * (Kernel::panel(inputs) / kPerNumber + kColumns);
      widest_ = std::max(widest_, Kernel::block(outputs));
    }
  }

  int64_t width() const { return width_; }
  int64_t packed_size() const { return packed_; }
  int64_t block_size() const { return width_ / kRows * Kernel::block(taken_) / kPerNumber; }

  // Panels of a layer's weights, and then its biases.
  void pack(const float* row, float* packed) const {
    enter([&]() __attribute__((always_inline)) {
      for (const Dense& layer : layers_) {
        float* to = packed + layer.packed;
        for (int64_t o = 0; o < layer.outputs; o += kNarrow)
          pack_outputs(row + layer.weight + o * layer.inputs, std::min(kNarrow, layer.outputs - o),
                       layer.inputs, tiles(to) + o / kColumns * Kernel::panel(layer.inputs),
                       o % kColumns / kNarrow);
        to += layer.panels() * layer.panel();
        std::fill_n(to, layer.panels() * kColumns, 0.0f);
        if (layer.bias >= 0) std::copy_n(row + layer.bias, layer.outputs, to);
      }
    });
  }

  void prepare(const float* x, int64_t images, float* block) const {
    const product::Source<float> source{x, product::Kind::same, product::Lies::along, taken_};
    enter([&]() __attribute__((always_inline)) {
      for (int64_t i = 0; i < images; i += kRows)
        product::pack_rows<Kernel>(source, 0, i, std::min(kRows, images - i), 0, taken_,
                                   tiles(block) + i / kRows * Kernel::block(taken_), nullptr);
    });
  }

  // rows[image][output].
  void logits(const float*, const float* packed, const float* block, int64_t images,
              float* rows) const {
    Packed* hidden =
        reinterpret_cast<Packed*>(room_of<float, 2>(2 * width_ / kRows * widest_ / kPerNumber));
    enter([&]()
              __attribute__((always_inline)) { run(packed, tiles(block), images, hidden, rows); });
  }

  // columns[output * width() + image].
  const float* columns(const float* row, const float* packed, const float* block,
                       int64_t images) const {
    const int64_t outputs = layers_.back().outputs;
    float* rows = room_of<float, 3>(images * outputs);
    float* found = room_of<float, 4>(width_ * outputs);
    logits(row, packed, block, images, rows);
    enter([&]() __attribute__((always_inline)) {
      lay_out<Arithmetic>(rows, images, outputs, width_, found);
    });
    return found;
  }

 private:
  static constexpr int64_t kRows = Kernel::rows, kColumns = Kernel::lanes;
  static constexpr int64_t kNarrow = 16, kTwo = 2 * kRows;  // half a panel; two blocks of rows
  static constexpr int64_t kPerNumber = sizeof(float) / sizeof(Packed);
  static constexpr int64_t kMostImages = 256;
  // Six products of tiles take as long as one by multiply-adds of as many numbers of them.
  static constexpr double kAdvantage = 2.4;

  struct Dense {
    Kind activation;  // linear: none
    int64_t inputs, outputs, weight, bias, packed;
    int64_t panels() const { return (outputs + kColumns - 1) / kColumns; }
    int64_t panel() const { return Kernel::panel(inputs) / kPerNumber; }
  };

  // A product whose sums are there: what is left is to shift, activate and pack or write its rows.
  struct Finish {
    const float* sums;
    const float* bias;
    Kind activation;
    int64_t columns;  // of its panel
    Packed* next;     // the blocks for the next layer, or null: `rows` of outputs
    int64_t next_block, depth;
    float* rows;
    int64_t stride, count;
    int64_t row, each;

    WEIGHTOPS_INLINE void step(int, int) { advance(std::min(row + each, count)); }

    WEIGHTOPS_INLINE void advance(int64_t end) {
      if (row == end) return;
      if (activation != Kind::linear && activation != Kind::relu) {
        Finish copy = *this;  // so that this one can stay in registers
        copy.advance_by_others(end);
        row = end;
        return;
      }
      const float least = activation == Kind::relu ? 0 : -std::numeric_limits<float>::infinity();
      const Vector lowest = elementary::spread<Arithmetic>(&least);
      run_rows(end, [&](const Vector& x) __attribute__((always_inline)) {
        return elementary::larger<Arithmetic>(lowest, x);
      });
    }

    WEIGHTOPS_AMX void advance_by_others(int64_t end) {
      run_rows(end, [&](const Vector& x) __attribute__((always_inline)) {
        switch (activation) {
          case Kind::silu: return activate<Arithmetic, Kind::silu>(x);
          case Kind::gelu: return activate<Arithmetic, Kind::gelu>(x);
          case Kind::gelu_tanh: return activate<Arithmetic, Kind::gelu_tanh>(x);
          default: return activate<Arithmetic, Kind::tanh>(x);
        }
      });
    }

    template <class Activate>
    WEIGHTOPS_INLINE void run_rows(int64_t end, const Activate& activated) {
      const bool narrow = columns <= kNarrow;
      const int64_t across = narrow ? kNarrow : kColumns;
      const Vector first = Arithmetic::load(bias), second = Arithmetic::load(bias + kNarrow);
      for (; row < end; ++row) {
        const float* from = sums + row * across;
        const Vector low = activated(Arithmetic::load(from) + first);
        Vector high = {};
        if (!narrow) high = activated(Arithmetic::load(from + kNarrow) + second);
        if (next) {
          Kernel::pack_row(next + row / kRows * next_block, row % kRows, depth, low, high);
        } else {
          write(rows + row * stride, low, columns);
          if (!narrow) write(rows + row * stride + kNarrow, high, columns - kNarrow);
        }
      }
    }

    // The first `count` of them.
    static WEIGHTOPS_INLINE void write(float* to, const Vector& values, int64_t count) {
      const unsigned mask = count < kNarrow ? (1u << count) - 1 : 0xffff;
      asm volatile("kmovw %2, %%k1\n vmovups %1, (%0)%{%%k1%}" ::"r"(to), "v"(values), "r"(mask)
                   : "k1", "memory");
    }
  };

  static bool activates(const Layer& layer) {
    switch (layer.kind) {
      case Kind::relu:
      case Kind::silu:
      case Kind::gelu:
      case Kind::gelu_tanh:
      case Kind::tanh: return true;
      default: return false;
    }
  }

  static WEIGHTOPS_INLINE void pack_outputs(const float* weight, int64_t count, int64_t inputs,
                                            Packed* panel, int half) {
    for (int64_t d = 0; d < Kernel::padded(inputs); d += kNarrow) {
      Vector square[kNarrow] = {};
      for (int64_t o = 0; o < count; ++o) {
        const float* from = weight + o * inputs + d;
        if (d + kNarrow <= inputs) {
          square[o] = Arithmetic::load(from);
        } else if (d < inputs) {
          float rest[kNarrow] = {};
          std::copy_n(from, inputs - d, rest);
          square[o] = Arithmetic::load(rest);
        }
      }
      Arithmetic::transpose(square);
#pragma GCC unroll 8
      for (int i = 0; i < kNarrow; i += 2)
        Kernel::pack_half(panel, d + i, half, square[i], square[i + 1]);
    }
  }

  static Packed* tiles(float* at) { return reinterpret_cast<Packed*>(at); }
  static const Packed* tiles(const float* at) { return reinterpret_cast<const Packed*>(at); }

  // Lines that are written soon: stores that wait for them would hold up those of the tiles.
  static WEIGHTOPS_INLINE void fetch(const float* at, int64_t count) {
    for (const float* end = at + count; at < end; at += 64 / sizeof(float))
      asm volatile("prefetchw (%0)" ::"r"(at));
  }

  template <class F>
  static WEIGHTOPS_AMX void enter(const F& f) {
    f();
  }

  // Layer by layer; a product's rows are finished while the next one runs.
  WEIGHTOPS_INLINE void run(const float* packed, const Packed* block, int64_t images,
                            Packed* hidden, float* rows) const {
    alignas(64) float sums[2][kRows * kColumns];
    Finish finish{};
    int64_t unfinished = -1, product = 0;
    Kernel::begin();
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Dense& layer = layers_[l];
      const bool last = l + 1 == layers_.size();
      const int64_t taken = Kernel::block(layer.inputs), makes = Kernel::block(layer.outputs);
      const int64_t steps = Kernel::padded(layer.inputs) / Kernel::slice * 6;
      Packed* made = hidden + l % 2 * width_ / kRows * widest_;
      const float* bias = packed + layer.packed + layer.panels() * layer.panel();
      for (int64_t two = 0; two < images; two += kTwo) {
        if (unfinished == two) finish.advance(finish.count);
        for (int64_t o = 0; o < layer.outputs; o += kColumns) {
          const int64_t columns = std::min(kColumns, layer.outputs - o);
          const int64_t height = columns > kNarrow ? kRows : kTwo;
          const Packed* panel =
              tiles(packed + layer.packed) + o / kColumns * Kernel::panel(layer.inputs);
          for (int64_t i = two; i < std::min(two + kTwo, images); i += height, ++product) {
            const Packed* from = block + i / kRows * taken;
            float* tile = sums[product % 2];
            if (last) fetch(rows + i * layer.outputs, std::min(height, images - i) * layer.outputs);
            finish.each = (finish.count + steps - 1) / steps;
            if (height == kTwo) {
              Kernel::multiply_narrow(from, panel, layer.inputs, finish, tile);
            } else {
              const product::Segment<Packed> segment{from, panel, layer.inputs};
              Kernel::multiply(&segment, 1, kRows, finish, tile);
            }
            finish = {tile,
                      bias + o,
                      layer.activation,
                      columns,
                      last ? nullptr : made + i / kRows * makes,
                      makes,
                      o,
                      rows + i * layer.outputs + o,
                      layer.outputs,
                      std::min(height, images - i),
                      0,
                      0};
          }
        }
        unfinished = two;
      }
      block = made;
    }
    finish.advance(finish.count);
    Kernel::end();
  }

  std::vector<Dense> layers_;
  int64_t taken_, width_, packed_ = 0, widest_ = 0;
};

}  // namespace weightops::population

#endif
