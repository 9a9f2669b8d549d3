// manifold_contract and its backward for the CPU dispatch key.
#include "common.h"

#include "../core/manifold_conv.h"
#include "../core/manifold_linear.h"

namespace weightops {
namespace {

using manifold::Convolution;
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
  STD_TORCH_CHECK(
      index->dim() == 1 && index->size(0) == items && index->scalar_type() == ScalarType::Long,
      "manifold: index must be int64 of the items' number");
}

const int64_t* contexts(const std::optional<Tensor>& index, int64_t count) {
  if (!index) return nullptr;
  const int64_t* found = index->const_data_ptr<int64_t>();
  for (int64_t item = 0; item < index->size(0); ++item)
    STD_TORCH_CHECK(found[item] >= 0 && found[item] < count, "manifold: index ", found[item],
                    " is out of range");
  return found;
}

// What x, weight, coeffs and index, all dense, ask for.
template <class Sum>
Linear<Sum> linear(const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
                   const Tensor& weight, const std::string& precision) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3 && x.size(2) == weight.size(2),
                  "manifold: x does not fit the weights");
  return {x.size(0),
          x.size(1),
          weight.size(2),
          weight.size(1),
          weight.size(0),
          coeffs.size(0),
          contexts(index, coeffs.size(0)),
          static_cast<const Sum*>(coeffs.const_data_ptr()),
          kind_of(x.scalar_type()),
          weight.const_data_ptr(),
          parts_of(x.scalar_type(), precision),
          torch::stable::get_num_threads()};
}

template <class Sum>
Convolution<Sum> convolution(const Tensor& x, const Tensor& coeffs,
                             const std::optional<Tensor>& index, const Tensor& weight,
                             const std::vector<int64_t>& geometry, const std::string& precision) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 5 && geometry.size() == 7,
                  "manifold: x and the weights are no images and taps");
  const int64_t groups = geometry[6];
  STD_TORCH_CHECK(
      groups > 0 && x.size(1) == groups * weight.size(2) && weight.size(1) % groups == 0,
      "manifold: the channels do not fit the groups");
  manifold::Planes planes{x.size(2),
                          x.size(3),
                          0,
                          0,
                          weight.size(3),
                          weight.size(4),
                          {geometry[0], geometry[1]},
                          {geometry[2], geometry[3]},
                          {geometry[4], geometry[5]}};
  const auto size = [&](int64_t length, int64_t taps, int d) {
    return (length + 2 * planes.padding[d] - planes.dilation[d] * (taps - 1) - 1) /
               planes.stride[d] +
           1;
  };
  planes.out_height = size(planes.height, planes.tap_height, 0);
  planes.out_width = size(planes.width, planes.tap_width, 1);
  // A stride beyond the image is never taken.
  planes.stride[0] = std::min(planes.stride[0], planes.height + 2 * planes.padding[0]);
  planes.stride[1] = std::min(planes.stride[1], planes.width + 2 * planes.padding[1]);
  STD_TORCH_CHECK(planes.out_height > 0 && planes.out_width > 0,
                  "manifold: the taps are larger than the images");
  return {planes,
          x.size(0),
          groups,
          weight.size(2),
          weight.size(1) / groups,
          weight.size(0),
          coeffs.size(0),
          contexts(index, coeffs.size(0)),
          static_cast<const Sum*>(coeffs.const_data_ptr()),
          kind_of(x.scalar_type()),
          weight.const_data_ptr(),
          parts_of(x.scalar_type(), precision),
          torch::stable::get_num_threads()};
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(*tensor);
}

template <class Sum>
Tensor forward(const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
               const Tensor& weight, const std::optional<Tensor>& shift,
               const std::vector<int64_t>& geometry, const std::string& precision) {
  const Sum* plus = shift ? static_cast<const Sum*>(shift->const_data_ptr()) : nullptr;
  const auto run = [&](const auto& problem, Tensor y) {
    if (y.numel() == 0) return y;
    manifold::forward<Sum>(problem, x.const_data_ptr(), plus, y.mutable_data_ptr(), on_threads);
    return y;
  };
  if (geometry.empty()) {
    const auto problem = linear<Sum>(x, coeffs, index, weight, precision);
    return run(problem, torch::stable::new_empty(x, {x.size(0), x.size(1), problem.out}));
  }
  const auto problem = convolution<Sum>(x, coeffs, index, weight, geometry, precision);
  return run(problem,
             torch::stable::new_empty(x, {x.size(0), problem.groups * problem.out,
                                          problem.planes.out_height, problem.planes.out_width}));
}

Tensor manifold_contract(const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
                         const Tensor& weight, const std::optional<Tensor>& shift,
                         const std::vector<int64_t>& geometry, const std::string& precision) {
  check(x, coeffs, index, weight);
  STD_TORCH_CHECK(
      !shift || (shift->dim() == 2 && shift->size(0) == coeffs.size(0) &&
                 shift->size(1) == weight.size(1) && shift->scalar_type() == coeffs.scalar_type()),
      "manifold: shift does not fit the contexts");
  const auto run = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return run(torch::stable::contiguous(x), torch::stable::contiguous(coeffs), dense(index),
             torch::stable::contiguous(weight), dense(shift), geometry, precision);
}

template <class Sum>
void backward(const Tensor& grad, const Tensor& x, const Tensor& coeffs,
              const std::optional<Tensor>& index, const Tensor& weight,
              const std::vector<int64_t>& geometry, const std::string& precision, Tensor& to_x,
              Tensor& to_coeffs, Tensor& to_weight) {
  const auto run = [&](const auto& problem) {
    const auto room = [](Tensor& to) { return to.numel() ? to.mutable_data_ptr() : nullptr; };
    manifold::backward<Sum>(problem, x.const_data_ptr(), grad.const_data_ptr(), room(to_x),
                            static_cast<Sum*>(room(to_coeffs)), room(to_weight), on_threads);
  };
  if (geometry.empty())
    run(linear<Sum>(x, coeffs, index, weight, precision));
  else
    run(convolution<Sum>(x, coeffs, index, weight, geometry, precision));
}

std::tuple<Tensor, Tensor, Tensor> manifold_contract_backward(
    const Tensor& grad, const Tensor& x, const Tensor& coeffs, const std::optional<Tensor>& index,
    const Tensor& weight, const std::vector<int64_t>& geometry, bool need_x, bool need_coeffs,
    bool need_weight, const std::string& precision) {
  check(x, coeffs, index, weight);
  const auto room = [](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, like.sizes())
                  : torch::stable::new_empty(like, {0});
  };
  Tensor to_x = room(need_x, x), to_coeffs = room(need_coeffs, coeffs),
         to_weight = room(need_weight, weight);
  if (grad.numel() == 0 || x.numel() == 0 || weight.numel() == 0) {
    for (Tensor* each : {&to_x, &to_coeffs, &to_weight}) torch::stable::zero_(*each);
    return {to_x, to_coeffs, to_weight};
  }
  const auto run = x.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  run(torch::stable::contiguous(grad), torch::stable::contiguous(x),
      torch::stable::contiguous(coeffs), dense(index), torch::stable::contiguous(weight), geometry,
      precision, to_x, to_coeffs, to_weight);
  return {to_x, to_coeffs, to_weight};
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("manifold_contract", TORCH_BOX(&weightops::manifold_contract));
  m.impl("manifold_contract_backward", TORCH_BOX(&weightops::manifold_contract_backward));
}
