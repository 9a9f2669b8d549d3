// The integers of weightops/ops/equivariant/plan.py, read back: two sides of tensors and nodes, and
// the types whose readers and writers compose.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace weightops::equivariant {

using Sizes = std::vector<int64_t>;

inline int64_t product(const Sizes& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

// A diagonal of a tensor (no parent), or its parent with dimension `dropped` summed away.
struct Node {
  int64_t tensor, parent, dropped;
  bool whole = false;    // the tensor itself
  bool copied = false;   // without a parent, but read from a copy at `slot`
  Sizes dim_of_axis;     // without a parent: which dimension each axis of the tensor runs along
  Sizes sizes, strides;  // strides in positions: of the tensor, or dense
  int64_t numel = 1;
  int64_t slot = 0;        // where it lies among the nodes that need a buffer to be read from
  int64_t write_slot = 0;  // ... to be written to
  std::vector<int64_t> children;   // nodes that are this one with one dimension dropped
  std::vector<int64_t> diagonals;  // of a whole tensor
};

struct Tensor {
  int64_t offset;
  Sizes sizes, strides;
  int64_t whole = -1, mean = -1;  // nodes
};

struct Side {
  int64_t numel = 0, slots = 0, write_slots = 0;
  std::vector<Tensor> tensors;
  std::vector<Node> nodes;
  bool same_nodes(const Side& other) const {
    return std::equal(nodes.begin(), nodes.end(), other.nodes.begin(), other.nodes.end(),
                      [](auto& a, auto& b) {
                        return a.tensor == b.tensor && a.parent == b.parent &&
                               a.dropped == b.dropped && a.dim_of_axis == b.dim_of_axis;
                      });
  }
  bool same_tensors(const Side& other) const {
    return numel == other.numel && std::equal(tensors.begin(), tensors.end(), other.tensors.begin(),
                                              other.tensors.end(), [](auto& a, auto& b) {
                                                return a.offset == b.offset && a.sizes == b.sizes &&
                                                       a.strides == b.strides;
                                              });
  }
};

struct Operand {
  int64_t node;
  Sizes dims;  // the node's dimension of each dimension of the type
  bool operator==(const Operand& other) const { return node == other.node && dims == other.dims; }
};

// Every node is written by one operand at most; it is read once for each way of matching equal
// labels.
struct Type {
  Sizes sizes;
  std::vector<Operand> readers, writers;
  std::vector<int64_t> table;  // [reader][writer] -> term, or -1
  int64_t term(int64_t reader, int64_t writer) const {
    return table[reader * writers.size() + writer];
  }
};

struct Plan {
  int64_t terms = 0;
  bool mean = true;
  Side sides[2];               // input, output
  std::vector<Type> types[2];  // of the layer, which reads the input, and of its transpose

  static Plan parse(const int64_t* code, int64_t length);
};

namespace detail {

class Reader {
 public:
  Reader(const int64_t* code, int64_t length) : at_(code), end_(code + length) {}
  int64_t next() {
    if (at_ == end_) throw std::invalid_argument("equivariant: the plan is cut short");
    return *at_++;
  }
  int64_t below(int64_t limit) {
    const int64_t value = next();
    if (value < 0 || value >= limit) throw std::invalid_argument("equivariant: not a plan");
    return value;
  }
  bool done() const { return at_ == end_; }

 private:
  const int64_t *at_, *end_;
};

constexpr int64_t kLimit = int64_t{1} << 40;

inline void parse_side(Reader& in, Side& side) {
  side.tensors.resize(in.below(kLimit));
  for (Tensor& tensor : side.tensors) {
    tensor.offset = in.below(kLimit);
    const int64_t rank = in.below(64);
    int64_t last = tensor.offset;
    for (int64_t axis = 0; axis < rank; ++axis) {
      tensor.sizes.push_back(in.below(kLimit));
      tensor.strides.push_back(in.below(kLimit));
      last += (tensor.sizes.back() - 1) * tensor.strides.back();
    }
    if (product(tensor.sizes) > 0 && last >= side.numel)
      throw std::invalid_argument("equivariant: a tensor of the plan ends outside of the features");
  }
  const int64_t count = in.below(kLimit);
  for (int64_t number = 0; number < count; ++number) {
    Node node;
    node.tensor = in.below(side.tensors.size());
    node.parent = in.next();
    node.dropped = in.next();
    Tensor& tensor = side.tensors[node.tensor];
    if (node.parent < 0) {
      for (size_t axis = 0; axis < tensor.sizes.size(); ++axis) {
        const size_t dim = in.below(tensor.sizes.size());
        node.dim_of_axis.push_back(dim);
        if (node.sizes.size() <= dim) node.sizes.resize(dim + 1), node.strides.resize(dim + 1);
        node.sizes[dim] = tensor.sizes[axis];
        node.strides[dim] += tensor.strides[axis];
      }
      node.whole = node.sizes.size() == tensor.sizes.size();
      if (node.whole) tensor.whole = number;
    } else {
      Node& parent = side.nodes.at(node.parent);
      node.sizes = parent.sizes;
      node.sizes.erase(node.sizes.begin() + node.dropped);
      parent.children.push_back(number);
      node.strides.assign(node.sizes.size(), 1);
      for (size_t dim = node.sizes.size(); dim-- > 1;)
        node.strides[dim - 1] = node.strides[dim] * node.sizes[dim];
    }
    node.numel = product(node.sizes);
    node.slot = side.slots;
    node.write_slot = side.write_slots;
    if (node.parent >= 0) side.slots += node.numel;
    if (!node.whole) side.write_slots += node.numel;
    side.nodes.push_back(std::move(node));
  }
  for (size_t number = 0; number < side.nodes.size(); ++number) {
    const Node& node = side.nodes[number];
    Tensor& tensor = side.tensors[node.tensor];
    if (tensor.whole < 0) throw std::invalid_argument("equivariant: a tensor has no node");
    if (node.parent < 0 && !node.whole) side.nodes[tensor.whole].diagonals.push_back(number);
    // Of the nodes without dimensions the first is the whole tensor's: diagonals come later.
    int64_t root = number;
    while (side.nodes[root].parent >= 0) root = side.nodes[root].parent;
    if (node.sizes.empty() && root == tensor.whole) tensor.mean = number;
  }
}

// The type as its transpose sees it. Readers of one node become one writer, and how they differ
// becomes a difference of what is read.
inline Type transposed(const Type& type) {
  Type result{type.sizes, {}, {}, {}};
  const size_t rank = type.sizes.size();
  struct Term {
    size_t reader, writer;
    int64_t number;
  };
  std::vector<Term> terms;
  for (size_t r = 0; r < type.readers.size(); ++r) {
    const Operand& own = type.readers[r];
    size_t writer = 0;
    while (writer < result.writers.size() && result.writers[writer].node != own.node) ++writer;
    if (writer == result.writers.size()) result.writers.push_back(own);
    const Sizes& first = result.writers[writer].dims;
    Sizes from(rank);
    for (size_t d = 0; d < rank; ++d)
      from[d] = std::find(own.dims.begin(), own.dims.end(), first[d]) - own.dims.begin();
    for (size_t w = 0; w < type.writers.size(); ++w) {
      Operand reader{type.writers[w].node, Sizes(rank)};
      for (size_t d = 0; d < rank; ++d) reader.dims[d] = type.writers[w].dims[from[d]];
      size_t at = 0;
      while (at < result.readers.size() && !(result.readers[at] == reader)) ++at;
      if (at == result.readers.size()) result.readers.push_back(reader);
      terms.push_back({at, writer, type.term(r, w)});
    }
  }
  if (type.readers.empty()) result.readers = type.writers;
  result.table.assign(result.readers.size() * result.writers.size(), -1);
  for (const Term& term : terms)
    result.table[term.reader * result.writers.size() + term.writer] = term.number;
  return result;
}

}  // namespace detail

inline Plan Plan::parse(const int64_t* code, int64_t length) {
  detail::Reader in(code, length);
  Plan plan;
  for (Side& side : plan.sides) side.numel = in.below(detail::kLimit);
  plan.terms = in.below(detail::kLimit);
  plan.mean = in.below(2) == 1;
  for (Side& side : plan.sides) detail::parse_side(in, side);
  plan.types[0].resize(in.below(detail::kLimit));
  for (Type& type : plan.types[0]) {
    type.sizes.resize(in.below(64));
    for (int64_t& size : type.sizes) size = in.below(detail::kLimit);
    type.readers.resize(in.below(detail::kLimit));
    type.writers.resize(in.below(detail::kLimit));
    for (int which = 0; which < 2; ++which)
      for (Operand& operand : which == 0 ? type.readers : type.writers) {
        operand.node = in.below(plan.sides[which].nodes.size());
        const Node& node = plan.sides[which].nodes[operand.node];
        for (int64_t size : type.sizes) {
          operand.dims.push_back(in.below(node.sizes.size()));
          if (node.sizes[operand.dims.back()] != size)
            throw std::invalid_argument("equivariant: an operand has another size than its type");
        }
      }
    type.table.resize(type.readers.size() * type.writers.size());
    for (int64_t& term : type.table) {
      term = in.next();
      if (term < -1 || term >= plan.terms) throw std::invalid_argument("equivariant: not a plan");
    }
    plan.types[1].push_back(detail::transposed(type));
  }
  if (!in.done()) throw std::invalid_argument("equivariant: the plan is too long");
  return plan;
}

}  // namespace weightops::equivariant
