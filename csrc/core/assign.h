// Exact linear assignment: every row of a dense score matrix gets its own column, at the best sum.
//
// Shortest augmenting paths after Jonker & Volgenant, "A shortest augmenting path algorithm for
// dense and sparse linear assignment problems" (Computing 38, 1987); their augmenting row reduction
// is done as bids that a displaced row answers one pass later, as in Bertsekas' auction (1988):
//   1. start    column potentials: what the row minima leave, minimised over rows; or given ones
//   2. bid      a free row takes its best column and lowers it by the lead over the second best
//   3. augment  each row still free, by Dijkstra over reduced costs to the nearest free column
// Scores are read as they are and all arithmetic is in double, so nothing is left to polish.
// O(rows^2 cols) at worst; but every row is read in full only once, see assign_scan.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "assign_scan.h"

namespace weightops::assign {

template <typename T>
struct Workspace {
  template <typename Value>
  struct alignas(64) Line {
    Value values[64 / sizeof(Value)];
  };
  struct Step {  // of a shortest path tree: a column, the row that holds it, and the way there
    int64_t row, column;
    double offset, distance, potential;
  };
  std::vector<Line<double>> lines;
  std::vector<Line<T>> coarse_lines;
  std::vector<double> own_cost;  // of columns: the cost of the row that holds it
  std::vector<int64_t> row_of, column_of, free_rows, displaced_rows, free_columns, reached_from;
  std::vector<Step> tree;
};

namespace internal {

// A pass costs its bids whatever it achieves, and the last few rows chase each other round.
inline constexpr int kBiddingPasses = 16;
inline constexpr size_t kFewRows = 3;
inline constexpr int64_t kSampledRows = 16;

template <typename T>
struct Problem {
  const T* score;
  int64_t rows, cols, stride;
  bool maximize, warm;
  int64_t* columns;
  double* potentials;
  const T* next = nullptr;
};

inline bool all_finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double value) { return std::isfinite(value); });
}

template <typename T, int lanes, int vectors>
struct Solver : Scan<T, lanes, vectors> {
  using Base = Scan<T, lanes, vectors>;
  using Base::ahead;
  using Base::ahead_end;
  using Base::bounds;
  using Base::coarse;
  using Base::cols;
  using Base::distance;
  using Base::groups;
  using Base::kBlock;
  using Base::kGroup;
  using Base::padded;
  using Base::potential;
  using Base::rows;
  using Base::score;
  using Base::sign;
  using Base::stride;
  using Base::zero;

  Workspace<T>& ws;
  double* nearest;  // of groups: the least distance

  WEIGHTOPS_INLINE Solver(const Problem<T>& problem, Workspace<T>& workspace) : ws(workspace) {
    score = problem.score;
    rows = problem.rows;
    cols = problem.cols;
    stride = problem.stride;
    sign = problem.maximize ? -1 : 1;
    ahead = reinterpret_cast<const char*>(problem.next);
    ahead_end = ahead;
    if (ahead && rows * stride * sizeof(T) >= kFetchAhead) ahead_end += kFetchAhead;
    padded = (cols + kBlock - 1) / kBlock * kBlock;
    groups = padded / kGroup;
    ws.lines.resize((2 * padded + groups) / 8 + 1);
    ws.coarse_lines.resize((2 * padded + rows * groups) * sizeof(T) / 64 + 1);
    potential = ws.lines.data()->values;
    distance = potential + padded;
    nearest = distance + padded;
    coarse = ws.coarse_lines.data()->values;
    zero = coarse + padded;
    bounds = zero + padded;
    ws.reached_from.resize(padded);
    this->reached_from = ws.reached_from.data();
    std::fill(potential + cols, potential + padded, -kInfinity);
    std::fill(coarse + cols, coarse + padded, -std::numeric_limits<T>::infinity());
    std::fill(zero, zero + cols, 0);
    std::fill(zero + cols, zero + padded, -std::numeric_limits<T>::infinity());
  }

  WEIGHTOPS_INLINE void give(int64_t column, int64_t row) {
    ws.row_of[column] = row;
    ws.column_of[row] = column;
    ws.own_cost[column] = this->cost(row, column);
  }

  // The row takes its best column, lowered by the lead over the second best; whoever loses waits.
  WEIGHTOPS_INLINE void place(int64_t row, const Minimum& best) {
    const int64_t column = best.column, holder = ws.row_of[column];
    const double lowered = potential[column] - (best.second - best.value);
    const bool lowers = lowered < potential[column] && lowered > -kInfinity;
    if (lowers) {
      potential[column] = lowered;
      coarse[column] = rounded_up<T>(lowered);
    }
    if (holder != kNone && !lowers) {
      ws.displaced_rows.push_back(row);
      return;
    }
    if (holder != kNone) {
      ws.column_of[holder] = kNone;
      ws.displaced_rows.push_back(holder);
    }
    give(column, row);
  }

