// Losses, gradients and whole trainings of small networks. A thread takes one network at a time,
// whose weights, gradients and moments stay in its core's cache for all steps; images go through
// all layers in blocks that do too.
#pragma once

#include <optional>
#include <string>

#include "buffer.h"
#include "population_backward.h"

namespace weightops::population {

// One network's samples. Targets are classes [rows] or values [rows, outputs].
template <class Number>
struct Samples {
  const Number* x;
  const int64_t* classes;
  const Number* values;
  int64_t rows;
};

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

// The work room of a thread: one network at a time.
template <class Arithmetic>
class Worker {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  static constexpr int64_t lanes = Arithmetic::lanes;

 public:
  Worker(const Plan& plan, int64_t most_rows) : plan_(plan) {
    const int64_t values = plan.layers.size() + 1;
    std::vector<int> readers(values, 0);
    for (const Layer& layer : plan.layers)
      for (const int64_t input : layer.inputs)
        if (input >= 0) ++readers[input];
    place_.resize(values);
    pooled_.assign(values, 0);
    followed_.assign(values, 0);
    for (const Layer& layer : plan.layers)
      if (layer.kind == Kind::max_pool && readers[layer.inputs[0]] == 1)
        pooled_[layer.inputs[0]] = 1;
    int64_t numbers = 0;
    for (int64_t value = 0; value < values; ++value) {
      place_[value] = value;
      if (value > 0 && rectifies(plan.layers[value - 1], readers)) {
        place_[value] = place_[plan.layers[value - 1].inputs[0]];
        followed_[place_[value] - 1] = 1;
        continue;
      }
      numbers += 2 * plan.numel(value);
    }
    // Blocks of several vectors are fewer calls, but must lie in the cache with all their values.
    vectors_ = 4;
    while (vectors_ > 1 && (vectors_ * lanes * numbers * int64_t(sizeof(Number)) > kCache ||
                            (vectors_ / 2) * lanes >= most_rows))
      vectors_ /= 2;
    width_ = vectors_ * lanes;
    int64_t sums = 0, products = 0, packed = 0, room = 0, widest = 0;
    for (const Layer& layer : plan.layers) {
      slots_.push_back({sums, 0, products, packed});
      const bool linear = layer.kind == Kind::linear;
      if (linear) {
        products += layer.made.channels * padded(layer.taken.numel());
        widest = std::max(widest, padded(layer.taken.numel()));
        reads_rows_ |= layer.inputs[0] == 0;
      } else if (layer.weight >= 0) {
        sums += layer.weight_size() * lanes;
      }
      slots_.back().bias = sums;
      if (layer.bias >= 0) sums += layer.bias_size() * lanes;
      // Packing a linear layer is as much work as a block of images, and repaid by several.
      packs_.push_back(layer.kind == Kind::conv || (linear && most_rows > width_));
      products_of_.emplace_back();
      if (packs_.back()) {
        packed += packed_size(layer);
        products_of_.back().emplace(layer, width_);
      }
      room = std::max(room, workspace_size(layer, width_));
    }
    sums_size_ = sums;
    products_size_ = products;
    sums_.get(sums);
    products_.get(products);
    packed_.get(packed);
    room_.get(room);
    rows_.get(widest * width_);
    values_.resize(values);
    grads_.resize(values);
    for (int64_t value = 0; value < values; ++value) {
      if (place_[value] != value) continue;
      values_[value].get(padded(plan.numel(value)) * width_);
      if (value > 0) grads_[value].get(plan.numel(value) * width_);
    }
  }

