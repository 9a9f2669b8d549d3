// Populations' forward, reductions, gradients and steps against plain loops in double, from several
// threads: run under sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>

#include "../core/population.h"
#include "../core/population_train.h"

namespace {

using namespace weightops::population;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void require_close(double made, double expected, double bound, const char* what) {
  if (std::abs(made - expected) <= bound * (1 + std::abs(expected))) return;
  std::fprintf(stderr, "failed: %s: %.17g, expected %.17g\n", what, made, expected);
  std::exit(1);
}

int64_t bits_of(double number) {
  int64_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

constexpr int kHeight = 7, kWidth = 5, kChannels = 3, kClasses = 5, kPooled = 3 * 2 * kChannels;
constexpr double kEps = 1e-3, kMomentum = 0.3;

// Where the tensors lie in a network's row, of which 2 numbers are nobody's.
enum : int64_t {
  kConv = 1,
  kConvBias = kConv + 2 * 9 * kChannels,
  kScale = kConvBias + kChannels,
  kShift = kScale + kChannels,
  kMean = kShift + kChannels,
  kVariance = kMean + kChannels,
  kLinear = kVariance + kChannels,
  kBias = kLinear + kPooled * kClasses,
  kWeights = kBias + kClasses + 1
};

// Convolution with padding, batch norm, ReLU, a pool that leaves pixels out, and a linear layer.
std::vector<int64_t> code() {
  const int64_t taken = 2 * kHeight * kWidth;
  std::vector<int64_t> made{taken, 5};
  const auto add = [&](Kind kind, int64_t input, std::vector<int64_t> shapes,
                       std::vector<int64_t> places, std::vector<int64_t> settings) {
    made.insert(made.end(), {int64_t(kind), input, -1});
    made.insert(made.end(), shapes.begin(), shapes.end());
    places.resize(4, -1);
    settings.resize(10, -1);
    made.insert(made.end(), places.begin(), places.end());
    made.insert(made.end(), settings.begin(), settings.end());
    made.insert(made.end(), {bits_of(kEps), bits_of(kMomentum)});
  };
  const std::vector<int64_t> image{kChannels, kHeight, kWidth, kChannels, kHeight, kWidth};
  add(Kind::conv, 0, {2, kHeight, kWidth, kChannels, kHeight, kWidth}, {kConv, kConvBias},
      {3, 3, 1, 1, 1, 1, 1, 1, 1});
  add(Kind::batch_norm, 1, image, {kScale, kShift, kMean, kVariance}, {});
  add(Kind::relu, 2, image, {}, {});
  add(Kind::max_pool, 3, {kChannels, kHeight, kWidth, kChannels, 3, 2}, {},
      {2, 2, 2, 2, 0, 0, 1, 1});
  add(Kind::linear, 4, {kPooled, 1, 1, kClasses, 1, 1}, {kLinear, kBias}, {});
  return made;
}

// What one network makes of samples, by loops; in training by their own statistics, which are
// returned: means, then variances without bias.
std::vector<double> apply(const double* row, const std::vector<double>& x, int64_t samples,
                          bool training, std::vector<double>* statistics = nullptr) {
  const int64_t pixels = kHeight * kWidth;
  std::vector<double> image(samples * kChannels * pixels), logits(samples * kClasses);
  for (int64_t s = 0; s < samples; ++s)
    for (int c = 0; c < kChannels; ++c)
      for (int p = 0; p < pixels; ++p) {
        double sum = row[kConvBias + c];
        for (int i = 0; i < 2; ++i)
          for (int ky = 0; ky < 3; ++ky)
            for (int kx = 0; kx < 3; ++kx) {
              const int y = p / kWidth + ky - 1, at = p % kWidth + kx - 1;
              if (y < 0 || y >= kHeight || at < 0 || at >= kWidth) continue;
              sum += row[kConv + (c * 2 + i) * 9 + ky * 3 + kx] *
                     x[(s * 2 + i) * pixels + y * kWidth + at];
            }
        image[(s * kChannels + c) * pixels + p] = sum;
      }
  for (int c = 0; c < kChannels; ++c) {
    double mean = 0, variance = 0;
    const auto each = [&](auto&& f) {
      for (int64_t s = 0; s < samples; ++s)
        for (int p = 0; p < pixels; ++p) f(image[(s * kChannels + c) * pixels + p]);
    };
    const double count = samples * pixels;
    each([&](double& value) { mean += value / count; });
    each([&](double& value) { variance += (value - mean) * (value - mean) / count; });
    if (statistics) {
      (*statistics)[c] = mean;
      (*statistics)[kChannels + c] = variance * count / (count - 1);
    }
    if (!training) mean = row[kMean + c], variance = row[kVariance + c];
    each([&](double& value) {
      value = (value - mean) / std::sqrt(variance + kEps) * row[kScale + c] + row[kShift + c];
      value = std::max(value, 0.0);
    });
  }
  for (int64_t s = 0; s < samples; ++s)
    for (int k = 0; k < kClasses; ++k) {
      double sum = row[kBias + k];
      for (int i = 0; i < kPooled; ++i) {
        const int c = i / 6, y = i % 6 / 2 * 2, at = i % 2 * 2;
        double most = 0;
        for (int tap = 0; tap < 4; ++tap)
          most = std::max(
              most, image[((s * kChannels + c) * kHeight + y + tap / 2) * kWidth + at + tap % 2]);
        sum += row[kLinear + k * kPooled + i] * most;
      }
      logits[s * kClasses + k] = sum;
    }
  return logits;
}

double cross_entropy(const double* logits, const std::vector<int64_t>& classes) {
  double loss = 0;
  for (size_t s = 0; s < classes.size(); ++s, logits += kClasses) {
    double total = 0;
    for (int k = 0; k < kClasses; ++k) total += std::exp(logits[k]);
    loss += (std::log(total) - logits[classes[s]]) / double(classes.size());
  }
  return loss;
}

// Exactly as long as may be read, so that the address sanitizer sees a step too far.
template <class Number>
struct Given {
  int64_t networks, rows;
  bool shared;
  std::vector<Number> flat, x;
  std::vector<int64_t> classes;

  Given(int64_t n, int64_t b, bool share) : networks(n), rows(b), shared(share) {
    std::mt19937 random(int(7 * b + n));
    std::normal_distribution<float> normal;
    flat.resize(networks * kWeights);
    for (Number& weight : flat) weight = normal(random) / 2;
    for (int64_t i = 0; i < networks; ++i)
      for (int c = 0; c < kChannels; ++c) flat[i * kWeights + kVariance + c] = 0.5f + float(c);
    x.resize((shared ? 1 : networks) * rows * 2 * kHeight * kWidth);
    for (Number& number : x) number = normal(random);
    for (int64_t i = 0; i < (shared ? 1 : networks) * rows; ++i)
      classes.push_back(random() % kClasses);
  }

  int64_t x_stride() const { return shared ? 0 : rows * 2 * kHeight * kWidth; }
  std::vector<double> row(int64_t n) const {
    return {flat.begin() + n * kWeights, flat.begin() + (n + 1) * kWeights};
  }
  std::vector<double> samples(int64_t n) const {
    return {x.begin() + n * x_stride(), x.begin() + n * x_stride() + rows * 2 * kHeight * kWidth};
  }
  std::vector<int64_t> targets(int64_t n) const {
    const auto begin = classes.begin() + (shared ? 0 : n * rows);
    return {begin, begin + rows};
  }
};

void in_threads(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] { f(count * t / 3, count * (t + 1) / 3); });
  for (std::thread& thread : threads) thread.join();
}

