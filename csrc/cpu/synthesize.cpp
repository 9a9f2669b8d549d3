// synthesize and synthesize_update for the CPU dispatch key.
#include "../core/synthesize.h"

#include "common.h"

namespace weightops {
namespace {

template <class T>
using SumOf = typename Accumulator<T>::type;

// f(T) for the element type of a tensor.
template <class F>
void by_type(const Tensor& tensor, const char* name, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(BFloat16());
    default: STD_TORCH_CHECK(false, name, ": bases must be floating point");
  }
}

void check(const char* name, const Tensor& coeffs, const Tensor& bases) {
  STD_TORCH_CHECK(coeffs.dim() == 2 && bases.dim() == 2 && coeffs.size(1) == bases.size(0), name,
                  ": coeffs do not fit the bases");
  const ScalarType type = bases.scalar_type();
  STD_TORCH_CHECK(coeffs.scalar_type() == (type == ScalarType::Double ? type : ScalarType::Float),
                  name, ": coeffs must be of the dtype of the sums");
}

void synthesize_into(const Tensor& coeffs, const Tensor& bases, const Tensor& out) {
  check("synthesize", coeffs, bases);
  Tensor target = out;
  if (bases.size(0) == 0) {
    torch::stable::zero_(target);
    return;
  }
  const bool rows = out.size(1) < 2 || out.stride(1) == 1;
  Tensor written = rows ? out : torch::stable::new_empty(bases, {out.size(0), out.size(1)});
  const Tensor factors = torch::stable::contiguous(coeffs), from = with_contiguous_rows(bases);
  by_type(bases, "synthesize", [&](auto number) {
    using T = decltype(number);
    const manifold::Synthesis<T, SumOf<T>> job{
        coeffs.size(0),
        bases.size(0),
        static_cast<const SumOf<T>*>(factors.const_data_ptr()),
        static_cast<const T*>(from.const_data_ptr()),
        row_stride(from),
        static_cast<T*>(written.mutable_data_ptr()),
        row_stride(written),
        written.numel() * int64_t(sizeof(T)) >= kStreamBytes};
    const int64_t cost = sizeof(T) * (job.points + job.bases);
    torch::stable::parallel_for(
        0, bases.size(1), std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, cost)),
        [&](int64_t begin, int64_t end) { manifold::synthesize(job, begin, end); });
  });
  if (!rows) torch::stable::copy_(target, written);
}

Tensor synthesize(const Tensor& coeffs, const Tensor& bases) {
  Tensor out = torch::stable::new_empty(bases, {coeffs.size(0), bases.size(1)});
  synthesize_into(coeffs, bases, out);
  return out;
}

Tensor synthesize_update(const Tensor& bases, const Tensor& grad, const Tensor&,
                         const Tensor& step) {
  check("synthesize_update", step, bases);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(1) == bases.size(1) &&
                      grad.size(0) == step.size(0) && grad.scalar_type() == bases.scalar_type(),
                  "synthesize_update: grad does not fit the bases");
  const bool rows = bases.size(1) < 2 || bases.stride(1) == 1;
  Tensor target = bases, held = rows ? bases : torch::stable::contiguous(bases);
  const Tensor factors = torch::stable::contiguous(step), from = with_contiguous_rows(grad);
  Tensor dots = torch::stable::new_empty(factors, {step.size(0), step.size(1)});
  by_type(bases, "synthesize_update", [&](auto number) {
    using T = decltype(number);
    using Sum = SumOf<T>;
    const manifold::Descent<T, Sum> job{step.size(0),
                                        bases.size(0),
                                        static_cast<const T*>(from.const_data_ptr()),
                                        row_stride(from),
                                        static_cast<T*>(held.mutable_data_ptr()),
                                        row_stride(held),
                                        static_cast<const Sum*>(factors.const_data_ptr())};
    // A fixed number of parts: sums do not depend on the number of threads.
    const int64_t count = bases.size(1), size = dots.numel();
    const int64_t parts = std::clamp<int64_t>(count * int64_t(sizeof(T)) / kGrainBytes, 1, 64);
    std::vector<Sum> sums(parts * size);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        manifold::descend(job, count * part / parts, count * (part + 1) / parts,
                          sums.data() + part * size);
    });
    Sum* to = static_cast<Sum*>(dots.mutable_data_ptr());
    std::fill_n(to, size, Sum(0));
    for (int64_t at = 0; at < parts * size; ++at) to[at % size] += sums[at];
  });
  if (!rows) torch::stable::copy_(target, held);
  return dots;
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("synthesize", TORCH_BOX(&weightops::synthesize));
  m.impl("synthesize_into", TORCH_BOX(&weightops::synthesize_into));
  m.impl("synthesize_update", TORCH_BOX(&weightops::synthesize_update));
}
