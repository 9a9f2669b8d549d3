// permute, permute_axes and merge for the CUDA dispatch key.
//
// A warp takes a piece of one output row (at most kPiece elements), so that the row's source is
// found once and the elements of the piece leave in whole lines.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../core/permute.h"
#include "common.cuh"

namespace weightops {
namespace {

constexpr int64_t kPiece = 1024;
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kOutputs = 4;  // merged networks that one pass accumulates in registers

struct DeviceAxis {
  int64_t size, stride, start;  // start: of its indices in a network's maps, or kFixed
};

struct DeviceTensor {
  int64_t offset, columns, column_start, block, pieces_per_row, first_piece;
  int64_t outer_begin, outer_end;
};

struct DevicePlan {
  const DeviceTensor* tensors;
  const DeviceAxis* outer;
  const int64_t* labels;  // per label: start, size
  const int64_t*
      products;  // per product map: start, size, number of factors, then (label start, size)
  int64_t num_tensors, num_labels, num_products, map_size, pieces, numel;
};

// Tables live as long as the process: a captured CUDA graph may hold their addresses.
struct UploadedPlan {
  Tensor storage;
  DevicePlan plan;
};

template <class T>
int64_t append(std::vector<int64_t>& words, const std::vector<T>& values) {
  const int64_t at = words.size();
  const auto* data = reinterpret_cast<const int64_t*>(values.data());
  words.insert(words.end(), data, data + values.size() * (sizeof(T) / sizeof(int64_t)));
  return at;
}

UploadedPlan upload(const Plan& plan, int32_t device) {
  const auto start = [&](int64_t map) { return map == kFixed ? kFixed : plan.maps[map].start; };
  std::vector<DeviceTensor> tensors;
  std::vector<DeviceAxis> outer;
  std::vector<int64_t> labels, products;
  int64_t pieces = 0, num_products = 0;
  for (const TensorPlan& t : plan.tensors) {
    const int64_t row = t.columns * t.block, per_row = (row + kPiece - 1) / kPiece;
    tensors.push_back({t.offset, t.columns, start(t.column_map), t.block, per_row, pieces,
                       static_cast<int64_t>(t.outer_begin), static_cast<int64_t>(t.outer_end)});
    pieces += t.numel / row * per_row;
  }
  for (const OuterAxis& axis : plan.outer)
    outer.push_back({axis.size, axis.stride, start(axis.map)});
  for (size_t i = 0; i < plan.label_sizes.size(); ++i) {
    labels.push_back(plan.label_starts[i]);
    labels.push_back(plan.label_sizes[i]);
  }
  for (const Map& map : plan.maps) {
    if (map.factors.size() < 2) continue;
    ++num_products;
    products.insert(products.end(), {map.start, map.size, int64_t(map.factors.size())});
    for (const Factor& factor : map.factors) {
      products.push_back(factor.label == kFixed ? kFixed : plan.label_starts[factor.label]);
      products.push_back(factor.size);
    }
  }
  std::vector<int64_t> words;
  const int64_t at_tensors = append(words, tensors), at_outer = append(words, outer),
                at_labels = append(words, labels), at_products = append(words, products);
  words.push_back(0);  // never empty
  const int64_t count = words.size();
  Tensor storage =
      torch::stable::empty({count}, ScalarType::Long, std::nullopt,
                           torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
  auto* base = static_cast<int64_t*>(storage.mutable_data_ptr());
  WEIGHTOPS_CUDA_CHECK(cudaMemcpy(base, words.data(), count * 8, cudaMemcpyHostToDevice));
  return {storage,
          {reinterpret_cast<const DeviceTensor*>(base + at_tensors),
           reinterpret_cast<const DeviceAxis*>(base + at_outer), base + at_labels,
           base + at_products, int64_t(tensors.size()), int64_t(plan.label_sizes.size()),
           num_products, plan.map_size, pieces, plan.numel}};
}

DevicePlan device_plan(const std::vector<int64_t>& code, int32_t device) {
  static std::mutex mutex;
  static auto& plans = *new std::map<std::pair<int32_t, std::vector<int64_t>>, UploadedPlan>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find({device, code});
  if (found == plans.end())
    found = plans
                .emplace(std::make_pair(device, code),
                         upload(Plan::parse(code.data(), code.size()), device))
                .first;
  return found->second.plan;
}

// One block a network: its permutations as 32-bit source indices, inverted where asked.
__global__ void load_maps(DevicePlan plan, const int64_t* __restrict__ index, int64_t index_stride,
                          bool inverse, int32_t* __restrict__ maps) {
  const int64_t network = blockIdx.x;
  index += network * index_stride;
  int32_t* out = maps + network * plan.map_size;
  for (int64_t label = 0; label < plan.num_labels; ++label) {
    const int64_t start = plan.labels[2 * label], size = plan.labels[2 * label + 1];
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      const int64_t source = index[start + i];
      // The front door has checked the values; this keeps a stray one from writing elsewhere.
      if (source < 0 || source >= size) __trap();
      if (inverse)
        out[start + source] = static_cast<int32_t>(i);
      else
        out[start + i] = static_cast<int32_t>(source);
    }
  }
  __syncthreads();
  const int64_t* product = plan.products;
  for (int64_t p = 0; p < plan.num_products; ++p) {
    const int64_t start = product[0], size = product[1], num_factors = product[2];
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      int64_t inner = size, source = 0;
      for (int64_t f = 0; f < num_factors; ++f) {
        const int64_t label_start = product[3 + 2 * f], factor = product[4 + 2 * f];
        inner /= factor;
        const int64_t place = i / inner % factor;
        source += (label_start == kFixed ? place : out[label_start + place]) * inner;
      }
      out[start + i] = static_cast<int32_t>(source);
    }
    product += 3 + 2 * num_factors;
  }
}

// Where one piece of an output row lies, and what it is made of.
struct Piece {
  const DeviceTensor* tensor;
  int64_t row, begin, end;  // elements of the row
};

__device__ Piece find_piece(const DevicePlan& plan, int64_t piece) {
  int64_t low = 0, high = plan.num_tensors - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (plan.tensors[middle].first_piece <= piece)
      low = middle;
    else
      high = middle - 1;
  }
  const DeviceTensor& tensor = plan.tensors[low];
  const int64_t rest = piece - tensor.first_piece;
  const int64_t begin = rest % tensor.pieces_per_row * kPiece;
  const int64_t row_size = tensor.columns * tensor.block;
  return {&tensor, rest / tensor.pieces_per_row, begin,
          begin + kPiece < row_size ? begin + kPiece : row_size};
}

