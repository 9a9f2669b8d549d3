// What the CPU files share: checks on boxed arguments, and row views.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "../core/permute.h"

namespace weightops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix whose rows are contiguous; rows may overlap (an expanded tensor) or stand apart.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const bool rows = tensor.dim() == 2 && (tensor.size(1) < 2 || tensor.stride(1) == 1);
  return rows ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t row_stride(const Tensor& tensor) {
  return tensor.size(0) < 2 ? 0 : tensor.stride(0);
}

inline Rows<const char> byte_rows(const Tensor& tensor) {
  return {static_cast<const char*>(tensor.const_data_ptr()), row_stride(tensor)};
}

inline Rows<const int64_t> index_rows(const Tensor& index) {
  return {index.const_data_ptr<int64_t>(), row_stride(index)};
}

// Fewer elements than this are not worth waking another thread for.
constexpr int64_t kGrainBytes = 1 << 16;
// Larger outputs leave the second-level cache anyway, so they may as well not enter it.
constexpr int64_t kStreamBytes = 1 << 22;

// Runs body(begin, end) -> bool over a range of elements and reports whether all agreed: an
// exception thrown inside parallel_for would lose its text.
template <class Body>
bool all_of_range(int64_t count, int64_t element_size, Body&& body) {
  std::atomic<bool> valid{true};
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrainBytes / element_size),
                              [&](int64_t begin, int64_t end) {
                                if (!body(begin, end)) valid = false;
                              });
  return valid;
}

}  // namespace weightops
