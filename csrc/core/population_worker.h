// Losses and gradients of small networks: images go through all layers in blocks whose values stay
// in the second-level cache.
#pragma once

#include <optional>

#include "buffer.h"
#include "population_backward.h"
#include "population_batch_norm.h"
#include "population_loss.h"
#include "population_pairs.h"
#include "population_work.h"

namespace weightops::population {

// The work room of a thread: one network at a time.
template <class Arithmetic_>
class Worker {
 public:
  using Arithmetic = Arithmetic_;

 private:
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  static constexpr int64_t lanes = Arithmetic::lanes;

 public:
  Worker(const Plan& plan, int64_t most_rows, bool whole, bool training)
      : plan_(plan), work_(plan, most_rows, whole, training), width_(work_.width) {
    for (int64_t l = 0; l < work_.layers(); ++l) {
      products_of_.emplace_back();
      if (work_.steps[l].packs && multiplies(plan.layers[l]))
        products_of_.back().emplace(plan.layers[l], width_);
      products_back_.emplace_back();
      if (work_.steps[l].packs_back)
        products_back_.back().emplace(transposed(plan.layers[l]), width_);
    }
    for (const int64_t l : work_.norms) norms_.emplace_back(plan.layers[l]);
    sums_.get(work_.sums);
    products_.get(work_.products);
    packed_.get(work_.packed);
    room_.get(work_.room);
    rows_.get(work_.widest * width_);
    if (work_.reads_rows) input_rows_.get(work_.taken_blocks * value_size(0));
    values_.resize(work_.layers() + 1);
    grads_.resize(work_.layers() + 1);
    for (int64_t v = 0; v <= work_.layers(); ++v) {
      if (work_.place[v] != v) continue;
      values_[v].get((v > 0 ? work_.blocks : work_.taken_blocks) * value_size(v));
      if (v > 0) grads_[v].get(work_.blocks * value_size(v));
    }
  }

  // The mean loss of `count` samples, `picked` or, if that is null, the first ones; gradients of
  // all P weights.
  double loss_grad(const Number* row, const Samples<Number>& samples, const int64_t* picked,
                   int64_t count, int64_t weights, Number* grads) {
    std::fill_n(sums_.get(0), work_.sums, Number(0));
    std::fill_n(products_.get(0), work_.products, Number(0));
    for (auto& norm : norms_) norm.clear();
    for (int64_t l = 0; l < work_.layers(); ++l) {
      const auto& step = work_.steps[l];
      if (step.packs) pack<Arithmetic>(plan_.layers[l], row, packed_.get(0) + step.packed);
      if (step.packs_back)
        pack_transposed<Arithmetic>(plan_.layers[l], row, packed_.get(0) + step.transposed);
    }
    // Between two norms all blocks go through the layers, one after the other: statistics are of
    // the whole batch. Behind the last one a block turns back at once.
    const int64_t stages = norms_.size();
    const auto each_block = [&](auto&& f) {
      for (int64_t begin = 0; begin < count; begin += width_) {
        select(picked, begin, count);
        f();
      }
    };
    double loss = 0;
    for (int64_t stage = 0; stage < stages; ++stage)
      each_block([&] { forward(stage, row, samples); });
    each_block([&] {
      forward(stages, row, samples);
      loss += compare(samples, count);
      backward(stages, row);
    });
    for (int64_t stage = stages - 1; stage >= 0; --stage) each_block([&] { backward(stage, row); });
    if (work_.keeps) taken_ = samples.x;
    std::fill_n(grads, weights, Number(0));
    collect(row, grads);
    return loss;
  }

  // Moves running statistics towards those of the batch that loss_grad saw last.
  void remember(Number* row, int64_t step) const {
    for (const auto& norm : norms_) norm.remember(row, step);
  }

 private:
  int64_t value_size(int64_t v) const { return Work<Arithmetic>::padded(plan_.numel(v)) * width_; }
  int64_t kept(int64_t blocks) const { return blocks == 1 ? 0 : block_; }
  Number* value(int64_t v) {
    const int64_t blocks = v > 0 ? work_.blocks : work_.taken_blocks;
    return values_[work_.place[v]].get(0) + kept(blocks) * value_size(v);
  }
  Number* grad(int64_t v) {
    return v == 0 ? nullptr : grads_[work_.place[v]].get(0) + kept(work_.blocks) * value_size(v);
  }
  Number* input_rows() { return input_rows_.get(0) + kept(work_.taken_blocks) * value_size(0); }

