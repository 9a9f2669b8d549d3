// Which way a linear map on a manifold is taken; measured on AVX-512 and AMX.
#pragma once

#include <vector>

#include "product_kernel.h"

namespace weightops::manifold {

enum class Regime {
  few_rows,  // every basis is read once, where it lies
  bases,     // one product, of the depth of all bases
  weights,   // one product a context, whose weights are made as they are packed
};

inline const char* name_of(Regime regime) {
  return regime == Regime::few_rows ? "few rows" : regime == Regime::bases ? "bases" : "weights";
}

inline int parts_available(int parts) {
#if WEIGHTOPS_X86
  if (product::Bfloat16Tiles<1>::available()) return parts;
#endif
  return 0;
}

// How many bfloat16 a number is split into for so many rows, of `parts` asked for: 0 where there
// are no tiles for them, or the rows would leave most of a tile empty.
inline int parts_for(int64_t rows, int parts) { return rows <= 16 ? 0 : parts_available(parts); }

// Rows of equal context are as many as `groups` says. Packing a weight costs as much as multiplying
// it by `pack` rows, adding a basis to it as much as by `blend`.
inline Regime choose(int64_t rows, int64_t bases, int parts, const std::vector<int64_t>& groups,
                     bool backward) {
  if (rows <= (backward ? 2 : 8)) return Regime::few_rows;
  parts = parts_for(rows, parts);
  const int64_t pack = parts == 0 ? 10 : parts == 3 ? 32 : parts == 2 ? 48 : 80;
  const int64_t blend = parts == 0 ? 3 : pack / 4, height = parts == 0 ? 14 : 32;
  const auto whole = [&](int64_t count) { return (count + height - 1) / height * height; };
  int64_t made = 0;
  for (const int64_t size : groups) made += whole(size) + pack + bases * blend;
  return made < bases * (whole(rows) + pack) ? Regime::weights : Regime::bases;
}

}  // namespace weightops::manifold
