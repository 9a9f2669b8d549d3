// Products of packed operands. Beside the tiles' unit the rest of the core stands idle: packing
// what comes next and taking the sums that came before are done meanwhile, a little after every few
// products.
#pragma once

#include "product.h"

namespace weightops::product {

// Packs a block's rows piece by piece.
template <class Kernel>
class RowPacking {
 public:
  using Packed = typename Kernel::Packed;
  using Sum = typename Kernel::Sum;

  RowPacking(const Source<Sum>& source, const std::vector<const Chunk*>& chunks, Range rows,
             Packed* block, Sum* scratch)
      : source_(&source),
        chunk_(chunks.data()),
        last_(rows.size() > 0 ? chunk_ + chunks.size() : chunk_),
        rows_(rows),
        block_(block),
        scratch_(scratch) {}

  WEIGHTOPS_INLINE void finish() {
    while (chunk_ < last_) next();
  }
  // As many as are due every time, in 65536th.
  WEIGHTOPS_INLINE void go_on(int64_t rate) {
    for (due_ += rate; due_ >= 1 << 16 && chunk_ < last_; due_ -= 1 << 16) next();
  }

 private:
  WEIGHTOPS_INLINE void next() {
    const Chunk& chunk = **chunk_;
    pack_rows_piece<Kernel>(*source_, chunk.term, rows_.begin, rows_.size(), chunk.begin + depth_,
                            std::min(Kernel::slice, chunk.length() - depth_),
                            block_ + chunk.rows_at + Kernel::rows_at(depth_), scratch_, piece_);
    if (++piece_ < Kernel::pieces) return;
    piece_ = 0;
    depth_ += Kernel::slice;
    if (depth_ < chunk.length()) return;
    depth_ = 0;
    ++chunk_;
  }

  const Source<Sum>* source_;
  const Chunk *const *chunk_, *const *last_;
  Range rows_;
  Packed* block_;
  Sum* scratch_;
  int64_t depth_ = 0, due_ = 0;
  int piece_ = 0;
};

// What is done between the products of a tile.
template <class Kernel, class Out>
struct Meanwhile {
  using Sum = typename Kernel::Sum;

  Out& out;
  void (*work)(Meanwhile&, int site, int sites);
  // The tile before is taken,
  Part part{};
  const Sum* tile = nullptr;
  Sum* sums = nullptr;
  int64_t share = 0, taken = 0;  // of its rows, to a slice and so far,
  int64_t wait = 0;              // slices until it is out of the tiles' unit,
  // and the rows that come next are fetched, or packed.
  Ahead ahead{};
  RowPacking<Kernel>* rows = nullptr;
  int64_t rate = 0;  // 65536th of pieces to a slice

  // Between groups of products, of which there are `sites` to a slice.
  WEIGHTOPS_INLINE void step(int site, int sites) {
    if (site == 0 || rows || taken < part.count) work(*this, site, sites);
  }

  WEIGHTOPS_INLINE void run(int site, int sites) {
    if (site == 0) {
      ahead.fetch();
      --wait;
    }
    if (wait < 0) take((share + sites - 1) / sites);
    if (rows) rows->go_on(rate / sites);
  }

  // Before a tile of a sum of so many products,
  WEIGHTOPS_INLINE void begin(int64_t depth) {
    const int64_t slices = depth / Kernel::slice;
    wait = slices > 3;
    share = part.count / std::max<int64_t>(1, slices - wait) + 1;
    taken = 0;
  }
  // and after it.
  WEIGHTOPS_INLINE void end(const Part& next, const Sum* next_tile, Sum* next_sums) {
    finish();
    part = next;
    tile = next_tile;
    sums = next_sums;
    taken = 0;
  }
  WEIGHTOPS_INLINE void finish() { take(part.count); }

