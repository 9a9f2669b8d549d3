// Permutes whole networks: flat weights [N, P], permutations packed as index [N, S], one pass.
//
// The unit of work is a run of consecutive output elements. A Cursor stands at any element of a
// permuted network and produces the next `count` of them, so work splits evenly over threads
// whatever the tensors' sizes, and merging is the same walk over several networks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "gather.h"

namespace weightops {

// How the integers of a plan (weightops/ops/permute/plan.py) read, per tensor: every axis has a
// size and the map that reorders it, or kFixed. A map is a product of factors, each a label or
// fixed.
constexpr int64_t kFixed = -1;

struct Factor {
  int64_t label, size;
};

struct Map {
  std::vector<Factor> factors;
  int64_t size, start;  // start: where its indices lie in Maps
};

struct OuterAxis {
  int64_t size, stride, map;
};

// A tensor as rows x columns x block: the last permuted axis is the columns, the elements behind it
// are one contiguous block, the axes before it count the rows.
struct TensorPlan {
  int64_t offset, numel, columns, column_map, block;
  size_t outer_begin, outer_end;
};

struct Plan {
  std::vector<int64_t> label_sizes, label_starts;
  std::vector<Map> maps;
  std::vector<OuterAxis> outer;
  std::vector<TensorPlan> tensors;
  int64_t index_size = 0, map_size = 0, numel = 0;

  void add_label(int64_t size) {
    if (size > INT32_MAX) throw std::length_error("an axis is longer than 2^31 - 1");
    label_sizes.push_back(size);
    label_starts.push_back(index_size);
    index_size += size;
    map_size = index_size;
  }

  void add_map(std::vector<Factor> factors) {
    Map map{std::move(factors), 1, 0};
    for (const Factor& factor : map.factors) map.size *= factor.size;
    if (map.size > INT32_MAX) throw std::length_error("an axis is longer than 2^31 - 1");
    if (map.factors.size() == 1) {
      map.start = label_starts.at(map.factors[0].label);
    } else {
      map.start = map_size;
      map_size += map.size;
    }
    maps.push_back(std::move(map));
  }

  void add_tensor(const int64_t* sizes, const int64_t* axis_maps, int64_t rank) {
    int64_t last = rank - 1, block = 1;
    while (last >= 0 && axis_maps[last] == kFixed) block *= sizes[last--];
    TensorPlan tensor{numel, block, 1, kFixed, block, outer.size(), outer.size()};
    if (last >= 0) {
      tensor.columns = sizes[last];
      tensor.column_map = axis_maps[last];
      tensor.numel *= sizes[last];
      for (int64_t axis = last - 1; axis >= 0; --axis) {
        outer.push_back({sizes[axis], tensor.numel, axis_maps[axis]});
        tensor.numel *= sizes[axis];
      }
      std::reverse(outer.begin() + tensor.outer_begin, outer.end());
      tensor.outer_end = outer.size();
    }
    if (tensor.numel == 0) {
      outer.resize(tensor.outer_begin);
      return;
    }
    numel += tensor.numel;
    tensors.push_back(tensor);
  }

  // labels, then maps, then tensors, each behind its count.
  static Plan parse(const int64_t* code, size_t length) {
    Plan plan;
    const int64_t* const end = code + length;
    const auto next = [&] {
      if (code == end) throw std::length_error("the plan ends early");
      return *code++;
    };
    for (int64_t count = next(); count > 0; --count) plan.add_label(next());
    for (int64_t count = next(); count > 0; --count) {
      std::vector<Factor> factors(next());
      for (Factor& factor : factors) {
        factor.label = next();
        factor.size = next();
      }
      plan.add_map(std::move(factors));
    }
    std::vector<int64_t> sizes, axis_maps;
    for (int64_t count = next(); count > 0; --count) {
      const int64_t rank = next();
      sizes.resize(rank);
      axis_maps.resize(rank);
      for (int64_t axis = 0; axis < rank; ++axis) {
        sizes[axis] = next();
        axis_maps[axis] = next();
      }
      plan.add_tensor(sizes.data(), axis_maps.data(), rank);
    }
    return plan;
  }
};

// One network's permutations as 32-bit source indices, checked and inverted where asked.
class Maps {
 public:
  // False where an entry of `index` is out of range or stands twice.
  bool load(const Plan& plan, const int64_t* index, bool inverse) {
    indices_.resize(plan.map_size);
    bool valid = true;
    for (size_t label = 0; label < plan.label_sizes.size() && valid; ++label) {
      const int64_t start = plan.label_starts[label];
      valid = load_label(index + start, plan.label_sizes[label], inverse, indices_.data() + start);
    }
    for (const Map& map : plan.maps)
      if (valid && map.factors.size() > 1) load_product(plan, map);
    return valid;
  }

  const int32_t* at(const Plan& plan, int64_t map) const {
    return indices_.data() + plan.maps[map].start;
  }

