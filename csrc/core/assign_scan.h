// The scans of assign.h over rows of scores, as vectors.
//
// Columns come in groups. When a row is read in full, the least reduced cost of each group is kept;
// as potentials only fall from there on, it bounds the group from below for good, and whoever looks
// for the row's best columns again reads only the groups whose bounds let them in. Bounds have the
// type of the scores and are rounded down, so that a row of floats is read as floats; what is
// decided is decided in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "assign_vector.h"

namespace weightops::assign::internal {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr int64_t kNone = -1;
inline constexpr size_t kReadAhead = 1 << 14, kFetchAhead = 1 << 20;  // bytes

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
struct Scan : Arithmetic<double, lanes> {
  using Base = Arithmetic<double, lanes>;
  using Base::equal;
  using Base::less;
  using Base::load;
  using Base::lower;
  using Base::lower_all;
  using Base::lower_all_two;
  using Base::store;
  using Doubles = typename Base::Values;
  using typename Base::Integers;

  static constexpr int kWide = lanes * 8 / sizeof(T);
  using Wide = Arithmetic<T, kWide>;
  using Scores = typename Wide::Values;

  static constexpr int64_t kGroup = lanes * vectors, kBlock = kWide * kGroup;

  const T* score;
  int64_t rows, cols, stride, padded, groups;
  double sign;
  double *potential, *distance;  // of columns; potentials are padded by -infinity, to cost infinity
  T* coarse;                     // potentials, rounded up
  T* zero;                       // in place of potentials
  T* bounds;                     // [rows, groups]
  int64_t* reached_from;         // of columns: the step of the tree that gave the distance
  const char *ahead, *ahead_end;  // what is left to fetch of the next problem

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

  // The group that is read `kReadAhead` bytes later, of whatever row or problem.
  WEIGHTOPS_INLINE void fetch_later(const T* scores) const {
    const auto first = reinterpret_cast<uintptr_t>(scores) + kReadAhead;
    for (size_t k = 0; k < kGroup * sizeof(T); k += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(first + k), 0, 2);
  }

  // Brings more of the next problem to L2: bids and searches leave the memory idle.
  WEIGHTOPS_INLINE void fetch_ahead() {
    for (int k = 0; k < 16 && ahead < ahead_end; ++k, ahead += 64) __builtin_prefetch(ahead, 0, 2);
  }

  static WEIGHTOPS_INLINE void load_cost(const T* scores, double sign, const double* from,
                                         Doubles& cost) {
    Doubles subtracted;
    load(scores, cost);
    load(from, subtracted);
    cost = cost * sign - subtracted;
  }

  // A block of a row, whole or the last. A float's difference is off by 2^-24 of itself at most,
  // and from zero it is exact.
  template <bool is_whole>
  WEIGHTOPS_INLINE void read_block(int64_t row, int64_t first, const T* from, Scores* infinite) {
    const T plus = static_cast<T>(sign);
    Scores minima[kWide];
#pragma GCC unroll 16
    for (int group = 0; group < kWide; ++group) {
      const int64_t start = first + group * kGroup;
      Scores minimum = Scores{} + std::numeric_limits<T>::infinity();
      T padding[kGroup];
      if (is_whole || start < cols) {
        const T* scores = is_whole ? score + row * stride + start : at(row, start, kGroup, padding);
        fetch_later(score + row * stride + start);
#pragma GCC unroll 8
        for (int k = 0; k < kGroup; k += kWide) {
          Scores value, subtracted;
          Wide::load(scores + k, value);
          Wide::load(from + start + k, subtracted);
          infinite[(group + k / kWide) % 2] += value * T{0};
          Wide::lower(minimum, value * plus - subtracted);
        }
      }
      minima[group] = minimum;
    }
    Wide::lower_each(minima);
    T* bound = bounds + row * groups + first / kGroup;
    if (sizeof(T) < 8 && from != zero) {
      Wide::lower(minima[0], Scores{} + std::numeric_limits<T>::max());
      const Scores negative = -minima[0], size = negative < minima[0] ? minima[0] : negative;
      minima[0] -= size * T{0x1p-22} + std::numeric_limits<T>::min();
    }
    Wide::store(minima[0], bound);
    if (!is_whole)
      for (int64_t group = (cols - first + kGroup - 1) / kGroup; group < kWide; ++group)
        bound[group] = std::numeric_limits<T>::infinity();
  }

