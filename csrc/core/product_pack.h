// Operands of matrix products: where their values come from, and how they are packed.
#pragma once

#include "buffer.h"
#include "number.h"
#include "product_kernel.h"

namespace weightops::product {

enum class Kind { same, half, bfloat16 };  // as the sums are, or narrower

// How an operand lies: its rows, or columns, follow each other along the depth or across it.
enum class Lies { along, across };

// Values row by row: rows of one tensor for each term; or sums of tensors, made as they are read.
template <class Sum>
struct Source {
  const void* data;
  Kind kind;
  Lies lies;
  int64_t stride;
  int64_t term_stride = 0;
  const int64_t* order = nullptr;   // the rows' places, where they are not 0, 1, 2 ...
  const int64_t* starts = nullptr;  // and where in it a term's begin
  // Row i of term t is multiplied by scale[i, t].
  const Sum* scale = nullptr;
  int64_t scale_stride = 0;
  // Rows are sum_k coeffs[k] * rows of basis k.
  const Sum* coeffs = nullptr;
  int64_t bases = 1, basis_stride = 0;
  // Whether terms have rows of their own.
  bool own() const { return term_stride != 0 || scale || starts; }

  // Whether rows are not there to be read.
  WEIGHTOPS_INLINE bool makes() const { return kind != Kind::same || coeffs || scale; }
  // `count` values of row i from column j on, where they lie or in `scratch`.
  WEIGHTOPS_INLINE const Sum* row(int term, int64_t i, int64_t j, int64_t count,
                                  Sum* scratch) const {
    if (makes()) return reader(*this, term, i, j, count, scratch);
    if (starts) i += starts[term];
    return static_cast<const Sum*>(data) + term * term_stride + (order ? order[i] : i) * stride + j;
  }

  // What makes them, of a kernel's instruction set.
  const Sum* (*reader)(const Source&, int, int64_t, int64_t, int64_t, Sum*) = nullptr;

  template <class Arithmetic>
  WEIGHTOPS_INLINE const Sum* made(int term, int64_t i, int64_t j, int64_t count,
                                   Sum* scratch) const {
    if (starts) i += starts[term];
    const int64_t at = term * term_stride + (order ? order[i] : i) * stride + j;
    if (kind == Kind::half)
      return widened<Arithmetic>(static_cast<const Half*>(data) + at, term, i, count, scratch);
    if (kind == Kind::bfloat16)
      return widened<Arithmetic>(static_cast<const BFloat16*>(data) + at, term, i, count, scratch);
    const Sum* from = static_cast<const Sum*>(data) + at;
    if (coeffs) {
      synthesize<Arithmetic>(from, count, scratch);
      return scratch;
    }
    const Sum factor = scale[i * scale_stride + term];
    for (int64_t c = 0; c < count; ++c) scratch[c] = factor * from[c];
    return scratch;
  }

 private:
  template <class Arithmetic, class T>
  WEIGHTOPS_INLINE const Sum* widened(const T* from, int term, int64_t i, int64_t count,
                                      Sum* scratch) const {
    const Sum factor = coeffs ? coeffs[0] : scale ? scale[i * scale_stride + term] : Sum(1);
    for (int64_t c = 0; c < count; ++c) scratch[c] = factor * widen(from[c]);
    for (int64_t k = 1; k < bases; ++k)
      for (int64_t c = 0; c < count; ++c)
        scratch[c] += coeffs[k] * widen(from[k * basis_stride + c]);
    return scratch;
  }

  template <class Arithmetic>
  WEIGHTOPS_INLINE void synthesize(const Sum* from, int64_t count, Sum* to) const {
    constexpr int lanes = Arithmetic::lanes;
    int64_t c = 0;
    for (; c + 2 * lanes <= count; c += 2 * lanes) {
      auto low = Arithmetic::load(from + c) * coeffs[0],
           high = Arithmetic::load(from + c + lanes) * coeffs[0];
      for (int64_t k = 1; k < bases; ++k) {
        low += Arithmetic::load(from + k * basis_stride + c) * coeffs[k];
        high += Arithmetic::load(from + k * basis_stride + c + lanes) * coeffs[k];
      }
      Arithmetic::store(to + c, low);
      Arithmetic::store(to + c + lanes, high);
    }
    for (; c + lanes <= count; c += lanes) {
      auto value = Arithmetic::load(from + c) * coeffs[0];
      for (int64_t k = 1; k < bases; ++k)
        value += Arithmetic::load(from + k * basis_stride + c) * coeffs[k];
      Arithmetic::store(to + c, value);
    }
    for (; c < count; ++c) {
      Sum value = coeffs[0] * from[c];
      for (int64_t k = 1; k < bases; ++k) value += coeffs[k] * from[k * basis_stride + c];
      to[c] = value;
    }
  }
};

constexpr int64_t kTurned = 64;     // depths that are turned at a time
constexpr int64_t kScratch = 1024;  // room for rows of sources; what was turned lies behind it

template <class Kernel>
constexpr int64_t scratch_size() {
  return kScratch + kTurned * std::max(Kernel::lanes, Kernel::rows);
}

// to[c][r] = source row (i + r), column (j + c); at most kTurned columns.
template <class Arithmetic, class Sum>
WEIGHTOPS_INLINE void turn(const Source<Sum>& source, int term, int64_t i, int64_t count_i,
                           int64_t j, int64_t count_j, Sum* to, int64_t to_stride, Sum* scratch) {
  constexpr int lanes = Arithmetic::lanes;
  for (int64_t r = 0; r < count_i; r += lanes) {
    const Sum* rows[lanes];
    const int64_t height = std::min<int64_t>(lanes, count_i - r);
    for (int64_t k = 0; k < height; ++k)
      rows[k] = source.row(term, i + r + k, j, count_j, scratch + k * kTurned);
    int64_t c = 0;
    if (height == lanes)
      for (; c + lanes <= count_j; c += lanes) {
        typename Arithmetic::Vector block[lanes];
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) block[k] = Arithmetic::load(rows[k] + c);
        Arithmetic::transpose(block);
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) Arithmetic::store(to + (c + k) * to_stride + r, block[k]);
      }
    for (; c < count_j; ++c)
      for (int64_t k = 0; k < height; ++k) to[c * to_stride + r + k] = rows[k][c];
  }
}