  // The mean loss of `count` samples, `picked` or, if that is null, the first ones; gradients of
  // all P weights.
  double loss_grad(const Number* row, const Samples<Number>& samples, const int64_t* picked,
                   int64_t count, int64_t weights, Number* grads) {
    std::fill_n(sums_.get(0), sums_size_, Number(0));
    std::fill_n(products_.get(0), products_size_, Number(0));
    for (size_t l = 0; l < plan_.layers.size(); ++l)
      if (packs_[l])
        pack_layer<Arithmetic>(plan_.layers[l], row, packed_.get(0) + slots_[l].packed);
    double loss = 0;
    for (int64_t begin = 0; begin < count; begin += width_) {
      const int64_t here = std::min(width_, count - begin);
      int64_t indices[4 * 64 / sizeof(Number)];
      for (int64_t i = 0; i < width_; ++i) {
        const int64_t at = begin + std::min(i, here - 1);
        indices[i] = picked ? picked[at] : at;
      }
      take(samples, indices);
      forward(row);
      loss += compare(samples, indices, here, count);
      backward(row, here);
    }
    std::fill_n(grads, weights, Number(0));
    collect(grads);
    return loss;
  }

 private:
  static constexpr int64_t kCache = 1 << 20;

  struct Slot {
    int64_t weight, bias, product, packed;
  };

  static int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

  // Whether a layer is a ReLU that may take the place of what it reads: nobody else reads that, and
  // the layer that made it does not look at it again.
  bool rectifies(const Layer& layer, const std::vector<int>& readers) const {
    const int64_t input = layer.inputs[0];
    if (layer.kind != Kind::relu || input == 0 || readers[input] > 1) return false;
    switch (plan_.layers[input - 1].kind) {
      case Kind::linear:
      case Kind::conv:
      case Kind::batch_norm:
      case Kind::group_norm:
      case Kind::layer_norm:
      case Kind::add:
      case Kind::average_pool: return true;
      default: return false;
    }
  }

  // Whether layer l is a ReLU in its input's memory.
  bool in_place(int64_t l) const { return place_[l + 1] != l + 1; }
  Number* value(int64_t v) { return values_[place_[v]].get(0); }
  Number* grad(int64_t v) { return v == 0 ? nullptr : grads_[place_[v]].get(0); }

