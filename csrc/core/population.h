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

// Packed weights of the networks that share a block, and numbers of the block's values.
constexpr int64_t kPackedBytes = 1 << 19, kRoomBytes = 1 << 20;

// How the work is cut: groups of networks times blocks of samples.
template <class Arithmetic>
struct Cut {
  int64_t width, blocks, group, groups;

  template <class Number>
  Cut(const Task<Number>& task, const Schedule& schedule) {
    // Of convolutions a single vector fills the registers, with several pixels.
    const bool flat = std::all_of(task.plan.layers.begin(), task.plan.layers.end(),
                                  [](const Layer& layer) { return layer.made.pixels() == 1; });
    const int64_t image = Arithmetic::lanes * sizeof(Number) * (task.plan.taken + schedule.room);
    constexpr int64_t most = Tile<Arithmetic::bytes>::columns(Tile<Arithmetic::bytes>::outputs);
    const int64_t wide = flat ? std::min(most, std::max<int64_t>(1, kRoomBytes / image)) : 1;
    const int64_t vectors = (task.samples + Arithmetic::lanes - 1) / Arithmetic::lanes;
    blocks = (vectors + wide - 1) / wide;
    width = (vectors + blocks - 1) / blocks * Arithmetic::lanes;
    const int64_t bytes = std::max<int64_t>(1, schedule.packed) * sizeof(Number);
    group = task.x_stride ? 1 : std::min(task.networks, std::max<int64_t>(1, kPackedBytes / bytes));
    groups = (task.networks + group - 1) / group;
    group = (task.networks + groups - 1) / groups;
    groups = (task.networks + group - 1) / group;
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

// Items [begin, end) of a cut, on one thread; partial sums go to sums[network * blocks + block].
template <class Arithmetic, class Number = typename Arithmetic::Number>
void run_items(const Task<Number>& task, const Schedule& schedule, const Cut<Arithmetic>& cut,
               int64_t begin, int64_t end, double* sums) {
  const Plan& plan = task.plan;
  const int64_t width = cut.width, outputs = plan.outputs();
  int64_t working = 0;
  for (const Layer& layer : plan.layers) working = std::max(working, workspace_size(layer, width));
  Number* packed = room_of<Number, 0>(cut.group * schedule.packed);
  Number* block = room_of<Number, 1>(plan.taken * width);
  Number* room = room_of<Number, 2>(schedule.room * width);
  Number* workspace = room_of<Number, 3>(working);
  std::vector<std::optional<Products<Arithmetic>>> products(schedule.steps.size());
  for (size_t s = 0; s < products.size(); ++s) {
    const Layer& layer = plan.layers[schedule.steps[s].layer];
    if (packed_size(layer) > 0) products[s].emplace(layer, width);
  }
  int64_t ready = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / cut.blocks * cut.group, place = item % cut.blocks;
    const int64_t networks = std::min(cut.group, task.networks - first);
    if (ready != first)
      for (int64_t n = 0; n < networks; ++n)
        for (const auto& step : schedule.steps)
          pack_layer<Arithmetic>(plan.layers[step.layer],
                                 task.flat + (first + n) * task.flat_stride,
                                 packed + n * schedule.packed + step.packed);
    ready = first;
    const int64_t sample = place * width, images = std::min(width, task.samples - sample);
    const Number* x = task.x + first * task.x_stride + sample * plan.taken;
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      lay_out<Arithmetic>(x, images, plan.taken, width, block);
    });
    for (int64_t n = 0; n < networks; ++n) {
      const int64_t network = first + n;
      const Number *row = task.flat + network * task.flat_stride,
                   *weights = packed + n * schedule.packed;
      for (size_t s = 0; s < products.size(); ++s) {
        const auto& step = schedule.steps[s];
        const auto at = [&](int64_t place) { return place < 0 ? block : room + place * width; };
        const Number* inputs[] = {at(step.inputs[0]), at(step.inputs[1])};
        if (products[s])
          products[s]->run(row, weights + step.packed, inputs[0], at(step.out), workspace,
                           step.rectify);
        else
          forward_layer<Arithmetic>(plan.layers[step.layer], row, weights, inputs, at(step.out),
                                    width, workspace);
      }
      const Reduction<Arithmetic> reduction{room + schedule.steps.back().out * width, outputs,
                                            width, images};
      const int64_t target = network * task.target_stride, at = network * task.samples + sample;
      enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
        if (task.reduce == Reduce::logits)
          reduction.write(task.out + at * outputs);
        else if (task.reduce != Reduce::loss)
          sums[network * cut.blocks + place] = reduction.count_wrong(
              task.classes + target + sample, task.wrong ? task.wrong + at : nullptr);
        else
          sums[network * cut.blocks + place] =
              task.values ? reduction.squared_error(task.values + target + sample * outputs)
                          : reduction.cross_entropy(task.classes + target + sample);
      });
    }
  }
}

// Calls f on ranges that make up [0, count), on several threads.
using Team = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& f)>;

template <class Arithmetic, class Number = typename Arithmetic::Number>
void run_on(const Task<Number>& task, const Team& team) {
  const Schedule schedule(task.plan);
  const Cut<Arithmetic> cut(task, schedule);
  std::vector<double> sums(task.reduce == Reduce::logits ? 0 : task.networks * cut.blocks);
  team(cut.groups * cut.blocks, [&](int64_t begin, int64_t end) {
    run_items<Arithmetic>(task, schedule, cut, begin, end, sums.data());
  });
  if (task.reduce != Reduce::loss && task.reduce != Reduce::accuracy) return;
  const double count = task.samples * (task.values ? task.plan.outputs() : 1);
  for (int64_t n = 0; n < task.networks; ++n) {
    double total = 0;
    for (int64_t b = 0; b < cut.blocks; ++b) total += sums[n * cut.blocks + b];
    task.out[n] = task.reduce == Reduce::accuracy ? 1 - total / count : total / count;
  }
}

// Of at least one network and one sample.
template <class Number>
void run(const Task<Number>& task, const Team& team) {
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return run_on<Simd<Number, 64>>(task, team);
  if (isa() == Isa::avx2) return run_on<Simd<Number, 32>>(task, team);
#endif
  run_on<Simd<Number, 16>>(task, team);
}

}  // namespace weightops::population
