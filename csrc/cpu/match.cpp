// match_weights for the CPU dispatch key: networks are shared out over threads, or the products of
// one network are where networks are fewer.
#include <tuple>

#include "../core/match.h"
#include "common.h"

namespace weightops {
namespace {

using manifold::Team;

template <class Sum>
bool run(const match::Plan& plan, const Tensor& reference, const Tensor& flat, const Tensor& order,
         int64_t* perms, double* history, int64_t* sweeps) {
  const int64_t networks = flat.size(0), labels = plan.labels.size();
  const int64_t threads = torch::stable::get_num_threads();
  const Sum *ours = reference.const_data_ptr<Sum>(), *theirs = flat.const_data_ptr<Sum>();
  const int64_t numel = reference.numel();
  int64_t perm_size = 0;
  for (const auto& label : plan.labels) perm_size += label.size;

  const Team together = [](int64_t count, const std::function<void(int64_t, int64_t)>& f) {
    torch::stable::parallel_for(0, count, 1, f);
  };
  const Team alone = [](int64_t count, const std::function<void(int64_t, int64_t)>& f) {
    f(0, count);
  };
  const bool small = numel < 1 << 19;
  const match::Reference<Sum> own(plan, ours, small ? 1 : threads, small ? alone : together);
  std::atomic<bool> finite{true};
  const auto match_one = [&](int64_t network, const Team& team) {
    std::vector<int64_t*> found;
    int64_t* at = perms + network * perm_size;
    for (const auto& label : plan.labels) {
      found.push_back(at);
      at += label.size;
    }
    match::Descent<Sum> descent(plan, own, theirs + network * numel, found,
                                &team == &alone ? 1 : threads, team);
    sweeps[network] = match::descend(descent, order.const_data_ptr<int64_t>(), labels,
                                     order.size(0), history + network, networks);
    if (sweeps[network] < 0) finite = false;
  };
  if (networks >= threads)
    torch::stable::parallel_for(0, networks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) match_one(n, alone);
    });
  else
    for (int64_t n = 0; n < networks; ++n) match_one(n, small ? alone : together);
  return finite;
}

std::tuple<Tensor, Tensor, Tensor> match_weights(const Tensor& reference, const Tensor& flat,
                                                 const std::vector<int64_t>& code,
                                                 const Tensor& order) {
  STD_TORCH_CHECK(reference.dim() == 2 && flat.dim() == 3 && flat.size(1) == reference.size(0) &&
                      flat.size(2) == reference.size(1),
                  "match_weights: reference must be [T, P] and flat [N, T, P]");
  STD_TORCH_CHECK(flat.scalar_type() == reference.scalar_type(), "match_weights: dtypes differ");
  const match::Plan plan = match::Plan::parse(code.data(), code.size(), reference.numel());
  const int64_t networks = flat.size(0), labels = plan.labels.size();
  STD_TORCH_CHECK(
      order.dim() == 2 && order.size(1) == labels && order.scalar_type() == ScalarType::Long,
      "match_weights: order must be int64 [sweeps, labels]");
  const Tensor ours = torch::stable::contiguous(reference),
               theirs = torch::stable::contiguous(flat), dense = torch::stable::contiguous(order);
  const int64_t* visits = dense.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(
      std::all_of(visits, visits + dense.numel(), [&](int64_t l) { return l >= 0 && l < labels; }),
      "match_weights: order names a label that the plan lacks");
  int64_t perm_size = 0;
  for (const auto& label : plan.labels) perm_size += label.size;
  Tensor perms = torch::stable::new_empty(flat, {networks, perm_size}, ScalarType::Long);
  Tensor history =
      torch::stable::new_zeros(flat, {order.size(0) + 1, networks}, ScalarType::Double);
  Tensor sweeps = torch::stable::new_zeros(flat, {networks}, ScalarType::Long);
  auto* found = static_cast<int64_t*>(perms.mutable_data_ptr());
  auto* objectives = static_cast<double*>(history.mutable_data_ptr());
  auto* counts = static_cast<int64_t*>(sweeps.mutable_data_ptr());
  bool finite = false;
  switch (flat.scalar_type()) {
    case ScalarType::Float:
      finite = run<float>(plan, ours, theirs, dense, found, objectives, counts);
      break;
    case ScalarType::Double:
      finite = run<double>(plan, ours, theirs, dense, found, objectives, counts);
      break;
    default: STD_TORCH_CHECK(false, "match_weights: flat must be float32 or float64");
  }
  STD_TORCH_CHECK(finite, "match_weights: weights must be finite");
  return {perms, history, sweeps};
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("match_weights", TORCH_BOX(&weightops::match_weights));
}
