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
  const Source<Sum>* other;
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
  const Source<Sum>* weight;
  Sum* dots;  // [term, basis], or null: to be zeros

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

// As few columns to an item as fill the cache; to pack columns twice or rows twice, whichever is
// less, where that leaves threads without work.
inline Cut cut_up(int64_t panels, int64_t panel_bytes, int64_t blocks, bool rows_are_dear,
                  int64_t threads) {
  const int64_t most = std::max<int64_t>(2, product::kCacheBytes / std::max<int64_t>(1, panel_bytes));
  Cut cut{(panels + most - 1) / most, 1, panels, blocks};
  if (cut.column_items >= threads) {
    cut.column_items = std::min(panels, (cut.column_items + threads - 1) / threads * threads);
  } else {
    if (!rows_are_dear || blocks < threads) cut.column_items = std::min(panels, threads);
    cut.row_items = std::min(blocks, (threads + cut.column_items - 1) / cut.column_items);
  }
  return cut;
}

template <class Kernel>
struct Items {
  using Sum = typename Kernel::Sum;
  using Packed = typename Kernel::Packed;

  static WEIGHTOPS_INLINE void pack(const Product<Sum>& product, int64_t rows, Range blocks,
                                    Packed* packed, Workspace<Kernel>& workspace) {
    product::pack_blocks<Kernel>(product, rows, blocks, packed, workspace);
  }

  // False where a sum is not finite.
  static WEIGHTOPS_INLINE bool rows(const RowsJob<Sum>& job, Range blocks, Range panels,
                                    int64_t column_item, const Packed* packed, int64_t block_size,
                                    Workspace<Kernel>& workspace) {
    const Range columns{panels.begin * Kernel::lanes,
                        std::min(job.columns, panels.end * Kernel::lanes)};
    bool finite = true;
    int64_t first = 0;
    for (const auto& each : job.each) {
      const int64_t count = product::blocks_of<Kernel>(each.rows);
      const int64_t begin = std::max(blocks.begin, first) - first,
                    end = std::min(blocks.end, first + count) - first;
      if (begin < end) {
        RowSums<Kernel> out;
        out.to = job.to;
        out.kind = job.kind;
        out.stride = job.stride;
        out.order = each.order;
        out.context = each.context;
        out.terms = each.product.depths.size();
        out.factors = job.factors;
        out.shift = job.shift ? job.shift + each.first_context * job.columns : nullptr;
        out.shift_stride = job.columns;
        out.other = job.other;
        out.dots = job.dots ? job.dots + column_item * each.rows * out.terms : nullptr;
        const Range rows{begin * Kernel::rows, std::min(each.rows, end * Kernel::rows)};
        product::multiply<Kernel>(each.product, rows, columns, out,
                                  packed ? packed + first * block_size : nullptr, workspace);
        finite = finite && out.finite();
      }
      first += count;
    }
    return finite;
  }

  static WEIGHTOPS_INLINE bool bases(const BasesJob<Sum>& job, Range blocks, Range panels, Sum* dots,
                                     const Packed* packed, Workspace<Kernel>& workspace) {
    BasisSums<Kernel> out;
    out.to = job.to;
    out.kind = job.kind;
    out.stride = job.columns;
    out.basis_stride = job.rows * job.columns;
    out.bases = job.bases;
    out.coeffs = job.coeffs;
    out.weight = job.weight;
    out.dots = dots;
    product::multiply<Kernel>(
        job.product, {blocks.begin * Kernel::rows, std::min(job.rows, blocks.end * Kernel::rows)},
        {panels.begin * Kernel::lanes, std::min(job.columns, panels.end * Kernel::lanes)}, out,
        packed, workspace);
    return out.finite();
  }
};

// Compiled anew for each instruction set.
#define WEIGHTOPS_MANIFOLD_ENTRY(name, attribute)                                               \
  template <class Kernel>                                                                       \
  struct name {                                                                                 \
    using Sum = typename Kernel::Sum;                                                           \
    using Packed = typename Kernel::Packed;                                                     \
    attribute static void pack(const Product<Sum>& product, int64_t rows, Range blocks,         \
                               Packed* packed, Workspace<Kernel>& workspace) {                  \
      Items<Kernel>::pack(product, rows, blocks, packed, workspace);                            \
    }                                                                                           \
    attribute static bool rows(const RowsJob<Sum>& job, Range blocks, Range panels,             \
                               int64_t column_item, const Packed* packed, int64_t block_size,   \
                               Workspace<Kernel>& workspace) {                                  \
      Kernel::begin();                                                                          \
      const bool finite = Items<Kernel>::rows(job, blocks, panels, column_item, packed,         \
                                              block_size, workspace);                           \
      Kernel::end();                                                                            \
      return finite;                                                                            \
    }                                                                                           \
    attribute static bool bases(const BasesJob<Sum>& job, Range blocks, Range panels, Sum* dots, \
                                const Packed* packed, Workspace<Kernel>& workspace) {           \
      Kernel::begin();                                                                          \
      const bool finite =                                                                       \
          Items<Kernel>::bases(job, blocks, panels, dots, packed, workspace);                   \
      Kernel::end();                                                                            \
      return finite;                                                                            \
    }                                                                                           \
  };
WEIGHTOPS_MANIFOLD_ENTRY(Generic, )
#if WEIGHTOPS_X86
WEIGHTOPS_MANIFOLD_ENTRY(Avx2, WEIGHTOPS_AVX2)
WEIGHTOPS_MANIFOLD_ENTRY(Avx512, WEIGHTOPS_AVX512)
WEIGHTOPS_MANIFOLD_ENTRY(Amx, WEIGHTOPS_AMX)
#endif
#undef WEIGHTOPS_MANIFOLD_ENTRY

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

