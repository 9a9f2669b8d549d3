// Many small networks of one architecture on samples: blocks of images stay in the second-level
// cache while one network after the other runs on them.
#pragma once

#include <functional>
#include <optional>

#include "buffer.h"
#include "population_schedule.h"

namespace weightops::population {

enum class Reduce { logits, loss, errors, accuracy };

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
  Number* out;  // [networks, samples, outputs], or [networks]
  bool* wrong;  // [networks, samples]
};

// Calls f on ranges that make up [0, count), on several threads.
using Team = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& f)>;

// Blocks of samples that are laid out together, and a block's values.
constexpr int64_t kSpanBytes = 1 << 19, kRoomBytes = 1 << 20;
// Packed weights of the networks that run before the next ones are packed.
constexpr int64_t kWaveBytes = 1 << 25;

// How the work is cut: blocks of samples, of which a thread lays out a span before the networks run
// on it one after the other, each on all of it.
template <class Arithmetic>
struct Cut {
  int64_t width, blocks, span, spans, wave;

  template <class Number>
  Cut(const Task<Number>& task, const Schedule& schedule) {
    // Of convolutions a single vector fills the registers, with several pixels.
    const bool flat = std::all_of(task.plan.layers.begin(), task.plan.layers.end(),
                                  [](const Layer& layer) { return layer.made.pixels() == 1; });
    const int64_t most = Tile<Arithmetic::bytes>::columns(Tile<Arithmetic::bytes>::outputs);
    const auto fitting = [](int64_t bytes, int64_t numbers) {
      return std::max<int64_t>(1,
                               bytes / (int64_t(sizeof(Number)) * std::max<int64_t>(1, numbers)));
    };
    const int64_t wide =
        flat ? std::min(most, fitting(kRoomBytes, Arithmetic::lanes * schedule.room)) : 1;
    const int64_t vectors = (task.samples + Arithmetic::lanes - 1) / Arithmetic::lanes;
    blocks = (vectors + wide - 1) / wide;
    width = (vectors + blocks - 1) / blocks * Arithmetic::lanes;
    blocks = (task.samples + width - 1) / width;
    span = std::min(blocks, fitting(kSpanBytes, width * task.plan.taken));
    spans = (blocks + span - 1) / span;
    wave = std::min(task.networks, fitting(kWaveBytes, schedule.packed));
  }
};

// rows[image * size + i] -> columns[i * width + image]; images that are not there repeat the last.
template <class Arithmetic, class Number = typename Arithmetic::Number>
WEIGHTOPS_INLINE void lay_out(const Number* rows, int64_t images, int64_t size, int64_t width,
                              Number* columns) {
  constexpr int lanes = Arithmetic::lanes;
  for (int64_t image = 0; image < width; image += lanes) {
    const Number* from[lanes];
    for (int64_t k = 0; k < lanes; ++k) from[k] = rows + std::min(image + k, images - 1) * size;
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
      typename Arithmetic::Vector square[lanes];
      for (int k = 0; k < lanes; ++k) square[k] = Arithmetic::load(from[k] + i);
      Arithmetic::transpose(square);
      for (int k = 0; k < lanes; ++k)
        Arithmetic::store(columns + (i + k) * width + image, square[k]);
    }
    for (; i < size; ++i)
      for (int64_t k = 0; k < lanes; ++k) columns[i * width + image + k] = from[k][i];
  }
}

// What one network's logits[output * width + image] of a block come to.
template <class Arithmetic>
struct Reduction {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  const Number* logits;
  int64_t outputs, width, images;

  WEIGHTOPS_INLINE void write(Number* to) const {
    constexpr int lanes = Arithmetic::lanes;
    for (int64_t image = 0; image < images; image += lanes) {
      const int64_t rows = std::min<int64_t>(lanes, images - image);
      for (int64_t k = 0; k < outputs; k += lanes) {
        const int64_t columns = std::min<int64_t>(lanes, outputs - k);
        Vector square[lanes];
        for (int i = 0; i < lanes; ++i)
          square[i] =
              Arithmetic::load(logits + (k + std::min<int64_t>(i, columns - 1)) * width + image);
        Arithmetic::transpose(square);
        for (int64_t i = 0; i < rows; ++i) {
          Number* row = to + (image + i) * outputs + k;
          // What is written too much belongs to the next row, and is overwritten by that.
          const bool fits = columns == lanes ||
                            (outputs < lanes && (image + i) * outputs + lanes <= images * outputs);
          if (fits) {
            Arithmetic::store(row, square[i]);
          } else {
            Number tile[lanes];
            Arithmetic::store(tile, square[i]);
            std::copy_n(tile, columns, row);
          }
        }
      }
    }
  }

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

template <class T, int which>
T* room_of(int64_t count) {
  static thread_local Buffer<T> own;
  return own.get(count);
}

// One task on all threads.
template <class Arithmetic>
class Run {
  using Number = typename Arithmetic::Number;

