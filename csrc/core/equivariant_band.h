// Which sums of a plan are taken a band of their tensor's first axis at a time. Those of a
// convolution's weights over its taps are nearly as large as the weights: held for a band only,
// they stay in the first-level cache.
#pragma once

#include "equivariant_plan.h"

namespace weightops::equivariant {

struct Banding {
  std::vector<char> nodes[2];  // by side: held for a band only
  std::vector<int64_t> tensors;
  std::vector<int64_t> group_of_type;  // an index of tensors, or -1

  explicit Banding(const Plan& plan);

  // Nothing is held for a band only.
  void clear() {
    for (auto& flags : nodes) flags.assign(flags.size(), 0);
    tensors.clear();
    group_of_type.assign(group_of_type.size(), -1);
  }

 private:
  // Smaller tensors are in the cache anyway, smaller nodes are not worth tiles of their own.
  static constexpr int64_t kWeights = 2048, kShare = 16;
  std::vector<char> tensor_;

  bool is_banded(const Plan& plan, const Type& type) const;
  void begin(const Plan& plan);
  bool narrow(const Plan& plan);
};

namespace detail {

inline bool keeps_first_axis(const Side& side, int64_t number) {
  const Node& node = side.nodes[number];
  return node.parent < 0 ? node.whole : node.dropped > 0 && keeps_first_axis(side, node.parent);
}

}  // namespace detail

inline void Banding::begin(const Plan& plan) {
  const auto &from = plan.sides[0].tensors, &to = plan.sides[1].tensors;
  tensor_.assign(std::max(from.size(), to.size()), 0);
  for (size_t t = 0; t < from.size() && from.size() == to.size(); ++t) {
    tensor_[t] = from[t].sizes == to[t].sizes && from[t].sizes.size() > 2 &&
                 product(from[t].sizes) >= kWeights;
    for (const Side& side : plan.sides)
      if (!side.nodes[side.tensors[t].whole].diagonals.empty()) tensor_[t] = 0;
  }
  for (int s = 0; s < 2; ++s)
    for (size_t n = 0; n < plan.sides[s].nodes.size(); ++n) {
      const Node& node = plan.sides[s].nodes[n];
      nodes[s].push_back(tensor_[node.tensor] && node.parent >= 0 && node.sizes.size() > 1 &&
                         detail::keeps_first_axis(plan.sides[s], n) &&
                         node.numel * kShare >= product(plan.sides[s].tensors[node.tensor].sizes));
    }
}

// Whether all operands are one tensor's, lie the same way round and are whole or held by bands.
inline bool Banding::is_banded(const Plan& plan, const Type& type) const {
  int64_t tensor = -1;
  for (int s = 0; s < 2; ++s)
    for (const Operand& operand : s == 0 ? type.readers : type.writers) {
      const Node& node = plan.sides[s].nodes[operand.node];
      if (tensor < 0) tensor = node.tensor;
      if (node.tensor != tensor || !tensor_[tensor] || operand.dims.empty() || operand.dims[0] != 0)
        return false;
      if (!node.whole && !nodes[s][operand.node]) return false;
    }
  return tensor >= 0;
}

// Takes back what can't be held by bands; whether there was anything.
inline bool Banding::narrow(const Plan& plan) {
  bool changed = false;
  const auto clear = [&](char& flag) {
    changed |= flag != 0;
    flag = 0;
  };
  for (const Type& type : plan.types[0]) {
    if (is_banded(plan, type)) continue;
    for (int s = 0; s < 2; ++s)
      for (const Operand& operand : s == 0 ? type.readers : type.writers) {
        const Node& node = plan.sides[s].nodes[operand.node];
        clear(node.whole ? tensor_[node.tensor] : nodes[s][operand.node]);
      }
  }
  for (int s = 0; s < 2; ++s)
    for (size_t n = 0; n < nodes[s].size(); ++n) {
      if (!nodes[s][n]) continue;
      const Node& node = plan.sides[s].nodes[n];
      bool alone = !tensor_[node.tensor];
      alone |= !plan.sides[s].nodes[node.parent].whole && !nodes[s][node.parent];
      for (int64_t child : node.children) alone |= !nodes[s][child];
      if (alone) clear(nodes[s][n]);
    }
  return changed;
}

inline Banding::Banding(const Plan& plan) {
  begin(plan);
  while (narrow(plan)) {
  }
  std::vector<char> used(tensor_.size());
  for (int s = 0; s < 2; ++s)
    for (size_t n = 0; n < nodes[s].size(); ++n)
      if (nodes[s][n]) used[plan.sides[s].nodes[n].tensor] = 1;
  std::vector<int64_t> group(used.size(), -1);
  for (size_t t = 0; t < used.size(); ++t)
    if (used[t]) group[t] = tensors.size(), tensors.push_back(t);
  for (const Type& type : plan.types[0]) {
    group_of_type.push_back(-1);
    if (!is_banded(plan, type)) continue;
    const int s = type.readers.empty();
    const Operand& operand = s == 0 ? type.readers[0] : type.writers[0];
    group_of_type.back() = group[plan.sides[s].nodes[operand.node].tensor];
  }
}

}  // namespace weightops::equivariant