  // Reads a row in full and bounds its groups; false if a score is not finite.
  WEIGHTOPS_INLINE bool read(int64_t row, const T* from) {
    Scores infinite[2] = {};  // 0 times a score: 0, or else NaN
    int64_t first = 0;
    for (; first + kBlock <= cols; first += kBlock) read_block<true>(row, first, from, infinite);
    if (first < cols) read_block<false>(row, first, from, infinite);
    infinite[0] += infinite[1];
    return Wide::equal(infinite[0], Scores{}) == (1u << kWide) - 1;
  }

  // The least of the values, one a group, and the first group that has it.
  template <typename Value>
  WEIGHTOPS_INLINE Least least(const Value* values) const {
    using Of = Arithmetic<Value, lanes * 8 / sizeof(Value)>;
    using Numbers = typename Of::Integers;
    constexpr int step = lanes * 8 / sizeof(Value);
    typename Of::Values minimum;
    Of::load(values, minimum);
    Numbers start = Numbers{};
    for (typename Of::Integer k = step; k < groups; k += step) {
      typename Of::Values other;
      Of::load(values + k, other);
      start = other < minimum ? Numbers{} + k : start;
      Of::lower(minimum, other);
    }
    auto all = minimum;
    Of::lower_all(all);
    const unsigned found = Of::equal(minimum, all);
    typename Of::Integer starts[step];
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
    using Numbers = typename Wide::Integers;
    const T* bound = bounds + row * groups;
    Scores lowest, next = Scores{} + std::numeric_limits<T>::infinity();
    Wide::load(bound, lowest);
    Numbers start = Numbers{}, next_start = start, lane_of;
    for (int lane = 0; lane < kWide; ++lane) lane_of[lane] = lane;
    for (typename Wide::Integer k = kWide; k < groups; k += kWide) {
      Scores other;
      Wide::load(bound + k, other);
      const Numbers here = Numbers{} + k;
      next_start = other < next ? here : next_start;
      Wide::lower(next, other);
      next_start = other < lowest ? start : next_start;
      next = other < lowest ? lowest : next;
      start = other < lowest ? here : start;
      Wide::lower(lowest, other);
    }
    start += lane_of;
    next_start += lane_of;
    Scores all = lowest;
    Wide::lower_all(all);
    const unsigned found = Wide::equal(lowest, all);
    const int lane = found ? __builtin_ctz(found) : 0;
    typename Wide::Integer starts[kWide], next_starts[kWide];
    std::memcpy(starts, &start, sizeof starts);
    const Numbers is_taken = lane_of == Numbers{} + lane;
    lowest = is_taken ? next : lowest;
    start = is_taken ? next_start : start;
    all = lowest;
    Wide::lower_all(all);
    const unsigned found_next = Wide::equal(lowest, all);
    std::memcpy(next_starts, &start, sizeof next_starts);
    const Pair pair{starts[lane], next_starts[found_next ? __builtin_ctz(found_next) : 0],
                    all[0] < std::numeric_limits<T>::infinity()};
    prefetch(row, pair.first * kGroup);
    prefetch(row, pair.second * kGroup);
    return pair;
  }

  // Bits of those groups from `start` on, 64 at most, whose bounds in this row are below the limit.
  WEIGHTOPS_INLINE uint64_t below(int64_t row, int64_t start, T limit) const {
    uint64_t open = 0;
    for (int64_t k = start; k < std::min(groups, start + 64); k += kWide) {
      Scores bound;
      Wide::load(bounds + row * groups + k, bound);
      open |= static_cast<uint64_t>(Wide::less(bound, Scores{} + limit)) << (k - start);
    }
    return open;
  }

  // The least two reduced costs of each lane, and the group of the least of all.
  struct Best {
    Doubles value = Doubles{} + kInfinity, second = value;
    double least = kInfinity;
    int64_t group = 0;
  };

