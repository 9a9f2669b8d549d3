// equivariant_linear, equivariant_stack and equivariant_backward for the CPU dispatch key.
#include "common.h"

#include "../core/equivariant_batch.h"
#include "../core/equivariant_cache.h"

namespace weightops {
namespace {

using equivariant::BackwardTask;
using equivariant::Batch;
using equivariant::ForwardTask;
using equivariant::Plan;
using equivariant::Prepared;
using equivariant::Problem;
using equivariant::Program;
using equivariant::Runs;
using equivariant::Workspace;

// One a thread, for it is a network's size and would be given back to the system at every call.
template <class T>
Workspace<T>& workspace() {
  static thread_local Workspace<T> own;
  return own;
}

// Networks [B, P, C] whose rows are contiguous.
Tensor with_contiguous_networks(const Tensor& x) {
  const bool channels = x.size(2) < 2 || x.stride(2) == 1;
  const bool rows = x.size(1) < 2 || x.stride(1) == x.size(2);
  return channels && rows ? x : torch::stable::contiguous(x);
}

template <class T>
Batch<const T> batch_of(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.size(0) < 2 ? 0 : x.stride(0)};
}

void check(const Plan& plan, const Tensor& x, const Tensor& theta, int side) {
  STD_TORCH_CHECK(x.dim() == 3 && theta.dim() == 4, "equivariant: wrong number of axes");
  STD_TORCH_CHECK(x.size(1) == plan.sides[side].numel && x.size(2) == theta.size(2 + side),
                  "equivariant: features ", x.size(1), " x ", x.size(2), " do not fit the plan");
  STD_TORCH_CHECK(theta.size(1) == plan.terms, "equivariant: theta is of another plan");
  STD_TORCH_CHECK(theta.size(0) > 0 && x.size(0) % theta.size(0) == 0,
                  "equivariant: theta's groups do not divide the batch");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == theta.scalar_type(), "equivariant: dtypes differ");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::Half || type == ScalarType::BFloat16,
                  "equivariant: features must be floating point");
}

