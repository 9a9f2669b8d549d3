// population_loss_grad and population_steps for the CPU dispatch key: networks are shared out over
// threads.
#include "../core/population_train.h"

#include <optional>
#include <string>
#include <tuple>

#include "population_tokens.h"

namespace weightops {
namespace {

using population::Job;
using population::Plan;
using population::Samples;

// What both ops are given, checked and contiguous.
struct Data {
  Tensor flat, x, targets;
  Plan plan;
  int64_t networks, weights, rows;
  bool shared, own_targets, values;

  Data(const char* op, const Tensor& given_flat, const Tensor& given_x, const Tensor& given_targets,
       const std::vector<int64_t>& code, bool shared_x)
      : flat(torch::stable::contiguous(given_flat)),
        x(torch::stable::contiguous(given_x)),
        targets(torch::stable::contiguous(given_targets)),
        shared(shared_x) {
    STD_TORCH_CHECK(flat.dim() == 2, op, ": flat must be [N, P]");
    networks = flat.size(0);
    weights = flat.size(1);
    plan = Plan::parse(code.data(), code.size(), weights);
    const int64_t axes = shared ? 0 : 1;
    STD_TORCH_CHECK(x.dim() > axes + 1 && (shared || x.size(0) == networks) &&
                        x.scalar_type() == flat.scalar_type(),
                    op, ": x must be [B, ...] or [N, B, ...] of flat's dtype");
    rows = x.size(axes);
    STD_TORCH_CHECK(rows > 0 && x.numel() == rows * plan.taken * (shared ? 1 : networks), op,
                    ": x must have rows, of as many numbers as the program takes");
    check_tokens(op, plan, x);
    values = targets.scalar_type() == flat.scalar_type();
    STD_TORCH_CHECK(values || targets.scalar_type() == ScalarType::Long, op,
                    ": targets must be int64, or of flat's dtype");
    const int64_t expected = values ? rows * plan.outputs() : rows;
    own_targets = targets.dim() == (values ? 3 : 2);
    STD_TORCH_CHECK(targets.numel() == expected * (own_targets ? networks : 1), op,
                    ": targets must be [B] or [N, B], or that with outputs behind");
    if (!values) {
      const int64_t* classes = targets.const_data_ptr<int64_t>();
      STD_TORCH_CHECK(std::all_of(classes, classes + targets.numel(),
                                  [&](int64_t c) { return c >= 0 && c < plan.outputs(); }),
                      op, ": targets must lie in [0, outputs)");
    }
  }

  template <class Number>
  Samples<Number> samples(int64_t network) const {
    const int64_t of_targets = own_targets ? network * rows : 0;
    return {x.const_data_ptr<Number>() + (shared ? 0 : network * rows * plan.taken),
            values ? nullptr : targets.const_data_ptr<int64_t>() + of_targets,
            values ? targets.const_data_ptr<Number>() + of_targets * plan.outputs() : nullptr,
            rows};
  }

