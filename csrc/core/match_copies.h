// Copies [depth, units] of a label's tensors, in which permuting other axes only picks rows.
#pragma once

#include "gram.h"
#include "manifold_run.h"
#include "match_plan.h"

namespace weightops::match {

using manifold::Team;

// to[c * to_stride + u] = from[u * stride + c]
template <class Sum>
void turn(const Sum* from, int64_t stride, int64_t units, int64_t columns, Sum* to,
          int64_t to_stride) {
  constexpr int64_t lanes = 16 / sizeof(Sum);
  using Arithmetic = Simd<Sum, 16>;
  int64_t u = 0;
  for (; u + lanes <= units; u += lanes) {
    const Sum* rows[lanes];
    for (int64_t k = 0; k < lanes; ++k) rows[k] = from + (u + k) * stride;
    int64_t c = 0;
    for (; c + lanes <= columns; c += lanes) {
      typename Arithmetic::Vector block[lanes];
      for (int64_t k = 0; k < lanes; ++k) block[k] = Arithmetic::load(rows[k] + c);
      Arithmetic::transpose(block);
      for (int64_t k = 0; k < lanes; ++k) Arithmetic::store(to + (c + k) * to_stride + u, block[k]);
    }
    for (; c < columns; ++c)
      for (int64_t k = 0; k < lanes; ++k) to[c * to_stride + u + k] = rows[k][c];
  }
  for (; u < units; ++u)
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + u] = from[u * stride + c];
}

// The copy [depth, size] of a label's tensors, for units of a range.
template <class Sum>
void copy_rows(const Label& label, const Sum* data, Range units, Sum* to) {
  // Whose rows of the copy stay in the cache, though they may all lie in a few of its sets.
  constexpr int64_t kColumns = 16;
  for (const Place& place : label.places)
    for (int64_t p = 0, next; p < place.positions(); p = next) {
      // Positions that follow each other are copied at once.
      int64_t columns = place.run;
      for (next = p + 1; next < place.positions() && place.at[next] == place.at[p] + columns &&
                         columns < kColumns;
           ++next)
        columns += place.run;
      turn(data + place.offset + place.at[p] + units.begin * place.stride, place.stride,
           units.size(), columns, to + (place.row + p * place.run) * label.size + units.begin,
           label.size);
    }
}

// Copies of all labels' tensors.
template <class Sum>
void copy_all(const Plan& plan, const Sum* data, const std::vector<Sum*>& to, int64_t threads,
              const Team& team) {
  team(threads, [&](int64_t begin, int64_t end) {
    for (size_t l = 0; l < to.size(); ++l) {
      const int64_t size = plan.labels[l].size;
      copy_rows(plan.labels[l], data, {size * begin / threads, size * end / threads}, to[l]);
    }
  });
}

// The reference, of whose tensors every label has a copy; packed, too, where that is no more than
// kKeptBytes.
template <class Sum>
struct Reference {
  static constexpr int64_t kKeptBytes = 1 << 30;

  Reference(const Plan& plan, const Sum* data, int64_t threads, const Team& team)
      : data(data), rooms(plan.labels.size()), kept(plan.labels.size()) {
    int64_t numbers = 0;
    for (size_t l = 0; l < rooms.size(); ++l) {
      const int64_t count = plan.labels[l].depth * plan.labels[l].size;
      rows.push_back(rooms[l].get(count + gram::kMargin));
      numbers += count;
    }
    keeps = 6 * numbers <= kKeptBytes;
    copy_all(plan, data, rows, threads, team);
  }

  const Sum* data;
  std::vector<Sum*> rows;  // [depth, size] of each label
  std::vector<Buffer<Sum>> rooms;
  mutable std::vector<product::Kept> kept;
  bool keeps;
};

}  // namespace weightops::match
