// The sums of every tensor of a network over its indices: what the readers of a layer need that are
// not whole tensors.
#pragma once

#include <vector>

#include "equivariant_tile.h"

namespace weightops::equivariant {

// The features of one side of a layer: of one network, and what was summed from them.
template <class T>
struct Features {
  const Side* side;
  const T* values;
  int64_t channels;
  T* sums;  // one row of channels a slot
};

// A share of the sums of a whole tensor over one dimension: of positions [begin, end) of another.
struct PoolPart {
  int64_t node, child, begin, end;
};

template <class T, int Bytes>
struct Pool {
  using Arithmetic = Tile<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  static constexpr int lanes = Arithmetic::lanes;
  // Read once from memory, then a few times from the second-level cache.
  static constexpr int64_t kChunkBytes = 65536;

  struct View {
    const T* data;
    Sizes strides;
  };

  static WEIGHTOPS_INLINE View view(const Features<T>& from, int64_t number) {
    const Node& node = from.side->nodes[number];
    View view{node.parent < 0 && !node.copied
                  ? from.values + from.side->tensors[node.tensor].offset * from.channels
                  : from.sums + node.slot * from.channels,
              node.strides};
    for (int64_t& stride : view.strides) stride *= from.channels;
    return view;
  }

  // Sums the node of `from` over dimension `dropped`, rows [begin, end) of its first dimension
  // only.
  static WEIGHTOPS_INLINE void sum_node(const View& from, const Sizes& sizes, int64_t dropped,
                                        int64_t begin, int64_t end, int64_t channels, T* to,
                                        bool accumulate, T scale) {
    const int64_t rank = sizes.size();
    // Trailing dimensions that lie side by side are one run of elements.
    int64_t inner = rank, length = channels;
    while (inner - 1 > dropped && from.strides[inner - 1] == length) length *= sizes[--inner];
    const int64_t count = dropped == 0 ? end - begin : sizes[dropped],
                  stride = from.strides[dropped];
    const T* source = from.data + begin * from.strides[0];
    // An odometer over the dimensions in front of the run, but for the dropped one.
    int64_t at[64] = {};
    int64_t left = 1, sums_a_row = 1;
    for (int64_t dim = 0; dim < inner; ++dim)
      if (dim != dropped) {
        left *= dim == 0 ? end - begin : sizes[dim];
        if (dim > 0) sums_a_row *= sizes[dim];
      }
    if (dropped > 0) to += begin * sums_a_row * length;
    // Many short sums side by side, as over the taps of a convolution, are one loop.
    bool side_by_side =
        length == lanes && count <= 8 && !accumulate && dropped > 0 && dropped == inner - 1;
    for (int64_t dim = 1; dim <= dropped && side_by_side; ++dim)
      side_by_side = from.strides[dim - 1] == from.strides[dim] * sizes[dim];
    if (side_by_side) {
      for (; left > 0; --left, to += lanes, source += count * stride) {
        Vector sum = Arithmetic::load(source);
        for (int64_t d = 1; d < count; ++d) sum += Arithmetic::load(source + d * stride);
        Arithmetic::store(to, sum * scale);
      }
      return;
    }
    for (; left > 0; --left, to += length) {
      Arithmetic::sum_rows(source, stride, count, length, to, accumulate, scale);
      for (int64_t dim = inner; dim-- > 0;) {
        if (dim == dropped) continue;
        source += from.strides[dim];
        if (dim == 0 || ++at[dim] < sizes[dim]) break;
        source -= from.strides[dim] * sizes[dim];
        at[dim] = 0;
      }
    }
  }