__device__ int64_t row_offset(const DevicePlan& plan, const DeviceTensor& tensor, int64_t row,
                              const int32_t* maps) {
  int64_t offset = tensor.offset;
  for (int64_t axis = tensor.outer_end; axis-- > tensor.outer_begin;) {
    const DeviceAxis& outer = plan.outer[axis];
    const bool slowest = axis == tensor.outer_begin;
    const int64_t place = slowest ? row : row % outer.size;
    if (!slowest) row /= outer.size;
    offset += (outer.start == kFixed || maps == nullptr ? place : maps[outer.start + place]) *
              outer.stride;
  }
  return offset;
}

__device__ int64_t source_in_row(const DeviceTensor& tensor, int64_t element, const int32_t* maps) {
  if (tensor.column_start == kFixed || maps == nullptr) return element;
  const int32_t* columns = maps + tensor.column_start;
  if (tensor.block == 1) return columns[element];
  const int64_t column = element / tensor.block;
  return element + (columns[column] - column) * tensor.block;
}

template <typename T>
__global__ void permute_kernel(DevicePlan plan, const T* __restrict__ flat, int64_t flat_stride,
                               const int32_t* __restrict__ maps, int64_t map_stride,
                               T* __restrict__ out, int64_t out_stride, int64_t total) {
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int lane = threadIdx.x % kWarp;
  for (int64_t work = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; work < total;
       work += warps) {
    const int64_t network = work / plan.pieces;
    const Piece piece = find_piece(plan, work % plan.pieces);
    const DeviceTensor& tensor = *piece.tensor;
    const int32_t* own = maps + network * map_stride;
    const T* source = flat + network * flat_stride + row_offset(plan, tensor, piece.row, own);
    T* to = out + network * out_stride + tensor.offset + piece.row * tensor.columns * tensor.block;
#pragma unroll 4
    for (int64_t e = piece.begin + lane; e < piece.end; e += kWarp)
      to[e] = source[source_in_row(tensor, e, own)];
  }
}