  // Every free row bids once. Were displaced rows to bid at once, a Gram matrix of size 1024 would
  // take seven times as many bids.
  WEIGHTOPS_INLINE void bid_once() {
    ws.displaced_rows.clear();
    typename Base::Pair next{};
    if (!ws.free_rows.empty()) next = this->lowest_two(ws.free_rows[0]);
    for (size_t k = 0; k < ws.free_rows.size(); ++k) {
      const auto pair = next;
      this->fetch_ahead();
      if (k + 1 < ws.free_rows.size()) next = this->lowest_two(ws.free_rows[k + 1]);
      place(ws.free_rows[k], this->bid(ws.free_rows[k], pair, ws.row_of));
    }
    ws.free_rows.swap(ws.displaced_rows);
  }

  // Lowers the distances by way of this row that can be below the nearest free column's.
  WEIGHTOPS_INLINE void relax(int64_t row, double offset) {
    double limit = kInfinity;
    for (const int64_t column : ws.free_columns) limit = std::min(limit, distance[column]);
    const T key = rounded_up<T>(limit + offset);
    this->fetch_ahead();
    for (int64_t start = 0; start < groups; start += 64) {
      uint64_t open = this->below(row, start, key);
      for (; open != 0; open &= open - 1) {
        const int64_t group = start + __builtin_ctzll(open);
        nearest[group] = this->relax_group(row, group, offset, ws.tree.size() - 1);
      }
    }
  }

  WEIGHTOPS_INLINE Least find_nearest() const {
    const Least found = this->least(nearest);
    return {found.value, this->column_at(found.index, found.value, ws.row_of)};
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
    std::fill(nearest, nearest + groups, kInfinity);
    relax(root, 0);
    Least next;
    while (true) {
      next = find_nearest();
      if (!(next.value < kInfinity))  // sums have overflowed; any end will do
        next.index = std::find(ws.row_of.begin(), ws.row_of.end(), kNone) - ws.row_of.begin();
      // A free column among equals ends the search. Looking at the powers of two only costs less
      // than reading the rows, whether ties are few or everything is tied.
      ties = next.value == reached ? ties + 1 : 0;
      if (ties > 0 && (ties & (ties - 1)) == 0 && ws.row_of[next.index] != kNone) {
        const int64_t column = free_column_at(reached);
        if (column != kNone) next.index = column;
      }
      reached = next.value;
      const int64_t column = next.index, row = ws.row_of[column];
      if (row == kNone) break;
      const double offset = ws.own_cost[column] - potential[column] - reached;
      tree.push_back({row, column, offset, reached, potential[column]});
      // At infinite cost relax() leaves a column alone once it is in the tree.
      potential[column] = -kInfinity;
      distance[column] = kInfinity;
      nearest[column / kGroup] = this->nearest_of(column / kGroup);
      relax(row, offset);
    }
    for (size_t k = 1; k < tree.size(); ++k)
      potential[tree[k].column] = tree[k].potential + std::min(0.0, tree[k].distance - reached);
    // Overflow may leave the last column out of reach: it goes to the root.
    int64_t column = next.index, step = reached < kInfinity ? this->reached_from[column] : 0;
    while (true) {
      const int64_t row = tree[step].row, left = tree[step].column;
      give(column, row);
      if (step == 0) break;
      column = left;
      step = this->reached_from[column];
    }
    ws.free_columns.erase(std::find(ws.free_columns.begin(), ws.free_columns.end(), next.index));
  }

  WEIGHTOPS_INLINE void free_all() {
    ws.own_cost.resize(cols);
    ws.row_of.assign(cols, kNone);
    ws.column_of.assign(rows, kNone);
    ws.free_rows.clear();
    ws.displaced_rows.clear();
  }

  // potential = min over rows of (cost - row minimum). False, as below: a score is not finite.
  WEIGHTOPS_INLINE bool start_reduced() {
    free_all();
    ws.free_rows.resize(rows);
    std::iota(ws.free_rows.begin(), ws.free_rows.end(), 0);
    double* highest = nearest;
    std::fill(potential, potential + cols, kInfinity);
    std::fill(highest, highest + groups, 0);
    std::fill(highest, highest + (cols + kGroup - 1) / kGroup, kInfinity);
    bool finite = true;
    for (int64_t row = 0; row < rows; ++row) {
      finite &= this->read(row, zero);
      this->lower_potentials(row, this->least(bounds + row * groups).value, highest);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < groups; ++k) {
        T& bound = bounds[row * groups + k];
        bound = rounded_down<T>(bound - highest[k]);
      }
    return finite;
  }

  // From the given potentials, or zero; rows bid as soon as they have been read.
  WEIGHTOPS_INLINE bool start_from(const double* given, bool bids) {
    free_all();
    for (int64_t column = 0; column < cols; ++column) {
      potential[column] = given ? sign * given[column] : 0;
      coarse[column] = rounded_up<T>(potential[column]);
    }
    bool finite = true;
    // A row bids while the next is read, which hides how long each step of a bid awaits the last.
    typename Base::Pair pair{}, last;
    for (int64_t row = 0; row < rows; ++row) {
      if (!given || row >= sampled()) finite &= this->read(row, coarse);
      last = pair;
      pair = this->lowest_two(row);
      if (!bids) ws.displaced_rows.push_back(row);
      if (bids && row > 0) place(row - 1, this->first_bid(row - 1, last, ws.row_of));
    }
    if (bids && rows > 0) place(rows - 1, this->first_bid(rows - 1, pair, ws.row_of));
    ws.free_rows.swap(ws.displaced_rows);
    return finite;
  }

