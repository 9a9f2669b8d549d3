// Exact linear assignment: every row of a dense score matrix gets its own column, at the best sum.
//
// Shortest augmenting paths after Jonker & Volgenant, "A shortest augmenting path algorithm for
// dense and sparse linear assignment problems" (Computing 38, 1987); their augmenting row reduction
// is done as bids that a displaced row answers one pass later, as in Bertsekas' auction (1988):
//   1. start    column potentials: what the row minima leave, minimised over rows; or given ones
//   2. bid      a free row takes its best column and lowers it by the lead over the second best
//   3. augment  each row still free, by Dijkstra over reduced costs to the nearest free column
// Scores are read as they are and all arithmetic is in double, so nothing is left to polish.
// O(rows^2 cols) at worst; a row of a random problem of size 256 to 1024 is read 5 to 9 times.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "isa.h"

#define WEIGHTOPS_INLINE inline __attribute__((always_inline))
#define WEIGHTOPS_INLINE_LAMBDA __attribute__((always_inline))

namespace weightops::assign {

template <typename T>
struct Workspace {
  struct alignas(64) Line {
    double values[8];
  };
  struct Step {  // of a shortest path tree: a column, the row that holds it, and the way there
    int64_t row, column;
    double offset, distance, potential;
  };
  std::vector<Line> lines;
  std::vector<int64_t> row_of, column_of, free_rows, displaced_rows, free_columns;
  std::vector<Step> tree;
};

template <typename T>
bool all_finite(const T* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(T) - 1), kLowest = Bits{1} << kMantissa;
  constexpr Bits kExponent = kSign - kLowest;
  for (int64_t start = 0; start < count; start += 4096) {
    const int64_t end = std::min(count, start + 4096);
    Bits carries = 0;  // an exponent of ones, and no other, carries into the sign
    for (int64_t k = start; k < end; ++k) {
      Bits bits;
      std::memcpy(&bits, values + k, sizeof bits);
      carries |= (bits & kExponent) + kLowest;
    }
    if (carries & kSign) return false;
  }
  return true;
}

namespace internal {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr int64_t kNone = -1;
inline constexpr int kVectorsPerGroup = 8;
inline constexpr int kBiddingPasses = 8;

template <typename T>
struct Problem {
  const T* score;
  int64_t rows, cols, stride;
  bool maximize, warm;
  int64_t* columns;
  double* potentials;
};

struct Minimum {
  double value;
  int64_t column;
  double second = kInfinity;
};

template <int lanes>
struct Vectors {
  typedef double Doubles __attribute__((vector_size(8 * lanes)));
  typedef float Floats __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
  typedef int64_t Integers __attribute__((vector_size(8 * lanes)));
};

// All of this is always_inline, to be compiled anew into each of the functions below that name an
// instruction set; vectors go by reference, for how they go by value depends on the set.
template <typename T, int lanes>
struct Solver {
  using Doubles = typename Vectors<lanes>::Doubles;
  using Floats = typename Vectors<lanes>::Floats;
  using Integers = typename Vectors<lanes>::Integers;
  static constexpr int64_t kGroup = lanes * kVectorsPerGroup;

  const T* score;
  const int64_t rows, cols, stride, padded;
  const double sign;
  Workspace<T>& ws;
  double *potential, *distance;  // of columns; potentials are padded by -infinity, to cost infinity

  WEIGHTOPS_INLINE Solver(const Problem<T>& problem, Workspace<T>& workspace)
      : score(problem.score),
        rows(problem.rows),
        cols(problem.cols),
        stride(problem.stride),
        padded((cols + kGroup - 1) / kGroup * kGroup),
        sign(problem.maximize ? -1 : 1),
        ws(workspace) {
    ws.lines.resize(padded / 4);
    potential = ws.lines.data()->values;
    distance = potential + padded;
    std::fill(potential + cols, potential + padded, -kInfinity);
  }

