// Many small networks of one architecture on samples: blocks of images stay in the second-level
// cache while one network after the other runs on them.
#pragma once

#include <functional>

#include "population_dense.h"
#include "population_engine.h"

namespace weightops::population {

// Scores are loss and accuracy.
enum class Reduce { logits, loss, errors, accuracy, scores };

// Targets are classes [samples], or values [samples, outputs] of a mean squared error.
template <class Number>
struct Task {
  const Plan& plan;
  int64_t networks, samples;
  const Number *flat, *x;
  int64_t flat_stride, x_stride;  // from network to network; 0: all have the same
  Reduce reduce;
  const int64_t* classes;
  const Number* values;
  int64_t target_stride;
  Number* out;  // [networks, samples, outputs], [networks] or, of scores, [networks, 2]
  bool* wrong;  // [networks, samples]
};

// Calls f on ranges that make up [0, count), on several threads.
using Team = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& f)>;

// Blocks of samples that are laid out together.
constexpr int64_t kSpanBytes = 1 << 19;
// Packed weights of the networks that run before the next ones are packed.
constexpr int64_t kWaveBytes = 1 << 25;

// What one network's logits[output * width + image] of a block come to.
template <class Arithmetic>
struct Reduction {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  const Number* logits;
  int64_t outputs, width, images;

  // The sum over images of the negative logarithms of what softmax gives the classes.
  WEIGHTOPS_INLINE double cross_entropy(const int64_t* classes) const {
    double total = 0;
    for (int64_t image = 0; image < images; image += Arithmetic::lanes) {
      Vector most = Arithmetic::load(logits + image), sum = {};
      for (int64_t k = 1; k < outputs; ++k) {
        const Vector logit = Arithmetic::load(logits + k * width + image);
        most = elementary::larger_or_nan<Arithmetic>(most, logit);
      }
      for (int64_t k = 0; k < outputs; ++k)
        sum += elementary::exp<Arithmetic>(Arithmetic::load(logits + k * width + image) - most);
      // One logarithm of what they make together: each is between 1 and the number of outputs.
      double product = 1;
      const int64_t count = std::min<int64_t>(Arithmetic::lanes, images - image);
      for (int64_t i = 0; i < count; ++i) {
        product *= sum[i];
        total += double(most[i]) - double(logits[classes[image + i] * width + image + i]);
      }
      total += std::log(product);
    }
    return total;
  }

  WEIGHTOPS_INLINE double squared_error(const Number* values) const {
    double total = 0;
    for (int64_t image = 0; image < images; ++image)
      for (int64_t k = 0; k < outputs; ++k) {
        const double rest = logits[k * width + image] - values[image * outputs + k];
        total += rest * rest;
      }
    return total;
  }

  // How many predictions are wrong; which ones goes to `wrong` unless it is null.
  WEIGHTOPS_INLINE int64_t count_wrong(const int64_t* classes, bool* wrong) const {
    int64_t found = 0;
    for (int64_t image = 0; image < images; image += Arithmetic::lanes) {
      Vector most = Arithmetic::load(logits + image), place = {};
      for (int64_t k = 1; k < outputs; ++k) {
        const Vector logit = Arithmetic::load(logits + k * width + image);
        place = elementary::where_greater<Arithmetic>(logit, most, Number(k) - Vector{}, place);
        most = elementary::larger_or_nan<Arithmetic>(most, logit);
      }
      const int64_t count = std::min<int64_t>(Arithmetic::lanes, images - image);
      for (int64_t i = 0; i < count; ++i) {
        // The first of equals, but NaN before all else, as argmax has it.
        const bool differs = most[i] == most[i] ? place[i] != Number(classes[image + i])
                                                : first_nan(image + i) != classes[image + i];
        found += differs;
        if (wrong) wrong[image + i] = differs;
      }
    }
    return found;
  }

 private:
  int64_t first_nan(int64_t image) const {
    int64_t k = 0;
    while (!std::isnan(logits[k * width + image])) ++k;
    return k;
  }
};

// One task on all threads. The engine runs a network on a block of samples: it packs what networks
// have, prepares what blocks have, and makes logits of both, as rows or as columns.
template <class Engine>
class Run {
  using Arithmetic = typename Engine::Arithmetic;
  using Number = typename Engine::Number;

 public:
  explicit Run(const Task<Number>& task)
      : task_(task),
        engine_(task.plan, task.samples),
        packed_(line_up<Number>(engine_.packed_size())),
        block_(line_up<Number>(engine_.block_size())),
        blocks_((task.samples + engine_.width() - 1) / engine_.width()),
        span_(std::clamp<int64_t>(kSpanBytes / (sizeof(Number) * block_), 1, blocks_)),
        spans_((blocks_ + span_ - 1) / span_),
        sums_(task.reduce == Reduce::logits ? 0 : task.networks * blocks_) {}