template <class Kernel, template <class> class Entry>
struct Runner {
  using Sum = typename Kernel::Sum;
  using Packed = typename Kernel::Packed;

  static bool run(const RowsJob<Sum>& job, int64_t threads, const Team& team) {
    std::vector<product::Chunk> chunks;
    const auto& model = job.each.front().product;
    const int64_t block_size = product::cut<Kernel>(model, chunks);
    int64_t blocks = 0, panel_bytes = 0, rows = 0, terms = model.depths.size();
    for (const auto& each : job.each) blocks += product::blocks_of<Kernel>(each.rows), rows += each.rows;
    for (const auto& chunk : chunks) panel_bytes += Kernel::panel(chunk.length()) * sizeof(Packed);
    const Cut cut = cut_up(product::panels_of<Kernel>(job.columns), panel_bytes, blocks,
                           rows > int64_t(job.each.size()) * terms * job.columns, threads);
    const Packed* packed = nullptr;
    if (cut.column_items > 1 && blocks > 1) {
      Packed* room = shared_room<Packed>().get(blocks * block_size);
      packed = room;
      team(blocks, [&](int64_t begin, int64_t end) {
        int64_t first = 0;
        for (const auto& each : job.each) {
          const int64_t count = product::blocks_of<Kernel>(each.rows);
          const Range own{std::max(begin, first) - first, std::min(end, first + count) - first};
          if (own.size() > 0)
            Entry<Kernel>::pack(each.product, each.rows, own, room + first * block_size,
                                workspace_of<Kernel>());
          first += count;
        }
      });
    }
    RowsJob<Sum> own = job;
    std::vector<Sum> dots;
    const int64_t dot_size = job.dot_count();
    if (job.dots && cut.column_items > 1) {
      dots.assign(cut.column_items * dot_size, Sum(0));
      own.dots = dots.data();
    }
    std::atomic<bool> finite{true};
    team(cut.items(), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item)
        if (!Entry<Kernel>::rows(own, cut.blocks_of(item), cut.panels_of(item),
                                 item / cut.row_items, packed, block_size, workspace_of<Kernel>()))
          finite = false;
    });
    for (size_t at = 0; at < dots.size(); ++at) job.dots[int64_t(at) % dot_size] += dots[at];
    return finite;
  }

  static bool run(const BasesJob<Sum>& job, int64_t threads, const Team& team) {
    std::vector<product::Chunk> chunks;
    const int64_t block_size = product::cut<Kernel>(job.product, chunks);
    const int64_t terms = job.product.depths.size(), blocks = product::blocks_of<Kernel>(job.rows);
    int64_t panel_bytes = 0;
    for (const auto& chunk : chunks)
      panel_bytes = std::max(panel_bytes, Kernel::panel(chunk.length()) * int64_t(sizeof(Packed)));
    // Chunks of all terms at one depth, twice: the sums take as much.
    panel_bytes *= 2 * (job.product.by_depth ? terms : 2);
    const Cut cut = cut_up(product::panels_of<Kernel>(job.columns), panel_bytes, blocks,
                           job.rows > job.columns, threads);
    const Packed* packed = nullptr;
    if (cut.column_items > 1) {
      Packed* room = shared_room<Packed>().get(blocks * block_size);
      packed = room;
      team(blocks, [&](int64_t begin, int64_t end) {
        Entry<Kernel>::pack(job.product, job.rows, {begin, end}, room,
                            workspace_of<Kernel>());
      });
    }
    const int64_t dot_size = job.dot_count();
    std::vector<Sum> dots(cut.items() * dot_size);
    std::atomic<bool> finite{true};
    team(cut.items(), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item)
        if (!Entry<Kernel>::bases(job, cut.blocks_of(item), cut.panels_of(item),
                                  job.dots ? dots.data() + item * dot_size : nullptr, packed,
                                  workspace_of<Kernel>()))
          finite = false;
    });
    for (size_t at = 0; at < dots.size(); ++at) job.dots[int64_t(at) % dot_size] += dots[at];
    return finite;
  }
};

// `parts` bfloat16 stand for a float32 where there are tiles for them; 0: multiply-adds.
template <class Job>
void run(const Job& job, int parts, int64_t threads, const Team& team) {
  using Sum = std::remove_const_t<std::remove_pointer_t<decltype(job.dots)>>;
#if WEIGHTOPS_X86
  if constexpr (std::is_same_v<Sum, float>) {
    using product::Bfloat16Tiles;
    // What infinities and NaN come to is left to the sums that know them.
    if (parts > 0 && Bfloat16Tiles<1>::available()) {
      const bool finite =
          parts == 1   ? Runner<Bfloat16Tiles<1>, Amx>::run(job, threads, team)
          : parts == 2 ? Runner<Bfloat16Tiles<2>, Amx>::run(job, threads, team)
                       : Runner<Bfloat16Tiles<3>, Amx>::run(job, threads, team);
      if (finite) return;
      std::fill_n(job.dots, job.dot_count(), Sum(0));
    }
  }
  if (isa() == Isa::avx512) {
    Runner<product::MultiplyAdd<Sum, 64>, Avx512>::run(job, threads, team);
    return;
  }
  if (isa() == Isa::avx2) {
    Runner<product::MultiplyAdd<Sum, 32>, Avx2>::run(job, threads, team);
    return;
  }
#endif
  Runner<product::MultiplyAdd<Sum, 16>, Generic>::run(job, threads, team);
}

}  // namespace weightops::manifold