  template <typename From>
  static WEIGHTOPS_INLINE void load(const From* from, Doubles& to) {
    if constexpr (sizeof(From) == sizeof(double)) {
      std::memcpy(&to, from, sizeof to);
    } else {
      const Floats& floats = *reinterpret_cast<const Floats*>(from);
#if WEIGHTOPS_X86  // GCC 12 makes five instructions of this conversion, an eighth of the whole
                   // time.
      if constexpr (lanes > 2) asm("vcvtps2pd %1, %0" : "=v"(to) : "m"(floats));
      if constexpr (lanes > 2) return;
#endif
      to = __builtin_convertvector(floats, Doubles);
    }
  }

  static WEIGHTOPS_INLINE void lower(Doubles& to, const Doubles& by) { to = by < to ? by : to; }

  WEIGHTOPS_INLINE void load_cost(const T* scores, const double* from, Doubles& cost) const {
    Doubles subtracted;
    load(scores, cost);
    load(from, subtracted);
    cost = cost * sign - subtracted;
  }

  WEIGHTOPS_INLINE double reduced_cost(int64_t row, int64_t column) const {
    return sign * score[row * stride + column] - potential[column];
  }

  // visit(scores, first column) for each group of columns, the last padded by the row's last score.
  template <typename Visit>
  WEIGHTOPS_INLINE void for_each_group(int64_t row, const Visit& visit) const {
    const T* scores = score + row * stride;
    int64_t column = 0;
    for (; column + kGroup <= cols; column += kGroup) visit(scores + column, column);
    if (column < cols) {
      T padded[kGroup];
      std::fill(padded, padded + kGroup, scores[cols - 1]);
      std::copy(scores + column, scores + cols, padded);
      visit(padded, column);
    }
  }

  WEIGHTOPS_INLINE void prefetch(int64_t row, int64_t column) const {
    const T* scores = score + row * stride + column;
    for (int64_t k = 0; k < kGroup; k += 64 / sizeof(T)) __builtin_prefetch(scores + k);
  }

  // The minimum of each lane and the group of columns it is in.
  struct LaneMinima {
    Doubles value = Doubles{} + kInfinity;
    Integers group = Integers{};

    WEIGHTOPS_INLINE void merge(const Doubles& minima, int64_t first_column) {
      group = minima < value ? Integers{} + first_column : group;
      lower(value, minima);
    }

    // Of equal columns, one a lane, the first free one if there is one, else the first.
    template <typename At>
    WEIGHTOPS_INLINE Minimum smallest(const std::vector<int64_t>& row_of, const At& at) const {
      double halves[lanes];
      std::memcpy(halves, &value, sizeof halves);
      for (int half = lanes / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) halves[k] = std::min(halves[k], halves[k + half]);
      const double minimum = halves[0];
      if (!(minimum < kInfinity)) return {minimum, 0};
      unsigned tied_lanes = 0;
      for (int lane = 0; lane < lanes; ++lane)
        tied_lanes |= static_cast<unsigned>(value[lane] == minimum) << lane;
      int64_t column = std::numeric_limits<int64_t>::max();
      for (; tied_lanes != 0; tied_lanes &= tied_lanes - 1) {
        const int lane = __builtin_ctz(tied_lanes);
        const int64_t first = group[lane] + lane;
        unsigned tied_vectors = 0;
        for (int k = 0; k < kVectorsPerGroup; ++k)
          tied_vectors |= static_cast<unsigned>(at(first + k * lanes) == minimum) << k;
        const int64_t found = first + __builtin_ctz(tied_vectors) * lanes;
        if (row_of[found] == kNone) return {minimum, found};
        column = std::min(column, found);
      }
      return {minimum, column};
    }
  };