 public:
  explicit Run(const Task<Number>& task)
      : task_(task),
        schedule_(task.plan),
        cut_(task, schedule_),
        products_(schedule_.steps.size()),
        sums_(task.reduce == Reduce::logits ? 1 : task.networks * cut_.blocks) {
    for (size_t s = 0; s < products_.size(); ++s) {
      const Layer& layer = layer_of(s);
      if (packed_size(layer) > 0) products_[s].emplace(layer, cut_.width);
      working_ = std::max(working_, workspace_size(layer, cut_.width));
    }
  }

  void run(const Team& team) {
    Number* packed = room_of<Number, 0>(cut_.wave * schedule_.packed);
    for (int64_t first = 0; first < task_.networks; first += cut_.wave) {
      const int64_t networks = std::min(cut_.wave, task_.networks - first);
      team(networks, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
          for (size_t s = 0; s < products_.size(); ++s)
            pack_layer<Arithmetic>(layer_of(s), row_of(first + n),
                                   packed + n * schedule_.packed + schedule_.steps[s].packed);
      });
      team(networks * cut_.spans, [&](int64_t begin, int64_t end) {
        int64_t ready = -1;
        for (int64_t item = begin; item < end; ++item) {
          // Networks on the same samples follow each other.
          const bool own = task_.x_stride > 0;
          const int64_t n = own ? item / cut_.spans : item % networks;
          const int64_t span = own ? item % cut_.spans : item / networks;
          const bool fresh = own || span != ready;
          run_span(first + n, span, fresh, packed + n * schedule_.packed);
          ready = span;
        }
      });
    }
    finish();
  }

 private:
  const Layer& layer_of(size_t step) const {
    return task_.plan.layers[schedule_.steps[step].layer];
  }
  const Number* row_of(int64_t network) const { return task_.flat + network * task_.flat_stride; }

  void run_span(int64_t network, int64_t span, bool fresh, const Number* packed) {
    const int64_t width = cut_.width, size = task_.plan.taken * width;
    Number* laid = room_of<Number, 1>(cut_.span * size);
    const int64_t first = span * cut_.span, last = std::min(first + cut_.span, cut_.blocks);
    for (int64_t b = first; b < last; ++b) {
      const int64_t sample = b * width, images = std::min(width, task_.samples - sample);
      Number* block = laid + (b - first) * size;
      if (fresh) {
        const Number* x = task_.x + network * task_.x_stride + sample * task_.plan.taken;
        enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
          lay_out<Arithmetic>(x, images, task_.plan.taken, width, block);
        });
      }
      const Number* logits = run_layers(row_of(network), packed, block);
      enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
        reduce({logits, task_.plan.outputs(), width, images}, network, b);
      });
    }
  }

  const Number* run_layers(const Number* row, const Number* packed, const Number* block) const {
    const int64_t width = cut_.width;
    Number* room = room_of<Number, 2>(schedule_.room * width);
    Number* workspace = room_of<Number, 3>(working_);
    const auto at = [&](int64_t place) { return place < 0 ? block : room + place * width; };
    for (size_t s = 0; s < products_.size(); ++s) {
      const auto& step = schedule_.steps[s];
      const Number* inputs[] = {at(step.inputs[0]), at(step.inputs[1])};
      Number* out = room + step.out * width;
      if (products_[s])
        products_[s]->run(row, packed + step.packed, inputs[0], out, workspace, step.rectify);
      else
        forward_layer<Arithmetic>(layer_of(s), row, packed, inputs, out, width, workspace);
    }
    return room + schedule_.steps.back().out * width;
  }

  WEIGHTOPS_INLINE void reduce(const Reduction<Arithmetic>& block, int64_t network, int64_t b) {
    const int64_t sample = b * cut_.width, at = network * task_.samples + sample;
    const int64_t target = network * task_.target_stride;
    double& sum = sums_[task_.reduce == Reduce::logits ? 0 : network * cut_.blocks + b];
    if (task_.reduce == Reduce::logits)
      block.write(task_.out + at * block.outputs);
    else if (task_.reduce != Reduce::loss)
      sum = block.count_wrong(task_.classes + target + sample,
                              task_.wrong ? task_.wrong + at : nullptr);
    else
      sum = task_.values ? block.squared_error(task_.values + target + sample * block.outputs)
                         : block.cross_entropy(task_.classes + target + sample);
  }

  // In the order of blocks, so that threads change nothing.
  void finish() const {
    if (task_.reduce != Reduce::loss && task_.reduce != Reduce::accuracy) return;
    const double count = task_.samples * (task_.values ? task_.plan.outputs() : 1);
    for (int64_t n = 0; n < task_.networks; ++n) {
      double total = 0;
      for (int64_t b = 0; b < cut_.blocks; ++b) total += sums_[n * cut_.blocks + b];
      task_.out[n] = task_.reduce == Reduce::accuracy ? 1 - total / count : total / count;
    }
  }

  const Task<Number>& task_;
  Schedule schedule_;
  Cut<Arithmetic> cut_;
  std::vector<std::optional<Products<Arithmetic>>> products_;
  std::vector<double> sums_;
  int64_t working_ = 0;
};

// Of at least one network and one sample.
template <class Number>
void run(const Task<Number>& task, const Team& team) {
  with_arithmetic<Number>([&](auto arithmetic) { Run<decltype(arithmetic)>(task).run(team); });
}

}  // namespace weightops::population
