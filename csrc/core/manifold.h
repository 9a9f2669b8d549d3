// Linear maps whose weights lie on a manifold, y[r] = sum_k coeffs[context of r, k] W_k x[r], and
// their gradients, as matrix products: one whose depth is all bases where contexts have few rows,
// one a context, with its weights made on the way, where they have many.
#pragma once

#include <atomic>
#include <functional>
#include <numeric>

#include "product_multiply.h"

namespace weightops::manifold {

using product::Kind;
using product::Lies;
using product::Part;
using product::Product;
using product::Range;
using product::Source;

template <class Sum>
WEIGHTOPS_INLINE void put(void* to, Kind kind, int64_t at, const Sum* values, int64_t count) {
  if (kind == Kind::same) {
    std::copy_n(values, count, static_cast<Sum*>(to) + at);
  } else if (kind == Kind::half) {
    for (int64_t c = 0; c < count; ++c) narrow(float(values[c]), static_cast<Half*>(to)[at + c]);
  } else {
    for (int64_t c = 0; c < count; ++c)
      narrow(float(values[c]), static_cast<BFloat16*>(to)[at + c]);
  }
}

// What products of one kind of tiles have in common: vectors of a tile's rows, and whether a result
// is not finite, which tells a kernel of split numbers that infinities or NaN came its way.
template <class Kernel>
struct Sums {
  using Sum = typename Kernel::Sum;
  using Arithmetic = typename Kernel::Arithmetic;
  using Vector = typename Arithmetic::Vector;
  static constexpr int lanes = Kernel::lanes, step = Arithmetic::lanes;
  static constexpr bool joint = false;

  Vector worst = {};

  WEIGHTOPS_INLINE void watch(const Vector& value) { worst += value - value; }
  WEIGHTOPS_INLINE bool finite() const { return Arithmetic::total(worst) == 0; }
};

// Rows of a result: a term's products times the row's factor for it.
template <class Kernel>
struct RowSums : Sums<Kernel> {
  using typename Sums<Kernel>::Sum;
  using typename Sums<Kernel>::Vector;
  using typename Sums<Kernel>::Arithmetic;
  using Sums<Kernel>::lanes, Sums<Kernel>::step;

  void* to;
  Kind kind;
  int64_t stride;
  const int64_t* order;    // places of the rows, or null
  const int64_t* context;  // of each row, or null: 0
  const Sum* factors;      // [context, term], or null: 1
  int64_t terms;
  const Sum* shift;  // [context, column], or null
  int64_t shift_stride;
  const Sum* row_shift;  // [row], or null
  // <products, other's row> is added to dots[row, term], where there are dots.
  Source<Sum> other;
  Sum* dots;

  int64_t sums() const { return 1; }

  template <bool first, bool last>
  WEIGHTOPS_INLINE void add(const Part& part, Range range, const Sum* tile, Sum* sums) {
    const bool whole = part.width == lanes;
    alignas(64) Sum rest[lanes], room[product::kScratch];
    for (int64_t m = range.begin; m < range.end; ++m) {
      const int64_t row = part.i + m, at = context ? context[row] : 0;
      const Sum factor = factors ? factors[at * terms + part.term] : Sum(1);
      const Sum *from = tile + m * lanes, *own = nullptr;
      if (dots) {
        own = other.row(0, row, part.j, part.width, room);
        if (!whole) {
          std::fill(std::copy_n(own, part.width, rest), rest + lanes, Sum(0));
          own = rest;
        }
        Vector dot = {};
#pragma GCC unroll 4
        for (int v = 0; v < lanes; v += step)
          dot += Arithmetic::load(from + v) * Arithmetic::load(own + v);
        dots[row * terms + part.term] += Arithmetic::total(dot);
      }
      if (to == nullptr) continue;
      Sum* kept = sums + m * lanes;
      Vector values[lanes / step];
#pragma GCC unroll 4
      for (int v = 0; v < lanes; v += step) {
        values[v / step] = Arithmetic::load(from + v) * factor;
        if constexpr (!first) values[v / step] += Arithmetic::load(kept + v);
      }
      if constexpr (last) {
        const int64_t place = (order ? order[row] : row) * stride + part.j;
        const Sum* plus = shift ? shift + at * shift_stride + part.j : nullptr;
        if (plus && !whole) {
          std::fill(std::copy_n(plus, part.width, rest), rest + lanes, Sum(0));
          plus = rest;
        }
#pragma GCC unroll 4
        for (int v = 0; v < lanes; v += step) {
          if (plus) values[v / step] += Arithmetic::load(plus + v);
          if (row_shift) values[v / step] += row_shift[row];
          this->watch(values[v / step]);
        }
        if (kind == Kind::same && whole) {
          for (int v = 0; v < lanes; v += step)
            Arithmetic::store(static_cast<Sum*>(to) + place + v, values[v / step]);
        } else {
          for (int v = 0; v < lanes; v += step) Arithmetic::store(kept + v, values[v / step]);
          put(to, kind, place, kept, part.width);
        }
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < lanes; v += step) Arithmetic::store(kept + v, values[v / step]);
      }
    }
  }

