// Products of many rows on several threads, by the best kernel the machine has.
#pragma once

#include "manifold.h"

namespace weightops::manifold {

using product::Workspace;

// Calls f on ranges that make up [0, count), on several threads.
using Team = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& f)>;

// Products of the same sizes, whose rows go to one result: y or a gradient of x.
template <class Sum>
struct RowsJob {
  struct Each {
    Product<Sum> product;
    int64_t rows;
    const int64_t* order;    // places of the rows in the result, or null
    const int64_t* context;  // of each row, or null: `first_context`
    int64_t first_context;
  };
  std::vector<Each> each;
  int64_t columns;
  void* to;  // may be null
  Kind kind;
  int64_t stride;
  const Sum* factors;  // [context, terms], or null
  const Sum* shift;    // [context, columns], or null
  Source<Sum> other;
  Sum* dots;  // [row, terms] of a single product, or null: to be zeros

  int64_t dot_count() const {
    return dots ? each.front().rows * int64_t(each.front().product.depths.size()) : 0;
  }
};

// One product whose tiles go to gradients of the bases.
template <class Sum>
struct BasesJob {
  Product<Sum> product;
  int64_t rows, columns;
  void* to;  // [bases, rows, columns], or null
  Kind kind;
  int64_t bases;
  const Sum* coeffs;  // [term, basis], or null
  Source<Sum> weight;
  Sum* dots;  // [term, basis], or null: to be zeros
  // What keeps the packed left operand from call to call, or null.
  product::Kept* kept = nullptr;

  int64_t dot_count() const { return dots ? int64_t(product.depths.size()) * bases : 0; }
};

// How the columns and the blocks of rows are cut into items.
struct Cut {
  int64_t column_items, row_items, panels, blocks;
  int64_t items() const { return column_items * row_items; }
  static Range share(int64_t total, int64_t part, int64_t of) {
    return {total * part / of, total * (part + 1) / of};
  }
  Range panels_of(int64_t item) const { return share(panels, item / row_items, column_items); }
  Range blocks_of(int64_t item) const { return share(blocks, item % row_items, row_items); }
};

template <class Arithmetic, class Sum>
WEIGHTOPS_INLINE Sum dot(const Sum* a, const Sum* b, int64_t count) {
  constexpr int lanes = Arithmetic::lanes;
  typename Arithmetic::Vector sum = {};
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) sum += Arithmetic::load(a + c) * Arithmetic::load(b + c);
  Sum total = Arithmetic::total(sum);
  for (; c < count; ++c) total += a[c] * b[c];
  return total;
}

// As few columns to an item as fill the cache; to pack columns twice or rows twice, whichever is
// less, where that leaves threads without work.
inline Cut cut_up(int64_t panels, int64_t panel_bytes, int64_t blocks, bool rows_are_dear,
                  int64_t threads) {
  const int64_t most =
      std::max<int64_t>(2, product::kCacheBytes / std::max<int64_t>(1, panel_bytes));
  Cut cut{(panels + most - 1) / most, 1, panels, blocks};
  if (cut.column_items >= threads) {
    cut.column_items = std::min(panels, (cut.column_items + threads - 1) / threads * threads);
  } else {
    if (!rows_are_dear || blocks < threads) cut.column_items = std::min(panels, threads);
    cut.row_items = std::min(blocks, (threads + cut.column_items - 1) / cut.column_items);
  }
  return cut;
}

// What is compiled anew for each instruction set.
#define WEIGHTOPS_MANIFOLD_COMPILED(name, attribute)                                            \
  template <class K>                                                                            \
  struct name {                                                                                 \
    using Kernel = K;                                                                           \
    using Sum = typename K::Sum;                                                                \
    using Packed = typename K::Packed;                                                          \
    attribute static const Sum* read(const Source<Sum>& source, int term, int64_t i, int64_t j, \
                                     int64_t count, Sum* scratch) {                             \
      return source.template made<typename K::Arithmetic>(term, i, j, count, scratch);          \
    }                                                                                           \
    attribute static void pack(const Product<Sum>& product, int64_t rows, Range blocks,         \
                               Packed* packed, Workspace<K>& workspace) {                       \
      product::pack_blocks<K>(product, rows, blocks, packed, workspace);                        \
    }                                                                                           \
    template <class Out>                                                                        \
    attribute static void work(product::Meanwhile<K, Out>& meanwhile, int site, int sites) {    \
      meanwhile.run(site, sites);                                                               \
    }                                                                                           \
    template <class F>                                                                          \
    attribute static void enter(const F& f) {                                                   \
      K::begin();                                                                               \
      f();                                                                                      \
      K::end();                                                                                 \
    }                                                                                           \
    template <class Out>                                                                        \
    attribute static bool multiply(const Product<Sum>& product, Range rows, Range columns,      \
                                   Out& out, const Packed* packed, Workspace<K>& workspace) {   \
      K::begin();                                                                               \
      product::multiply<K>(product, rows, columns, out, packed, workspace, work<Out>);          \
      K::end();                                                                                 \
      return out.finite();                                                                      \
    }                                                                                           \
    attribute static void turn(const Source<Sum>& source, int64_t rows, int64_t j,              \
                               int64_t columns, Sum* to, Sum* scratch) {                        \
      product::turn<typename K::Arithmetic>(source, 0, 0, rows, j, columns, to, rows, scratch); \
    }                                                                                           \
    attribute static Sum dot(const Sum* a, const Sum* b, int64_t count) {                       \
      return manifold::dot<typename K::Arithmetic>(a, b, count);                                \
    }                                                                                           \
    attribute static void add(Sum factor, const Sum* value, int64_t count, Sum* to) {           \
      for (int64_t c = 0; c < count; ++c) to[c] += factor * value[c];                           \
    }                                                                                           \
  };