  // potential = min(potential, cost - row minimum of (cost - start)); start is held in distance.
  WEIGHTOPS_INLINE void reduce(int64_t row) {
    Doubles minima = Doubles{} + kInfinity;
    for_each_group(row, [&](const T* scores, int64_t first) WEIGHTOPS_INLINE_LAMBDA {
      for (int64_t k = 0; k < kGroup; k += lanes) {
        Doubles cost;
        load_cost(scores + k, distance + first + k, cost);
        lower(minima, cost);
      }
    });
    double minimum = minima[0];
    for (int lane = 1; lane < lanes; ++lane) minimum = std::min(minimum, minima[lane]);
    for_each_group(row, [&](const T* scores, int64_t first) WEIGHTOPS_INLINE_LAMBDA {
      prefetch(std::min(row + 1, rows - 1), first);
      for (int64_t k = 0; k < kGroup; k += lanes) {
        Doubles cost, current;
        load(scores + k, cost);
        load(potential + first + k, current);
        lower(current, cost * sign - minimum);
        std::memcpy(potential + first + k, &current, sizeof current);
      }
    });
  }

  WEIGHTOPS_INLINE Minimum bid(int64_t row, int64_t next_row) const {
    LaneMinima minima;
    Doubles second = Doubles{} + kInfinity;
    for_each_group(row, [&](const T* scores, int64_t first) WEIGHTOPS_INLINE_LAMBDA {
      prefetch(next_row, first);
      Doubles best = Doubles{} + kInfinity, next = best;
      for (int64_t k = 0; k < kGroup; k += lanes) {
        Doubles cost;
        load_cost(scores + k, potential + first + k, cost);
        lower(next, cost > best ? cost : best);
        lower(best, cost);
      }
      lower(second, next);
      lower(second, best > minima.value ? best : minima.value);
      minima.merge(best, first);
    });
    Minimum best = minima.smallest(ws.row_of, [&](int64_t column) WEIGHTOPS_INLINE_LAMBDA {
      return column < cols ? reduced_cost(row, column) : kInfinity;
    });
    for (int lane = 0; lane < lanes; ++lane) {
      const bool holds_best = lane == best.column % lanes;
      best.second = std::min(best.second, holds_best ? second[lane] : minima.value[lane]);
    }
    return best;
  }

  // Every free row bids once. Were displaced rows to bid at once, a Gram matrix of size 1024 would
  // be read 65 times instead of 9.
  WEIGHTOPS_INLINE void bid_once() {
    ws.displaced_rows.clear();
    for (size_t k = 0; k < ws.free_rows.size(); ++k) {
      const int64_t row = ws.free_rows[k];
      const Minimum best = bid(row, ws.free_rows[std::min(k + 1, ws.free_rows.size() - 1)]);
      const int64_t column = best.column, holder = ws.row_of[column];
      const double lowered = potential[column] - (best.second - best.value);
      const bool lowers = lowered < potential[column] && lowered > -kInfinity;
      if (lowers) potential[column] = lowered;
      if (holder != kNone && !lowers) {
        ws.displaced_rows.push_back(row);
        continue;
      }
      if (holder != kNone) {
        ws.column_of[holder] = kNone;
        ws.displaced_rows.push_back(holder);
      }
      ws.row_of[column] = row;
      ws.column_of[row] = column;
    }
    ws.free_rows.swap(ws.displaced_rows);
  }

  // Lowers the distances to those by way of this row and returns the smallest.
  WEIGHTOPS_INLINE Minimum relax(int64_t row, double offset) {
    LaneMinima minima;
    for_each_group(row, [&](const T* scores, int64_t first) WEIGHTOPS_INLINE_LAMBDA {
      Doubles group = Doubles{} + kInfinity;
      for (int64_t k = 0; k < kGroup; k += lanes) {
        Doubles cost, current;
        load_cost(scores + k, potential + first + k, cost);
        cost -= offset;
        load(distance + first + k, current);
        lower(cost, current);
        std::memcpy(distance + first + k, &cost, sizeof cost);
        lower(group, cost);
      }
      minima.merge(group, first);
    });
    return minima.smallest(
        ws.row_of, [&](int64_t column) WEIGHTOPS_INLINE_LAMBDA { return distance[column]; });
  }