  // The linear layer that takes gradients of outputs to those of inputs.
  static Layer transposed(Layer layer) {
    const int64_t inputs = layer.taken.numel();
    layer.taken = layer.made;
    layer.made = {inputs, 1, 1};
    layer.bias = -1;
    return layer;
  }

  // Makes [begin, begin + width) the block that all else is about.
  void select(const int64_t* picked, int64_t begin, int64_t count) {
    here_ = std::min(width_, count - begin);
    block_ = begin / width_;
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t at = begin + std::min(i, here_ - 1);
      indices_[i] = picked ? picked[at] : at;
    }
  }

  // Rows of samples become columns; rows stay for a linear layer that reads them.
  void take(const Samples<Number>& samples) {
    const int64_t features = plan_.taken, stride = Work<Arithmetic>::padded(features);
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      Number* to = value(0);
      Number* rows = work_.reads_rows ? input_rows() : nullptr;
      for (int64_t image = 0; image < width_; image += lanes)
        for (int64_t f = 0; f < features; f += lanes) {
          Vector tile[lanes];
          for (int64_t i = 0; i < lanes; ++i) {
            const Number* from = samples.x + indices_[image + i] * features + f;
            if (f + lanes <= features) {
              tile[i] = Arithmetic::load(from);
            } else {
              Number tail[lanes] = {};
              std::copy_n(from, features - f, tail);
              tile[i] = Arithmetic::load(tail);
            }
            if (rows) Arithmetic::store(rows + (image + i) * stride + f, tile[i]);
          }
          Arithmetic::transpose(tile);
          for (int64_t i = 0; i < std::min(lanes, features - f); ++i)
            Arithmetic::store(to + (f + i) * width_ + image, tile[i]);
        }
    });
  }

  // The layers of a stage: from behind a norm to before the next one.
  int64_t first_of(int64_t stage) const { return stage ? work_.norms[stage - 1] + 1 : 0; }
  int64_t last_of(int64_t stage) const {
    return stage < int64_t(norms_.size()) ? work_.norms[stage] : work_.layers();
  }

  void forward(int64_t stage, const Number* row, const Samples<Number>& samples) {
    if (stage == 0) {
      if (taken_ == nullptr || taken_ != samples.x) take(samples);
    } else {
      const int64_t l = work_.norms[stage - 1];
      norms_[stage - 1].forward(row, value(plan_.layers[l].inputs[0]), value(l + 1), width_);
    }
    for (int64_t l = first_of(stage); l < last_of(stage); ++l) {
      const Layer& layer = plan_.layers[l];
      const auto& step = work_.steps[l];
      if (step.skips) continue;
      const Number* inputs[] = {value(layer.inputs[0]),
                                layer.inputs[1] >= 0 ? value(layer.inputs[1]) : nullptr};
      Number* out = value(l + 1);
      if (layer.kind == Kind::token_pair)
        add_tables<Arithmetic>(layer, packed_.get(0) + step.packed, inputs[0], out, width_);
      else if (step.keeps_slope)
        forward_slope<Arithmetic>(layer, value(layer.inputs[0]), out, layer.taken.numel() * width_);
      else if (step.packs)
        products_of_[l]->run(row, packed_.get(0) + step.packed, inputs[0], out, room_.get(0),
                             step.followed, nullptr, [&](int64_t begin, int64_t end) {
                               if (step.activation >= 0) activate(step.activation, out, begin, end);
                             });
      else if (layer.kind == Kind::linear)
        forward_linear(layer, row, inputs[0], out);
      else
        forward_layer<Arithmetic, Number>(layer, row, nullptr, inputs, out, width_, nullptr);
    }
    if (stage < int64_t(norms_.size())) {
      const int64_t input = plan_.layers[work_.norms[stage]].inputs[0];
      norms_[stage].measure(value(input), width_, here_);
    }
  }

  // Of some channels of its input, in whose place their slopes are left.
  void activate(int64_t l, Number* from, int64_t begin, int64_t end) {
    const int64_t channel = plan_.layers[l].taken.pixels() * width_;
    forward_slope<Arithmetic>(plan_.layers[l], from + begin * channel,
                              value(l + 1) + begin * channel, (end - begin) * channel);
  }

  // Weights as they are.
  void forward_linear(const Layer& layer, const Number* row, const Number* from, Number* out) {
    const int64_t inputs = layer.taken.numel(), outputs = layer.made.channels;
    for (int64_t o = 0; o < outputs; ++o)
      std::fill_n(out + o * width_, width_, layer.bias < 0 ? Number(0) : row[layer.bias + o]);
    Product<Number> product{};
    product.a = row + layer.weight;
    product.row = inputs;
    product.left[1] = 1;
    product.b = from;
    product.column = product.to_column = lanes;
    product.right[1] = product.to_row = width_;
    product.depth[0] = 1;
    product.depth[1] = inputs;
    product.to = out;
    product.adds = true;
    multiply<Arithmetic>(product, outputs, work_.vectors);
  }

  double compare(const Samples<Number>& samples, int64_t count) {
    const int64_t last = work_.layers();
    const Loss<Arithmetic> loss{value(last), grad(last), plan_.outputs(), width_, indices_,
                                here_,       count};
    return samples.values ? loss.squared_error(samples.values)
                          : loss.cross_entropy(samples.classes);
  }

  void backward(int64_t stage, const Number* row) {
    if (stage < int64_t(norms_.size())) {
      const int64_t l = work_.norms[stage], input = plan_.layers[l].inputs[0];
      if (!work_.steps[l].skips_back && input > 0)
        norms_[stage].backward(row, value(input), grad(l + 1), grad(input), work_.steps[l].fresh[0],
                               width_, here_);
    }
    for (int64_t l = last_of(stage) - 1; l >= first_of(stage); --l) {
      const Layer& layer = plan_.layers[l];
      const auto& step = work_.steps[l];
      if (step.skips_back) continue;
      if (layer.kind == Kind::token_pair) {
        gather_tables<Arithmetic>(layer, value(0), grad(l + 1), width_, sums_.get(0) + step.weight);
        continue;
      }
      Backward<Number> job{};
      job.row = row;
      job.out = value(l + 1);
      job.grad = grad(l + 1);
      job.width = width_;
      job.rectifies = step.rectifies;
      job.slope = step.keeps_slope;
      for (int i = 0; i < 2; ++i) {
        if (layer.inputs[i] < 0) continue;
        job.from[i] = value(layer.inputs[i]);
        job.into[i] = grad(layer.inputs[i]);
        job.fresh[i] = step.fresh[i];
      }
      if (layer.weight >= 0) job.weight = sums_.get(0) + step.weight;
      if (layer.bias >= 0) job.bias = sums_.get(0) + step.bias;
      if (step.packs_back) {
        const int64_t slope = step.sloped < 0 ? -1 : plan_.layers[step.sloped].inputs[0];
        products_back_[l]->run(row, packed_.get(0) + step.transposed, job.grad,
                               slope < 0 ? job.into[0] : grad(slope), room_.get(0), false,
                               slope < 0 ? nullptr : value(slope), [](int64_t, int64_t) {});
        job.into[0] = nullptr;
      }
      backward_layer<Arithmetic>(layer, job);
      if (layer.kind == Kind::linear) add_products(layer, l);
    }
    if (stage > 0) {
      const int64_t l = work_.norms[stage - 1];
      if (!work_.steps[l].skips_back)
        norms_[stage - 1].gather(value(plan_.layers[l].inputs[0]), grad(l + 1), width_);
    }
  }

  // The gradient of a linear layer's weight: images in rows, so that features are in the lanes.
  void add_products(const Layer& layer, int64_t l) {
    const auto& step = work_.steps[l];
    const int64_t inputs = layer.taken.numel() - step.tail;
    int64_t stride = step.columns * lanes;
    const Number *from = value(layer.inputs[0]), *rows = nullptr;
    if (layer.inputs[0] == 0) {
      rows = input_rows();
      stride = Work<Arithmetic>::padded(layer.taken.numel());
    } else {
      Number* made = rows_.get(0);
      enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
        for (int64_t f = 0; f < inputs; f += lanes)
          for (int64_t image = 0; image < width_; image += lanes) {
            Vector tile[lanes];
            for (int64_t i = 0; i < lanes; ++i)
              tile[i] =
                  f + i < inputs ? Arithmetic::load(from + (f + i) * width_ + image) : Vector{};
            Arithmetic::transpose(tile);
            for (int64_t i = 0; i < lanes; ++i)
              Arithmetic::store(made + (image + i) * stride + f, tile[i]);
          }
      });
      rows = made;
    }
    Product<Number> product{};
    product.a = grad(l + 1);
    product.row = width_;
    product.left[1] = 1;
    product.b = rows;
    product.column = product.to_column = lanes;
    product.right[1] = stride;
    product.depth[0] = 1;
    product.depth[1] = here_;
    product.to = products_.get(0) + step.product;
    product.to_row = step.columns * lanes;
    product.adds = true;
    multiply<Arithmetic>(product, layer.made.channels, step.columns);
    if (step.tail == 0) return;
    Correlation<Number> sums{};
    sums.left = grad(l + 1);
    sums.right = from + inputs * width_;
    sums.to = sums_.get(0) + step.weight;
    sums.left_channel = sums.right_channel = width_;
    sums.left_pixel = sums.right_pixel = sums.to_right = lanes;
    sums.to_left = step.tail * lanes;
    sums.height = 1;
    sums.width = work_.vectors;
    correlate<Arithmetic>(sums, layer.made.channels, step.tail);
  }

  // Sums of lanes become gradients of weights.
  void collect(const Number* row, Number* grads) {
    for (auto& norm : norms_) norm.collect(grads);
    for (int64_t l = 0; l < work_.layers(); ++l)
      if (plan_.layers[l].kind == Kind::token_pair)
        collect_tables<Arithmetic>(plan_.layers[l], row, sums_.get(0) + work_.steps[l].weight,
                                   grads);
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      const Number* sums = sums_.get(0);
      for (int64_t l = 0; l < work_.layers(); ++l) {
        const Layer& layer = plan_.layers[l];
        const auto& step = work_.steps[l];
        if (layer.kind == Kind::token_pair) continue;
        if (layer.bias >= 0) total(sums + step.bias, layer.bias_size(), grads + layer.bias);
        if (layer.kind == Kind::linear) {
          const int64_t inputs = layer.taken.numel(), whole = inputs - step.tail;
          const Number *from = products_.get(0) + step.product, *tail = sums + step.weight;
          Number* to = grads + layer.weight;
          for (int64_t o = 0; o < layer.made.channels; ++o, from += step.columns * lanes) {
            for (int64_t i = 0; i < whole; ++i) *to++ += from[i];
            for (int64_t i = 0; i < step.tail; ++i, tail += lanes)
              *to++ += Arithmetic::total(Arithmetic::load(tail));
          }
        } else if (layer.weight >= 0) {
          total(sums + step.weight, layer.weight_size(), grads + layer.weight);
        }
      }
    });
  }

  static WEIGHTOPS_INLINE void total(const Number* from, int64_t count, Number* to) {
    int64_t at = 0;
    for (; at + lanes <= count; at += lanes) {
      Vector tile[lanes], sum = Arithmetic::load(to + at);
      for (int64_t i = 0; i < lanes; ++i) tile[i] = Arithmetic::load(from + (at + i) * lanes);
      Arithmetic::transpose(tile);
      for (int64_t i = 0; i < lanes; ++i) sum += tile[i];
      Arithmetic::store(to + at, sum);
    }
    for (; at < count; ++at) to[at] += Arithmetic::total(Arithmetic::load(from + at * lanes));
  }

  const Plan& plan_;
  const Work<Arithmetic> work_;
  const int64_t width_;
  std::vector<std::optional<Products<Arithmetic>>> products_of_, products_back_;
  std::vector<BatchNorm<Arithmetic>> norms_;  // in the order of layers
  std::vector<Buffer<Number>> values_, grads_;
  Buffer<Number> sums_, products_, packed_, room_, rows_, input_rows_;
  int64_t block_ = 0, here_ = 0;           // which block it is, and its images
  int64_t indices_[kMostVectors * lanes];  // rows of its images
  const Number* taken_ = nullptr;          // samples that lie there from the last time
};

}  // namespace weightops::population
