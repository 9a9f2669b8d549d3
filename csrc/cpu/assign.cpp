// assign for the CPU dispatch key: problems are shared out over threads, one solver to each.
#include "../core/assign.h"

#include <tuple>

#include "common.h"

namespace weightops {
namespace {

template <class T>
bool solve_all(const Tensor& score, bool maximize, bool warm, int64_t* columns, double* duals) {
  const int64_t rows = score.size(1), cols = score.size(2);
  const T* scores = score.const_data_ptr<T>();
  // A problem is read some eight times, and each pass costs more than a copy.
  const int64_t cost = std::max<int64_t>(1, 8 * rows * cols * sizeof(T));
  return all_of_range(score.size(0), cost, [&](int64_t begin, int64_t end) {
    assign::Workspace<T> workspace;
    for (int64_t b = begin; b < end; ++b) {
      const T* own = scores + b * rows * cols;
      if (!assign::solve(own, rows, cols, cols, maximize, columns + b * rows, duals + b * cols,
                         warm, workspace, b + 1 < end ? own + rows * cols : nullptr))
        return false;
    }
    return true;
  });
}

std::tuple<Tensor, Tensor> assign_problems(const Tensor& score, bool maximize,
                                           const std::optional<Tensor>& duals) {
  const int64_t problems = score.size(0), rows = score.size(1), cols = score.size(2);
  STD_TORCH_CHECK(rows <= cols, "assign: more rows than columns");
  const Tensor dense = torch::stable::contiguous(score);
  Tensor columns = torch::stable::new_empty(score, {problems, rows}, ScalarType::Long);
  Tensor potentials = torch::stable::new_empty(score, {problems, cols}, ScalarType::Double);
  if (duals.has_value())
    torch::stable::copy_(potentials, *duals);
  else
    torch::stable::zero_(potentials);
  const bool warm = duals.has_value();
  auto* chosen = static_cast<int64_t*>(columns.mutable_data_ptr());
  auto* prices = static_cast<double*>(potentials.mutable_data_ptr());
  bool finite = false;
  switch (score.scalar_type()) {
    case ScalarType::Float: finite = solve_all<float>(dense, maximize, warm, chosen, prices); break;
    case ScalarType::Double:
      finite = solve_all<double>(dense, maximize, warm, chosen, prices);
      break;
    default: STD_TORCH_CHECK(false, "assign: score must be float32 or float64");
  }
  STD_TORCH_CHECK(finite, "assign: score must be finite");
  return {columns, potentials};
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("assign", TORCH_BOX(&weightops::assign_problems));
}