  // Sums of one band of a group's tensor.
  static WEIGHTOPS_INLINE void pool_band(const Features<T>& from, const Group& group,
                                         const std::vector<int64_t>& numbers, int64_t index,
                                         bool mean) {
    for (int64_t number : numbers) {
      const Node& node = from.side->nodes[number];
      const Node& parent = from.side->nodes[node.parent];
      View source = view(from, node.parent);
      if (parent.whole) source.data += index * group.band * source.strides[0];
      const int64_t size = parent.sizes[node.dropped];
      sum_node(source, parent.sizes, node.dropped, 0, group.band, from.channels,
               from.sums + node.slot * from.channels, false, mean ? T(1) / T(size) : T(1));
    }
  }

  // Rows of a whole tensor that are read at a time.
  static WEIGHTOPS_INLINE int64_t chunk(const Node& node, int64_t channels) {
    const int64_t rows = node.sizes[0], bytes = node.numel * channels * sizeof(T);
    return node.parent >= 0 || bytes <= kChunkBytes || node.sizes.size() == 1
               ? rows
               : std::max<int64_t>(4, kChunkBytes * rows / bytes);
  }

  // Adds up as `pool` does, so that it makes no difference which of them did.
  static WEIGHTOPS_INLINE void pool_part(const Features<T>& from, const PoolPart& part, bool mean) {
    const Node &node = from.side->nodes[part.node], &child = from.side->nodes[part.child];
    View source = view(from, part.node);
    Sizes sizes = node.sizes;
    T* to = from.sums + child.slot * from.channels;
    const T scale = mean ? T(1) / T(sizes[child.dropped]) : T(1);
    const int64_t rows = sizes[0], step = chunk(node, from.channels);
    if (child.dropped > 0) {
      for (int64_t begin = part.begin; begin < part.end; begin += step)
        sum_node(source, sizes, child.dropped, begin, std::min(part.end, begin + step),
                 from.channels, to, false, scale);
      return;
    }
    source.data += part.begin * source.strides[1];
    to += part.begin * (child.numel / sizes[1]) * from.channels;
    sizes[1] = part.end - part.begin;
    for (int64_t begin = 0; begin < rows; begin += step)
      sum_node(source, sizes, 0, begin, std::min(rows, begin + step), from.channels, to, begin > 0,
               scale);
  }

  // All nodes of a side that are sums but for the `banded` ones, each tensor read once from memory.
  // Sums over one index of a `streamed` tensor are there already, but for the division; those of
  // a node that is `done` altogether.
  static WEIGHTOPS_INLINE void pool(const Features<T>& from, bool mean,
                                    const std::vector<char>& banded,
                                    const std::vector<char>* streamed = nullptr,
                                    const std::vector<char>* done = nullptr) {
    const auto& nodes = from.side->nodes;
    const auto scale = [&](int64_t size) { return mean ? T(1) / T(size) : T(1); };
    for (size_t number = 0; number < nodes.size(); ++number) {
      const Node& node = nodes[number];
      if (node.children.empty() || banded[number] || (done && (*done)[number])) continue;
      if (node.numel == 0) {
        for (int64_t child : node.children)
          std::fill_n(from.sums + nodes[child].slot * from.channels,
                      nodes[child].numel * from.channels, T(0));
        continue;
      }
      if (streamed && node.whole && (*streamed)[node.tensor]) {
        for (int64_t child : node.children) {
          if (banded[child]) continue;
          T* sums = from.sums + nodes[child].slot * from.channels;
          for (int64_t i = 0; mean && i < nodes[child].numel * from.channels; ++i)
            sums[i] *= scale(node.sizes[nodes[child].dropped]);
        }
        continue;
      }
      const View source = view(from, number);
      const int64_t rows = node.sizes[0], step = chunk(node, from.channels);
      for (int64_t begin = 0; begin < rows; begin += step)
        for (int64_t child : node.children)
          if (!banded[child])
            sum_node(source, node.sizes, nodes[child].dropped, begin, std::min(rows, begin + step),
                     from.channels, from.sums + nodes[child].slot * from.channels,
                     nodes[child].dropped == 0 && begin > 0,
                     scale(node.sizes[nodes[child].dropped]));
    }
  }
};

}  // namespace weightops::equivariant