  WEIGHTOPS_INLINE int64_t free_column_at(double value) const {
    for (const int64_t column : ws.free_columns)
      if (ws.row_of[column] == kNone && distance[column] == value) return column;
    return kNone;
  }

  WEIGHTOPS_INLINE void augment(int64_t root) {
    auto& tree = ws.tree;
    tree.clear();
    tree.push_back({root, kNone, 0, 0, 0});
    int64_t ties = 0;
    double reached = -kInfinity;
    std::fill(distance, distance + padded, kInfinity);
    Minimum nearest = relax(root, 0);
    while (true) {
      if (!(nearest.value < kInfinity))  // sums have overflowed; any end will do
        nearest.column = std::find(ws.row_of.begin(), ws.row_of.end(), kNone) - ws.row_of.begin();
      // A free column among equals ends the search. Looking at the powers of two only costs less
      // than reading the rows, whether ties are few or everything is tied.
      ties = nearest.value == reached ? ties + 1 : 0;
      if (ties > 0 && (ties & (ties - 1)) == 0 && ws.row_of[nearest.column] != kNone) {
        const int64_t column = free_column_at(reached);
        if (column != kNone) nearest.column = column;
      }
      reached = nearest.value;
      const int64_t column = nearest.column, row = ws.row_of[column];
      if (row == kNone) break;
      const double offset = reduced_cost(row, column) - reached;
      tree.push_back({row, column, offset, reached, potential[column]});
      // At infinite cost relax() leaves a column alone once it is in the tree.
      potential[column] = -kInfinity;
      distance[column] = kInfinity;
      nearest = relax(row, offset);
    }
    for (size_t k = 1; k < tree.size(); ++k)
      potential[tree[k].column] = tree[k].potential + std::min(0.0, tree[k].distance - reached);
    // Predecessors are found again, on the path only: storing them would slow relax() by a third.
    int64_t column = nearest.column;
    double before = potential[column];
    for (size_t end = tree.size(); end > 0;) {
      size_t best = 0;
      double least = kInfinity;
      for (size_t k = 0; k < end; ++k) {
        const double cost = sign * score[tree[k].row * stride + column] - before - tree[k].offset;
        if (cost < least) best = k;
        least = std::min(least, cost);
      }
      ws.row_of[column] = tree[best].row;
      ws.column_of[tree[best].row] = column;
      column = tree[best].column;
      before = tree[best].potential;
      end = best;
    }
  }

  WEIGHTOPS_INLINE void start_cold(const double* given, bool reduces) {
    ws.row_of.assign(cols, kNone);
    ws.column_of.assign(rows, kNone);
    ws.free_rows.resize(rows);
    std::iota(ws.free_rows.begin(), ws.free_rows.end(), 0);
    std::fill(potential, potential + cols, reduces ? kInfinity : 0);
    if (!reduces) return;
    std::fill(distance, distance + padded, -kInfinity);
    for (int64_t column = 0; column < cols; ++column)
      distance[column] = given ? sign * given[column] : 0;
    for (int64_t row = 0; row < rows; ++row) reduce(row);
  }

  // The rows bid at the given potentials, a quarter at a time. What fraction of all rows has been
  // displaced tells what the potentials are worth, and hardly depends on the size:
  //   potentials of          the same   2 % noise   2 % of a Gram   none (0)   an unrelated problem
  //   quarter of the rows      0.004      0.007         0.012         0.016          0.027
  //   half of the rows         0.016      0.023         0.043         0.055          0.083
  WEIGHTOPS_INLINE void start_warm(const double* given) {
    start_cold(nullptr, false);
    ws.free_rows.clear();
    for (int64_t column = 0; column < cols; ++column) potential[column] = sign * given[column];
    for (int64_t quarter = 0; quarter < 4; ++quarter) {
      for (int64_t row = quarter; row < rows; row += 4) ws.free_rows.push_back(row);
      if (quarter == 2) continue;
      bid_once();
      const double displaced = static_cast<double>(ws.free_rows.size()) / rows;
      if (quarter == 0 && displaced > 0.018) return start_cold(nullptr, true);
      if (quarter == 1 && displaced > 0.035)
        return start_cold(displaced < 0.05 ? given : nullptr, true);
    }
  }