  // Takes a group's reduced costs into account; returns the new bound of the group.
  WEIGHTOPS_INLINE T visit(int64_t row, int64_t group, Best& best) const {
    const int64_t first = group * kGroup;
    T padding[kGroup];
    const T* scores = at(row, first, kGroup, padding);
    Doubles minimum = Doubles{} + kInfinity;
    for (int k = 0; k < vectors; ++k) {
      Doubles costs;
      load_cost(scores + k * lanes, sign, potential + first + k * lanes, costs);
      lower(best.second, costs > best.value ? costs : best.value);
      lower(best.value, costs);
      lower(minimum, costs);
    }
    lower_all(minimum);
    // By lanes, GCC would take these apart.
    best.group = minimum[0] < best.least ? group : best.group;
    best.least = std::min(best.least, minimum[0]);
    return rounded_down<T>(minimum[0]);
  }

  WEIGHTOPS_INLINE int64_t column_of(int64_t row, int64_t group, const Doubles& cost) const {
    const int64_t first = group * kGroup;
    T padding[kGroup];
    const T* scores = at(row, first, kGroup, padding);
    uint64_t place = 0;
    for (int k = 0; k < vectors; ++k) {
      Doubles costs;
      load_cost(scores + k * lanes, sign, potential + first + k * lanes, costs);
      place |= static_cast<uint64_t>(equal(costs, cost)) << (k * lanes);
    }
    return first + __builtin_ctzll(place);
  }

  // A bid right after the row was read: the bounds of other groups are as good as their costs. The
  // second cost may come out too low, which lowers the column too little: that is harmless.
  WEIGHTOPS_INLINE Minimum first_bid(int64_t row, const Pair& pair,
                                     const std::vector<int64_t>& row_of) {
    Best best;
    visit(row, pair.first, best);
    lower_all_two(best.value, best.second);
    const double other = pair.is_pair ? bounds[row * groups + pair.second] : kInfinity;
    const double second = std::min(best.second[0], other);
    if (!(best.value[0] < second)) return bid(row, pair, row_of);
    return {best.value[0], column_of(row, pair.first, best.value), second};
  }

  // A row's two least reduced costs; of equal columns, a free one if there is one.
  WEIGHTOPS_INLINE Minimum bid(int64_t row, const Pair& pair, const std::vector<int64_t>& row_of) {
    Best best;
    T* bound = bounds + row * groups;
    // Stored when the bounds have been read: a vector load waits for narrower stores to retire.
    const T first_bound = visit(row, pair.first, best);
    const T second_bound = pair.is_pair ? visit(row, pair.second, best) : bound[pair.second];
    Doubles value = best.value, second = best.second;
    lower_all_two(value, second);
    for (int64_t start = 0; start < groups; start += 64) {
      uint64_t open = below(row, start, rounded_up<T>(second[0]));
      if (static_cast<uint64_t>(pair.first - start) < 64)
        open &= ~(uint64_t{1} << (pair.first - start));
      if (static_cast<uint64_t>(pair.second - start) < 64)
        open &= ~(uint64_t{pair.is_pair} << (pair.second - start));
      if (open == 0) continue;
      for (; open != 0; open &= open - 1) {
        const int64_t group = start + __builtin_ctzll(open);
        bound[group] = visit(row, group, best);
      }
      value = best.value;
      second = best.second;
      lower_all_two(value, second);
    }
    bound[pair.second] = second_bound;
    bound[pair.first] = first_bound;
    if (!(value[0] < second[0])) return {value[0], any_of_equal(row, value[0], row_of), second[0]};
    return {value[0], column_of(row, best.group, value), second[0]};
  }

  WEIGHTOPS_INLINE int64_t any_of_equal(int64_t row, double least,
                                        const std::vector<int64_t>& row_of) const {
    const Doubles wanted = Doubles{} + least;
    const T limit = rounded_up<T>(std::nextafter(least, kInfinity));
    int64_t any = kNone;
    for (int64_t start = 0; start < groups; start += 64) {
      for (uint64_t open = below(row, start, limit); open != 0; open &= open - 1) {
        const int64_t first = (start + __builtin_ctzll(open)) * kGroup;
        T padding[kGroup];
        const T* scores = at(row, first, kGroup, padding);
        uint64_t tied = 0;
        for (int k = 0; k < vectors; ++k) {
          Doubles costs;
          load_cost(scores + k * lanes, sign, potential + first + k * lanes, costs);
          tied |= static_cast<uint64_t>(equal(costs, wanted)) << (k * lanes);
        }
        if (tied == 0) continue;
        const int64_t column = choose(tied, first, row_of);
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
    const T* bound = bounds + row * groups;
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