  // Rows of samples become columns; rows stay for a linear layer that reads them.
  void take(const Samples<Number>& samples, const int64_t* indices) {
    const int64_t features = plan_.taken, stride = padded(features);
    if (reads_rows_) input_rows_.get(stride * width_);
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      Number *to = values_[0].get(0), *kept = reads_rows_ ? input_rows_.get(0) : nullptr;
      for (int64_t image = 0; image < width_; image += lanes)
        for (int64_t f = 0; f < features; f += lanes) {
          Vector tile[lanes];
          for (int64_t i = 0; i < lanes; ++i) {
            const Number* from = samples.x + indices[image + i] * features + f;
            if (f + lanes <= features) {
              tile[i] = Arithmetic::load(from);
            } else {
              Number tail[lanes] = {};
              std::copy_n(from, features - f, tail);
              tile[i] = Arithmetic::load(tail);
            }
            if (kept) Arithmetic::store(kept + (image + i) * stride + f, tile[i]);
          }
          Arithmetic::transpose(tile);
          for (int64_t i = 0; i < std::min(lanes, features - f); ++i)
            Arithmetic::store(to + (f + i) * width_ + image, tile[i]);
        }
    });
  }

  void forward(const Number* row) {
    for (size_t l = 0; l < plan_.layers.size(); ++l) {
      const Layer& layer = plan_.layers[l];
      const Number* inputs[] = {value(layer.inputs[0]),
                                layer.inputs[1] >= 0 ? value(layer.inputs[1]) : nullptr};
      Number* out = value(l + 1);
      if (in_place(l) && packs_[layer.inputs[0] - 1]) continue;
      if (packs_[l])
        products_of_[l]->run(row, packed_.get(0) + slots_[l].packed, inputs[0], out, room_.get(0),
                             followed_[l]);
      else if (layer.kind == Kind::linear)
        forward_linear(layer, row, inputs[0], out);
      else
        forward_layer<Arithmetic, Number>(layer, row, nullptr, inputs, out, width_, nullptr);
    }
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
    multiply<Arithmetic>(product, outputs, vectors_);
  }

  // The losses' share of the mean over `count` samples, and its gradient by the last value.
  double compare(const Samples<Number>& samples, const int64_t* indices, int64_t here,
                 int64_t count) {
    const int64_t last = plan_.layers.size(), outputs = plan_.outputs();
    const Number* logits = value(last);
    Number* grads = last_grad();
    double loss = 0;
    if (samples.values) {
      const Number scale = 2 / (Number(count) * Number(outputs));
      double squares = 0;
      for (int64_t k = 0; k < outputs; ++k)
        for (int64_t i = 0; i < width_; ++i) {
          const Number rest =
              i < here ? logits[k * width_ + i] - samples.values[indices[i] * outputs + k] : 0;
          grads[k * width_ + i] = rest * scale;
          squares += double(rest) * double(rest);
        }
      return squares / (double(count) * double(outputs));
    }
    Number tops[4 * lanes], totals[4 * lanes];
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      const Number share = Number(1) / Number(count);
      for (int64_t image = 0; image < width_; image += lanes) {
        Vector top = Arithmetic::load(logits + image), total = {};
        for (int64_t k = 1; k < outputs; ++k) {
          const Vector logit = Arithmetic::load(logits + k * width_ + image);
          top = logit > top ? logit : top;
        }
        for (int64_t k = 0; k < outputs; ++k) {
          const Vector power =
              elementary::exp<Arithmetic>(Arithmetic::load(logits + k * width_ + image) - top);
          total += power;
          Arithmetic::store(grads + k * width_ + image, power);
        }
        Vector scale = share / total;
        for (int64_t i = std::max<int64_t>(0, here - image); i < lanes; ++i) scale[i] = 0;
        for (int64_t k = 0; k < outputs; ++k) {
          Number* at = grads + k * width_ + image;
          Arithmetic::store(at, Arithmetic::load(at) * scale);
        }
        Arithmetic::store(tops + image, top);
        Arithmetic::store(totals + image, total);
      }
      for (int64_t i = 0; i < here; ++i) grads[samples.classes[indices[i]] * width_ + i] -= share;
    });
    for (int64_t i = 0; i < here; ++i)
      loss += double(tops[i] - logits[samples.classes[indices[i]] * width_ + i]) +
              double(std::log(totals[i]));
    return loss / double(count);
  }

  Number* last_grad() { return grad(plan_.layers.size()); }

  void backward(const Number* row, int64_t here) {
    const int64_t layers = plan_.layers.size();
    reached_.assign(layers + 1, 0);
    reached_[place_[layers]] = 1;
    for (int64_t l = layers - 1; l >= 0; --l) {
      const Layer& layer = plan_.layers[l];
      // Nothing comes of what the output does not depend on.
      if (!reached_[place_[l + 1]]) continue;
      // A pool that alone reads what a ReLU made has done its part.
      if (in_place(l) && pooled_[l + 1]) continue;
      Backward<Number> job{};
      job.row = row;
      job.out = value(l + 1);
      job.grad = grad(l + 1);
      job.width = width_;
      for (int i = 0; i < 2; ++i) {
        const int64_t input = layer.inputs[i];
        if (input < 0) continue;
        job.from[i] = value(input);
        job.into[i] = grad(input);
        job.fresh[i] = in_place(l) || !reached_[place_[input]];
        reached_[place_[input]] = 1;
      }
      job.rectifies =
          layer.inputs[0] > 0 && pooled_[layer.inputs[0]] && in_place(layer.inputs[0] - 1);
      Number* sums = sums_.get(0);
      if (layer.weight >= 0) job.weight = sums + slots_[l].weight;
      if (layer.bias >= 0) job.bias = sums + slots_[l].bias;
      backward_layer<Arithmetic>(layer, job);
      if (layer.kind == Kind::linear) add_products(layer, l, here);
    }
  }

  // The gradient of a linear layer's weight: images in rows, so that features are in the lanes.
  void add_products(const Layer& layer, int64_t l, int64_t here) {
    const int64_t inputs = layer.taken.numel(), stride = padded(inputs);
    const Number* rows = input_rows_.get(0);
    if (layer.inputs[0] != 0) {
      Number* made = rows_.get(0);
      const Number* from = value(layer.inputs[0]);
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
    product.right[1] = product.to_row = stride;
    product.depth[0] = 1;
    product.depth[1] = here;
    product.to = products_.get(0) + slots_[l].product;
    product.adds = true;
    multiply<Arithmetic>(product, layer.made.channels, stride / lanes);
  }

  void collect(Number* grads) {
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      const auto total = [&](const Number* from, int64_t count, Number* to)
                             __attribute__((always_inline)) {
                               int64_t at = 0;
                               for (; at + lanes <= count; at += lanes) {
                                 Vector tile[lanes], sum = Arithmetic::load(to + at);
                                 for (int64_t i = 0; i < lanes; ++i)
                                   tile[i] = Arithmetic::load(from + (at + i) * lanes);
                                 Arithmetic::transpose(tile);
                                 for (int64_t i = 0; i < lanes; ++i) sum += tile[i];
                                 Arithmetic::store(to + at, sum);
                               }
                               for (; at < count; ++at)
                                 to[at] += Arithmetic::total(Arithmetic::load(from + at * lanes));
                             };
      const Number* sums = sums_.get(0);
      for (size_t l = 0; l < plan_.layers.size(); ++l) {
        const Layer& layer = plan_.layers[l];
        if (layer.bias >= 0) total(sums + slots_[l].bias, layer.bias_size(), grads + layer.bias);
        if (layer.kind == Kind::linear) {
          const int64_t inputs = layer.taken.numel(), stride = padded(inputs);
          const Number* from = products_.get(0) + slots_[l].product;
          for (int64_t o = 0; o < layer.made.channels; ++o)
            for (int64_t i = 0; i < inputs; ++i)
              grads[layer.weight + o * inputs + i] += from[o * stride + i];
        } else if (layer.weight >= 0) {
          total(sums + slots_[l].weight, layer.weight_size(), grads + layer.weight);
        }
      }
    });
  }

  const Plan& plan_;
  std::vector<int64_t> place_;  // of a value: which one's memory it has
  std::vector<Slot> slots_;
  std::vector<std::optional<Products<Arithmetic>>> products_of_;
  std::vector<char> packs_;     // per layer: whether it is one of those
  std::vector<char> followed_;  // per layer: by a ReLU in place
  std::vector<char> pooled_;    // per value: read by a max pool alone
  std::vector<char> reached_;
  int64_t vectors_, width_, sums_size_, products_size_;
  bool reads_rows_ = false;
  std::vector<Buffer<Number>> values_, grads_;
  Buffer<Number> sums_, products_, packed_, room_, rows_, input_rows_;
};