  WEIGHTOPS_INLINE void take(const Part& part, Range range, const Sum* tile, Sum* sums) {
    if (part.first)
      part.last ? add<true, true>(part, range, tile, sums)
                : add<true, false>(part, range, tile, sums);
    else
      part.last ? add<false, true>(part, range, tile, sums)
                : add<false, false>(part, range, tile, sums);
  }
};

// Rows that are added to what lies at places[row], columns on from there.
template <class Kernel>
struct PlaceSums : Sums<Kernel> {
  using typename Sums<Kernel>::Sum;
  using typename Sums<Kernel>::Vector;
  using typename Sums<Kernel>::Arithmetic;
  using Sums<Kernel>::lanes, Sums<Kernel>::step;
  static constexpr bool joint = true;

  Sum* to;
  const int64_t* places;

  int64_t sums() const { return 0; }

  WEIGHTOPS_INLINE void take(const Part& part, Range range, const Sum* tile, Sum*) {
    tile += range.begin * lanes;
    for (int64_t m = range.begin; m < range.end; ++m, tile += lanes) {
      Sum* own = to + places[part.i + m] + part.j;
      if (part.width == lanes) {
#pragma GCC unroll 4
        for (int v = 0; v < lanes; v += step) {
          const Vector value = Arithmetic::load(tile + v);
          this->watch(value);
          Arithmetic::store(own + v, Arithmetic::load(own + v) + value);
        }
      } else {
        for (int64_t c = 0; c < part.width; ++c) {
          this->worst[0] += tile[c] - tile[c];
          own[c] += tile[c];
        }
      }
    }
  }
};

// Gradients of the bases: each from a term of its own, or all from every context's gradient.
template <class Kernel>
struct BasisSums : Sums<Kernel> {
  using typename Sums<Kernel>::Sum;
  using typename Sums<Kernel>::Vector;
  using typename Sums<Kernel>::Arithmetic;
  using Sums<Kernel>::lanes, Sums<Kernel>::step;

  void* to;  // [basis, row, column], or null
  Kind kind;
  int64_t stride, basis_stride, bases;
  bool large;         // more than the caches hold
  const Sum* coeffs;  // [term, basis], or null: a term is a basis
  // <products, bases> is added to dots[term, basis], where there are dots.
  Source<Sum> weight;  // its terms are the bases
  Sum* dots;

  int64_t sums() const { return bases; }

  WEIGHTOPS_INLINE void take(const Part& part, Range range, const Sum* tile, Sum* sums) {
    const int64_t size = int64_t(Kernel::rows) * lanes;
    alignas(64) Sum rest[lanes], room[product::kScratch];
    if (coeffs == nullptr) {
      Sum* own = sums + part.term * size;
      if (part.opens && part.closes) {
        write(part, range, part.term, tile);
        return;
      }
      accumulate(tile, Sum(1), own, range, part.opens);
      if (part.closes) write(part, range, part.term, own);
      return;
    }
    if (dots)
      for (int64_t k = 0; k < bases; ++k) {
        Vector dot = {};
        for (int64_t m = range.begin; m < range.end; ++m) {
          const Sum* own = weight.row(k, part.i + m, part.j, part.width, room);
          if (part.width < lanes) {
            std::fill(std::copy_n(own, part.width, rest), rest + lanes, Sum(0));
            own = rest;
          }
#pragma GCC unroll 4
          for (int v = 0; v < lanes; v += step)
            dot += Arithmetic::load(tile + m * lanes + v) * Arithmetic::load(own + v);
        }
        this->watch(dot);
        dots[part.term * bases + k] += Arithmetic::total(dot);
      }
    if (to == nullptr) return;
    for (int64_t k = 0; k < bases; ++k) {
      accumulate(tile, coeffs[part.term * bases + k], sums + k * size, range, part.first);
      if (part.last) write(part, range, k, sums + k * size);
    }
  }

 private:
  WEIGHTOPS_INLINE void accumulate(const Sum* tile, Sum factor, Sum* sums, Range range,
                                   bool first) {
    for (int64_t at = range.begin * lanes; at < range.end * lanes; at += step) {
      Vector value = Arithmetic::load(tile + at) * factor;
      if (!first) value += Arithmetic::load(sums + at);
      Arithmetic::store(sums + at, value);
    }
  }
  WEIGHTOPS_INLINE void write(const Part& part, Range range, int64_t basis, const Sum* sums) {
    for (int64_t m = range.begin; m < range.end; ++m) {
      const int64_t place = basis * basis_stride + (part.i + m) * stride + part.j;
      Sum* own = static_cast<Sum*>(to) + place;
      const bool past_cache =
          large && part.width == lanes && reinterpret_cast<uintptr_t>(own) % 64 == 0;
      for (int v = 0; v < lanes; v += step) {
        const Vector value = Arithmetic::load(sums + m * lanes + v);
        this->watch(value);
        if (past_cache) Arithmetic::stream(own + v, value);
      }
      if (!past_cache) put(to, kind, place, sums + m * lanes, part.width);
    }
  }
};

}  // namespace weightops::manifold
