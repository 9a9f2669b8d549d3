// Products of packed operands. Beside the tiles' unit the rest of the core stands idle: packing
// what comes next and taking the sums that came before are done meanwhile, a little after every few
// products.
#pragma once

#include "product.h"

namespace weightops::product {

// Packs a block's rows, or panels of columns, piece by piece.
template <class Kernel>
class Packing {
 public:
  using Packed = typename Kernel::Packed;
  using Sum = typename Kernel::Sum;

  Packing() = default;
  Packing(const Source<Sum>& source, bool columns, const Chunk* const* chunks, size_t count,
          Range range, Packed* to, Sum* scratch)
      : source_(&source),
        columns_(columns),
        chunk_(chunks),
        last_(range.size() > 0 ? chunk_ + count : chunk_),
        range_(range),
        to_(to),
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
    const int64_t length = chunk.length(), rest = std::min(Kernel::slice, length - depth_);
    if (columns_) {
      const int64_t j = range_.begin + panel_ * Kernel::lanes;
      pack_columns_piece<Kernel>(
          *source_, chunk.term, j, std::min<int64_t>(Kernel::lanes, range_.end - j),
          chunk.begin + depth_, rest,
          to_ + chunk.columns_at + panel_ * Kernel::panel(length) + Kernel::columns_at(depth_),
          scratch_, piece_);
    } else {
      pack_rows_piece<Kernel>(*source_, chunk.term, range_.begin, range_.size(),
                              chunk.begin + depth_, rest,
                              to_ + chunk.rows_at + Kernel::rows_at(depth_), scratch_, piece_);
    }
    if (++piece_ < Kernel::pieces) return;
    piece_ = 0;
    if (columns_ && ++panel_ < panels_of<Kernel>(range_.size())) return;
    panel_ = 0;
    depth_ += Kernel::slice;
    if (depth_ < length) return;
    depth_ = 0;
    ++chunk_;
  }

  const Source<Sum>* source_ = nullptr;
  bool columns_ = false;
  const Chunk *const *chunk_ = nullptr, *const *last_ = nullptr;
  Range range_{};
  Packed* to_ = nullptr;
  Sum* scratch_ = nullptr;
  int64_t depth_ = 0, panel_ = 0, due_ = 0;
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
  Packing<Kernel>* packing = nullptr;
  int64_t rate = 0;  // 65536th of pieces to a slice

  // Between groups of products, of which there are `sites` to a slice.
  WEIGHTOPS_INLINE void step(int site, int sites) {
    if (site == 0 || packing || taken < part.count) work(*this, site, sites);
  }

  WEIGHTOPS_INLINE void run(int site, int sites) {
    if (site == 0) {
      ahead.fetch();
      --wait;
    }
    if (wait < 0) take((share + sites - 1) / sites);
    if (packing) packing->go_on(rate / sites);
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
  int64_t all = 0, largest = 0;
  std::vector<const Chunk*> in_turn;
  for (const Chunk& chunk : chunks) {
    all += size_of(chunk);
    largest = std::max(largest, size_of(chunk));
    in_turn.push_back(&chunk);
  }
  // Chunks that are packed at a time: all of them, or as many as the cache holds beside the sums.
  // Where the rows are packed already, and sums may wait, the next ones are packed meanwhile.
  const int64_t waiting = blocks * panels * sum_size,
                reserve = std::min<int64_t>(kCacheBytes / 2, waiting * sizeof(Sum));
  const bool fits = all <= kCacheBytes,
             overlaps = product.streams && packed_rows && Kernel::pieces > 1 && chunks.size() > 1 &&
                        (!fits || reserve < kCacheBytes / 2),
             at_once = fits && !overlaps;
  const int64_t budget = overlaps ? std::min((kCacheBytes - reserve) / 2, all / 4)
                                  : kCacheBytes - (at_once ? 0 : reserve);
  const int64_t room = at_once ? all : std::max(budget, largest);
  Packed* const packed = workspace.columns.get((overlaps ? 2 : 1) * room / sizeof(Packed));
  // Chunks from `first` on that come to lie there `turn` by turn.
  const auto group_from = [&](size_t first, int turn) {
    int64_t at = overlaps ? turn % 2 * room : 0;
    const int64_t end = at + room;
    size_t last = first;
    for (; last < chunks.size() && at + size_of(chunks[last]) <= end; ++last) {
      chunks[last].columns_at = at / sizeof(Packed);
      at += size_of(chunks[last]);
    }
    return last;
  };
  const auto columns_of = [&](size_t first, size_t last) {
    return Packing<Kernel>(product.right, true, in_turn.data() + first, last - first, columns,
                           packed, scratch);
  };
  const auto steps_of = [&](size_t first, size_t last) {
    int64_t steps = 0;
    for (; first < last; ++first)
      steps += (chunks[first].length() + Kernel::slice - 1) / Kernel::slice;
    return steps;
  };
  Sum* sums = workspace.sums.get(at_once ? sum_size : waiting);
  Packed* block_room = packed_rows ? nullptr : workspace.rows.get(2 * row_size);
  Meanwhile<Kernel, Out> meanwhile{out, work};
  for (size_t first = 0, last = group_from(0, 0), following, turn = 0; first < chunks.size();
       first = last, last = following) {
    for (size_t c = first; c < last && (first == 0 || !overlaps); ++c)
      for (int64_t p = 0; p < panels; ++p) {
        const Chunk& chunk = chunks[c];
        const int64_t j = columns.begin + p * width;
        pack_columns<Kernel>(
            product.right, chunk.term, j, std::min(width, columns.end - j), chunk.begin,
            chunk.length(), packed + chunk.columns_at + p * Kernel::panel(chunk.length()), scratch);
      }
    following = group_from(last, ++turn);
    // What is read of a block's packed rows, how many steps a tile takes and those rows' packing.
    Range read{row_size, 0};
    const int64_t steps = steps_of(first, last);
    int64_t row_steps = 0;
    std::vector<const Chunk*> with_rows;  // no earlier one of those at hand has the same
    for (size_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      read.begin = std::min(read.begin, chunk.rows_at);
      read.end = std::max(read.end, chunk.rows_at + Kernel::block(chunk.length()));
      if (std::any_of(with_rows.begin(), with_rows.end(),
                      [&](const Chunk* other) { return other->rows_at == chunk.rows_at; }))
        continue;
      with_rows.push_back(&chunk);
      row_steps += steps_of(c, c + 1);
    }
    const auto packing_of = [&](int64_t b) {
      const int64_t begin = rows.begin + b * height;
      return Packing<Kernel>(product.left, false, with_rows.data(), with_rows.size(),
                             {begin, std::min(begin + height, rows.end)},
                             block_room + b % 2 * row_size, scratch);
    };
    Packing<Kernel> packing =
        packed_rows ? columns_of(last, overlaps ? following : last) : packing_of(0);
    meanwhile.packing = packed_rows && !overlaps ? nullptr : &packing;
    meanwhile.rate = (Kernel::pieces << 16) *
                         (packed_rows ? steps_of(last, following) * panels : row_steps * blocks) /
                         (blocks * panels * steps) +
                     1;
    for (int64_t n = 0; n < blocks * panels; ++n) {
      const int64_t b = n / panels, p = n % panels;
      if (!packed_rows && p == 0) {
        packing.finish();
        packing = packing_of(b + 1);
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
    if (overlaps) packing.finish();
  }
  meanwhile.finish();
}

}  // namespace weightops::product
