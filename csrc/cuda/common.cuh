// What the CUDA files share: the current stream, and launch checks with our own macro, so that the
// library needs a single shim that a CPU build of torch lacks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#define WEIGHTOPS_CUDA_CHECK(call)                                                         \
  do {                                                                                     \
    const cudaError_t error = (call);                                                      \
    STD_TORCH_CHECK(error == cudaSuccess, "weightops: CUDA: ", cudaGetErrorString(error)); \
  } while (false)

namespace weightops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace weightops
