// The last layer of a functional, which leads to one channel: what it needs of every weight's
// hidden features, so that these need not be written. A whole tensor's term is a number a weight;
// all else comes from sums over an index, taken while the features are in the first-level cache.
#pragma once

#include <list>
#include <memory>
#include <mutex>

#include "equivariant_cache.h"

namespace weightops::functional {

using equivariant::Node;
using equivariant::Plan;
using equivariant::Sizes;

// A sum over `size` positions of a tensor that lie `inner` apart, in rows from `slot` on.
struct Sum {
  int64_t size, inner, slot;
};

// A row of a tensor that is kept.
struct Kept {
  int64_t at, slot;
};

// Numbers at `from` that are summed over `size` of them, `inner` apart, to numbers at `to`.
struct Fold {
  int64_t from, to, size, inner;
  double scale;
  bool first;  // of those that lead to one node
};

struct Field {
  int64_t term, at;
};

struct Tensor {
  int64_t offset, numel;
  int64_t row = 1;   // positions that parts do not divide
  int64_t wide = 0;  // positions of the first axis's rows, where sums over it are many
  std::vector<Sum> sums;
  std::vector<Kept> kept;     // in order of positions
  int64_t copy = -1;          // slot of its own rows, where they are kept
  std::vector<Field> fields;  // a number a position: the features times a term's matrix
  std::vector<Fold> folds;    // in order
};

class Readout {
 public:
  explicit Readout(std::shared_ptr<equivariant::Prepared> prepared)
      : plan(prepared->plan), prepared_(std::move(prepared)), folded_(plan) {
    base.assign(plan.terms, 0);
    is_field.assign(plan.terms, 0);
    lay_out();
    program = std::make_unique<equivariant::Program>(plan, 0, 1, 1, 1, false);
    // Rows below the first axis come one after another: what a network's parts may not divide.
    streamed.assign(plan.sides[0].tensors.size(), 1);
  }
  Readout(const Readout&) = delete;
  Readout& operator=(const Readout&) = delete;

  const std::vector<char>& folded() const { return folded_.nodes[0]; }
  const equivariant::Prepared* prepared() const { return prepared_.get(); }

  // Where part p of so many begins: at a row of a tensor whose rows are folded.
  int64_t begin(int64_t p, int64_t parts) const {
    const int64_t at = plan.sides[0].numel * p / parts;
    for (const Tensor& each : tensors)
      if (at < each.offset + each.numel) return at - (at - each.offset) % each.row;
    return at;
  }

  Plan plan;  // whose slots are those of the sums and rows that are kept
  std::unique_ptr<equivariant::Program> program;  // in positions: of one channel
  std::vector<Tensor> tensors;
  std::vector<int64_t> base;  // of a term that is a field: to be added to a reader's place
  std::vector<char> is_field, streamed;
  int64_t numbers = 0;  // in all fields

 private:
  // Of a tensor that more terms read the rows are kept: as many numbers would be as large.
  static constexpr size_t kMostFields = 24;
  // Sums of so many positions do not stay in the first-level cache beside the features.
  static constexpr int64_t kWide = 128;

  void lay_out();
  void lay_out_tensor(int64_t number, const std::vector<std::vector<int64_t>>& terms);

