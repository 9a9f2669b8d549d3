// manifold_contract and its backward for the CPU dispatch key.
#include "common.h"

#include "../core/manifold_linear.h"

namespace weightops {
namespace {

using manifold::Kind;
using manifold::Linear;
using manifold::Team;

Kind kind_of(ScalarType type) {
  return type == ScalarType::Half       ? Kind::half
         : type == ScalarType::BFloat16 ? Kind::bfloat16
                                        : Kind::same;
}

// How many bfloat16 a number is split into; a double into none.
int parts_of(ScalarType type, const std::string& precision) {
  switch (type) {
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    case ScalarType::Float: return precision == "medium" ? 1 : precision == "high" ? 2 : 3;
    default: return 0;
  }
}

void on_threads(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  if (count == 1) return f(0, 1);
  torch::stable::parallel_for(0, count, 1, f);
}

void check(const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
           const Tensor& weight) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::Half || type == ScalarType::BFloat16,
                  "manifold: x must be floating point");
  STD_TORCH_CHECK(weight.scalar_type() == type, "manifold: dtypes differ");
  STD_TORCH_CHECK(coeffs.scalar_type() == (type == ScalarType::Double ? type : ScalarType::Float),
                  "manifold: coeffs must be of the dtype of the sums");
  STD_TORCH_CHECK(coeffs.dim() == 2 && coeffs.size(1) == weight.size(0),
                  "manifold: coeffs do not fit the bases");
  const int64_t items = x.size(0), contexts = coeffs.size(0);
  if (!index) {
    STD_TORCH_CHECK(contexts == 1 || contexts == items, "manifold: ", contexts, " contexts for ",
                    items, " items");
    return;
  }
  STD_TORCH_CHECK(index->dim() == 1 && index->size(0) == items &&
                      index->scalar_type() == ScalarType::Long,
                  "manifold: index must be int64 of the items' number");
}

template <class Sum>
Linear<Sum> linear(const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
                   const Tensor& weight, const std::string& precision) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3 && x.size(2) == weight.size(2),
                  "manifold: x does not fit the weights");
  const Linear<Sum> problem{x.size(0),
                            x.size(1),
                            weight.size(2),
                            weight.size(1),
                            weight.size(0),
                            coeffs.size(0),
                            index ? index->const_data_ptr<int64_t>() : nullptr,
                            static_cast<const Sum*>(coeffs.const_data_ptr()),
                            kind_of(x.scalar_type()),
                            weight.const_data_ptr(),
                            parts_of(x.scalar_type(), precision),
                            torch::stable::get_num_threads()};
  for (int64_t item = 0; problem.index && item < problem.items; ++item)
    STD_TORCH_CHECK(problem.index[item] >= 0 && problem.index[item] < problem.contexts,
                    "manifold: index ", problem.index[item], " is out of range");
  return problem;
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(*tensor);
}

void clear(Tensor& tensor) {
  std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
}

template <class Sum>
Tensor linear_forward(const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
                      const Tensor& weight, const std::optional<Tensor>& shift,
                      const std::string& precision) {
  const Linear<Sum> problem = linear<Sum>(x, coeffs, index, weight, precision);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), problem.out});
  if (y.numel() == 0) return y;
  manifold::forward<Sum>(problem, x.const_data_ptr(),
                         shift ? static_cast<const Sum*>(shift->const_data_ptr()) : nullptr,
                         y.mutable_data_ptr(), on_threads);
  return y;
}

template <class Sum>
std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
    const Tensor& weight, bool need_x, bool need_coeffs, bool need_weight,
    const std::string& precision) {
  const Linear<Sum> problem = linear<Sum>(x, coeffs, index, weight, precision);
  const auto room = [](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, like.sizes())
                  : torch::stable::new_empty(like, {0});
  };
  Tensor to_x = room(need_x, x), to_coeffs = room(need_coeffs, coeffs),
         to_weight = room(need_weight, weight);
  if (grad.numel() == 0 || x.numel() == 0 || weight.numel() == 0) {
    for (Tensor* each : {&to_x, &to_coeffs, &to_weight}) clear(*each);
    return {to_x, to_coeffs, to_weight};
  }
  manifold::backward<Sum>(problem, x.const_data_ptr(), grad.const_data_ptr(),
                          need_x ? to_x.mutable_data_ptr() : nullptr,
                          need_coeffs ? static_cast<Sum*>(to_coeffs.mutable_data_ptr()) : nullptr,
                          need_weight ? to_weight.mutable_data_ptr() : nullptr, on_threads);
  return {to_x, to_coeffs, to_weight};
}

Tensor manifold_contract(const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
                         const Tensor& weight, const std::optional<Tensor>& shift,
                         const std::vector<int64_t>& geometry, const std::string& precision) {
  check(x, coeffs, index, weight);
  const auto run =
      x.scalar_type() == ScalarType::Double ? linear_forward<double> : linear_forward<float>;
  return run(torch::stable::contiguous(x), torch::stable::contiguous(coeffs), dense(index),
             torch::stable::contiguous(weight), dense(shift), precision);
}

std::tuple<Tensor, Tensor, Tensor> manifold_contract_backward(
    const Tensor& grad, const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
    const Tensor& weight, const std::vector<int64_t>& geometry, bool need_x, bool need_coeffs,
    bool need_weight, const std::string& precision) {
  check(x, coeffs, index, weight);
  const auto run =
      x.scalar_type() == ScalarType::Double ? linear_backward<double> : linear_backward<float>;
  return run(torch::stable::contiguous(grad), torch::stable::contiguous(x),
             torch::stable::contiguous(coeffs), dense(index), torch::stable::contiguous(weight),
             need_x, need_coeffs, need_weight, precision);
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("manifold_contract", TORCH_BOX(&weightops::manifold_contract));
  m.impl("manifold_contract_backward", TORCH_BOX(&weightops::manifold_contract_backward));
}