template <class Number>
struct Job {
  Number* flat;  // of one network, in place
  Number *first, *second;
  Samples<Number> samples;
  const int64_t* batches;     // of its first step; null: all rows
  int64_t batch, next_batch;  // rows, and how far the next step's are
  Number* losses;
  int64_t next_loss;
  double rate;
};

template <class Arithmetic, class Number = typename Arithmetic::Number>
void train(Worker<Arithmetic>& worker, const Job<Number>& job, const Optimizer& optimizer,
           const std::vector<int64_t>& trained, int64_t weights, int64_t first_step, int64_t steps,
           Number* grads) {
  for (int64_t s = 0; s < steps; ++s) {
    const bool all = job.batches == nullptr;
    job.losses[s * job.next_loss] =
        worker.loss_grad(job.flat, job.samples, all ? nullptr : job.batches + s * job.next_batch,
                         all ? job.samples.rows : job.batch, weights, grads);
    for (size_t i = 0; i < trained.size(); i += 2) {
      const int64_t at = trained[i], count = trained[i + 1] - at;
      update<Arithmetic>(optimizer, job.rate, first_step + s + 1, count, job.flat + at, grads + at,
                         job.first + at, job.second + at);
    }
  }
}

// f(arithmetic) with the widest vectors that the machine has.
template <class Number, class F>
void with_arithmetic(F&& f) {
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return f(Simd<Number, 64>{});
  if (isa() == Isa::avx2) return f(Simd<Number, 32>{});
#endif
  f(Simd<Number, 16>{});
}

}  // namespace weightops::population