  // f(worker, network, room for gradients) of every network; a batch of 0 is all rows.
  template <class Number, class F>
  void each(int64_t batch, bool training, F&& f) const {
    with_arithmetic<Number>([&](auto arithmetic) {
      torch::stable::parallel_for(0, networks, 1, [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const FlushDenormals flush;
        population::Worker<decltype(arithmetic)> worker(plan, batch ? batch : rows, batch == 0,
                                                        training);
        Buffer<Number> grads;
        grads.get(weights);
        for (int64_t network = begin; network < end; ++network) f(worker, network, grads.get(0));
      });
    });
  }
};

template <class Number>
void compute_grads(const Data& data, Tensor& losses, Tensor& grads) {
  auto* found = static_cast<Number*>(losses.mutable_data_ptr());
  auto* to = static_cast<Number*>(grads.mutable_data_ptr());
  const Number* flat = data.flat.const_data_ptr<Number>();
  data.each<Number>(0, false, [&](auto& worker, int64_t n, Number*) {
    found[n] = worker.loss_grad(flat + n * data.weights, data.samples<Number>(n), nullptr,
                                data.rows, data.weights, to + n * data.weights);
  });
}

std::tuple<Tensor, Tensor> population_loss_grad(const Tensor& flat, const Tensor& x,
                                                const Tensor& targets,
                                                const std::vector<int64_t>& code, bool shared) {
  const Data data("population_loss_grad", flat, x, targets, code, shared);
  Tensor losses = torch::stable::new_empty(data.flat, {data.networks});
  Tensor grads = torch::stable::new_empty(data.flat, {data.networks, data.weights});
  switch (flat.scalar_type()) {
    case ScalarType::Float: compute_grads<float>(data, losses, grads); break;
    case ScalarType::Double: compute_grads<double>(data, losses, grads); break;
    default: STD_TORCH_CHECK(false, "population_loss_grad: flat must be float32 or float64");
  }
  return {losses, grads};
}

template <class Number>
void run_steps(const Data& data, const Tensor& batches, const Tensor& rates,
               const population::Optimizer& optimizer, const std::vector<int64_t>& trained,
               int64_t first_step, const std::optional<population::Probe>& probe, Tensor& flat,
               Tensor& state, Tensor& losses, Tensor& found_signals) {
  const int64_t steps = batches.size(0), batch = batches.size(2), networks = data.networks;
  auto* weights = static_cast<Number*>(flat.mutable_data_ptr());
  auto* moments = static_cast<Number*>(state.mutable_data_ptr());
  auto* found = static_cast<Number*>(losses.mutable_data_ptr());
  const int64_t frequencies = found_signals.size(2);
  auto* signal = static_cast<Number*>(found_signals.mutable_data_ptr());
  const int64_t second = optimizer.method == population::Method::adamw ? networks : 0;
  data.each<Number>(batch, true, [&](auto& worker, int64_t n, Number* grads) {
    Job<Number> job{};
    job.flat = weights + n * data.weights;
    job.first = moments + n * data.weights;
    job.second = moments + (second + n) * data.weights;
    job.samples = data.samples<Number>(n);
    job.batches = batch ? batches.const_data_ptr<int64_t>() + n * batch : nullptr;
    job.batch = batch;
    job.next_batch = networks * batch;
    job.losses = found + n;
    job.next_loss = networks;
    job.rate = rates.const_data_ptr<double>()[n];
    job.found = signal + n * frequencies;
    job.next_found = networks * frequencies;
    const auto train = [&](auto* signals) {
      population::train(worker, job, optimizer, trained, data.weights, first_step, steps, grads,
                        signals);
    };
    using Signals = population::Signals<typename std::decay_t<decltype(worker)>::Arithmetic>;
    if (!probe) return train(static_cast<Signals*>(nullptr));
    Signals signals(*probe);
    train(&signals);
  });
}

// Begins and ends of what is optimised: neither frozen nor a running statistic.
std::vector<int64_t> trained_ranges(const char* op, const Data& data,
                                    const std::vector<int64_t>& frozen) {
  std::vector<char> stays(data.weights + 1, 0);
  STD_TORCH_CHECK(frozen.size() % 2 == 0, op, ": frozen must be pairs");
  for (size_t i = 0; i < frozen.size(); i += 2) {
    STD_TORCH_CHECK(frozen[i] >= 0 && frozen[i + 1] >= frozen[i] && frozen[i + 1] <= data.weights,
                    op, ": frozen must be ranges of weights");
    std::fill(stays.begin() + frozen[i], stays.begin() + frozen[i + 1], 1);
  }
  for (const auto& layer : data.plan.layers)
    if (layer.kind == population::Kind::batch_norm)
      for (const int64_t place : {layer.mean, layer.variance})
        std::fill_n(stays.begin() + place, layer.taken.channels, 1);
  stays[data.weights] = 1;
  std::vector<int64_t> ranges;
  for (int64_t i = 0; i <= data.weights; ++i)
    if ((i == 0 || stays[i - 1]) != bool(stays[i])) ranges.push_back(i);
  return ranges;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> population_steps(
    const Tensor& given, const Tensor& given_state, const Tensor& x, const Tensor& targets,
    const Tensor& given_batches, const Tensor& given_rates, const std::vector<int64_t>& code,
    bool shared, const std::vector<int64_t>& frozen, const std::string& method,
    const std::vector<double>& settings, int64_t first_step, const std::vector<int64_t>& probe) {
  const char* op = "population_steps";
  const Data data(op, given, x, targets, code, shared);
  const Tensor batches = torch::stable::contiguous(given_batches);
  const Tensor rates = torch::stable::contiguous(given_rates);
  STD_TORCH_CHECK(method == "adamw" || method == "sgd", op, ": optimizer must be adamw or sgd");
  const bool adamw = method == "adamw";
  STD_TORCH_CHECK(settings.size() == (adamw ? 4 : 3), op, ": settings do not fit the optimizer");
  STD_TORCH_CHECK(given_state.dim() == 3 && given_state.size(0) == (adamw ? 2 : 1) &&
                      given_state.size(1) == data.networks && given_state.size(2) == data.weights &&
                      given_state.scalar_type() == given.scalar_type(),
                  op, ": state must be [2, N, P] of adamw or [1, N, P] of sgd, of flat's dtype");
  STD_TORCH_CHECK(batches.dim() == 3 && batches.size(1) == data.networks &&
                      batches.scalar_type() == ScalarType::Long,
                  op, ": batches must be int64 [S, N, b]");
  const int64_t* rows = batches.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(
      std::all_of(rows, rows + batches.numel(), [&](int64_t r) { return r >= 0 && r < data.rows; }),
      op, ": batches must lie in [0, rows)");
  STD_TORCH_CHECK(rates.dim() == 1 && rates.size(0) == data.networks &&
                      rates.scalar_type() == ScalarType::Double,
                  op, ": rates must be float64 [N]");
  STD_TORCH_CHECK(probe.empty() || (probe.size() == 4 && probe[0] >= 0 && probe[1] >= 3 &&
                                    probe[2] > 0 && probe[2] <= data.weights / probe[1] &&
                                    probe[0] <= data.weights - probe[1] * probe[2] && probe[3] > 0),
                  op, ": probe must be a place, tokens, features and every how many steps");
  STD_TORCH_CHECK(first_step >= 0, op, ": first_step must not be negative");
  const std::vector<int64_t> trained = trained_ranges(op, data, frozen);
  const int64_t batch = batches.size(2) ? batches.size(2) : data.rows;
  for (const auto& layer : data.plan.layers)
    STD_TORCH_CHECK(layer.kind != population::Kind::batch_norm || batch * layer.taken.pixels() > 1,
                    op, ": batch norm needs two numbers of a channel in a batch");
  population::Optimizer optimizer{
      adamw ? population::Method::adamw : population::Method::sgd, settings[0], {}};
  std::copy(settings.begin() + 1, settings.end(), optimizer.settings);

  Tensor flat = torch::stable::clone(data.flat);
  Tensor state = torch::stable::clone(torch::stable::contiguous(given_state));
  Tensor losses = torch::stable::new_empty(data.flat, {batches.size(0), data.networks});
  std::optional<population::Probe> recorder;
  int64_t recorded = 0;
  if (!probe.empty()) recorder.emplace(population::Probe{probe[0], probe[1], probe[2], probe[3]});
  for (int64_t s = 0; recorder && s < batches.size(0); ++s)
    recorded += (first_step + s) % recorder->every == 0;
  Tensor signals = torch::stable::new_empty(
      data.flat, {recorded, data.networks, recorder ? recorder->frequencies() : 0});
  const auto run = [&](auto number) {
    run_steps<decltype(number)>(data, batches, rates, optimizer, trained, first_step, recorder,
                                flat, state, losses, signals);
  };
  switch (given.scalar_type()) {
    case ScalarType::Float: run(float()); break;
    case ScalarType::Double: run(double()); break;
    default: STD_TORCH_CHECK(false, "population_steps: flat must be float32 or float64");
  }
  return {flat, state, losses, signals};
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("population_loss_grad", TORCH_BOX(&weightops::population_loss_grad));
  m.impl("population_steps", TORCH_BOX(&weightops::population_steps));
}