  // Potentials far above the scores they are subtracted from have rounded them away.
  WEIGHTOPS_INLINE bool is_precise() const {
    double total = 0, largest = 0;
    for (int64_t row = 0; row < rows; ++row)
      total += std::abs(static_cast<double>(score[row * stride + ws.column_of[row]]));
    for (int64_t column = 0; column < cols; ++column)
      largest = std::max(largest, std::abs(potential[column]));
    return largest * rows <= 1024 * total;
  }

  WEIGHTOPS_INLINE void run(const Problem<T>& problem) {
    // With columns to spare, free ones must keep the largest potential, which only a start from
    // zero ensures. The careful start has no potential grow larger than the optimum asks for.
    enum { kWarm, kCold, kCareful };
    const bool square = rows == cols;
    const bool warm = problem.warm && square && all_finite(problem.potentials, cols);
    for (int start = warm ? kWarm : kCold;; ++start) {
      if (start == kWarm) {
        start_warm(problem.potentials);
      } else {
        start_cold(nullptr, square && start == kCold);
      }
      for (int pass = 0; pass < kBiddingPasses && start != kCareful; ++pass) bid_once();
      ws.free_columns.clear();
      for (int64_t column = 0; column < cols; ++column)
        if (ws.row_of[column] == kNone) ws.free_columns.push_back(column);
      for (const int64_t row : ws.free_rows) augment(row);
      if (start == kCareful || is_precise()) break;
    }
    std::copy(ws.column_of.begin(), ws.column_of.end(), problem.columns);
    for (int64_t column = 0; column < cols; ++column)
      problem.potentials[column] = sign * potential[column];
  }
};

template <typename T>
void solve_generic(const Problem<T>& problem, Workspace<T>& ws) {
  Solver<T, 2>(problem, ws).run(problem);
}

#if WEIGHTOPS_X86
template <typename T>
WEIGHTOPS_AVX2 void solve_avx2(const Problem<T>& problem, Workspace<T>& ws) {
  Solver<T, 4>(problem, ws).run(problem);
}

template <typename T>
WEIGHTOPS_AVX512 void solve_avx512(const Problem<T>& problem, Workspace<T>& ws) {
  Solver<T, 8>(problem, ws).run(problem);
}
#endif

}  // namespace internal

// score is [rows, cols] with rows <= cols, finite and below 1e300; columns is [rows]. potentials,
// [cols], are read if warm (any values do, near ones save time) and always written:
//   score[i][j] - potentials[j] <= score[i][columns[i]] - potentials[columns[i]]   if maximize
// and >= otherwise, up to rounding; columns left over hold the least of them (>=: the greatest).
template <typename T>
void solve(const T* score, int64_t rows, int64_t cols, int64_t stride, bool maximize,
           int64_t* columns, double* potentials, bool warm, Workspace<T>& ws) {
  if (cols == 0) return;
  const internal::Problem<T> problem{score,    rows, cols,    stride,
                                     maximize, warm, columns, potentials};
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return internal::solve_avx512(problem, ws);
  if (isa() == Isa::avx2) return internal::solve_avx2(problem, ws);
#endif
  internal::solve_generic(problem, ws);
}

}  // namespace weightops::assign

#undef WEIGHTOPS_INLINE
#undef WEIGHTOPS_INLINE_LAMBDA