// Rows [i, i + count) of an operand as a block, at depths [d, d + length).
template <class Kernel>
WEIGHTOPS_INLINE void pack_rows(const Source<typename Kernel::Sum>& source, int term, int64_t i,
                                int64_t count, int64_t d, int64_t length,
                                typename Kernel::Packed* block, typename Kernel::Sum* scratch) {
  using Arithmetic = typename Kernel::Arithmetic;
  if (source.lies == Lies::along) {
    for (int64_t r = 0; r < count; ++r)
      Kernel::pack_row(block, r, 0, source.row(term, i + r, d, length, scratch), length);
    return;
  }
  typename Kernel::Sum* turned = scratch + kScratch;
  for (int64_t at = 0; at < length; at += kTurned) {
    const int64_t part = std::min(kTurned, length - at);
    turn<Arithmetic>(source, term, d + at, part, i, count, turned, kTurned, scratch);
    for (int64_t r = 0; r < count; ++r) Kernel::pack_row(block, r, at, turned + r * kTurned, part);
  }
}

// Columns [i, i + count) of an operand as a panel; what is not there counts as zeros.
template <class Kernel>
WEIGHTOPS_INLINE void pack_columns(const Source<typename Kernel::Sum>& source, int term, int64_t i,
                                   int64_t count, int64_t d, int64_t length,
                                   typename Kernel::Packed* panel, typename Kernel::Sum* scratch) {
  using Arithmetic = typename Kernel::Arithmetic;
  using Sum = typename Kernel::Sum;
  constexpr int lanes = Kernel::lanes;
  if (source.lies == Lies::across) {
    const auto row = [&](int64_t at, Sum* room) __attribute__((always_inline)) {
      const Sum* found = source.row(term, d + at, i, count, room);
      if (count == lanes) return found;
      if (found != room) std::copy_n(found, count, room);
      std::fill(room + count, room + lanes, Sum(0));
      return static_cast<const Sum*>(room);
    };
    for (int64_t at = 0; at < length; at += 2) {
      const Sum* first = row(at, scratch);
      Kernel::pack_columns(panel, at, first,
                           at + 1 < length ? row(at + 1, scratch + lanes) : nullptr);
    }
  } else {
    Sum* turned = scratch + kScratch;
    if (count < lanes) std::fill_n(turned, kTurned * lanes, Sum(0));
    for (int64_t at = 0; at < length; at += kTurned) {
      const int64_t part = std::min(kTurned, length - at);
      turn<Arithmetic>(source, term, i, count, d + at, part, turned, lanes, scratch);
      for (int64_t c = 0; c < part; c += 2)
        Kernel::pack_columns(panel, at + c, turned + c * lanes,
                             c + 1 < part ? turned + (c + 1) * lanes : nullptr);
    }
  }
  Kernel::finish_panel(panel, length);
}

// One of the pieces in which a slice of depths is packed; `scratch` is theirs from the first to the
// last. A piece is what vectors do while the tiles' unit is at work on four products.
template <class Kernel>
WEIGHTOPS_INLINE void pack_rows_piece(const Source<typename Kernel::Sum>& source, int term,
                                      int64_t i, int64_t count, int64_t d, int64_t length,
                                      typename Kernel::Packed* block, typename Kernel::Sum* scratch,
                                      int piece) {
  if constexpr (Kernel::pieces == 16) {
    if (count == Kernel::rows && length == Kernel::slice) {
      if (source.lies == Lies::along) {
        for (int64_t r = 2 * piece; r < 2 * piece + 2; ++r)
          Kernel::pack_row(block, r, 0, source.row(term, i + r, d, length, scratch), length);
        return;
      }
      typename Kernel::Sum* turned = scratch + kScratch;
      const int first = piece / 8 * 16, part = piece % 8;
      if (part < 2) {
        turn<typename Kernel::Arithmetic>(source, term, d + 16 * part, 16, i + first, 16,
                                          turned + 16 * part, Kernel::slice, scratch);
        return;
      }
      const int to = std::min(3 * (part - 1), 16);
      for (int r = 3 * (part - 2); r < to; ++r)
        Kernel::pack_row(block, first + r, 0, turned + r * Kernel::slice, length);
      return;
    }
  }
  if (piece == 0) pack_rows<Kernel>(source, term, i, count, d, length, block, scratch);
}

template <class Kernel>
WEIGHTOPS_INLINE void pack_columns_piece(const Source<typename Kernel::Sum>& source, int term,
                                         int64_t i, int64_t count, int64_t d, int64_t length,
                                         typename Kernel::Packed* panel,
                                         typename Kernel::Sum* scratch, int piece) {
  if constexpr (Kernel::pieces == 16) {
    if (source.lies == Lies::across && count == Kernel::lanes && length == Kernel::slice) {
      const int64_t at = 2 * piece;
      Kernel::pack_columns(panel, at, source.row(term, d + at, i, count, scratch),
                           source.row(term, d + at + 1, i, count, scratch + Kernel::lanes));
      return;
    }
  }
  if (piece == 0) pack_columns<Kernel>(source, term, i, count, d, length, panel, scratch);
}

}  // namespace weightops::product