  // Rows that the test of given potentials reads; a warm start finds their bounds in place.
  WEIGHTOPS_INLINE int64_t sampled() const {
    return std::min(rows, std::max(kSampledRows, rows / 16));
  }

  // Potentials bound the optimum from below: by their sum and that of the row minima they leave. In
  // units of the mean lead of a row's best column over its second best, the best potentials raise
  // the bound over that by zeros by 0.5, a cold start by 0.27, those before 2 % of noise by 0.48
  // (Gram matrices) or 0.04 (uniform scores, size 1024). The first rows tell, and a cold start
  // reads them next.
  WEIGHTOPS_INLINE bool is_worth_a_start(const double* given) {
    double total = 0, gain = 0, lead = 0;
    for (int64_t column = 0; column < cols; ++column) {
      total += sign * given[column];
      coarse[column] = rounded_up<T>(sign * given[column]);
    }
    bool finite = true;
    for (int64_t row = 0; row < sampled(); ++row) {
      const T* minima = bounds + row * groups;
      this->read(row, zero);
      double best = kInfinity, second = kInfinity;
      for (int64_t k = 0; k < groups; ++k) {
        second = std::min(second, std::max(best, static_cast<double>(minima[k])));
        best = std::min(best, static_cast<double>(minima[k]));
      }
      lead += second - best;
      finite &= this->read(row, coarse);
      gain += this->least(minima).value - best;
    }
    return finite && gain + sampled() * (total / cols) > 0.1 * lead;
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

  WEIGHTOPS_INLINE bool run(const Problem<T>& problem) {
    // With columns to spare, free ones must keep the largest potential, which only a start from
    // zero ensures. The careful start has no potential grow larger than the optimum asks for.
    enum { kWarm, kCold, kCareful };
    const bool square = rows == cols;
    const bool warm = problem.warm && square && all_finite(problem.potentials, cols) &&
                      is_worth_a_start(problem.potentials);
    for (int start = warm ? kWarm : kCold;; ++start) {
      const bool reduces = square && start == kCold;
      if (!(reduces ? start_reduced()
                    : start_from(start == kWarm ? problem.potentials : nullptr, start != kCareful)))
        return false;
      const int passes = start == kCareful ? 0 : kBiddingPasses;
      for (int pass = 0; pass < passes && ws.free_rows.size() > kFewRows; ++pass) bid_once();
      ws.free_columns.clear();
      for (int64_t column = 0; column < cols; ++column)
        if (ws.row_of[column] == kNone) ws.free_columns.push_back(column);
      for (const int64_t row : ws.free_rows) augment(row);
      if (start == kCareful || is_precise()) break;
    }
    std::copy(ws.column_of.begin(), ws.column_of.end(), problem.columns);
    for (int64_t column = 0; column < cols; ++column)
      problem.potentials[column] = sign * potential[column];
    return true;
  }
};

template <typename T>
bool solve_generic(const Problem<T>& problem, Workspace<T>& ws) {
  return Solver<T, 2, 4>(problem, ws).run(problem);
}

#if WEIGHTOPS_X86
template <typename T>
WEIGHTOPS_AVX2 bool solve_avx2(const Problem<T>& problem, Workspace<T>& ws) {
  return Solver<T, 4, 4>(problem, ws).run(problem);
}

template <typename T>
WEIGHTOPS_AVX512 bool solve_avx512(const Problem<T>& problem, Workspace<T>& ws) {
  return Solver<T, 8, 2>(problem, ws).run(problem);
}
#endif

}  // namespace internal

// score is [rows, cols] with rows <= cols and below 1e300; false if it is not finite. columns is
// [rows]. potentials, [cols], are read if warm (any values do, near ones save time) and written:
//   score[i][j] - potentials[j] <= score[i][columns[i]] - potentials[columns[i]]   if maximize
// and >= otherwise, up to rounding; columns left over hold the least of them (>=: the greatest).
// next: scores of the same shape that this thread solves next, or null.
template <typename T>
bool solve(const T* score, int64_t rows, int64_t cols, int64_t stride, bool maximize,
           int64_t* columns, double* potentials, bool warm, Workspace<T>& ws,
           const T* next = nullptr) {
  if (cols == 0) return true;
  const internal::Problem<T> problem{score, rows,    cols,       stride, maximize,
                                     warm,  columns, potentials, next};
#if WEIGHTOPS_X86
  if (isa() == Isa::avx512) return internal::solve_avx512(problem, ws);
  if (isa() == Isa::avx2) return internal::solve_avx2(problem, ws);
#endif
  return internal::solve_generic(problem, ws);
}

}  // namespace weightops::assign

#undef WEIGHTOPS_INLINE
