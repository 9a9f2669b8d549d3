// The scans of assign.h over rows of scores, as vectors of doubles.
//
// Columns come in groups. When a row is read in full, the least reduced cost of each group is kept;
// as potentials only fall from there on, it bounds the group from below for good, and whoever looks
// for the row's best columns again reads only the groups whose bounds let them in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "assign_vector.h"

namespace weightops::assign::internal {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr int64_t kNone = -1;

struct Minimum {
  double value;
  int64_t column;
  double second;
};

struct Least {
  double value;
  int64_t index;
};

// Compiled anew for each instruction set, see assign_vector.h.
template <typename T, int lanes, int vectors>
struct Scan : Arithmetic<lanes> {
  using Base = Arithmetic<lanes>;
  using Base::equal;
  using Base::less;
  using Base::load;
  using Base::lower;
  using Base::lower_all;
  using Base::lower_all_two;
  using Base::lower_each;
  using Base::store;
  using typename Base::Doubles;
  using typename Base::Integers;

  static constexpr int64_t kGroup = lanes * vectors, kBlock = lanes * kGroup;

  const T* score;
  int64_t rows, cols, stride, padded, groups;
  double sign;
  double *potential, *distance;  // of columns; potentials are padded by -infinity, to cost infinity
  double* bounds;                // [rows, groups]
  int64_t* reached_from;         // of columns: the step of the tree that gave the distance

  WEIGHTOPS_INLINE double cost(int64_t row, int64_t column) const {
    return sign * static_cast<double>(score[row * stride + column]);
  }

  // `count` scores from a column on, the last repeated as often as the row is too short.
  WEIGHTOPS_INLINE const T* at(int64_t row, int64_t column, int64_t count, T* padding) const {
    const T* scores = score + row * stride;
    if (__builtin_expect(column + count <= cols, 1)) return scores + column;
    std::fill(padding, padding + count, scores[cols - 1]);
    if (column < cols) std::copy(scores + column, scores + cols, padding);
    return padding;
  }

  WEIGHTOPS_INLINE void prefetch(int64_t row, int64_t column) const {
    const T* scores = score + row * stride + column;
    for (int64_t k = 0; k < kGroup; k += 64 / sizeof(T)) __builtin_prefetch(scores + k);
  }

  static WEIGHTOPS_INLINE void load_cost(const T* scores, double sign, const double* from,
                                         Doubles& cost) {
    Doubles subtracted;
    load(scores, cost);
    load(from, subtracted);
    cost = cost * sign - subtracted;
  }

  // Reads a row in full and bounds its groups; false if a score is not finite.
  WEIGHTOPS_INLINE bool read(int64_t row, int64_t next_row, const double* from) {
    Doubles infinite[2] = {};  // 0 times a score: 0, or else NaN
    for (int64_t first = 0; first < padded; first += kBlock) {
      T padding[kBlock];
      const T* scores = at(row, first, kBlock, padding);
      Doubles minima[lanes];
#pragma GCC unroll 8
      for (int group = 0; group < lanes; ++group) {
        prefetch(next_row, first + group * kGroup);
        Doubles minimum = Doubles{} + kInfinity;
#pragma GCC unroll 8
        for (int k = 0; k < vectors; ++k) {
          const int64_t offset = group * kGroup + k * lanes;
          Doubles value, subtracted;
          load(scores + offset, value);
          load(from + first + offset, subtracted);
          infinite[(group * vectors + k) % 2] += value * 0.0;
          lower(minimum, value * sign - subtracted);
        }
        minima[group] = minimum;
      }
      lower_each(minima);
      store(minima[0], bounds + row * groups + first / kGroup);
    }
    infinite[0] += infinite[1];
    return equal(infinite[0], Doubles{}) == (1u << lanes) - 1;
  }

  // The least of the values, one a group, and the first group that has it.
  WEIGHTOPS_INLINE Least least(const double* values) const {
    Doubles minimum;
    load(values, minimum);
    Integers start = Integers{};
    for (int64_t k = lanes; k < groups; k += lanes) {
      Doubles other;
      load(values + k, other);
      start = other < minimum ? Integers{} + k : start;
      lower(minimum, other);
    }
    Doubles all = minimum;
    lower_all(all);
    const unsigned found = equal(minimum, all);
    int64_t starts[lanes];
    std::memcpy(starts, &start, sizeof starts);
    const int lane = found ? __builtin_ctz(found) : 0;
    return {all[0], starts[lane] + lane};
  }

