// token_pack, token_unpack and token_moments for the CPU dispatch key.
#include "../core/tokens.h"

#include <optional>

#include "common.h"

namespace weightops {
namespace {

// f(T) for the element type of a tensor.
template <class F>
void by_type(const Tensor& tensor, const char* name, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(BFloat16());
    default: STD_TORCH_CHECK(false, name, ": unsupported dtype");
  }
}

// One number a tensor of the plan: those given, or `missing`.
template <class Sum>
std::vector<Sum> numbers(const char* name, const std::optional<Tensor>& given, Sum missing,
                         int64_t count) {
  std::vector<Sum> found(count, missing);
  if (!given.has_value()) return found;
  STD_TORCH_CHECK(
      given->dim() == 1 && given->size(0) == count &&
          given->scalar_type() == (sizeof(Sum) == 8 ? ScalarType::Double : ScalarType::Float),
      name, ": shift and scale must be of the dtype of the sums, one for each tensor");
  const Tensor dense = torch::stable::contiguous(*given);
  const Sum* data = static_cast<const Sum*>(dense.const_data_ptr());
  std::copy(data, data + count, found.begin());
  return found;
}

// run(job, begin, end) over the elements of `out`, whose rows are as many as those of `from`.
template <class T, class Run>
void move(const char* name, const tokens::Plan& plan, const Tensor& from, int64_t row_size,
          const std::optional<Tensor>& shift, const std::optional<Tensor>& scale, const Tensor& out,
          const Run& run) {
  using Sum = typename Accumulator<T>::type;
  const std::vector<Sum> shifts = numbers<Sum>(name, shift, 0, plan.tensors);
  const std::vector<Sum> scales = numbers<Sum>(name, scale, 1, plan.tensors);
  const bool plain = !shift.has_value() && !scale.has_value();
  const int64_t stride = from.size(0) < 2 ? 0 : row_size;
  const tokens::Job<T> job{plan,
                           {static_cast<const T*>(from.const_data_ptr()), stride},
                           plain ? nullptr : shifts.data(),
                           plain ? nullptr : scales.data(),
                           static_cast<T*>(out.mutable_data_ptr()),
                           out.numel() * int64_t(sizeof(T)) >= kStreamBytes};
  torch::stable::parallel_for(0, out.numel(), kGrainBytes / int64_t(sizeof(T)),
                              [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

Tensor token_pack(const Tensor& flat, const std::optional<Tensor>& shift,
                  const std::optional<Tensor>& scale, const std::vector<int64_t>& code) {
  const tokens::Plan plan = tokens::Plan::parse(code.data(), code.size());
  STD_TORCH_CHECK(flat.dim() == 2 && flat.size(1) == plan.numel, "token_pack: flat has ",
                  flat.size(-1), " columns, the plan has ", plan.numel);
  const Tensor from = with_contiguous_rows(flat);
  Tensor out = torch::stable::new_empty(flat, {flat.size(0), plan.count / plan.size, plan.size});
  by_type(flat, "token_pack", [&](auto number) {
    using T = decltype(number);
    move<T>("token_pack", plan, from, row_stride(from), shift, scale, out, tokens::pack<T>);
  });
  return out;
}

Tensor token_unpack(const Tensor& packed, const std::optional<Tensor>& shift,
                    const std::optional<Tensor>& scale, const std::vector<int64_t>& code) {
  const tokens::Plan plan = tokens::Plan::parse(code.data(), code.size());
  STD_TORCH_CHECK(
      packed.dim() == 3 && packed.size(2) == plan.size && packed.size(1) * plan.size == plan.count,
      "token_unpack: tokens do not fit the plan");
  const Tensor from = torch::stable::contiguous(packed);
  Tensor out = torch::stable::new_empty(packed, {packed.size(0), plan.numel});
  by_type(packed, "token_unpack", [&](auto number) {
    using T = decltype(number);
    move<T>("token_unpack", plan, from, plan.count, shift, scale, out, tokens::unpack<T>);
  });
  return out;
}

Tensor token_moments(const Tensor& flat, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> offsets{0};
  for (const int64_t size : sizes) offsets.push_back(offsets.back() + size);
  STD_TORCH_CHECK(flat.dim() == 2 && flat.size(1) == offsets.back(), "token_moments: flat has ",
                  flat.size(-1), " columns, its tensors have ", offsets.back());
  const int64_t tensors = sizes.size(), items = flat.size(0) * tensors;
  const Tensor from = with_contiguous_rows(flat);
  Tensor out = torch::stable::new_empty(flat, {flat.size(0), tensors, 2}, ScalarType::Double);
  double* const to = static_cast<double*>(out.mutable_data_ptr());
  by_type(flat, "token_moments", [&](auto number) {
    using T = decltype(number);
    const T* const data = static_cast<const T*>(from.const_data_ptr());
    const int64_t bytes = offsets.back() * sizeof(T) / std::max<int64_t>(1, tensors);
    torch::stable::parallel_for(0, items, kGrainBytes / std::clamp<int64_t>(bytes, 1, kGrainBytes),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t at = begin; at < end; ++at) {
                                    const int64_t network = at / tensors, tensor = at % tensors;
                                    tokens::moments(
                                        data + network * row_stride(from) + offsets[tensor],
                                        sizes[tensor], to + 2 * at);
                                  }
                                });
  });
  return out;
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("token_pack", TORCH_BOX(&weightops::token_pack));
  m.impl("token_unpack", TORCH_BOX(&weightops::token_unpack));
  m.impl("token_moments", TORCH_BOX(&weightops::token_moments));
}
