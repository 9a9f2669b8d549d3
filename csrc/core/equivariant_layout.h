// How the positions of a type become runs, and where an operand lies along them.
#pragma once

#include "equivariant_plan.h"

namespace weightops::equivariant {

constexpr int64_t kDepth = 16;  // channels that a tile's product takes at a time
constexpr int64_t kTile = 192;  // positions of a tile at most
constexpr int64_t kShortRun =
    64;  // runs below this are joined with the next dimension, or a part of it

inline Sizes dense_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * sizes[dim];
  return strides;
}

// Elements of something that a type's positions share: position (outer, i) of the run begins at
// offset + outer's coordinates * outer_strides + (table empty ? i * stride : table[i]).
struct Place {
  int64_t offset = 0;
  Sizes outer_strides;
  int64_t stride = 0;
  std::vector<int64_t> table;
  bool moves() const { return stride != 0 || !table.empty(); }
  int64_t along(int64_t i) const { return table.empty() ? i * stride : table[i]; }
};

namespace detail {

// How a type's positions become runs: trailing dimensions, the first of which may be split to get
// there.
struct Layout {
  Sizes whole, sizes;  // before and after the split
  size_t split = 0;    // dimension
  int64_t factor = 1;  // its inner part
  size_t outer_rank = 0;
  int64_t run = 1, band = 0;

  // With a `band` the first dimension is that of bands, which no run crosses.
  Layout(const Sizes& given, int64_t band) : whole(given), sizes(given), band(band) {
    if (band > 0) {
      sizes[0] /= band;
      sizes.insert(sizes.begin() + 1, band);
    }
    const size_t kept = band > 0;
    outer_rank = sizes.size();
    while (outer_rank > kept && run < kShortRun && run * sizes[outer_rank - 1] <= kTile)
      run *= sizes[--outer_rank];
    if (outer_rank == kept || run >= kShortRun) return;
    const int64_t size = sizes[outer_rank - 1];
    if (outer_rank == sizes.size() && size > kTile) {  // one long dimension is a run already
      run = sizes[--outer_rank];
      return;
    }
    factor = std::min(size, kTile / run);
    while (size % factor != 0) --factor;
    if (factor == 1 && run >= 12) return;
    if (factor == 1) factor = size;
    split = outer_rank - 1;
    run *= factor;
    if (factor == size) {
      --outer_rank;
      factor = 1;
      return;
    }
    sizes[split] = size / factor;
    sizes.insert(sizes.begin() + split + 1, factor);
  }

  // What is held of one band only lies in the same place for every band.
  Sizes strides(Sizes given, bool of_band) const {
    if (band > 0) given.insert(given.begin(), of_band ? 0 : given[0] * band);
    if (factor == 1) return given;
    given.insert(given.begin() + split, given[split] * factor);
    return given;
  }
};

// Where a run of several dimensions is not even, or `tabled` is wanted anyway, it has a table.
inline Place place(const Layout& layout, int64_t offset, const Sizes& unsplit, bool of_band,
                   bool tabled = false) {
  const Sizes &sizes = layout.sizes, strides = layout.strides(unsplit, of_band);
  const size_t rank = sizes.size(), outer_rank = layout.outer_rank;
  Place place{offset, Sizes(strides.begin(), strides.begin() + outer_rank), 0, {}};
  if (rank == outer_rank) return place;
  place.stride = strides[rank - 1];
  bool even = true, still = place.stride == 0;
  for (size_t dim = outer_rank + 1; dim < rank; ++dim) {
    even &= strides[dim - 1] == strides[dim] * sizes[dim];
    still &= strides[dim - 1] == 0;
  }
  if (still || (even && (!tabled || rank - outer_rank < 2))) return place;
  place.table.push_back(0);
  for (size_t dim = outer_rank; dim < rank; ++dim) {
    std::vector<int64_t> longer;
    for (int64_t before : place.table)
      for (int64_t i = 0; i < sizes[dim]; ++i) longer.push_back(before + i * strides[dim]);
    place.table = std::move(longer);
  }
  return place;
}

}  // namespace detail

}  // namespace weightops::equivariant
