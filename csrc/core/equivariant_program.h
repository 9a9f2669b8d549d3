// A plan prepared for a pair of channel counts: where every operand of every type lies, as offsets
// that are the same for all networks.
#pragma once

#include "equivariant_band.h"
#include "equivariant_layout.h"

namespace weightops::equivariant {

struct Source {
  bool whole;  // in the features themselves, not among what was summed from them
  Place place;
  std::vector<Place> sums;  // of a whole tensor: where its positions are summed, in the slots
};

struct Addend {
  Place place;
  double scale;
};

// A diagonal's vector that is added at position `at` of a run.
struct OnDiagonal {
  int64_t at, offset;
};

struct Target {
  bool whole;
  Place place;
  int64_t width;  // elements a position
  int64_t bias;   // offset, or -1
  std::vector<Addend> addends;
  std::vector<OnDiagonal> diagonal;
  std::vector<int64_t> diagonal_begin;  // [outer + 1], empty without diagonals
};

// One vector of a target's channels: what is read for it, and where the blocks begin.
struct Column {
  int64_t target, lane;
  std::vector<int64_t> readers, blocks;
};

// One type.
struct Step {
  Sizes outer_sizes;
  int64_t outer = 1, run = 1, tile = 1;
  bool turns = false;  // an operand lies the other way round
  // Targets are whole tensors only: their sums can be taken while they are read for other reasons.
  bool streams = false;
  std::vector<Source> readers, others;  // others: what the targets stand for, to be read
  std::vector<Target> targets;
  std::vector<Column> columns;
  std::vector<int64_t> terms;  // [reader][target] -> term, or -1

  // Tiles below each other share the pages and lines of operands that lie the other way round.
  int64_t abreast() const { return turns ? 8 : 1; }
};

// Weights [out, in, 3, 3] with all of their sums over taps, for equivariant_taps.h. Offsets and
// strides are elements.
struct Taps {
  bool found = false;
  int64_t sizes[2];                    // out, in
  int64_t terms[4];                    // of the weights, of sums over columns, rows and both
  int64_t from_offset, from_stride;    // of the step to the next out
  int64_t to_offset, to_stride, bias;  // likewise, of the targets' side
  int64_t broadcast[2] = {-1, -1};     // [in, 3, 3] for every out, [out, 3, 3] for every in
  double scales[2] = {0, 0};
};

// A tensor whose types run a band of its first axis at a time, behind all other steps.
struct Group {
  int64_t tensor, band, bands;
  std::vector<int64_t> nodes[2];  // the sums that are taken of a band, by side
  std::vector<Step> steps;
  Taps taps;
};

struct Program {
  const Plan* plan;
  int reads;  // which side
  int64_t channels_read, channels_written, padded;
  std::vector<Step> steps;
  std::vector<Group> groups;
  std::vector<char> banded[2];  // nodes by side: a group's
  size_t max_readers = 0, max_targets = 0;
  bool thin;                   // to one channel, see equivariant_thin.h: rows are not padded
  bool mean, share;            // divide by sizes when reading, when broadcasting
  std::vector<char> streamed;  // tensors of the targets' side that are in steps that stream

  Program(const Plan& plan, int reads, int64_t channels_read, int64_t channels_written,
          int64_t lanes, bool bands = true);