template <typename T>
__device__ float widen(T value) {
  return static_cast<float>(value);
}
__device__ double widen(double value) { return value; }

template <typename T, typename Sum>
__global__ void __launch_bounds__(kThreads, 3)
    merge_kernel(DevicePlan plan, const T* __restrict__ flat, int64_t flat_stride, int64_t networks,
                 const Sum* __restrict__ weights, int64_t outputs, const int32_t* __restrict__ maps,
                 int64_t map_stride, T* __restrict__ out, int64_t out_stride) {
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int lane = threadIdx.x % kWarp;
  const int64_t first = int64_t{blockIdx.y} * kOutputs;
  for (int64_t work = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
       work < plan.pieces; work += warps) {
    const Piece piece = find_piece(plan, work);
    const DeviceTensor& tensor = *piece.tensor;
    const auto row_of = [&](int64_t m) {
      const int32_t* own = maps == nullptr ? nullptr : maps + m * map_stride;
      return m * flat_stride + row_offset(plan, tensor, piece.row, own);
    };
    // Lane m finds the row of network m once for the whole piece.
    const int64_t own_row = lane < networks ? row_of(lane) : 0;
    for (int64_t base = piece.begin; base < piece.end; base += kWarp) {
      const int64_t e = base + lane;
      const bool inside = e < piece.end;
      Sum sums[kOutputs] = {};
      for (int64_t m = 0; m < networks; ++m) {
        const int64_t row =
            m < kWarp ? __shfl_sync(0xffffffffu, own_row, static_cast<int>(m)) : row_of(m);
        if (!inside) continue;
        const int32_t* own = maps == nullptr ? nullptr : maps + m * map_stride;
        const Sum value = widen(flat[row + source_in_row(tensor, e, own)]);
#pragma unroll
        for (int l = 0; l < kOutputs; ++l)
          if (first + l < outputs) sums[l] += weights[(first + l) * networks + m] * value;
      }
      if (!inside) continue;
      const int64_t to = tensor.offset + piece.row * tensor.columns * tensor.block + e;
#pragma unroll
      for (int l = 0; l < kOutputs; ++l)
        if (first + l < outputs) out[(first + l) * out_stride + to] = static_cast<T>(sums[l]);
    }
  }
}

unsigned blocks_for(int64_t work) {
  const int64_t per_block = kThreads / kWarp;
  return static_cast<unsigned>(std::min<int64_t>((work + per_block - 1) / per_block, 1 << 16));
}

Tensor contiguous_rows(const Tensor& tensor) {
  const bool rows = tensor.dim() == 2 && (tensor.size(1) < 2 || tensor.stride(1) == 1);
  return rows ? tensor : torch::stable::contiguous(tensor);
}

int64_t stride_of(const Tensor& tensor) { return tensor.size(0) < 2 ? 0 : tensor.stride(0); }

