// Matrix products of packed operands, term after term, whose sums a caller takes tile by tile.
#pragma once

#include <vector>

#include "product_pack.h"

namespace weightops::product {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Depths [begin, end) of one term: what is packed and multiplied at a time.
struct Chunk {
  int term;
  int64_t begin, end;
  int64_t rows_at;  // where its packed rows begin, among a block's
  bool packs;       // no earlier one of those at hand has the same rows
  int64_t length() const { return end - begin; }
};

template <class Kernel>
struct Workspace {
  Buffer<typename Kernel::Packed> rows, columns;
  Buffer<typename Kernel::Sum> sums, scratch, results;
  std::vector<Chunk> chunks;
  std::vector<Segment<typename Kernel::Packed>> segments;
};

// A tile of products: rows [i, i + count), columns [j, j + width). The first one of its place finds
// nothing in the sums, the last one leaves them; one opens and one closes a term.
struct Part {
  int term;
  int64_t i, count, j, width;
  bool first, last, opens, closes;
};

// What is done between the steps of a product, while the tiles' unit is at work: the tile before is
// taken, some rows at a time, and the rows that come next are fetched.
template <class Out, class Sum>
struct Meanwhile {
  Ahead ahead;
  Out& out;
  const Part& part;
  const Sum* tile;
  Sum* sums;
  int64_t share;  // rows in a step
  int64_t taken = 0;

  WEIGHTOPS_INLINE void step() {
    ahead.fetch();
    take(share);
  }
  WEIGHTOPS_INLINE void finish() { take(part.count); }

