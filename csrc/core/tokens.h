// Networks [N, P] as tokens [N, T, D] and back, and the moments of their tensors.
//
// Both ways are one walk over the output, which any number of threads can begin anywhere: it is
// runs of elements that lie one behind the other in the input too, scaled on their way, and
// padding. Outputs that leave the caches are put together line by line in the first-level cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "number.h"
#include "permute.h"

namespace weightops::tokens {

// How the integers of a plan (weightops/ops/tokens/plan.py) read. Row r of a piece is
// network[offset + r * width ...), and stands at `start` in row r of its group.
struct Piece {
  int64_t tensor, offset, width, start;
  size_t group;
};

// Row r of a group stands at `first + r * stride` in the network's tokens: `length` elements of its
// pieces, then zeros.
struct Group {
  int64_t rows, length, stride, first;
  size_t begin, end;  // of its pieces
};

struct Plan {
  int64_t size, numel, tensors, count = 0;  // count: T * D
  std::vector<Group> groups;
  std::vector<Piece> pieces;
  std::vector<Piece> by_offset;

  static Plan parse(const int64_t* code, size_t length) {
    Plan plan;
    const int64_t* const end = code + length;
    const auto next = [&] {
      if (code == end) throw std::length_error("the plan ends early");
      return *code++;
    };
    plan.size = next();
    plan.numel = next();
    plan.tensors = next();
    if (plan.size < 1) throw std::length_error("tokens have no room");
    for (int64_t groups = next(); groups > 0; --groups) {
      Group group{next(), 0, 0, plan.count, plan.pieces.size(), 0};
      if (group.rows < 0) throw std::length_error("a piece lies outside the network");
      for (int64_t pieces = next(); pieces > 0; --pieces) {
        Piece piece{next(), next(), next(), group.length, plan.groups.size()};
        if (piece.tensor < 0 || piece.tensor >= plan.tensors || piece.offset < 0 ||
            piece.width < 0 || piece.offset + group.rows * piece.width > plan.numel)
          throw std::length_error("a piece lies outside the network");
        if (piece.width == 0 || group.rows == 0) continue;
        group.length += piece.width;
        plan.pieces.push_back(piece);
      }
      if (group.length == 0) continue;
      group.end = plan.pieces.size();
      group.stride = (group.length + plan.size - 1) / plan.size * plan.size;
      plan.count += group.rows * group.stride;
      plan.groups.push_back(group);
    }
    plan.by_offset = plan.pieces;
    std::sort(plan.by_offset.begin(), plan.by_offset.end(),
              [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
    int64_t covered = 0;
    for (const Piece& piece : plan.by_offset) {
      if (piece.offset != covered) throw std::length_error("the pieces do not cover the network");
      covered += plan.groups[piece.group].rows * piece.width;
    }
    if (covered != plan.numel) throw std::length_error("the pieces do not cover the network");
    return plan;
  }
};

// The last of `all` that begins at or before `position`.
template <class Each>
const Each* holding(const Each* begin, const Each* end, int64_t Each::* start, int64_t position) {
  return std::upper_bound(begin, end, position,
                          [start](int64_t at, const Each& each) { return at < each.*start; }) -
         1;
}

namespace detail {

// The same loops for each instruction set.
#define WEIGHTOPS_TOKEN_LOOPS(suffix, attribute)                                                \
  template <class T, class Sum>                                                                 \
  attribute void pack_##suffix(T* to, const T* from, Sum shift, Sum scale, int64_t count) {     \
    for (int64_t i = 0; i < count; ++i) narrow((widen(from[i]) - shift) * scale, to[i]);        \
  }                                                                                             \
  template <class T, class Sum>                                                                 \
  attribute void unpack_##suffix(T* to, const T* from, Sum shift, Sum scale, int64_t count) {   \
    for (int64_t i = 0; i < count; ++i) narrow(widen(from[i]) * scale + shift, to[i]);          \
  }                                                                                             \
  template <class T>                                                                            \
  attribute double sum_##suffix(const T* from, int64_t count, double origin) {                  \
    double lanes[kLanes] = {}, sum = 0;                                                         \
    int64_t i = 0;                                                                              \
    for (; i + kLanes <= count; i += kLanes)                                                    \
      for (int k = 0; k < kLanes; ++k) lanes[k] += widen(from[i + k]) - origin;                 \
    for (; i < count; ++i) sum += widen(from[i]) - origin;                                      \
    for (int k = 0; k < kLanes; ++k) sum += lanes[k];                                           \
    return sum;                                                                                 \
  }                                                                                             \
  template <class T>                                                                            \
  attribute double squares_##suffix(const T* from, int64_t count, double origin, double mean) { \
    double lanes[kLanes] = {}, sum = 0;                                                         \
    int64_t i = 0;                                                                              \
    for (; i + kLanes <= count; i += kLanes)                                                    \
      for (int k = 0; k < kLanes; ++k) {                                                        \
        const double away = widen(from[i + k]) - origin - mean;                                 \
        lanes[k] += away * away;                                                                \
      }                                                                                         \
    for (; i < count; ++i) {                                                                    \
      const double away = widen(from[i]) - origin - mean;                                       \
      sum += away * away;                                                                       \
    }                                                                                           \
    for (int k = 0; k < kLanes; ++k) sum += lanes[k];                                           \
    return sum;                                                                                 \
  }