Tensor load_all_maps(const DevicePlan& plan, const Tensor& index, bool inverse,
                     cudaStream_t stream) {
  const int64_t rows = index.size(0), map_size = std::max<int64_t>(plan.map_size, 1);
  Tensor maps = torch::stable::empty(
      {rows, map_size}, ScalarType::Int, std::nullopt,
      torch::stable::Device(torch::headeronly::DeviceType::CUDA, index.get_device_index()));
  const Tensor dense = contiguous_rows(index);
  if (rows > 0 && plan.map_size > 0) {
    load_maps<<<static_cast<unsigned>(rows), 1024, 0, stream>>>(
        plan, dense.const_data_ptr<int64_t>(), stride_of(dense), inverse,
        static_cast<int32_t*>(maps.mutable_data_ptr()));
    WEIGHTOPS_CUDA_CHECK(cudaGetLastError());
  }
  return maps;
}

template <typename T>
void launch_permute(const DevicePlan& plan, const Tensor& flat, const Tensor& maps,
                    const Tensor& out, cudaStream_t stream) {
  const int64_t total = flat.size(0) * plan.pieces;
  permute_kernel<T><<<blocks_for(total), kThreads, 0, stream>>>(
      plan, static_cast<const T*>(flat.const_data_ptr()), stride_of(flat),
      static_cast<const int32_t*>(maps.const_data_ptr()), stride_of(maps),
      static_cast<T*>(out.mutable_data_ptr()), stride_of(out), total);
  WEIGHTOPS_CUDA_CHECK(cudaGetLastError());
}

// flat and out have contiguous rows.
void permute_rows(const Tensor& flat, const Tensor& index, const std::vector<int64_t>& code,
                  bool inverse, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(flat.get_device_index());
  if (flat.numel() == 0) return;
  const cudaStream_t stream = current_stream(flat);
  const DevicePlan plan = device_plan(code, flat.get_device_index());
  STD_TORCH_CHECK(flat.size(1) == plan.numel, "permute: flat and the plan do not fit");
  const Tensor maps = load_all_maps(plan, index, inverse, stream);
  switch (flat.element_size()) {
    case 1: return launch_permute<uint8_t>(plan, flat, maps, out, stream);
    case 2: return launch_permute<uint16_t>(plan, flat, maps, out, stream);
    case 4: return launch_permute<uint32_t>(plan, flat, maps, out, stream);
    case 8: return launch_permute<uint64_t>(plan, flat, maps, out, stream);
    case 16: return launch_permute<uint4>(plan, flat, maps, out, stream);
    default: STD_TORCH_CHECK(false, "permute: unsupported element size");
  }
}

void permute_into(const Tensor& flat, const Tensor& index, const std::vector<int64_t>& code,
                  bool inverse, const Tensor& out) {
  if (out.size(1) < 2 || out.stride(1) == 1)
    return permute_rows(contiguous_rows(flat), index, code, inverse, out);
  Tensor dense = torch::stable::new_empty(flat, {flat.size(0), flat.size(1)}), target = out;
  permute_rows(contiguous_rows(flat), index, code, inverse, dense);
  torch::stable::copy_(target, dense);
}

Tensor permute(const Tensor& flat, const Tensor& index, const std::vector<int64_t>& code,
               bool inverse) {
  Tensor out = torch::stable::new_empty(flat, {flat.size(0), flat.size(1)});
  permute_rows(contiguous_rows(flat), index, code, inverse, out);
  return out;
}

// The plan of one tensor [B, ...], in the integers that Plan::parse reads.
std::vector<int64_t> code_of_axes(const Tensor& x, const std::vector<int64_t>& axes) {
  const int64_t rank = x.dim() - 1, permuted = axes.size();
  std::vector<int64_t> code{permuted}, maps(rank, kFixed);
  for (const int64_t axis : axes) code.push_back(x.size(axis));
  code.push_back(permuted);
  for (int64_t i = 0; i < permuted; ++i) {
    code.insert(code.end(), {1, i, x.size(axes[i])});
    maps[axes[i] - 1] = i;
  }
  code.insert(code.end(), {1, rank});
  for (int64_t axis = 0; axis < rank; ++axis)
    code.insert(code.end(), {x.size(axis + 1), maps[axis]});
  return code;
}