template <class Number>
void check_forward(const Plan& plan, const Given<Number>& given) {
  const double bound = sizeof(Number) == 4 ? 1e-4 : 1e-12;
  const int64_t networks = given.networks, rows = given.rows;
  Task<Number> task{plan,     networks,         rows,           given.flat.data(), given.x.data(),
                    kWeights, given.x_stride(), Reduce::logits, nullptr,           nullptr,
                    0,        nullptr,          nullptr};
  std::vector<Number> logits(networks * rows * kClasses), losses(networks), values(logits.size());
  task.out = logits.data();
  run(task, in_threads);
  task.classes = given.classes.data();
  task.target_stride = given.shared ? 0 : rows;
  task.reduce = Reduce::loss;
  task.out = losses.data();
  run(task, in_threads);
  const auto wrong = std::make_unique<bool[]>(networks * rows);
  task.reduce = Reduce::errors;
  task.wrong = wrong.get();
  run(task, in_threads);
  for (int64_t n = 0; n < networks; ++n) {
    const auto expected = apply(given.row(n).data(), given.samples(n), rows, false);
    const auto classes = given.targets(n);
    for (int64_t i = 0; i < rows * kClasses; ++i)
      require_close(logits[n * rows * kClasses + i], expected[i], bound, "logits");
    require_close(losses[n], cross_entropy(expected.data(), classes), bound, "loss");
    for (int64_t s = 0; s < rows; ++s) {
      const Number* own = logits.data() + (n * rows + s) * kClasses;
      const bool differs = std::max_element(own, own + kClasses) - own != classes[s];
      require(wrong[n * rows + s] == differs, "errors");
    }
  }
  // A mean squared error of what is 1 off everywhere.
  for (size_t i = 0; i < values.size(); ++i) values[i] = logits[i] + 1;
  task.reduce = Reduce::loss;
  task.classes = nullptr;
  task.values = values.data();
  task.target_stride = rows * kClasses;
  run(task, in_threads);
  for (const Number loss : losses) require_close(loss, 1, bound, "squared error");
}