 private:
  Step step(const Type& type, int64_t band, int64_t lanes);
};

namespace detail {

inline Sizes turned(const Sizes& strides, const Sizes& dims, int64_t scale) {
  Sizes result;
  for (int64_t dim : dims) result.push_back(strides[dim] * scale);
  return result;
}

inline Source source(const Side& side, const std::vector<char>& banded, const Operand& operand,
                     const Layout& layout, int64_t channels) {
  const Node& node = side.nodes[operand.node];
  const bool whole = node.parent < 0 && !node.copied;
  const int64_t offset = whole ? side.tensors[node.tensor].offset : node.slot;
  Source source{whole,
                place(layout, offset * channels, turned(node.strides, operand.dims, channels),
                      banded[operand.node]),
                {}};
  if (node.whole)
    for (int64_t number : node.children) {
      const Node& child = side.nodes[number];
      Sizes spread = child.strides;
      spread.insert(spread.begin() + child.dropped, 0);
      source.sums.push_back(place(layout, child.slot * channels,
                                  turned(spread, operand.dims, channels), banded[number], true));
    }
  return source;
}

// Positions of a type at which all coordinates that share a dimension of `diagonal` agree.
inline void add_diagonal(Target& target, const Step& step, const Sizes& sizes, const Node& node,
                         const Node& diagonal, const Sizes& dims, int64_t padded) {
  const Sizes strides = dense_strides(diagonal.sizes);
  Sizes shared;  // the diagonal's dimension of each dimension of the type
  for (int64_t dim : dims) {
    size_t axis = 0;
    while (node.dim_of_axis[axis] != dim) ++axis;
    shared.push_back(diagonal.dim_of_axis[axis]);
  }
  std::vector<std::vector<OnDiagonal>> found(step.outer);
  if (!target.diagonal_begin.empty())
    for (int64_t o = 0; o < step.outer; ++o)
      found[o].assign(target.diagonal.begin() + target.diagonal_begin[o],
                      target.diagonal.begin() + target.diagonal_begin[o + 1]);
  const Sizes type_strides = dense_strides(sizes);
  for (int64_t d = 0; d < diagonal.numel; ++d) {
    int64_t position = 0;
    for (size_t dim = 0; dim < sizes.size(); ++dim)
      position += d / strides[shared[dim]] % diagonal.sizes[shared[dim]] * type_strides[dim];
    found[position / step.run].push_back({position % step.run, (diagonal.write_slot + d) * padded});
  }
  target.diagonal.clear();
  target.diagonal_begin.assign(1, 0);
  for (const auto& each : found) {
    target.diagonal.insert(target.diagonal.end(), each.begin(), each.end());
    target.diagonal_begin.push_back(target.diagonal.size());
  }
}

inline Target target(const Side& side, const std::vector<char>& banded, const Operand& operand,
                     const Step& step, const Layout& layout, int64_t channels, int64_t padded,
                     bool share) {
  const Node& node = side.nodes[operand.node];
  Target target{
      node.whole, {}, node.whole ? channels : padded, node.whole ? node.tensor * padded : -1, {},
      {},         {}};
  const int64_t offset = node.whole ? side.tensors[node.tensor].offset : node.write_slot;
  const Sizes strides = node.whole ? node.strides : dense_strides(node.sizes);
  target.place = place(layout, offset * target.width, turned(strides, operand.dims, target.width),
                       banded[operand.node]);
  for (int64_t number : node.children) {
    const Node& child = side.nodes[number];
    Sizes spread = child.strides;
    spread.insert(spread.begin() + child.dropped, 0);
    target.addends.push_back({place(layout, child.write_slot * padded,
                                    turned(spread, operand.dims, padded), banded[number], true),
                              share ? 1.0 / node.sizes[child.dropped] : 1.0});
  }
  for (int64_t number : node.diagonals)
    add_diagonal(target, step, layout.whole, node, side.nodes[number], operand.dims, padded);
  return target;
}

// A band's features take about half of the first-level cache.
inline Group group(const Plan& plan, const Banding& banding, int64_t tensor, int64_t channels) {
  const Sizes& sizes = plan.sides[0].tensors[tensor].sizes;
  const int64_t most = std::max<int64_t>(1, 24576 * sizes[0] / (product(sizes) * channels * 4));
  Group group{tensor, std::min(most, sizes[0]), 0, {}, {}, {}};
  while (sizes[0] % group.band != 0) --group.band;
  group.bands = sizes[0] / group.band;
  for (int s = 0; s < 2; ++s)
    for (size_t n = 0; n < banding.nodes[s].size(); ++n)
      if (banding.nodes[s][n] && plan.sides[s].nodes[n].tensor == tensor)
        group.nodes[s].push_back(n);
  return group;
}

// Which of the weights (0), their sums over columns, rows and both a banded node is.
inline int taps_part(const Side& side, const Node& node) {
  if (node.whole) return 0;
  return side.nodes[node.parent].whole ? 4 - node.dropped : 3;
}

inline Taps taps(const Plan& plan, int reads, const Group& group,
                 const std::vector<const Type*>& types, int64_t channels_read,
                 int64_t channels_written, bool thin) {
  const Side &from = plan.sides[reads], &to = plan.sides[1 - reads];
  const Tensor &source = from.tensors[group.tensor], &target = to.tensors[group.tensor];
  Taps taps{};
  const auto is_3x3 = [](const Tensor& tensor) {
    return tensor.sizes.size() == 4 && tensor.sizes[2] == 3 && tensor.sizes[3] == 3 &&
           tensor.strides[1] == 9 && tensor.strides[2] == 3 && tensor.strides[3] == 1;
  };
  if (!is_3x3(source) || !is_3x3(target) || types.size() != 4 || group.nodes[0].size() != 3 ||
      group.nodes[1].size() != 3 || channels_read % kDepth != 0 ||
      (channels_written % kDepth != 0 && !thin))
    return taps;
  for (const Type* type : types) {
    if (type->readers.size() != 1 || type->writers.size() != 1 || type->term(0, 0) < 0) return taps;
    const int part = taps_part(from, from.nodes[type->readers[0].node]);
    if (part != taps_part(to, to.nodes[type->writers[0].node])) return taps;
    taps.terms[part] = type->term(0, 0);
  }
  for (int axis = 0; axis < 2; ++axis) taps.sizes[axis] = source.sizes[axis];
  taps.from_offset = source.offset * channels_read;
  taps.from_stride = source.strides[0] * channels_read;
  taps.to_offset = target.offset * channels_written;
  taps.to_stride = target.strides[0] * channels_written;
  taps.bias = group.tensor * channels_written;
  for (int64_t number : to.nodes[target.whole].children) {
    const Node& child = to.nodes[number];
    if (child.dropped > 1) continue;
    taps.broadcast[child.dropped] = child.write_slot * channels_written;
    taps.scales[child.dropped] = plan.mean && reads == 1 ? 1.0 / target.sizes[child.dropped] : 1.0;
  }
  taps.found = true;
  return taps;
}

}  // namespace detail

inline Program::Program(const Plan& plan, int reads, int64_t channels_read,
                        int64_t channels_written, int64_t lanes, bool bands)
    : plan(&plan),
      reads(reads),
      channels_read(channels_read),
      channels_written(channels_written),
      padded((channels_written + lanes - 1) / lanes * lanes),
      thin(lanes == 1),
      mean(plan.mean && reads == 0),
      share(plan.mean && reads == 1) {
  Banding banding(plan);
  if (!bands) banding.clear();
  for (int side = 0; side < 2; ++side) banded[side] = banding.nodes[side];
  streamed.assign(plan.sides[1 - reads].tensors.size(), 0);
  for (const int64_t tensor : banding.tensors)
    groups.push_back(
        detail::group(plan, banding, tensor, std::max(channels_read, channels_written)));
  std::vector<std::vector<const Type*>> members(groups.size());
  for (size_t t = 0; t < plan.types[reads].size(); ++t) {
    const Type& type = plan.types[reads][t];
    if (type.writers.empty() || product(type.sizes) == 0) continue;
    const int64_t group = banding.group_of_type[t];
    if (group >= 0) members[group].push_back(&type);
    Step made = step(type, group < 0 ? 0 : groups[group].band, lanes);
    (group < 0 ? steps : groups[group].steps).push_back(std::move(made));
  }
  for (size_t g = 0; g < groups.size(); ++g)
    groups[g].taps =
        detail::taps(plan, reads, groups[g], members[g], channels_read, channels_written, thin);
}

inline Step Program::step(const Type& type, int64_t band, int64_t lanes) {
  const Side &from = plan->sides[reads], &to = plan->sides[1 - reads];
  Step step;
  const detail::Layout layout(type.sizes, band);
  step.outer_sizes.assign(layout.sizes.begin(), layout.sizes.begin() + layout.outer_rank);
  step.outer = product(step.outer_sizes);
  step.run = layout.run;
  step.terms = type.table;
  // What a tile reads stays in the first-level cache; tiles are of a length, a multiple of 12
  // rows.
  const auto row = [](size_t count, int64_t channels) {
    return int64_t(count) * ((channels + kDepth - 1) / kDepth) * kDepth * 4;
  };
  const int64_t a_row = row(type.readers.size(), channels_read) +
                        (reads == 1 ? row(type.writers.size(), channels_written) : 0);
  const int64_t most = std::clamp<int64_t>(16384 / std::max<int64_t>(1, a_row), 48, kTile);
  const int64_t tiles = (step.run + most - 1) / most;
  step.tile = std::min(most, ((step.run + tiles - 1) / tiles + 11) / 12 * 12);
  for (const Operand& operand : type.readers)
    step.readers.push_back(detail::source(from, banded[reads], operand, layout, channels_read));
  for (const Operand& operand : type.writers) {
    step.others.push_back(detail::source(to, banded[1 - reads], operand, layout, channels_written));
    step.targets.push_back(detail::target(to, banded[1 - reads], operand, step, layout,
                                          channels_written, padded, share));
  }
  for (size_t w = 0; w < type.writers.size(); ++w)
    for (int64_t lane = 0; lane < padded; lane += lanes) {
      Column column{int64_t(w), lane, {}, {}};
      for (size_t r = 0; r < type.readers.size(); ++r)
        if (const int64_t term = type.term(r, w); term >= 0) {
          column.readers.push_back(r);
          column.blocks.push_back(term * channels_read * padded + lane);
        }
      step.columns.push_back(std::move(column));
    }
  for (const Source& each : step.readers)
    step.turns |= each.whole && each.place.stride != channels_read;
  for (const Target& each : step.targets)
    step.turns |= each.whole && each.place.stride != channels_written;
  step.turns &= layout.outer_rank > 0 && band == 0;
  // With more indices there are more sums, which then cost more than reading twice.
  step.streams = type.sizes.size() == 2;
  for (const Target& each : step.targets) step.streams &= each.whole;
  if (step.streams)
    for (const Operand& operand : type.writers) streamed[to.nodes[operand.node].tensor] = 1;
  max_readers = std::max(max_readers, step.readers.size());
  max_targets = std::max(max_targets, step.targets.size());
  return step;
}

}  // namespace weightops::equivariant
