// fourier_signal for the CPU dispatch key.
#include "../core/fourier.h"

#include "common.h"

namespace weightops {
namespace {

Tensor fourier_signal(const Tensor& embedding, const Tensor& matrix) {
  STD_TORCH_CHECK(embedding.dim() == 3 && matrix.dim() == 3 && matrix.size(0) == 2 &&
                      matrix.size(2) == embedding.size(1),
                  "fourier_signal: embedding must be [M, p, d] and matrix [2, K, p]");
  STD_TORCH_CHECK(matrix.scalar_type() == embedding.scalar_type(), "fourier_signal: dtypes differ");
  const int64_t networks = embedding.size(0);
  const fourier::Shape shape{matrix.size(1), embedding.size(1), embedding.size(2)};
  const Tensor from = torch::stable::contiguous(embedding), by = torch::stable::contiguous(matrix);
  Tensor out = torch::stable::new_empty(embedding, {networks, shape.frequencies});
  const auto run = [&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    using Number = typename Arithmetic::Number;
    const fourier::Signal<Arithmetic> signal(shape, by.const_data_ptr<Number>());
    const auto* const data = from.const_data_ptr<Number>();
    auto* const to = out.mutable_data_ptr<Number>();
    const int64_t tiles = signal.tiles(), size = shape.tokens * shape.size;
    // A tile takes as long as about so many bytes that are only moved.
    const int64_t cost = std::max<int64_t>(1, size * int64_t(sizeof(Number)));
    torch::stable::parallel_for(0, networks * tiles, std::max<int64_t>(1, kGrainBytes / cost),
                                [&](int64_t begin, int64_t end) {
                                  typename fourier::Signal<Arithmetic>::Workspace workspace;
                                  while (begin < end) {
                                    const int64_t network = begin / tiles, first = begin % tiles;
                                    const int64_t last = std::min(tiles, first + end - begin);
                                    signal(data + network * size, first, last,
                                           to + network * shape.frequencies, workspace);
                                    begin += last - first;
                                  }
                                });
  };
  switch (embedding.scalar_type()) {
    case ScalarType::Float: with_arithmetic<float>(run); break;
    case ScalarType::Double: with_arithmetic<double>(run); break;
    default: STD_TORCH_CHECK(false, "fourier_signal: unsupported dtype");
  }
  return out;
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("fourier_signal", TORCH_BOX(&weightops::fourier_signal));
}