  struct Pair {
    int64_t first, second;
    bool is_pair;
  };

  // The two groups of a row with the lowest bounds, fetched ahead.
  WEIGHTOPS_INLINE Pair lowest_two(int64_t row) const {
    const double* bound = bounds + row * groups;
    Doubles lowest, next = Doubles{} + kInfinity;
    load(bound, lowest);
    Integers start = Integers{}, next_start = start, lane_of;
    for (int lane = 0; lane < lanes; ++lane) lane_of[lane] = lane;
    for (int64_t k = lanes; k < groups; k += lanes) {
      Doubles other;
      load(bound + k, other);
      const Integers here = Integers{} + k;
      next_start = other < next ? here : next_start;
      lower(next, other);
      next_start = other < lowest ? start : next_start;
      next = other < lowest ? lowest : next;
      start = other < lowest ? here : start;
      lower(lowest, other);
    }
    start += lane_of;
    next_start += lane_of;
    Doubles all = lowest;
    lower_all(all);
    const unsigned found = equal(lowest, all);
    const int lane = found ? __builtin_ctz(found) : 0;
    int64_t starts[lanes];
    std::memcpy(starts, &start, sizeof starts);
    const Integers is_taken = lane_of == Integers{} + lane;
    lowest = is_taken ? next : lowest;
    start = is_taken ? next_start : start;
    all = lowest;
    lower_all(all);
    const unsigned found_next = equal(lowest, all);
    int64_t next_starts[lanes];
    std::memcpy(next_starts, &start, sizeof next_starts);
    const Pair pair{starts[lane], next_starts[found_next ? __builtin_ctz(found_next) : 0],
                    all[0] < kInfinity};
    prefetch(row, pair.first * kGroup);
    prefetch(row, pair.second * kGroup);
    return pair;
  }

  // The least two reduced costs of each lane, and the group of the least.
  struct Best {
    Doubles value = Doubles{} + kInfinity, second = value;
    Integers group = Integers{};
  };

  // Takes a group's reduced costs into account, and bounds the group by the least of them.
  WEIGHTOPS_INLINE void visit(int64_t row, int64_t group, Best& best) {
    const int64_t first = group * kGroup;
    T padding[kGroup];
    const T* scores = at(row, first, kGroup, padding);
    Doubles minimum = Doubles{} + kInfinity;
    for (int k = 0; k < vectors; ++k) {
      Doubles costs;
      load_cost(scores + k * lanes, sign, potential + first + k * lanes, costs);
      lower(best.second, costs > best.value ? costs : best.value);
      best.group = costs < best.value ? Integers{} + group : best.group;
      lower(best.value, costs);
      lower(minimum, costs);
    }
    lower_all(minimum);
    bounds[row * groups + group] = minimum[0];
  }

  // A row's two least reduced costs; of equal columns, a free one if there is one.
  WEIGHTOPS_INLINE Minimum bid(int64_t row, const Pair& pair, const std::vector<int64_t>& row_of) {
    const double* bound = bounds + row * groups;
    Best best;
    visit(row, pair.first, best);
    if (pair.is_pair) visit(row, pair.second, best);
    Doubles value = best.value, second = best.second;
    lower_all_two(value, second);
    for (int64_t start = 0; start < groups; start += 64) {
      uint64_t open = 0;
      for (int64_t k = start; k < std::min(groups, start + 64); k += lanes) {
        Doubles lowest;
        load(bound + k, lowest);
        open |= static_cast<uint64_t>(less(lowest, second)) << (k - start);
      }
      if (static_cast<uint64_t>(pair.first - start) < 64)
        open &= ~(uint64_t{1} << (pair.first - start));
      if (static_cast<uint64_t>(pair.second - start) < 64)
        open &= ~(uint64_t{pair.is_pair} << (pair.second - start));
      for (; open != 0; open &= open - 1) visit(row, start + __builtin_ctzll(open), best);
    }
    value = best.value;
    second = best.second;
    lower_all_two(value, second);
    if (!(value[0] < second[0])) return {value[0], any_of_equal(row, value[0], row_of), second[0]};
    int64_t group_of[lanes];
    std::memcpy(group_of, &best.group, sizeof group_of);
    const int lane = __builtin_ctz(equal(best.value, value));
    const int64_t first = group_of[lane] * kGroup;
    T padding[kGroup];
    const T* scores = at(row, first, kGroup, padding);
    unsigned place = 0;
    for (int k = 0; k < vectors; ++k) {
      Doubles costs;
      load_cost(scores + k * lanes, sign, potential + first + k * lanes, costs);
      place |= equal(costs, value) != 0 ? k * lanes : 0;
    }
    return {value[0], first + place + lane, second[0]};
  }