 private:
  bool load_label(const int64_t* index, int64_t size, bool inverse, int32_t* out) {
    bool valid = true;
    for (int64_t i = 0; i < size; ++i)
      valid &= static_cast<uint64_t>(index[i]) < static_cast<uint64_t>(size);
    if (!valid) return false;
    // `size` entries in range that fill every place are a permutation.
    if (inverse) {
      std::fill(out, out + size, -1);
      for (int64_t i = 0; i < size; ++i) out[index[i]] = static_cast<int32_t>(i);
      for (int64_t i = 0; i < size; ++i) valid &= out[i] >= 0;
    } else {
      seen_.assign(size, 0);
      for (int64_t i = 0; i < size; ++i) {
        seen_[index[i]] = 1;
        out[i] = static_cast<int32_t>(index[i]);
      }
      for (int64_t i = 0; i < size; ++i) valid &= seen_[i] != 0;
    }
    return valid;
  }

  void load_product(const Plan& plan, const Map& map) {
    if (map.size == 0) return;  // a factor may be empty
    int32_t* out = indices_.data() + map.start;
    std::fill(out, out + map.size, 0);
    int64_t inner = map.size;
    for (const Factor& factor : map.factors) {
      inner /= factor.size;
      const int32_t* label =
          factor.label == kFixed ? nullptr : indices_.data() + plan.label_starts[factor.label];
      for (int64_t i = 0; i < map.size; ++i) {
        const int64_t place = i / inner % factor.size;
        out[i] += static_cast<int32_t>((label ? label[place] : place) * inner);
      }
    }
  }

  std::vector<int32_t> indices_;
  std::vector<uint8_t> seen_;
};

// A buffer that stays with the thread: a fresh one would cost page faults with every call.
inline char* thread_scratch() {
  alignas(64) static thread_local char scratch[kScratchBytes];
  return scratch;
}

class Cursor {
  static constexpr int64_t kStageBytes = 8192;

 public:
  // `stream`: the output is too large to find in the cache later, and may go past it.
  Cursor(const Plan& plan, int64_t element_size, bool stream)
      : plan_(plan), size_(element_size), stream_(stream) {}

  // Stands before output element `position` of a network.
  void seek(int64_t position) {
    const auto behind =
        std::upper_bound(plan_.tensors.begin(), plan_.tensors.end(), position,
                         [](int64_t at, const TensorPlan& tensor) { return at < tensor.offset; });
    tensor_ = behind - plan_.tensors.begin() - 1;
    const TensorPlan& tensor = plan_.tensors[tensor_];
    const int64_t rest = position - tensor.offset;
    within_ = rest % tensor.block;
    column_ = rest / tensor.block % tensor.columns;
    row_ = rest / (tensor.block * tensor.columns);
  }

  // How many of the next `limit` output elements to take at once: whole groups of rows, which
  // gather fastest, where they fit.
  int64_t good_run(int64_t limit) const {
    const TensorPlan& tensor = plan_.tensors[tensor_];
    const int64_t row_size = tensor.columns * tensor.block, group = kMaxRows * row_size;
    const int64_t in_row = column_ * tensor.block + within_;
    if (in_row > 0) return std::min(limit, row_size - in_row);
    return limit >= group ? std::min(limit / group * group, tensor.numel - row_ * row_size) : limit;
  }

  // Hands out the next `count` output elements, read from the network at `source` through `maps`:
  // step(destination, job) has to gather each job.
  template <class Step>
  void fill(const Maps& maps, const char* source, char* destination, int64_t count,
            const Step& step) {
    while (count > 0) {
      const TensorPlan& tensor = plan_.tensors[tensor_];
      const int64_t rest =
          tensor.numel - (row_ * tensor.columns + column_) * tensor.block - within_;
      const int64_t run = std::min(rest, count);
      const char* from = source + tensor.offset * size_;
      // Single elements are streamed by the gather itself where their rows lie on lines.
      if (stream_ && tensor.block > 1)
        stage_tensor(tensor, maps, from, destination, run, step);
      else
        fill_tensor(tensor, maps, from, destination, run, step);
      destination += run * size_;
      count -= run;
      if (run == rest) {
        row_ = column_ = within_ = 0;
        ++tensor_;
      }
    }
  }

 private:
  // Runs are gathered in the first-level cache and leave in whole lines.
  template <class Step>
  void stage_tensor(const TensorPlan& tensor, const Maps& maps, const char* source,
                    char* destination, int64_t count, const Step& step) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(destination) % 64;
    if (misaligned % size_ != 0) return fill_tensor(tensor, maps, source, destination, count, step);
    const int64_t head = std::min(count, (64 - misaligned) % 64 / size_), line = 64 / size_;
    fill_tensor(tensor, maps, source, destination, head, step);
    destination += head * size_;
    for (count -= head; count >= line;) {
      const int64_t run = std::min(kStageBytes / size_, count / line * line);
      fill_tensor(tensor, maps, source, scratch_, run, step);
      stream_lines(destination, scratch_, run * size_);
      destination += run * size_;
      count -= run;
    }
    fill_tensor(tensor, maps, source, destination, count, step);
  }