void permute_axes_into(const Tensor& x, const Tensor& index, const std::vector<int64_t>& axes,
                       bool inverse, const Tensor& out) {
  if (x.numel() == 0) return;
  const Tensor dense = torch::stable::contiguous(x);
  Tensor target = out, written = out.is_contiguous() ? out : torch::stable::new_empty(x, x.sizes());
  const auto flat = [&](const Tensor& t) {
    return torch::stable::view(t, {x.size(0), x.numel() / x.size(0)});
  };
  permute_rows(flat(dense), index, code_of_axes(x, axes), inverse, flat(written));
  if (!out.is_contiguous()) torch::stable::copy_(target, written);
}

Tensor permute_axes(const Tensor& x, const Tensor& index, const std::vector<int64_t>& axes,
                    bool inverse) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  permute_axes_into(x, index, axes, inverse, out);
  return out;
}

template <typename T, typename Sum>
void launch_merge(const DevicePlan& plan, const Tensor& flat, const Tensor& weights,
                  const Tensor* maps, const Tensor& out, cudaStream_t stream) {
  const unsigned groups = static_cast<unsigned>((weights.size(0) + kOutputs - 1) / kOutputs);
  merge_kernel<T, Sum><<<dim3(blocks_for(plan.pieces), groups), kThreads, 0, stream>>>(
      plan, static_cast<const T*>(flat.const_data_ptr()), stride_of(flat), flat.size(0),
      static_cast<const Sum*>(weights.const_data_ptr()), weights.size(0),
      maps ? static_cast<const int32_t*>(maps->const_data_ptr()) : nullptr,
      maps ? stride_of(*maps) : 0, static_cast<T*>(out.mutable_data_ptr()), stride_of(out));
  WEIGHTOPS_CUDA_CHECK(cudaGetLastError());
}

Tensor merge(const Tensor& flat, const Tensor& weights, const std::optional<Tensor>& index,
             const std::vector<int64_t>& code) {
  const torch::stable::accelerator::DeviceGuard guard(flat.get_device_index());
  Tensor out = torch::stable::new_empty(flat, {weights.size(0), flat.size(1)});
  if (out.numel() == 0) return out;
  const cudaStream_t stream = current_stream(flat);
  const DevicePlan plan = device_plan(code, flat.get_device_index());
  const Tensor networks = contiguous_rows(flat), dense = torch::stable::contiguous(weights);
  Tensor maps;
  if (index.has_value()) maps = load_all_maps(plan, *index, false, stream);
  const Tensor* own = index.has_value() ? &maps : nullptr;
  switch (flat.scalar_type()) {
    case ScalarType::Float:
      launch_merge<float, float>(plan, networks, dense, own, out, stream);
      break;
    case ScalarType::Double:
      launch_merge<double, double>(plan, networks, dense, own, out, stream);
      break;
    case ScalarType::Half:
      launch_merge<__half, float>(plan, networks, dense, own, out, stream);
      break;
    case ScalarType::BFloat16:
      launch_merge<__nv_bfloat16, float>(plan, networks, dense, own, out, stream);
      break;
    default: STD_TORCH_CHECK(false, "merge: flat has an unsupported dtype");
  }
  return out;
}

void merge_into(const Tensor& flat, const Tensor& weights, const std::optional<Tensor>& index,
                const std::vector<int64_t>& code, const Tensor& out) {
  Tensor target = out;
  torch::stable::copy_(target, merge(flat, weights, index, code));
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CUDA, m) {
  m.impl("permute", TORCH_BOX(&weightops::permute));
  m.impl("permute_into", TORCH_BOX(&weightops::permute_into));
  m.impl("permute_axes", TORCH_BOX(&weightops::permute_axes));
  m.impl("permute_axes_into", TORCH_BOX(&weightops::permute_axes_into));
  m.impl("merge", TORCH_BOX(&weightops::merge));
  m.impl("merge_into", TORCH_BOX(&weightops::merge_into));
}