 private:
  WEIGHTOPS_INLINE void take(int64_t count) {
    if (taken == part.count) return;
    const Range range{taken, std::min(taken + count, part.count)};
    out.take(part, range, tile, sums);
    taken = range.end;
  }
};

// Rows x columns of a product; out.take(part, range, tile, sums) adds a range of rows of a tile to
// the out.sums() sums of its place. Where it does not tell terms apart (Out::joint), a tile may
// hold several. `packed_rows` are all blocks from row 0 on, or null. Rows begin at a block. `work`
// calls Meanwhile::run.
template <class Kernel, class Out>
WEIGHTOPS_INLINE void multiply(const Product<typename Kernel::Sum>& product, Range rows,
                               Range columns, Out& out, const typename Kernel::Packed* packed_rows,
                               Workspace<Kernel>& workspace,
                               void (*work)(Meanwhile<Kernel, Out>&, int, int)) {
  using Sum = typename Kernel::Sum;
  using Packed = typename Kernel::Packed;
  constexpr int64_t height = Kernel::rows, width = Kernel::lanes, area = height * width;
  const int64_t blocks = blocks_of<Kernel>(rows.size()), panels = panels_of<Kernel>(columns.size());
  Sum* scratch = workspace.scratch.get(scratch_size<Kernel>() + 2 * area);
  Sum *tile = scratch + scratch_size<Kernel>(), *other_tile = tile + area;
  std::vector<Chunk>& chunks = workspace.chunks;
  const int64_t row_size = cut<Kernel>(product, chunks), sum_size = out.sums() * area;
  const auto size_of = [&](const Chunk& chunk) {
    return Kernel::panel(chunk.length()) * panels * int64_t(sizeof(Packed));
  };
  // Chunks that are packed at a time: all of them, or as many as the cache holds beside the sums.
  int64_t all = 0;
  for (const Chunk& chunk : chunks) all += size_of(chunk);
  const bool at_once = all <= kCacheBytes;
  const int64_t kept = at_once ? 1 : blocks * panels, kept_bytes = kept * sum_size * sizeof(Sum);
  const int64_t budget = kCacheBytes - (at_once ? 0 : std::min(kCacheBytes / 2, kept_bytes));
  Sum* sums = workspace.sums.get(kept * sum_size);
  Packed* block_room = packed_rows ? nullptr : workspace.rows.get(2 * row_size);
  Meanwhile<Kernel, Out> meanwhile{out, work};
  for (size_t first = 0, last; first < chunks.size(); first = last) {
    int64_t size = 0;
    for (last = first; last < chunks.size(); ++last) {
      const int64_t more = size_of(chunks[last]);
      if (last > first && size + more > budget) break;
      chunks[last].columns_at = size / sizeof(Packed);
      size += more;
    }
    // What is read of a block's packed rows, how many steps a tile takes and those rows' packing.
    Range read{row_size, 0};
    int64_t steps = 0, row_steps = 0;
    std::vector<const Chunk*> with_rows;  // no earlier one of those at hand has the same
    for (size_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      const int64_t slices = (chunk.length() + Kernel::slice - 1) / Kernel::slice;
      read.begin = std::min(read.begin, chunk.rows_at);
      read.end = std::max(read.end, chunk.rows_at + Kernel::block(chunk.length()));
      steps += slices;
      if (std::any_of(with_rows.begin(), with_rows.end(),
                      [&](const Chunk* other) { return other->rows_at == chunk.rows_at; }))
        continue;
      with_rows.push_back(&chunk);
      row_steps += slices;
    }
    Packed* const packed = workspace.columns.get(size / sizeof(Packed));
    for (size_t c = first; c < last; ++c)
      for (int64_t p = 0; p < panels; ++p) {
        const Chunk& chunk = chunks[c];
        const int64_t j = columns.begin + p * width;
        pack_columns<Kernel>(
            product.right, chunk.term, j, std::min(width, columns.end - j), chunk.begin,
            chunk.length(), packed + chunk.columns_at + p * Kernel::panel(chunk.length()), scratch);
      }
    const auto packing_of = [&](int64_t b) {
      const int64_t begin = rows.begin + b * height;
      return RowPacking<Kernel>(product.left, with_rows,
                                {begin, std::min(begin + height, rows.end)},
                                block_room + b % 2 * row_size, scratch);
    };
    RowPacking<Kernel> row_packing = packing_of(0);
    meanwhile.rows = packed_rows ? nullptr : &row_packing;
    meanwhile.rate = (Kernel::pieces << 16) * row_steps / (panels * steps) + 1;
    for (int64_t n = 0; n < blocks * panels; ++n) {
      const int64_t b = n / panels, p = n % panels;
      if (!packed_rows && p == 0) {
        row_packing.finish();
        row_packing = packing_of(b + 1);
      }
      const int64_t i = rows.begin + b * height, j = columns.begin + p * width;
      const Packed* block =
          packed_rows ? packed_rows + i / height * row_size : block_room + b % 2 * row_size;
      Part part{0,
                i,
                std::min(height, rows.end - i),
                j,
                std::min(width, columns.end - j),
                false,
                false,
                false,
                false};
      // The next block's packed rows, shared out among this one's tiles.
      const char* next = reinterpret_cast<const char*>(block + row_size + read.begin);
      const int64_t ahead_size = packed_rows && b + 1 < blocks ? read.size() * sizeof(Packed) : 0;
      const int64_t ahead_step = (ahead_size / (panels * (steps + 1)) / 64 + 1) * 64;
      Sum* mine = sums + (at_once ? 0 : b * panels + p) * sum_size;
      for (size_t c = first, done = 0; c < last;) {
        auto& segments = workspace.segments;
        segments.clear();
        part.term = chunks[c].term;
        part.first = c == 0;
        part.opens = chunks[c].begin == 0;
        int64_t chain = 0;
        for (; c < last && (Out::joint || chunks[c].term == part.term); ++c) {
          const int64_t length = chunks[c].length();
          if (chain + length > kChain && !segments.empty()) break;
          chain += length;
          segments.push_back({block + chunks[c].rows_at,
                              packed + chunks[c].columns_at + p * Kernel::panel(length), length});
        }
        part.last = c == chunks.size();
        part.closes = chunks[c - 1].end == product.depths[part.term];
        const char* ahead =
            next + std::min<int64_t>(ahead_size, (p * (steps + 1) + done / 32) * ahead_step);
        done += chain;
        meanwhile.ahead = {ahead, next + ahead_size, ahead_step};
        meanwhile.begin(chain);
        Kernel::multiply(segments.data(), segments.size(), part.count, meanwhile, tile);
        meanwhile.end(part, tile, mine);
        std::swap(tile, other_tile);
      }
    }
  }
  meanwhile.finish();
}

}  // namespace weightops::product