  void run(const Team& team) {
    if (spans_ == 1 || task_.x_stride > 0)
      run_by_network(team);
    else
      run_by_span(team);
    finish();
  }

 private:
  const Number* row_of(int64_t network) const { return task_.flat + network * task_.flat_stride; }

  // A network's spans follow each other.
  void run_by_network(const Team& team) {
    team(task_.networks * spans_, [&](int64_t begin, int64_t end) {
      Number* packed = room_of<Number, 0>(packed_);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t network = item / spans_, span = item % spans_;
        if (item == begin || span == 0) engine_.pack(row_of(network), packed);
        run_span(network, span, item == begin || task_.x_stride > 0, packed);
      }
    });
  }

  // Networks on the same span follow each other.
  void run_by_span(const Team& team) {
    const int64_t wave = std::clamp<int64_t>(
        kWaveBytes / (sizeof(Number) * std::max<int64_t>(1, packed_)), 1, task_.networks);
    Number* packed = room_of<Number, 0>(wave * packed_);
    for (int64_t first = 0; first < task_.networks; first += wave) {
      const int64_t networks = std::min(wave, task_.networks - first);
      team(networks, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) engine_.pack(row_of(first + n), packed + n * packed_);
      });
      team(networks * spans_, [&](int64_t begin, int64_t end) {
        int64_t ready = -1;
        for (int64_t item = begin; item < end; ++item) {
          const int64_t n = item % networks, span = item / networks;
          run_span(first + n, span, span != ready, packed + n * packed_);
          ready = span;
        }
      });
    }
  }

  void run_span(int64_t network, int64_t span, bool fresh, const Number* packed) {
    const int64_t width = engine_.width(), outputs = task_.plan.outputs();
    const Number* row = row_of(network);
    Number* prepared = room_of<Number, 1>(span_ * block_);
    const int64_t first = span * span_, last = std::min(first + span_, blocks_);
    for (int64_t b = first; b < last; ++b) {
      const int64_t sample = b * width, images = std::min(width, task_.samples - sample);
      const int64_t at = network * task_.samples + sample;
      Number* block = prepared + (b - first) * block_;
      if (fresh)
        engine_.prepare(task_.x + network * task_.x_stride + sample * task_.plan.taken, images,
                        block);
      if (task_.reduce == Reduce::logits) {
        engine_.logits(row, packed, block, images, task_.out + at * outputs);
        continue;
      }
      const Number* logits = engine_.columns(row, packed, block, images);
      enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
        reduce({logits, outputs, width, images}, network, b);
      });
    }
  }

  WEIGHTOPS_INLINE void reduce(const Reduction<Arithmetic>& block, int64_t network, int64_t b) {
    const int64_t sample = b * block.width, target = network * task_.target_stride;
    Sums& sums = sums_[network * blocks_ + b];
    if (task_.reduce != Reduce::loss)
      sums.wrong =
          block.count_wrong(task_.classes + target + sample,
                            task_.wrong ? task_.wrong + network * task_.samples + sample : nullptr);
    if (losses())
      sums.loss = task_.values ? block.squared_error(task_.values + target + sample * block.outputs)
                               : block.cross_entropy(task_.classes + target + sample);
  }

  bool losses() const { return task_.reduce == Reduce::loss || task_.reduce == Reduce::scores; }

  // In the order of blocks, so that threads change nothing.
  void finish() const {
    if (task_.reduce == Reduce::logits || task_.reduce == Reduce::errors) return;
    const double count = task_.samples * (task_.values ? task_.plan.outputs() : 1);
    Number* out = task_.out;
    for (int64_t n = 0; n < task_.networks; ++n) {
      Sums total;
      for (int64_t b = 0; b < blocks_; ++b) {
        total.loss += sums_[n * blocks_ + b].loss;
        total.wrong += sums_[n * blocks_ + b].wrong;
      }
      if (losses()) *out++ = total.loss / count;
      if (task_.reduce != Reduce::loss) *out++ = 1 - total.wrong / count;
    }
  }

  const Task<Number>& task_;
  Engine engine_;
  int64_t packed_, block_;  // numbers of a network, and of a block of samples
  int64_t blocks_, span_, spans_;
  struct Sums {
    double loss = 0, wrong = 0;
  };
  std::vector<Sums> sums_;
};

// Whether networks run by bfloat16 tiles, in float32.
inline bool by_tiles(const Plan& plan, int64_t samples) {
#if WEIGHTOPS_X86
  return DenseTiles::takes(plan, samples);
#endif
  return false;
}

// Of at least one network and one sample.
template <class Number>
void run(const Task<Number>& task, const Team& team) {
#if WEIGHTOPS_X86
  if constexpr (std::is_same_v<Number, float>)
    if (by_tiles(task.plan, task.samples)) return Run<DenseTiles>(task).run(team);
#endif
  with_arithmetic<Number>(
      [&](auto arithmetic) { Run<LayerByLayer<decltype(arithmetic)>>(task).run(team); });
}

}  // namespace weightops::population