template <class Number>
Samples<Number> samples_of(const Given<Number>& given, int64_t n) {
  return {given.x.data() + n * given.x_stride(),
          given.classes.data() + (given.shared ? 0 : n * given.rows), nullptr, given.rows};
}

// Gradients against differences of the loss that loops give.
template <class Number>
void check_gradient(const Plan& plan, const Given<Number>& given, bool training) {
  const double bound = sizeof(Number) == 4 ? 2e-3 : 1e-6, step = 1e-6;
  std::vector<Number> grads(given.networks * kWeights), losses(given.networks);
  weightops::with_arithmetic<Number>([&](auto arithmetic) {
    in_threads(given.networks, [&](int64_t begin, int64_t end) {
      Worker<decltype(arithmetic)> worker(plan, given.rows, true, training);
      for (int64_t n = begin; n < end; ++n)
        losses[n] = worker.loss_grad(given.flat.data() + n * kWeights, samples_of(given, n),
                                     nullptr, given.rows, kWeights, grads.data() + n * kWeights);
    });
  });
  for (int64_t n = 0; n < given.networks; ++n) {
    auto row = given.row(n);
    const auto x = given.samples(n);
    const auto classes = given.targets(n);
    const auto loss = [&] {
      return cross_entropy(apply(row.data(), x, given.rows, training).data(), classes);
    };
    require_close(losses[n], loss(), bound, "loss of a gradient");
    for (int64_t i = 0; i < kWeights; i += 1 + i % 9) {
      if (i >= kMean && i < kLinear) continue;  // data to eval mode, which differences would see
      const double kept = row[i];
      row[i] = kept + step;
      const double above = loss();
      row[i] = kept - step;
      const double below = loss();
      row[i] = kept;
      require_close(grads[n * kWeights + i], (above - below) / (2 * step), bound, "gradient");
    }
  }
}