 private:
  WEIGHTOPS_INLINE void take(int64_t rows) {
    if (taken == part.count) return;
    const Range range{taken, std::min(taken + rows, part.count)};
    out.take(part, range, tile, sums);
    taken = range.end;
  }
};

// Packed columns, and sums that wait for more, stay in the second-level cache.
constexpr int64_t kCacheBytes = 5 << 18;
// As many products are summed in registers: rounding grows with their number.
constexpr int64_t kChain = 1024;

template <class Kernel>
constexpr int64_t blocks_of(int64_t count) {
  return (count + Kernel::rows - 1) / Kernel::rows;
}
template <class Kernel>
constexpr int64_t panels_of(int64_t count) {
  return (count + Kernel::lanes - 1) / Kernel::lanes;
}

// What is multiplied: sum over terms of rows[term] * columns[term], of depth depths[term].
template <class Sum>
struct Product {
  Source<Sum> left, right;
  std::vector<int64_t> depths;
  bool by_depth = false;  // chunk after chunk of all terms, not term after term
};

// The chunks in the order in which they are multiplied; returns the size of a block's packed rows.
template <class Kernel, class Sum>
int64_t cut(const Product<Sum>& product, std::vector<Chunk>& chunks) {
  chunks.clear();
  int64_t at = 0;
  const int terms = product.depths.size();
  for (int term = 0; term < terms; ++term) {
    if (!product.left.own()) at = 0;
    for (int64_t d = 0; d < product.depths[term]; d += Kernel::depth) {
      const int64_t end = std::min(d + Kernel::depth, product.depths[term]);
      chunks.push_back({term, d, end, at, true});
      at += Kernel::block(end - d);
    }
  }
  if (product.by_depth)
    std::stable_sort(chunks.begin(), chunks.end(),
                     [](const Chunk& a, const Chunk& b) { return a.begin < b.begin; });
  return at;
}

// Blocks of rows, one after the other.
template <class Kernel>
WEIGHTOPS_INLINE void pack_blocks(const Product<typename Kernel::Sum>& product, int64_t rows,
                                  Range blocks, typename Kernel::Packed* packed,
                                  Workspace<Kernel>& workspace) {
  std::vector<Chunk>& chunks = workspace.chunks;
  const int64_t size = cut<Kernel>(product, chunks);
  typename Kernel::Sum* scratch = workspace.scratch.get(scratch_size<Kernel>());
  for (int64_t b = blocks.begin; b < blocks.end; ++b)
    for (const Chunk& chunk : chunks) {
      if (chunk.term > 0 && !product.left.own()) continue;
      const int64_t i = b * Kernel::rows;
      pack_rows<Kernel>(product.left, chunk.term, i, std::min<int64_t>(Kernel::rows, rows - i),
                        chunk.begin, chunk.length(), packed + b * size + chunk.rows_at, scratch);
    }
}

// Rows x columns of a product; out.take(part, range, tile, sums) adds a range of rows of a tile to
// the out.sums() sums of its place. Where it does not tell terms apart (Out::joint), a tile may
// hold several. `packed_rows` are all blocks from row 0 on, or null. Rows begin at a block.
template <class Kernel, class Out>
WEIGHTOPS_INLINE void multiply(const Product<typename Kernel::Sum>& product, Range rows,
                               Range columns, Out& out, const typename Kernel::Packed* packed_rows,
                               Workspace<Kernel>& workspace) {
  using Sum = typename Kernel::Sum;
  using Packed = typename Kernel::Packed;
  constexpr int64_t height = Kernel::rows, width = Kernel::lanes, area = height * width;
  const int64_t blocks = blocks_of<Kernel>(rows.size()), panels = panels_of<Kernel>(columns.size());
  Sum* scratch = workspace.scratch.get(scratch_size<Kernel>() + 2 * area);
  // A tile is taken while the next one is multiplied: its sums come late out of the tiles' unit.
  Sum* tile = scratch + scratch_size<Kernel>();
  Sum* other_tile = tile + area;
  Part waiting{};
  Sum* waiting_sums = nullptr;
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
  Packed* block_room = packed_rows ? nullptr : workspace.rows.get(row_size);
  for (size_t first = 0, last; first < chunks.size(); first = last) {
    int64_t size = 0;
    for (last = first; last < chunks.size(); ++last) {
      const int64_t more = size_of(chunks[last]);
      if (last > first && size + more > budget) break;
      size += more;
    }
    for (size_t c = first; c < last; ++c)
      chunks[c].packs =
          std::none_of(chunks.begin() + first, chunks.begin() + c,
                       [&](const Chunk& other) { return other.rows_at == chunks[c].rows_at; });
    Packed* const packed = workspace.columns.get(size / sizeof(Packed));
    Packed* panel = packed;
    for (size_t c = first; c < last; ++c)
      for (int64_t j = columns.begin; j < columns.end; j += width) {
        pack_columns<Kernel>(product.right, chunks[c].term, j, std::min(width, columns.end - j),
                             chunks[c].begin, chunks[c].length(), panel, scratch);
        panel += Kernel::panel(chunks[c].length());
      }
    // What is read of a block's packed rows, and in how many steps.
    Range read{row_size, 0};
    int64_t steps = 1;
    for (size_t c = first; c < last; ++c) {
      read.begin = std::min(read.begin, chunks[c].rows_at);
      read.end = std::max(read.end, chunks[c].rows_at + Kernel::block(chunks[c].length()));
      steps += chunks[c].length() / 32;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i = rows.begin + b * height, count = std::min(height, rows.end - i);
      const Packed* block = block_room;
      if (packed_rows)
        block = packed_rows + i / height * row_size;
      else
        for (size_t c = first; c < last; ++c)
          if (chunks[c].packs)
            pack_rows<Kernel>(product.left, chunks[c].term, i, count, chunks[c].begin,
                              chunks[c].length(), block_room + chunks[c].rows_at, scratch);
      // The next block's packed rows, shared out among this one's tiles.
      const char* next = reinterpret_cast<const char*>(block + row_size + read.begin);
      const int64_t ahead_size = packed_rows && b + 1 < blocks ? read.size() * sizeof(Packed) : 0;
      const int64_t ahead_step = (ahead_size / (panels * steps) / 64 + 1) * 64;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t j = columns.begin + p * width;
        int64_t done = 0;
        Part part{0, i, count, j, std::min(width, columns.end - j), false, false, false, false};
        Sum* mine = sums + (at_once ? 0 : b * panels + p) * sum_size;
        const Packed* at = packed;
        for (size_t c = first; c < last;) {
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
            segments.push_back({block + chunks[c].rows_at, at + p * Kernel::panel(length), length});
            at += panels * Kernel::panel(length);
          }
          part.last = c == chunks.size();
          part.closes = chunks[c - 1].end == product.depths[part.term];
          const char* from = next + std::min(ahead_size, (p * steps + done / 32) * ahead_step);
          done += chain;
          Meanwhile<Out, Sum> meanwhile{
              {from, next + ahead_size, ahead_step}, out, waiting, other_tile, waiting_sums,
              waiting.count * 32 / chain + 1};
          Kernel::multiply(segments.data(), segments.size(), count, meanwhile, tile);
          meanwhile.finish();
          waiting = part;
          waiting_sums = mine;
          std::swap(tile, other_tile);
        }
      }
    }
  }
  if (waiting.count > 0) out.take(waiting, {0, waiting.count}, other_tile, waiting_sums);
}

}  // namespace weightops::product