  WEIGHTOPS_INLINE int64_t any_of_equal(int64_t row, double least,
                                        const std::vector<int64_t>& row_of) const {
    int64_t any = kNone;
    for (int64_t group = 0; group < groups; ++group) {
      if (bounds[row * groups + group] > least) continue;
      const int64_t end = std::min(cols, (group + 1) * kGroup);
      for (int64_t column = group * kGroup; column < end; ++column) {
        if (cost(row, column) - potential[column] != least) continue;
        if (row_of[column] == kNone) return column;
        if (any == kNone) any = column;
      }
    }
    return std::max<int64_t>(any, 0);
  }

  WEIGHTOPS_INLINE int64_t choose(uint64_t tied, int64_t first,
                                  const std::vector<int64_t>& row_of) const {
    const int64_t column = first + (tied ? __builtin_ctzll(tied) : 0);
    if (__builtin_expect((tied & (tied - 1)) == 0, 1)) return std::min(column, cols - 1);
    for (uint64_t rest = tied; rest != 0; rest &= rest - 1) {
      const int64_t other = first + __builtin_ctzll(rest);
      if (other < cols && row_of[other] == kNone) return other;
    }
    return std::min(column, cols - 1);
  }

  // Lowers the distances of a group to those by way of this row and returns the smallest.
  WEIGHTOPS_INLINE double relax_group(int64_t row, int64_t group, double offset, int64_t step) {
    const int64_t first = group * kGroup;
    T padding[kGroup];
    const T* scores = at(row, first, kGroup, padding);
    Doubles minimum = Doubles{} + kInfinity;
    for (int k = 0; k < vectors; ++k) {
      Doubles costs, current;
      load_cost(scores + k * lanes, sign, potential + first + k * lanes, costs);
      costs -= offset;
      load(distance + first + k * lanes, current);
      Integers from;
      std::memcpy(&from, reached_from + first + k * lanes, sizeof from);
      from = costs < current ? Integers{} + step : from;
      std::memcpy(reached_from + first + k * lanes, &from, sizeof from);
      lower(current, costs);
      store(current, distance + first + k * lanes);
      lower(minimum, current);
    }
    lower_all(minimum);
    return minimum[0];
  }

  WEIGHTOPS_INLINE double nearest_of(int64_t group) const {
    Doubles minimum = Doubles{} + kInfinity;
    for (int k = 0; k < vectors; ++k) {
      Doubles current;
      load(distance + group * kGroup + k * lanes, current);
      lower(minimum, current);
    }
    lower_all(minimum);
    return minimum[0];
  }

  WEIGHTOPS_INLINE int64_t column_at(int64_t group, double value,
                                     const std::vector<int64_t>& row_of) const {
    const Doubles wanted = Doubles{} + value;
    uint64_t tied = 0;
    for (int k = 0; k < vectors; ++k) {
      Doubles current;
      load(distance + group * kGroup + k * lanes, current);
      tied |= static_cast<uint64_t>(equal(current, wanted)) << (k * lanes);
    }
    return choose(tied, group * kGroup, row_of);
  }

  // Lowers the potentials to cost - minimum, where a group's bound and its highest potential allow
  // that there be one to lower.
  WEIGHTOPS_INLINE void lower_potentials(int64_t row, double minimum, double* highest) {
    const double* bound = bounds + row * groups;
    for (int64_t start = 0; start < groups; start += lanes) {
      Doubles lowest, high;
      load(bound + start, lowest);
      load(highest + start, high);
      for (unsigned open = less(lowest - minimum, high); open != 0; open &= open - 1) {
        const int64_t group = start + __builtin_ctz(open), first = group * kGroup;
        T padding[kGroup];
        const T* scores = at(row, first, kGroup, padding);
        Doubles negative = Doubles{} + kInfinity;
        for (int k = 0; k < vectors; ++k) {
          Doubles value, current;
          load(scores + k * lanes, value);
          load(potential + first + k * lanes, current);
          lower(current, value * sign - minimum);
          store(current, potential + first + k * lanes);
          lower(negative, -current);
        }
        lower_all(negative);
        highest[group] = -negative[0];
      }
    }
  }
};

}  // namespace weightops::assign::internal