WEIGHTOPS_MANIFOLD_COMPILED(Generic, )
#if WEIGHTOPS_X86
WEIGHTOPS_MANIFOLD_COMPILED(Avx2, WEIGHTOPS_AVX2)
WEIGHTOPS_MANIFOLD_COMPILED(Avx512, WEIGHTOPS_AVX512)
WEIGHTOPS_MANIFOLD_COMPILED(Amx, WEIGHTOPS_AMX)
#endif
#undef WEIGHTOPS_MANIFOLD_COMPILED

template <class Kernel>
Workspace<Kernel>& workspace_of() {
  static thread_local Workspace<Kernel> own;
  return own;
}

// What a call packs for all of its threads.
template <class T>
Buffer<T>& shared_room() {
  static thread_local Buffer<T> own;
  return own;
}

template <class Compiled>
struct Runner {
  using Kernel = typename Compiled::Kernel;
  using Sum = typename Compiled::Sum;
  using Packed = typename Compiled::Packed;

  static bool run(RowsJob<Sum> job, int64_t threads, const Team& team) {
    const auto& model = job.each.front().product;
    std::vector<product::Chunk> chunks;
    const int64_t block_size = product::cut<Kernel>(model, chunks), terms = model.depths.size();
    int64_t blocks = 0, panel_bytes = 0, rows = 0;
    for (auto& each : job.each) {
      each.product.left.reader = each.product.right.reader = Compiled::read;
      blocks += product::blocks_of<Kernel>(each.rows);
      rows += each.rows;
    }
    job.other.reader = Compiled::read;
    for (const auto& chunk : chunks) panel_bytes += Kernel::panel(chunk.length()) * sizeof(Packed);
    const Cut cut = cut_up(product::panels_of<Kernel>(job.columns), panel_bytes, blocks,
                           rows > int64_t(job.each.size()) * terms * job.columns, threads);
    // f(product, its blocks among [begin, end), the first of its blocks).
    const auto blocks_among = [&](int64_t begin, int64_t end, const auto& f) {
      int64_t first = 0;
      for (const auto& each : job.each) {
        const int64_t count = product::blocks_of<Kernel>(each.rows);
        const Range own{std::max(begin, first) - first, std::min(end, first + count) - first};
        if (own.size() > 0) f(each, own, first);
        first += count;
      }
    };
    Packed* packed = nullptr;
    if (cut.column_items > 1 && blocks > 1) {
      packed = shared_room<Packed>().get(blocks * block_size);
      team(blocks, [&](int64_t begin, int64_t end) {
        blocks_among(begin, end, [&](const auto& each, Range own, int64_t first) {
          Compiled::pack(each.product, each.rows, own, packed + first * block_size,
                         workspace_of<Kernel>());
        });
      });
    }
    const int64_t dot_size = job.dot_count();
    std::vector<Sum> dots(cut.column_items * dot_size);
    std::atomic<bool> finite{true};
    team(cut.items(), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const Range panels = cut.panels_of(item), mine = cut.blocks_of(item);
        const Range columns{panels.begin * Kernel::lanes,
                            std::min(job.columns, panels.end * Kernel::lanes)};
        blocks_among(mine.begin, mine.end, [&](const auto& each, Range own, int64_t first) {
          RowSums<Kernel> out{};
          out.to = job.to;
          out.kind = job.kind;
          out.stride = job.stride;
          out.order = each.order;
          out.context = each.context;
          out.factors = job.factors;
          out.terms = terms;
          out.shift = job.shift ? job.shift + each.first_context * job.columns : nullptr;
          out.shift_stride = job.columns;
          out.other = job.other;
          out.dots = job.dots ? dots.data() + item / cut.row_items * dot_size : nullptr;
          if (!Compiled::multiply(
                  each.product,
                  {own.begin * Kernel::rows, std::min(each.rows, own.end * Kernel::rows)}, columns,
                  out, packed ? packed + first * block_size : nullptr, workspace_of<Kernel>()))
            finite = false;
        });
      }
    });
    for (size_t at = 0; at < dots.size(); ++at) job.dots[int64_t(at) % dot_size] += dots[at];
    return finite;
  }

  static bool run(BasesJob<Sum> job, int64_t threads, const Team& team) {
    job.product.left.reader = job.product.right.reader = job.weight.reader = Compiled::read;
    std::vector<product::Chunk> chunks;
    const int64_t block_size = product::cut<Kernel>(job.product, chunks);
    const int64_t terms = job.product.depths.size(), blocks = product::blocks_of<Kernel>(job.rows);
    int64_t panel_bytes = 0;
    for (const auto& chunk : chunks)
      panel_bytes = std::max(panel_bytes, Kernel::panel(chunk.length()) * int64_t(sizeof(Packed)));
    // Chunks of all terms at one depth, twice: the sums take as much. Of others two.
    panel_bytes *= 2 * (job.product.by_depth ? terms : job.product.streams ? 1 : 2);
    const Cut cut = cut_up(product::panels_of<Kernel>(job.columns), panel_bytes, blocks,
                           job.rows > job.columns, threads);
    const auto pack_all = [&](Packed* to) {
      team(blocks, [&](int64_t begin, int64_t end) {
        Compiled::pack(job.product, job.rows, {begin, end}, to, workspace_of<Kernel>());
      });
    };
    Packed* packed = nullptr;
    if (job.kept) {
      packed = job.kept->template get<Kernel>(blocks * block_size, pack_all);
    } else if (cut.column_items > 1) {
      packed = shared_room<Packed>().get(blocks * block_size);
      pack_all(packed);
    }
    const int64_t dot_size = job.dot_count();
    std::vector<Sum> dots(cut.items() * dot_size);
    std::atomic<bool> finite{true};
    team(cut.items(), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        BasisSums<Kernel> out{};
        out.to = job.to;
        out.kind = job.kind;
        out.stride = job.columns;
        out.basis_stride = job.rows * job.columns;
        out.bases = job.bases;
        out.large = job.kind == Kind::same &&
                    job.bases * out.basis_stride * int64_t(sizeof(Sum)) > 4 * product::kCacheBytes;
        out.coeffs = job.coeffs;
        out.weight = job.weight;
        out.dots = job.dots ? dots.data() + item * dot_size : nullptr;
        const Range own = cut.blocks_of(item), panels = cut.panels_of(item);
        if (!Compiled::multiply(
                job.product, {own.begin * Kernel::rows, std::min(job.rows, own.end * Kernel::rows)},
                {panels.begin * Kernel::lanes, std::min(job.columns, panels.end * Kernel::lanes)},
                out, packed, workspace_of<Kernel>()))
          finite = false;
        if (out.large) stream_fence();
      }
    });
    for (size_t at = 0; at < dots.size(); ++at) job.dots[int64_t(at) % dot_size] += dots[at];
    return finite;
  }
};

