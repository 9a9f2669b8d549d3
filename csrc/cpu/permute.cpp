// permute, permute_axes and merge for the CPU dispatch key.
#include "common.h"

#include "../core/merge.h"

namespace weightops {
namespace {

struct Networks {
  int64_t count, element_size;
  Rows<const char> flat;
  Rows<char> out;
};

void run_permute(const char* name, const Plan& plan, const Networks& networks, const Tensor& index,
                 bool inverse) {
  STD_TORCH_CHECK(index.dim() == 2 && index.size(1) == plan.index_size &&
                      (index.size(0) == 1 || index.size(0) == networks.count),
                  name, ": index has the wrong shape");
  const int64_t total = networks.count * plan.numel;
  const bool stream = total * networks.element_size >= kStreamBytes;
  const Tensor dense_index = with_contiguous_rows(index);
  const Rows<const int64_t> indices = index_rows(dense_index);
  const bool valid =
      total == 0 ? all_permutations(plan, indices, index.size(0))
                 : all_of_range(total, networks.element_size, [&](int64_t begin, int64_t end) {
                     return permute_range(plan, networks.flat, indices, inverse, networks.out,
                                          networks.element_size, stream, begin, end);
                   });
  STD_TORCH_CHECK(valid, name, ": index holds a row that is no permutation");
}

void permute_into(const Tensor& flat, const Tensor& index, const std::vector<int64_t>& code,
                  bool inverse, const Tensor& out) {
  const Plan plan = Plan::parse(code.data(), code.size());
  STD_TORCH_CHECK(flat.size(1) == plan.numel, "permute: flat has ", flat.size(1),
                  " columns, the plan has ", plan.numel);
  const bool rows = out.size(1) < 2 || out.stride(1) == 1;
  const Tensor source = with_contiguous_rows(flat);
  Tensor target = out,
         written = rows ? out : torch::stable::new_empty(flat, {flat.size(0), flat.size(1)});
  const Networks networks{flat.size(0),
                          int64_t(flat.element_size()),
                          byte_rows(source),
                          {static_cast<char*>(written.mutable_data_ptr()), row_stride(written)}};
  run_permute("permute", plan, networks, index, inverse);
  if (!rows) torch::stable::copy_(target, written);
}

Tensor permute(const Tensor& flat, const Tensor& index, const std::vector<int64_t>& code,
               bool inverse) {
  Tensor out = torch::stable::new_empty(flat, {flat.size(0), flat.size(1)});
  permute_into(flat, index, code, inverse, out);
  return out;
}

// One tensor [B, ...] is a network of one tensor; `axes` (counted from 1) are the permuted ones.
void permute_axes_into(const Tensor& x, const Tensor& index, const std::vector<int64_t>& axes,
                       bool inverse, const Tensor& out) {
  const int64_t rank = x.dim() - 1;
  std::vector<int64_t> sizes(rank), maps(rank, kFixed);
  for (int64_t axis = 0; axis < rank; ++axis) sizes[axis] = x.size(axis + 1);
  Plan plan;
  for (size_t i = 0; i < axes.size(); ++i) {
    const int64_t axis = axes[i] - 1;
    STD_TORCH_CHECK(axis >= 0 && axis < rank, "permute_axes: axis ", axes[i], " is out of range");
    plan.add_label(sizes[axis]);
    plan.add_map({{static_cast<int64_t>(i), sizes[axis]}});
    maps[axis] = static_cast<int64_t>(i);
  }
  plan.add_tensor(sizes.data(), maps.data(), rank);
  const bool dense = out.is_contiguous();
  const Tensor source = x.is_contiguous() ? x : torch::stable::contiguous(x);
  Tensor target = out, written = dense ? out : torch::stable::new_empty(x, x.sizes());
  const Networks networks{x.size(0),
                          int64_t(x.element_size()),
                          {static_cast<const char*>(source.const_data_ptr()), plan.numel},
                          {static_cast<char*>(written.mutable_data_ptr()), plan.numel}};
  run_permute("permute_axes", plan, networks, index, inverse);
  if (!dense) torch::stable::copy_(target, written);
}

Tensor permute_axes(const Tensor& x, const Tensor& index, const std::vector<int64_t>& axes,
                    bool inverse) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  permute_axes_into(x, index, axes, inverse, out);
  return out;
}

template <class T>
bool run_merge(const MergeProblem& problem, const Tensor& weights, const Tensor& out) {
  using Sum = typename Accumulator<T>::type;
  const Sum* weight = weights.const_data_ptr<Sum>();
  const Rows<char> destination{static_cast<char*>(out.mutable_data_ptr()), row_stride(out)};
  // A thread reads `networks` elements for each one it writes.
  const int64_t cost = sizeof(T) * (problem.networks + problem.outputs);
  return all_of_range(problem.plan.numel, cost, [&](int64_t begin, int64_t end) {
    return merge_range<T>(problem, weight, destination, begin, end);
  });
}

void merge_into(const Tensor& flat, const Tensor& weights, const std::optional<Tensor>& index,
                const std::vector<int64_t>& code, const Tensor& out) {
  const Plan plan = Plan::parse(code.data(), code.size());
  STD_TORCH_CHECK(flat.size(1) == plan.numel && weights.size(1) == flat.size(0),
                  "merge: flat, weights and the plan do not fit");
  const Tensor networks = with_contiguous_rows(flat), dense = torch::stable::contiguous(weights);
  Rows<const int64_t> indices{nullptr, 0};
  Tensor held;
  if (index.has_value()) {
    STD_TORCH_CHECK(index->size(1) == plan.index_size &&
                        (index->size(0) == 1 || index->size(0) == flat.size(0)),
                    "merge: index has the wrong shape");
    held = with_contiguous_rows(*index);
    indices = index_rows(held);
  }
  const bool rows = out.size(1) < 2 || out.stride(1) == 1;
  Tensor target = out;
  Tensor merged = rows ? out : torch::stable::new_empty(flat, {out.size(0), out.size(1)});
  const MergeProblem problem{plan, flat.size(0), weights.size(0), byte_rows(networks), indices};
  bool valid =
      plan.numel > 0 || !index.has_value() || all_permutations(plan, indices, index->size(0));
  if (plan.numel > 0) switch (flat.scalar_type()) {
      case ScalarType::Float: valid = run_merge<float>(problem, dense, merged); break;
      case ScalarType::Double: valid = run_merge<double>(problem, dense, merged); break;
      case ScalarType::Half: valid = run_merge<Half>(problem, dense, merged); break;
      case ScalarType::BFloat16: valid = run_merge<BFloat16>(problem, dense, merged); break;
      default: STD_TORCH_CHECK(false, "merge: flat has an unsupported dtype");
    }
  STD_TORCH_CHECK(valid, "merge: index holds a row that is no permutation");
  if (!rows) torch::stable::copy_(target, merged);
}

Tensor merge(const Tensor& flat, const Tensor& weights, const std::optional<Tensor>& index,
             const std::vector<int64_t>& code) {
  Tensor out = torch::stable::new_empty(flat, {weights.size(0), flat.size(1)});
  merge_into(flat, weights, index, code, out);
  return out;
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("permute", TORCH_BOX(&weightops::permute));
  m.impl("permute_into", TORCH_BOX(&weightops::permute_into));
  m.impl("permute_axes", TORCH_BOX(&weightops::permute_axes));
  m.impl("permute_axes_into", TORCH_BOX(&weightops::permute_axes_into));
  m.impl("merge", TORCH_BOX(&weightops::merge));
  m.impl("merge_into", TORCH_BOX(&weightops::merge_into));
}
