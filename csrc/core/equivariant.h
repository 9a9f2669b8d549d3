// Equivariant linear layers on weight-space features [P, C], one network at a time: sums of every
// tensor over its indices (pool), one small matrix product per type on tiles of positions (mix),
// and one pass over the output that adds what is broadcast (write). Arithmetic: equivariant_tile.h.
#pragma once

#include "equivariant_thin.h"

namespace weightops::equivariant {

template <class T, int Bytes>
struct Network {
  using Arithmetic = Tile<T, Bytes>;
  using Pooling = Pool<T, Bytes>;
  using Rows = equivariant::Rows<T, Bytes>;
  using Span = typename Rows::Span;
  using Factor = typename Arithmetic::Factor;
  using Frame = typename Arithmetic::Frame;
  using Right = typename Arithmetic::Right;
  using Job = equivariant::Job<T>;
  using Outer = equivariant::Outer<T>;
  static constexpr int lanes = Arithmetic::lanes;
  static constexpr int64_t kWorthSharing = 1 << 21;  // multiplications, a few times a call's cost

  static WEIGHTOPS_INLINE void run_tile(const Job& job, const Step& step, const Span& span) {
    constexpr int depth = kDepth;
    const Program& program = job.program;
    const int64_t own = job.from.channels,
                  own_rows = (own + depth - 1) / depth * depth * span.pitch;
    T* packed = job.workspace.packed.get(0);
    T* other_packed = packed + program.max_readers * ((own + depth - 1) / depth * depth * kTile);
    const T** rows = job.workspace.rows.get(0);
    Factor* factors = job.workspace.factors.get(0);
    int64_t* second = job.workspace.second.get(0);
    for (size_t r = 0; r < step.readers.size(); ++r)
      rows[r] = Rows::rows_of(step.readers[r], job.from, span, packed + int64_t(r) * own_rows);
    if (job.out) {
      T* broadcast = job.broadcast;
      T* buffers = job.workspace.tile.get(0);
      for (size_t c = 0; c < step.columns.size();) {
        const Column* columns = &step.columns[c];
        const bool two = c + 1 < step.columns.size() && columns[1].readers == columns[0].readers;
        const int64_t width = two ? 2 : 1;
        int64_t count = 0;
        for (size_t f = 0; f < columns->readers.size(); ++f)
          for (int64_t k = 0; k < own; k += depth) {
            const int64_t r = columns->readers[f];
            factors[count] = {rows[r] + k * span.pitch,
                              job.parameters.blocks + columns->blocks[f] + k * program.padded,
                              std::min<int64_t>(depth, own - k), rows[r], 0};
            // Spread over the columns: lines come more slowly than products are done.
            const int64_t pairs = (step.columns.size() + 1) / 2;
            if (int64_t(c / 2) % pairs == count % pairs && step.readers[r].whole &&
                step.readers[r].place.table.empty()) {
              factors[count].ahead = Rows::ahead_of(step.readers[r].place, job.from, span) + k;
              factors[count].ahead_stride = step.readers[r].place.stride;
            }
            second[count++] = two ? columns[1].blocks[f] - columns[0].blocks[f] : 0;
          }
        Frame frames[2];
        bool direct[2] = {true, true}, streams = job.stream;
        T* to[2];
        for (int64_t v = 0; v < width; ++v) {
          const Target& target = step.targets[columns[v].target];
          const int64_t lane = columns[v].lane;
          Rows::begin_with(target, lane, span, job.parameters, broadcast,
                           buffers + v * kTile * lanes, frames[v]);
          frames[v].activate = job.activate && target.whole;
          to[v] = (target.whole ? job.out : broadcast) + Rows::at(target.place, span.at) + lane;
          direct[v] = target.place.table.empty() && target.width - lane >= lanes;
          T* even = to[v] + span.begin * target.place.stride;
          frames[v].out = direct[v] ? even : buffers + (2 + v) * kTile * lanes;
          frames[v].out_stride = direct[v] ? target.place.stride : lanes;
          streams = streams && direct[v] && target.whole && target.width % lanes == 0 &&
                    reinterpret_cast<uintptr_t>(even) % Bytes == 0;
        }
        const auto multiply = [&](auto w, auto s) __attribute__((always_inline)) {
          Arithmetic::template multiply_rows<decltype(w)::value, decltype(s)::value>(
              span.size(), factors, count, second, program.padded, frames);
        };
        using One = std::integral_constant<int, 1>;
        using Two = std::integral_constant<int, 2>;
        if (two)
          streams ? multiply(Two(), std::true_type()) : multiply(Two(), std::false_type());
        else
          streams ? multiply(One(), std::true_type()) : multiply(One(), std::false_type());
        for (int64_t v = 0; v < width; ++v)
          if (!direct[v])
            Rows::scatter(step.targets[columns[v].target], columns[v].lane, span, frames[v].out,
                          to[v]);
        if (job.next && step.streams)
          for (int64_t v = 0; v < width; ++v)
            for (const Place& sum : step.others[columns[v].target].sums)
              Rows::add_to_sum(frames[v].out, frames[v].out_stride, sum, span, lanes,
                               job.next->sums + columns[v].lane);
        c += width;
      }
    }
    if (job.outer == nullptr) return;
    const int64_t other = job.outer->other->channels,
                  other_rows = (other + depth - 1) / depth * depth * span.pitch;
    const int64_t ld = Arithmetic::padded(own), count = step.others.size();
    Right* right = job.workspace.right.get(0);
    for (int64_t o = 0; o < count; ++o) {
      const T* left =
          Rows::rows_of(step.others[o], *job.outer->other, span, other_packed + o * other_rows);
      for (int64_t i = 0; i < other; i += depth) {
        if (job.outer->sums)
          for (const Place& sum : step.others[o].sums)
            Rows::add_to_sum(left + i * span.pitch, depth, sum, span,
                             std::min<int64_t>(depth, other - i), job.outer->other->sums + i);
        int64_t found = 0;
        for (size_t r = 0; r < step.readers.size(); ++r)
          if (const int64_t t = step.terms[r * count + o]; t >= 0)
            for (int64_t k = 0; k < ld; k += lanes)
              right[found++] = {rows[r] + k / depth * depth * span.pitch + k % depth,
                                job.outer->gradient + (t * other + i) * ld + k};
        const Place& place = step.others[o].place;
        const bool fetches = step.others[o].whole && place.table.empty();
        const T* ahead = fetches ? Rows::ahead_of(place, *job.outer->other, span) + i : left;
        const int64_t channels = std::min<int64_t>(depth, other - i),
                      rows_ahead = fetches ? span.size() : 0;
        for (int64_t f = 0; f < found; f += 2) {
          // As above, a share of the lines with every product.
          for (int64_t m = rows_ahead * f / found; m < rows_ahead * std::min(f + 2, found) / found;
               ++m)
            __builtin_prefetch(ahead + m * place.stride);
          if (f + 1 < found)
            Arithmetic::template outer<2>(left + i * span.pitch, channels, right + f, span.size(),
                                          ld);
          else
            Arithmetic::template outer<1>(left + i * span.pitch, channels, right + f, span.size(),
                                          ld);
        }
      }
    }
  }