// Runs a job by the best kernel: `parts` bfloat16 stand for a float32 where there are tiles for
// them, 0 asks for multiply-adds. What infinities and NaN come to is left to sums that know them:
// then `again` clears what the first attempt has added to.
template <template <class> class Run, class Sum, class Job, class Again>
void run_best(const Job& job, int parts, int64_t threads, const Team& team, const Again& again) {
  using product::MultiplyAdd;
#if WEIGHTOPS_X86
  if constexpr (std::is_same_v<Sum, float>) {
    using product::Bfloat16Tiles;
    if (parts > 0 && Bfloat16Tiles<1>::available()) {
      const bool finite = parts == 1   ? Run<Amx<Bfloat16Tiles<1>>>::run(job, threads, team)
                          : parts == 2 ? Run<Amx<Bfloat16Tiles<2>>>::run(job, threads, team)
                                       : Run<Amx<Bfloat16Tiles<3>>>::run(job, threads, team);
      if (finite) return;
      again();
    }
  }
  if (isa() == Isa::avx512) {
    Run<Avx512<MultiplyAdd<Sum, 64>>>::run(job, threads, team);
    return;
  }
  if (isa() == Isa::avx2) {
    Run<Avx2<MultiplyAdd<Sum, 32>>>::run(job, threads, team);
    return;
  }
#endif
  Run<Generic<MultiplyAdd<Sum, 16>>>::run(job, threads, team);
}

template <class Job>
void run(const Job& job, int parts, int64_t threads, const Team& team) {
  using Sum = std::remove_pointer_t<decltype(job.dots)>;
  run_best<Runner, Sum>(job, parts, threads, team,
                        [&] { std::fill_n(job.dots, job.dot_count(), Sum(0)); });
}

}  // namespace weightops::manifold