constexpr int kLanes = 32;
WEIGHTOPS_TOKEN_LOOPS(generic, )
#if WEIGHTOPS_X86
WEIGHTOPS_TOKEN_LOOPS(avx2, WEIGHTOPS_AVX2)
WEIGHTOPS_TOKEN_LOOPS(avx512, WEIGHTOPS_AVX512)
#define WEIGHTOPS_TOKENS_BY_ISA(function, ...)                   \
  (isa() == Isa::avx512 ? detail::function##_avx512(__VA_ARGS__) \
   : isa() == Isa::avx2 ? detail::function##_avx2(__VA_ARGS__)   \
                        : detail::function##_generic(__VA_ARGS__))
#else
#define WEIGHTOPS_TOKENS_BY_ISA(function, ...) detail::function##_generic(__VA_ARGS__)
#endif
#undef WEIGHTOPS_TOKEN_LOOPS

}  // namespace detail

// Takes the output's elements in order. With `stream` they gather in the first-level cache and
// leave it in whole lines, wherever the runs that they come in begin.
template <class T>
class Writer {
  static constexpr int64_t kStageBytes = 8192;

 public:
  Writer(T* to, bool stream) : to_(reinterpret_cast<char*>(to)) {
    const int64_t within = reinterpret_cast<uintptr_t>(to) % 64;
    if (!stream || within % sizeof(T) != 0) return;
    stage_ = thread_scratch();
    to_ -= within;
    begin_ = filled_ = within;
  }

  // fill(where, count, done) writes `count` elements, `done` of the run being there already.
  template <class Fill>
  void run(int64_t count, const Fill& fill) {
    if (stage_ == nullptr) {
      fill(reinterpret_cast<T*>(to_), count, 0);
      to_ += count * sizeof(T);
      return;
    }
    for (int64_t done = 0; done < count;) {
      const int64_t room = std::min<int64_t>(count - done, (kStageBytes - filled_) / sizeof(T));
      fill(reinterpret_cast<T*>(stage_ + filled_), room, done);
      filled_ += room * sizeof(T);
      done += room;
      if (filled_ == kStageBytes) flush();
    }
  }

  void finish() {
    if (stage_ == nullptr) return;
    flush();
    stream_fence();
  }

 private:
  void flush() {
    const int64_t whole = filled_ / 64 * 64;
    int64_t at = begin_;
    if (at > 0) {
      const int64_t end = std::min<int64_t>(64, filled_);
      std::memcpy(to_ + at, stage_ + at, end - at);
      at = end;
    }
    if (at < whole) {
      stream_lines(to_ + at, stage_ + at, whole - at);
      at = whole;
    }
    std::memcpy(to_ + at, stage_ + at, filled_ - at);
    to_ += filled_;
    begin_ = filled_ = 0;
  }

  char* to_;  // with a stage: where its first byte belongs
  char* stage_ = nullptr;
  int64_t begin_ = 0, filled_ = 0;
};

// shift and scale: one a tensor of the plan, or both null.
template <class T>
struct Job {
  using Sum = typename Accumulator<T>::type;
  const Plan& plan;
  Rows<const T> from;
  const Sum *shift, *scale;
  T* to;
  bool stream;
};