  template <class Step>
  void fill_tensor(const TensorPlan& tensor, const Maps& maps, const char* source,
                   char* destination, int64_t count, const Step& step) {
    const int64_t block = tensor.block, columns = tensor.columns, block_bytes = block * size_;
    const int32_t* index = tensor.column_map == kFixed ? &zero_ : maps.at(plan_, tensor.column_map);
    // One permuted axis before the columns is the common case, and rows may be short.
    const OuterAxis* only =
        tensor.outer_end - tensor.outer_begin == 1 ? &plan_.outer[tensor.outer_begin] : nullptr;
    const int32_t* row_index = only && only->map != kFixed ? maps.at(plan_, only->map) : nullptr;
    const int64_t row_bytes = only ? only->stride * size_ : 0;
    const int64_t last_row = tensor.numel / (columns * block) - 1;
    const auto row = [&](int64_t r) {
      if (row_index != nullptr) return source + row_index[r] * row_bytes;
      return source + row_offset(tensor, maps, r) * size_;
    };
    while (count > 0) {
      int64_t produced;
      if (within_ > 0 || count < block) {
        produced = std::min(block - within_, count);
        const char* from = row(row_) + index[column_] * block_bytes + within_ * size_;
        step(destination,
             RowGather{{from}, {from}, 1, &zero_, 1, produced * size_, 1, false, scratch_});
        within_ += produced;
        if (within_ == block) {
          within_ = 0;
          ++column_;
        }
      } else {
        const int64_t run = std::min(columns - column_, count / block);
        const int rows = run < columns ? 1 : std::min<int64_t>(kMaxRows, count / (columns * block));
        RowGather job{{}, {}, rows, index + column_, run, block_bytes, columns, stream_, scratch_};
        for (int r = 0; r < rows; ++r) {
          job.rows[r] = row(row_ + r);
          job.ahead[r] = row(std::min(row_ + rows + r, last_row)) + column_ * block_bytes;
        }
        step(destination, job);
        column_ += run;
        row_ += rows - 1;
        produced = rows * run * block;
      }
      destination += produced * size_;
      count -= produced;
      if (column_ == columns) {
        column_ = 0;
        ++row_;
      }
    }
  }

  int64_t row_offset(const TensorPlan& tensor, const Maps& maps, int64_t row) const {
    int64_t offset = 0;
    for (size_t axis = tensor.outer_end; axis-- > tensor.outer_begin;) {
      const OuterAxis& outer = plan_.outer[axis];
      const bool slowest = axis == tensor.outer_begin;
      const int64_t place = slowest ? row : row % outer.size;
      if (!slowest) row /= outer.size;
      offset += (outer.map == kFixed ? place : maps.at(plan_, outer.map)[place]) * outer.stride;
    }
    return offset;
  }

  static constexpr int32_t zero_ = 0;
  const Plan& plan_;
  int64_t size_;
  bool stream_;
  char* scratch_ = thread_scratch();
  int64_t row_ = 0, column_ = 0, within_ = 0;
  size_t tensor_ = 0;
};

// Rows of a matrix of elements at `data`, `stride` elements apart; stride 0 repeats one row.
template <class Byte>
struct Rows {
  Byte* data;
  int64_t stride;
};

// For networks without elements, whose permutations nothing else would look at.
inline bool all_permutations(const Plan& plan, Rows<const int64_t> index, int64_t rows) {
  Maps maps;
  for (int64_t row = 0; row < rows; ++row)
    if (!maps.load(plan, index.data + row * index.stride, false)) return false;
  return true;
}

// Output elements [begin, end) of N networks laid end to end. False on an index that is no
// permutation; the output is then undefined.
inline bool permute_range(const Plan& plan, Rows<const char> flat, Rows<const int64_t> index,
                          bool inverse, Rows<char> out, int64_t element_size, bool stream,
                          int64_t begin, int64_t end) {
  Maps maps;
  Cursor cursor(plan, element_size, stream);
  int64_t loaded = -1;
  while (begin < end) {
    const int64_t network = begin / plan.numel, position = begin % plan.numel;
    const int64_t count = std::min(plan.numel - position, end - begin);
    if (loaded < 0 || index.stride != 0) {
      if (!maps.load(plan, index.data + network * index.stride, inverse)) return false;
      loaded = network;
    }
    const char* source = flat.data + network * flat.stride * element_size;
    cursor.seek(position);
    cursor.fill(maps, source, out.data + (network * out.stride + position) * element_size, count,
                gather);
    begin += count;
  }
  if (stream) stream_fence();
  return true;
}

}  // namespace weightops