// A step of SGD goes along the gradient, and a step's batch moves the running statistics.
template <class Number>
void check_step(const Plan& plan, const Given<Number>& given, Method method, int64_t batch) {
  const double bound = sizeof(Number) == 4 ? 1e-4 : 1e-12, rate = 0.1;
  const int64_t networks = given.networks, size = batch ? batch : given.rows;
  const bool adamw = method == Method::adamw;
  Optimizer optimizer{method, 0, {0, 0, 0}};
  if (adamw) optimizer = {method, 0.01, {0.9, 0.999, 1e-8}};
  std::vector<Number> flat = given.flat, first(flat.size()), second(adamw ? flat.size() : 0);
  std::vector<Number> losses(networks), grads(flat.size());
  std::vector<int64_t> batches(networks * batch);
  for (size_t i = 0; i < batches.size(); ++i) batches[i] = int64_t(i * 5) % given.rows;
  const std::vector<int64_t> trained{0, kMean, kLinear, kWeights};
  weightops::with_arithmetic<Number>([&](auto arithmetic) {
    in_threads(networks, [&](int64_t begin, int64_t end) {
      Worker<decltype(arithmetic)> worker(plan, size, batch == 0, true);
      for (int64_t n = begin; n < end; ++n) {
        Job<Number> job{};
        job.flat = flat.data() + n * kWeights;
        job.first = first.data() + n * kWeights;
        job.second = adamw ? second.data() + n * kWeights : nullptr;
        job.samples = samples_of(given, n);
        job.batches = batch ? batches.data() + n * batch : nullptr;
        job.batch = batch;
        job.losses = losses.data() + n;
        job.rate = rate;
        train(worker, job, optimizer, trained, kWeights, 0, 1, grads.data() + n * kWeights);
      }
    });
  });
  for (int64_t n = 0; n < networks; ++n) {
    const auto all = given.samples(n), row = given.row(n);
    const auto targets = given.targets(n);
    std::vector<double> x, found(2 * kChannels);
    std::vector<int64_t> classes;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = batch ? batches[n * batch + i] : i, pixels = 2 * kHeight * kWidth;
      classes.push_back(targets[at]);
      x.insert(x.end(), all.begin() + at * pixels, all.begin() + (at + 1) * pixels);
    }
    const auto logits = apply(row.data(), x, size, true, &found);
    require_close(losses[n], cross_entropy(logits.data(), classes), bound, "loss of a step");
    const Number* made = flat.data() + n * kWeights;
    for (int c = 0; c < 2 * kChannels; ++c)
      require_close(made[kMean + c], (1 - kMomentum) * row[kMean + c] + kMomentum * found[c], bound,
                    "running statistics");
    for (int64_t i = 0; i < kWeights; ++i) {
      const double moved = row[i] - made[i], grad = grads[n * kWeights + i];
      if (i >= kMean && i < kLinear)
        require(grad == 0 && first[n * kWeights + i] == 0, "statistics are not optimised");
      else if (adamw)
        require(std::abs(moved) < 1.1 * rate, "a step of adamw is no longer than its rate");
      else
        require_close(moved, rate * grad, bound, "a step of sgd");
    }
  }
}

template <class Number>
void check(int64_t networks, int64_t rows, bool shared) {
  const std::vector<int64_t> program = code();
  const Plan plan = Plan::parse(program.data(), program.size(), kWeights);
  const Given<Number> given(networks, rows, shared);
  check_forward(plan, given);
  for (const bool training : {false, true}) check_gradient(plan, given, training);
  for (const Method method : {Method::adamw, Method::sgd})
    for (const int64_t batch : {int64_t(0), std::min<int64_t>(rows, 19)})
      check_step(plan, given, method, batch);
}

void check_refusal() {
  const std::vector<int64_t> good = code();
  for (size_t length = 0; length < good.size(); ++length) {
    bool refused = false;
    const std::vector<int64_t> part(good.begin(), good.begin() + length);
    try {
      Plan::parse(part.data(), part.size(), kWeights);
    } catch (const std::out_of_range&) {
      refused = true;
    }
    require(refused, "a program that ends early is refused");
  }
}

}  // namespace

int main() {
  for (const bool shared : {true, false})
    for (const int64_t rows : {1, 5, 37}) {
      check<float>(3, rows, shared);
      check<double>(2, rows, shared);
    }
  check_refusal();
  std::puts("population: passed");
}