template <class T>
Tensor layers(Prepared& prepared, const Tensor& x, const std::vector<Tensor>& theta,
              const std::vector<Tensor>& bias, bool transpose, bool activate_last) {
  const Plan& plan = prepared.plan;
  const int reads = transpose ? 1 : 0;
  const int64_t wide = equivariant::vector_bytes() / sizeof(T);
  const int64_t numel = plan.sides[1 - reads].numel, channels = theta.back().size(3 - reads);
  Tensor out = torch::stable::new_empty(x, {x.size(0), numel, channels});
  ForwardTask<T> task{{},
                      batch_of<T>(x),
                      {static_cast<T*>(out.mutable_data_ptr()), numel * channels},
                      activate_last,
                      out.numel() * int64_t(sizeof(T)) >= kStreamBytes,
                      plan.sides[0].same_nodes(plan.sides[1])};
  for (size_t l = 0; l < theta.size(); ++l) {
    const Problem<T> problem{plan,
                             x.size(0),
                             theta[l].size(0),
                             {theta[l].size(2), theta[l].size(3)},
                             static_cast<const T*>(theta[l].const_data_ptr())};
    const int64_t into = problem.channels[reads], out_of = problem.channels[1 - reads];
    const int64_t lanes = out_of == 1 && into % wide == 0 ? 1 : wide;
    task.layers.push_back({problem,
                           bias.empty() ? nullptr : static_cast<const T*>(bias[l].const_data_ptr()),
                           prepared.program(reads, into, out_of, lanes)});
  }
  if (out.numel() == 0) return out;
  const int64_t batch = x.size(0);
  if (task.few() && batch < torch::stable::get_num_threads()) {
    const equivariant::Team<T> team = [](int64_t count, const auto& f) {
      torch::stable::parallel_for(
          0, count, 1, [&](int64_t begin, int64_t end) { f(begin, end, workspace<T>()); });
    };
    equivariant::forward(task, 0, batch, workspace<T>(), &team);
    return out;
  }
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    equivariant::forward<T>(task, begin, end, workspace<T>(), nullptr);
  });
  return out;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(Prepared& prepared, const Tensor& x,
                                            const Tensor& theta, const Tensor& grad, bool need_x) {
  const Plan& plan = prepared.plan;
  const int64_t in = theta.size(2), out = theta.size(3), groups = theta.size(0);
  const Problem<T> problem{
      plan, x.size(0), groups, {in, out}, static_cast<const T*>(theta.const_data_ptr())};
  const int64_t numel = plan.sides[0].numel, tensors = plan.sides[1].tensors.size();
  const int64_t lanes = equivariant::vector_bytes() / sizeof(T);
  const int64_t padded = (out + lanes - 1) / lanes * lanes;
  Tensor to_x = torch::stable::new_empty(x, {need_x ? x.size(0) : 0, numel, in});
  if (!need_x) to_x = torch::stable::new_empty(x, {0});
  Tensor to_theta = torch::stable::new_empty(theta, {groups, plan.terms, in, out});
  Tensor to_bias = torch::stable::new_empty(theta, {groups, tensors, out});
  T* theta_out = static_cast<T*>(to_theta.mutable_data_ptr());
  T* bias_out = static_cast<T*>(to_bias.mutable_data_ptr());
  const int64_t theta_size = plan.terms * in * out, bias_size = tensors * out;
  if (x.size(0) == 0) {
    std::fill(theta_out, theta_out + groups * theta_size, T(0));
    std::fill(bias_out, bias_out + groups * bias_size, T(0));
    return {to_x, to_theta, to_bias};
  }
  const int64_t padded_size = plan.terms * in * padded;
  const auto program = prepared.program(1, out, in, lanes);
  const Runs runs(x.size(0), groups, x.numel() * sizeof(T), padded_size * sizeof(T));
  Workspace<T>& own = workspace<T>();
  T* theta_sums = own.gradients.get(runs.count() * (padded_size + bias_size));
  T* bias_sums = theta_sums + runs.count() * padded_size;
  const bool stream = to_x.numel() * int64_t(sizeof(T)) >= kStreamBytes;
  const BackwardTask<T> task{
      problem,
      batch_of<T>(x),
      batch_of<T>(grad),
      {need_x ? static_cast<T*>(to_x.mutable_data_ptr()) : nullptr, numel * in},
      theta_sums,
      bias_sums,
      runs,
      *program,
      stream};
  torch::stable::parallel_for(0, runs.count(), 1, [&](int64_t begin, int64_t end) {
    equivariant::backward(task, begin, end, workspace<T>());
  });
  const int64_t rows = groups * plan.terms * in, a_group = plan.terms * in;
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kGrainBytes / (out * sizeof(T) * runs.runs_a_group)),
      [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const T* from =
              theta_sums + row / a_group * runs.runs_a_group * padded_size + row % a_group * padded;
          T* to = theta_out + row * out;
          std::copy(from, from + out, to);
          for (int64_t run = 1; run < runs.runs_a_group; ++run) {
            from += padded_size;
            for (int64_t c = 0; c < out; ++c) to[c] += from[c];
          }
        }
      });
  std::fill(bias_out, bias_out + groups * bias_size, T(0));
  for (int64_t run = 0; run < runs.count(); ++run)
    for (int64_t i = 0; i < bias_size; ++i)
      bias_out[run / runs.runs_a_group * bias_size + i] += bias_sums[run * bias_size + i];
  return {to_x, to_theta, to_bias};
}

// Halves are computed in float32.
bool is_half(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

Tensor dense(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor
                                                                : torch::stable::to(tensor, type));
}

Tensor networks(const Tensor& x, ScalarType type) {
  return with_contiguous_networks(x.scalar_type() == type ? x : torch::stable::to(x, type));
}

void check_bias(const Plan& plan, const Tensor& bias, const Tensor& theta) {
  STD_TORCH_CHECK(bias.dim() == 3 && bias.size(0) == theta.size(0) &&
                      bias.size(1) == int64_t(plan.sides[1].tensors.size()) &&
                      bias.size(2) == theta.size(3) && bias.scalar_type() == theta.scalar_type(),
                  "equivariant: bias does not fit the plan");
}