  // Outer positions [from, to) of a step.
  static WEIGHTOPS_INLINE void run_step(const Job& job, const Step& step, int64_t from,
                                        int64_t to) {
    const int64_t rank = step.outer_sizes.size();
    const int64_t abreast = step.abreast();
    int64_t coordinates[64];
    for (int64_t first = from; first < to; first += abreast)
      for (int64_t begin = 0; begin < step.run; begin += step.tile)
        for (int64_t outer = first; outer < std::min(to, first + abreast); ++outer) {
          int64_t rest = outer;
          for (int64_t dim = rank; dim-- > 0;) {
            coordinates[dim] = rest % step.outer_sizes[dim];
            rest /= step.outer_sizes[dim];
          }
          const Span span{coordinates,
                          outer,
                          begin,
                          std::min(begin + step.tile, step.run),
                          step.turns ? step.run : step.tile,
                          step.tile};
          job.program.thin ? ThinLayer<T, Bytes>::run_tile(job, step, span)
                           : run_tile(job, step, span);
        }
  }

  // Room for any step of the program; to be called before the first network.
  static WEIGHTOPS_INLINE void reserve(const Program& program, Workspace<T>& workspace) {
    const auto rows = [](int64_t channels) {
      return (channels + kDepth - 1) / kDepth * kDepth * kTile;
    };
    const int64_t packed = program.max_readers * rows(program.channels_read) +
                           program.max_targets * rows(program.channels_written);
    T* room = workspace.packed.get(packed);
    if (std::min(program.channels_read, program.channels_written) < kDepth)
      std::fill_n(room, packed, T(0));
    workspace.tile.get(4 * kTile * lanes);
    workspace.broadcast.get(program.plan->sides[1 - program.reads].write_slots * program.padded);
    workspace.rows.get(program.max_readers);
    const int64_t factors = program.max_readers * (rows(program.channels_read) / kDepth / kTile);
    workspace.factors.get(factors);
    workspace.second.get(factors);
    workspace.right.get(program.max_readers * rows(program.channels_read) / kTile);
  }

  // f(job, begin, end) on ranges of [0, count), which the team shares if they are worth it.
  template <class F>
  static WEIGHTOPS_INLINE void share(const Job& job, int64_t count, int64_t products, const F& f) {
    if (job.team == nullptr || products < kWorthSharing || count < 2) return f(job, 0, count);
    (*job.team)(count, [&](int64_t begin, int64_t end, Workspace<T>& workspace) {
      job.kernels.reserve(job.program, workspace);
      f(job.with(workspace), begin, end);
    });
  }

