// population_logits and population_eval for the CPU dispatch key.
#include "../core/population.h"

#include "population_tokens.h"

namespace weightops {
namespace {

using population::Plan;
using population::Reduce;

struct Call {
  Plan plan;
  Tensor flat, x;
  int64_t networks, samples;
  bool shared;

  Call(const char* name, const Tensor& given, const Tensor& samples_of,
       const std::vector<int64_t>& code, bool shares)
      : plan(Plan::parse(code.data(), code.size(), given.size(1))),
        flat(with_contiguous_rows(given)),
        x(torch::stable::contiguous(samples_of)),
        networks(given.size(0)),
        shared(shares) {
    STD_TORCH_CHECK(
        given.dim() == 2 && x.dim() > (shared ? 0 : 1) && (shared || x.size(0) == networks), name,
        ": flat must be [N, P], x [B, ...] or [N, B, ...]");
    samples = x.size(shared ? 0 : 1);
    STD_TORCH_CHECK(x.numel() == samples * plan.taken * (shared ? 1 : networks), name,
                    ": the program takes ", plan.taken, " numbers of a sample");
    STD_TORCH_CHECK(x.scalar_type() == flat.scalar_type(), name, ": dtypes differ");
    STD_TORCH_CHECK(
        flat.scalar_type() == ScalarType::Float || flat.scalar_type() == ScalarType::Double, name,
        ": flat must be float32 or float64");
    check_tokens(name, plan, x);
  }

  template <class Number>
  population::Task<Number> task(Reduce reduce) const {
    return {plan,
            networks,
            samples,
            flat.const_data_ptr<Number>(),
            x.const_data_ptr<Number>(),
            row_stride(flat),
            shared ? 0 : samples * plan.taken,
            reduce,
            nullptr,
            nullptr,
            0,
            nullptr,
            nullptr};
  }
};

void on_threads(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, count, 1, f);
}

Tensor population_logits(const Tensor& flat, const Tensor& x, const std::vector<int64_t>& code,
                         bool shared) {
  const Call call("population_logits", flat, x, code, shared);
  Tensor logits =
      torch::stable::new_empty(flat, {call.networks, call.samples, call.plan.outputs()});
  if (logits.numel() == 0) return logits;
  const auto run = [&](auto* out) {
    auto task = call.task<std::remove_pointer_t<decltype(out)>>(Reduce::logits);
    task.out = out;
    population::run(task, on_threads);
  };
  if (flat.scalar_type() == ScalarType::Float)
    run(logits.mutable_data_ptr<float>());
  else
    run(logits.mutable_data_ptr<double>());
  return logits;
}

Reduce reduce_of(const std::string& name) {
  if (name == "loss") return Reduce::loss;
  if (name == "accuracy") return Reduce::accuracy;
  if (name == "scores") return Reduce::scores;
  STD_TORCH_CHECK(name == "errors",
                  "population_eval: reduce must be loss, accuracy, scores or errors");
  return Reduce::errors;
}

Tensor population_eval(const Tensor& flat, const Tensor& x, const Tensor& targets,
                       const std::vector<int64_t>& code, bool shared, const std::string& name) {
  const Call call("population_eval", flat, x, code, shared);
  const Reduce reduce = reduce_of(name);
  const int64_t outputs = call.plan.outputs(), networks = call.networks, samples = call.samples;
  const bool classes = targets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(
      classes || (reduce == Reduce::loss && targets.scalar_type() == flat.scalar_type()),
      "population_eval: targets must be int64, or of flat's dtype for a loss");
  const bool own = targets.dim() > (classes ? 1 : 2);
  const int64_t each = samples * (classes ? 1 : outputs);
  STD_TORCH_CHECK(
      targets.numel() == (own ? networks : 1) * each && (!own || targets.size(0) == networks),
      "population_eval: targets do not fit the samples");
  const Tensor dense = torch::stable::contiguous(targets);
  if (classes) {
    const int64_t* found = dense.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(
        std::all_of(found, found + dense.numel(), [&](int64_t c) { return c >= 0 && c < outputs; }),
        "population_eval: targets must lie in [0, ", outputs, ")");
  }
  Tensor out = reduce == Reduce::errors
                   ? torch::stable::new_empty(flat, {networks, samples}, ScalarType::Bool)
               : reduce == Reduce::scores ? torch::stable::new_empty(flat, {networks, 2})
                                          : torch::stable::new_empty(flat, {networks});
  if (out.numel() == 0) return out;
  if (samples == 0) return torch::stable::fill_(out, std::nan(""));
  const auto run = [&](auto number) {
    using Number = decltype(number);
    auto task = call.task<Number>(reduce);
    task.classes = classes ? dense.const_data_ptr<int64_t>() : nullptr;
    task.values = classes ? nullptr : dense.const_data_ptr<Number>();
    task.target_stride = own ? each : 0;
    if (reduce == Reduce::errors)
      task.wrong = out.mutable_data_ptr<bool>();
    else
      task.out = out.mutable_data_ptr<Number>();
    population::run(task, on_threads);
  };
  if (flat.scalar_type() == ScalarType::Float)
    run(float());
  else
    run(double());
  return out;
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("population_logits", TORCH_BOX(&weightops::population_logits));
  m.impl("population_eval", TORCH_BOX(&weightops::population_eval));
}