Tensor in_float(Prepared& prepared, const Tensor& x, std::vector<Tensor> theta,
                std::vector<Tensor> bias, bool transpose, bool activate_last) {
  const ScalarType given = x.scalar_type(), type = is_half(given) ? ScalarType::Float : given;
  for (auto* tensors : {&theta, &bias})
    for (Tensor& each : *tensors) each = dense(each, type);
  const auto run = type == ScalarType::Double ? layers<double> : layers<float>;
  const Tensor out = run(prepared, networks(x, type), theta, bias, transpose, activate_last);
  return type == given ? out : torch::stable::to(out, given);
}

Tensor equivariant_linear(const Tensor& x, const Tensor& theta, const std::optional<Tensor>& bias,
                          const std::vector<int64_t>& code, bool transpose) {
  const auto prepared = equivariant::prepare(code);
  check(prepared->plan, x, theta, transpose ? 1 : 0);
  if (!bias) return in_float(*prepared, x, {theta}, {}, transpose, false);
  STD_TORCH_CHECK(!transpose, "equivariant: the transposed layer has no bias");
  check_bias(prepared->plan, *bias, theta);
  return in_float(*prepared, x, {theta}, {*bias}, transpose, false);
}

Tensor equivariant_stack(const Tensor& x, const std::vector<Tensor>& theta,
                         const std::vector<Tensor>& bias, const std::vector<int64_t>& code,
                         bool activate_last) {
  const auto prepared = equivariant::prepare(code);
  const Plan& plan = prepared->plan;
  STD_TORCH_CHECK(!theta.empty() && (bias.empty() || bias.size() == theta.size()),
                  "equivariant: a stack has layers, and a bias for each or for none");
  STD_TORCH_CHECK(theta.size() == 1 || plan.sides[0].same_tensors(plan.sides[1]),
                  "equivariant: the plan's output is not what it takes as input");
  check(plan, x, theta[0], 0);
  for (size_t l = 0; l < theta.size(); ++l) {
    STD_TORCH_CHECK(theta[l].dim() == 4 && theta[l].scalar_type() == x.scalar_type() &&
                        theta[l].size(0) == theta[0].size(0) && theta[l].size(1) == plan.terms &&
                        (l == 0 || theta[l].size(2) == theta[l - 1].size(3)),
                    "equivariant: theta ", l, " does not fit the plan or the layer before");
    if (!bias.empty()) check_bias(plan, bias[l], theta[l]);
  }
  return in_float(*prepared, x, theta, bias, false, activate_last);
}

std::tuple<Tensor, Tensor, Tensor> equivariant_backward(const Tensor& x, const Tensor& theta,
                                                        const Tensor& grad,
                                                        const std::vector<int64_t>& code,
                                                        bool need_x) {
  const auto prepared = equivariant::prepare(code);
  check(prepared->plan, x, theta, 0);
  check(prepared->plan, grad, theta, 1);
  STD_TORCH_CHECK(grad.size(0) == x.size(0), "equivariant: batches differ");
  const ScalarType given = x.scalar_type(), type = is_half(given) ? ScalarType::Float : given;
  const Tensor features = networks(x, type), grads = networks(grad, type),
               blocks = dense(theta, type);
  const auto found = type == ScalarType::Double
                         ? backward<double>(*prepared, features, blocks, grads, need_x)
                         : backward<float>(*prepared, features, blocks, grads, need_x);
  if (type == given) return found;
  return {torch::stable::to(std::get<0>(found), given),
          torch::stable::to(std::get<1>(found), given),
          torch::stable::to(std::get<2>(found), given)};
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("equivariant_linear", TORCH_BOX(&weightops::equivariant_linear));
  m.impl("equivariant_stack", TORCH_BOX(&weightops::equivariant_stack));
  m.impl("equivariant_backward", TORCH_BOX(&weightops::equivariant_backward));
}