// Elements [begin, end) of all networks' tokens, laid end to end.
template <class T>
void pack(const Job<T>& job, int64_t begin, int64_t end) {
  const Plan& plan = job.plan;
  Writer<T> writer(job.to + begin, job.stream);
  while (begin < end) {
    const int64_t network = begin / plan.count, position = begin % plan.count;
    int64_t rest = std::min(plan.count - position, end - begin);
    begin += rest;
    const T* const source = job.from.data + network * job.from.stride;
    const Group* group = holding(plan.groups.data(), plan.groups.data() + plan.groups.size(),
                                 &Group::first, position);
    int64_t row = (position - group->first) / group->stride;
    int64_t within = (position - group->first) % group->stride;
    while (rest > 0) {
      const Piece* const last = plan.pieces.data() + group->end;
      const Piece* piece = holding(plan.pieces.data() + group->begin, last, &Piece::start, within);
      for (; within < group->length && rest > 0; ++piece) {
        const int64_t skip = within - piece->start;
        const int64_t count = std::min(piece->width - skip, rest);
        const T* const from = source + piece->offset + row * piece->width + skip;
        writer.run(count, [&](T* to, int64_t some, int64_t done) {
          if (job.scale == nullptr)
            std::memcpy(to, from + done, some * sizeof(T));
          else
            WEIGHTOPS_TOKENS_BY_ISA(pack, to, from + done, job.shift[piece->tensor],
                                    job.scale[piece->tensor], some);
        });
        within += count;
        rest -= count;
      }
      const int64_t padding = std::min(group->stride - within, rest);
      if (padding > 0)
        writer.run(padding, [](T* to, int64_t some, int64_t) {
          std::memset(static_cast<void*>(to), 0, some * sizeof(T));
        });
      rest -= padding;
      within = 0;
      if (++row == group->rows) {
        ++group;
        row = 0;
      }
    }
  }
  writer.finish();
}

// Elements [begin, end) of all networks, laid end to end.
template <class T>
void unpack(const Job<T>& job, int64_t begin, int64_t end) {
  const Plan& plan = job.plan;
  Writer<T> writer(job.to + begin, job.stream);
  while (begin < end) {
    const int64_t network = begin / plan.numel, position = begin % plan.numel;
    int64_t rest = std::min(plan.numel - position, end - begin);
    begin += rest;
    const T* const source = job.from.data + network * job.from.stride;
    const Piece* piece =
        holding(plan.by_offset.data(), plan.by_offset.data() + plan.by_offset.size(),
                &Piece::offset, position);
    int64_t row = (position - piece->offset) / piece->width;
    int64_t within = (position - piece->offset) % piece->width;
    for (; rest > 0; ++piece, row = 0) {
      const Group& group = plan.groups[piece->group];
      const T* from = source + group.first + piece->start + row * group.stride;
      for (; row < group.rows && rest > 0; ++row, from += group.stride, within = 0) {
        const int64_t count = std::min(piece->width - within, rest);
        writer.run(count, [&](T* to, int64_t some, int64_t done) {
          const T* const at = from + within + done;
          if (job.scale == nullptr)
            std::memcpy(to, at, some * sizeof(T));
          else
            WEIGHTOPS_TOKENS_BY_ISA(unpack, to, at, job.shift[piece->tensor],
                                    job.scale[piece->tensor], some);
        });
        rest -= count;
      }
    }
  }
  writer.finish();
}

// Mean and sum of squared deviations of `count` elements, read from memory once: blocks in the
// first-level cache are combined as by Chan, Golub and LeVeque (1983). Differences from the first
// element make a constant's moments exact.
template <class T>
void moments(const T* from, int64_t count, double* out) {
  constexpr int64_t kBlock = 2048;
  double mean = 0, squares = 0;
  const double origin = count > 0 ? widen(from[0]) : 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    const double own = WEIGHTOPS_TOKENS_BY_ISA(sum, from + begin, size, origin) / size;
    const double away = own - mean, total = double(begin + size);
    mean += away * (size / total);
    squares += WEIGHTOPS_TOKENS_BY_ISA(squares, from + begin, size, origin, own) +
               away * away * (begin * (size / total));
  }
  out[0] = origin + mean;
  out[1] = squares;
}

#undef WEIGHTOPS_TOKENS_BY_ISA

}  // namespace weightops::tokens