  // out = layer(from).
  static WEIGHTOPS_INLINE void run(const Job& job) {
    for (const Step& step : job.program.steps) {
      const int64_t rows = (step.outer + step.abreast() - 1) / step.abreast();
      const int64_t products = step.outer * step.run * step.readers.size() * step.targets.size() *
                               job.from.channels * job.program.padded;
      share(job, rows, products, [&](const Job& mine, int64_t begin, int64_t end) {
        mine.kernels.run_step(mine, step, begin * step.abreast(),
                              std::min(step.outer, end * step.abreast()));
      });
    }
    for (const Group& group : job.program.groups) run_group(job, group, nullptr, false);
  }

  static WEIGHTOPS_INLINE void run_taps(const Job& job, const Taps& taps, const Features<T>* other,
                                        bool mean, int64_t begin, int64_t end) {
    if constexpr (lanes == 16)
      if (job.program.thin) return ThinLayer<T, Bytes>::run_taps(job, taps, begin, end);
    TapsLayer<T, Bytes>::run(job, taps, other, mean, begin, end);
  }

  static WEIGHTOPS_INLINE void run_group(const Job& job, const Group& group,
                                         const Features<T>* other, bool mean) {
    const Program& program = job.program;
    if constexpr (Bytes == 64)
      if (group.taps.found && !(program.thin && lanes != 16)) {
        const Taps& taps = group.taps;
        const int64_t products =
            taps.sizes[0] * taps.sizes[1] * 16 * job.from.channels * job.program.padded;
        share(job, taps.sizes[0], products, [&](const Job& mine, int64_t begin, int64_t end) {
          mine.kernels.run_taps(mine, taps, other, mean, begin, end);
        });
        return;
      }
    for (int64_t band = 0; band < group.bands; ++band) {
      Pooling::pool_band(job.from, group, group.nodes[program.reads], band, program.mean);
      if (other) Pooling::pool_band(*other, group, group.nodes[1 - program.reads], band, mean);
      for (const Step& step : group.steps) {
        const int64_t outer = step.outer / group.bands;
        job.kernels.run_step(job, step, band * outer, (band + 1) * outer);
      }
    }
  }

  // Pooling::pool by a team.
  static WEIGHTOPS_INLINE void pool(const Features<T>& from, const Program& program,
                                    const Kernels<T>& kernels, const Team<T>* team) {
    const std::vector<char>& banded = program.banded[program.reads];
    if (team == nullptr) return Pooling::pool(from, program.mean, banded);
    const auto& nodes = from.side->nodes;
    std::vector<char> done(nodes.size());
    std::vector<PoolPart> parts;
    for (size_t number = 0; number < nodes.size(); ++number) {
      const Node& node = nodes[number];
      if (!node.whole || node.sizes.size() < 2 || node.numel * from.channels < kWorthSharing / 64)
        continue;
      done[number] = 1;
      for (int64_t child : node.children) {
        if (banded[child]) continue;
        const int64_t size = node.sizes[nodes[child].dropped > 0 ? 0 : 1];
        const int64_t shares = std::min<int64_t>(size, 8);
        for (int64_t s = 0; s < shares; ++s)
          parts.push_back({int64_t(number), child, size * s / shares, size * (s + 1) / shares});
      }
    }
    if (!parts.empty())
      (*team)(parts.size(), [&](int64_t begin, int64_t end, Workspace<T>&) {
        for (int64_t p = begin; p < end; ++p) kernels.pool_part(from, parts[p], program.mean);
      });
    Pooling::pool(from, program.mean, banded, nullptr, &done);
  }

  // The sums that are taken on the way begin with zero.
  static WEIGHTOPS_INLINE void clear(const Program& program, const Features<T>& features) {
    for (const Node& node : features.side->nodes)
      if (node.whole && program.streamed[node.tensor])
        for (int64_t child : node.children) {
          const Node& sum = features.side->nodes[child];
          std::fill_n(features.sums + sum.slot * features.channels, sum.numel * features.channels,
                      T(0));
        }
  }

  // out = layer(from), which may be left out, and the parameters' gradient, for which `other` is
  // read once: what is not a whole tensor waits for the sums that are taken meanwhile.
  static WEIGHTOPS_INLINE void run_backward(const Job& job, const Features<T>& other, bool mean,
                                            T* gradient) {
    const Program& program = job.program;
    clear(program, other);
    const Outer now{&other, gradient, true}, later{&other, gradient, false};
    Job streaming = job, rest = job;
    streaming.outer = &now;
    rest.outer = &later;
    rest.out = nullptr;
    for (const Step& step : program.steps)
      if (job.out && !step.streams) job.kernels.run_step(job, step, 0, step.outer);
    for (const Step& step : program.steps)
      if (step.streams) job.kernels.run_step(streaming, step, 0, step.outer);
    Pooling::pool(other, mean, program.banded[1 - program.reads], &program.streamed);
    for (const Step& step : program.steps)
      if (!step.streams) job.kernels.run_step(rest, step, 0, step.outer);
    rest.out = job.out;
    for (const Group& group : program.groups) run_group(rest, group, &other, mean);
  }
};

}  // namespace weightops::equivariant