  std::shared_ptr<equivariant::Prepared> prepared_;
  equivariant::Banding
      folded_;  // nodes nearly as large as their tensor: numbers are summed, not rows
};

inline void Readout::lay_out() {
  equivariant::Side& side = plan.sides[0];
  std::vector<std::vector<int64_t>> terms(side.nodes.size());
  for (const equivariant::Type& type : plan.types[0])
    for (size_t r = 0; r < type.readers.size(); ++r)
      for (size_t w = 0; w < type.writers.size(); ++w)
        if (const int64_t term = type.term(r, w); term >= 0)
          terms[type.readers[r].node].push_back(term);
  side.slots = 0;
  int64_t end = 0;
  for (size_t t = 0; t < side.tensors.size(); ++t) {
    const equivariant::Tensor& each = side.tensors[t];
    const int64_t numel = equivariant::product(each.sizes);
    if (numel > 0 && (each.offset != end || each.strides != equivariant::dense_strides(each.sizes)))
      throw std::invalid_argument("functional: the plan's tensors do not lie one after another");
    end += numel;
    tensors.emplace_back();
    tensors.back().offset = each.offset;
    tensors.back().numel = numel;
    lay_out_tensor(t, terms);
  }
  if (end != side.numel || plan.sides[1].numel != side.numel)
    throw std::invalid_argument("functional: the plan's tensors are not all weights");
}

inline void Readout::lay_out_tensor(int64_t number,
                                    const std::vector<std::vector<int64_t>>& terms) {
  equivariant::Side& side = plan.sides[0];
  Tensor& tensor = tensors[number];
  const std::vector<char>& folds = folded();
  const auto add_field = [&](int64_t term) {
    tensor.fields.push_back({term, numbers});
    numbers += tensor.numel;
    is_field[term] = 1;
    return tensor.fields.back().at;
  };
  for (size_t n = 0; n < side.nodes.size(); ++n) {
    Node& node = side.nodes[n];
    if (node.tensor != number) continue;
    const bool under_whole = node.parent >= 0 && side.nodes[node.parent].whole;
    node.slot = 0;
    if (node.whole && terms[n].size() <= kMostFields) {
      for (int64_t term : terms[n]) base[term] = add_field(term) - tensor.offset;
      continue;
    }
    if (folds[n]) {
      if (node.sizes.size() > 1) tensor.row = tensor.numel / std::max<int64_t>(1, node.sizes[0]);
      // From the whole tensor down to the node.
      std::vector<const Node*> chain;
      for (const Node* at = &node; at->parent >= 0; at = &side.nodes[at->parent])
        chain.insert(chain.begin(), at);
      for (int64_t term : terms[n]) {
        int64_t from = add_field(term);
        for (const Node* each : chain) {
          const Sizes& sizes = side.nodes[each->parent].sizes;
          const int64_t size = sizes[each->dropped];
          int64_t inner = 1;
          for (size_t d = each->dropped + 1; d < sizes.size(); ++d) inner *= sizes[d];
          tensor.folds.push_back(
              {from, numbers, size, inner, plan.mean ? 1.0 / size : 1.0, each == chain.front()});
          from = numbers;
          numbers += each->numel;
        }
        base[term] = from;
      }
      continue;
    }
    node.slot = side.slots;
    side.slots += node.numel;
    if (under_whole) {
      const Node& parent = side.nodes[node.parent];
      int64_t inner = 1;
      for (size_t d = node.dropped + 1; d < parent.sizes.size(); ++d) inner *= parent.sizes[d];
      tensor.sums.push_back({parent.sizes[node.dropped], inner, node.slot});
      if (node.dropped == 0 && inner > kWide) tensor.wide = inner;
    } else if (node.whole) {
      node.copied = true;
      tensor.copy = node.slot;
    } else if (node.parent < 0) {
      node.copied = true;
      const Sizes strides = node.strides, dense = equivariant::dense_strides(node.sizes);
      for (int64_t d = 0; d < node.numel; ++d) {
        int64_t at = 0;
        for (size_t dim = 0; dim < strides.size(); ++dim)
          at += d / dense[dim] % node.sizes[dim] * strides[dim];
        tensor.kept.push_back({at, node.slot + d});
      }
      node.strides = dense;
    }
  }
  std::sort(tensor.kept.begin(), tensor.kept.end(),
            [](const Kept& a, const Kept& b) { return a.at < b.at; });
}

// The readout of a plan, most recently used first.
inline std::shared_ptr<const Readout> readout(const std::vector<int64_t>& code) {
  constexpr size_t kMost = 32;
  static std::mutex mutex;
  static std::list<std::shared_ptr<const Readout>> recent;
  auto prepared = equivariant::prepare(code);
  const std::lock_guard<std::mutex> guard(mutex);
  for (auto it = recent.begin(); it != recent.end(); ++it)
    if ((*it)->prepared() == prepared.get()) {
      recent.splice(recent.begin(), recent, it);
      return recent.front();
    }
  recent.push_front(std::make_shared<Readout>(std::move(prepared)));
  if (recent.size() > kMost) recent.pop_back();
  return recent.front();
}

}  // namespace weightops::functional
