// Matrix products of packed operands, term after term, whose sums a caller takes tile by tile.
#pragma once

#include <mutex>
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
  int64_t rows_at;         // where its packed rows begin, among a block's
  int64_t columns_at = 0;  // where its first packed panel begins
  int64_t length() const { return end - begin; }
};

template <class Kernel>
struct Workspace {
  Buffer<typename Kernel::Packed> rows, columns;
  Buffer<typename Kernel::Sum> sums, scratch, results;
  std::vector<Chunk> chunks;
  std::vector<Segment<typename Kernel::Packed>> segments;
};

// An operand that is packed once and multiplied many times, by several threads.
class Kept {
 public:
  // What `pack(room)` fills on the first call, or null to another kernel than that one's.
  template <class Kernel, class Pack>
  typename Kernel::Packed* get(int64_t count, const Pack& pack) {
    using Packed = typename Kernel::Packed;
    static const char name = 0;  // its address tells kernels apart
    const std::lock_guard<std::mutex> hold(lock_);
    if (!kernel_) {
      pack(reinterpret_cast<Packed*>(room_.get(count * sizeof(Packed))));
      kernel_ = &name;
    }
    return kernel_ == &name ? reinterpret_cast<Packed*>(room_.get(0)) : nullptr;
  }

 private:
  std::mutex lock_;
  Buffer<char> room_;
  const char* kernel_ = nullptr;
};

// A tile of products: rows [i, i + count), columns [j, j + width). The first one of its place finds
// nothing in the sums, the last one leaves them; one opens and one closes a term.
struct Part {
  int term;
  int64_t i, count, j, width;
  bool first, last, opens, closes;
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
  // Shorter chunks, of which the next ones' columns are packed meanwhile where the rows are packed
  // already: for a single deep product.
  bool streams = false;
};

// The chunks in the order in which they are multiplied; returns the size of a block's packed rows.
template <class Kernel, class Sum>
int64_t cut(const Product<Sum>& product, std::vector<Chunk>& chunks) {
  chunks.clear();
  int64_t at = 0;
  const int terms = product.depths.size();
  const int64_t most = product.streams ? Kernel::streamed_depth : Kernel::depth;
  for (int term = 0; term < terms; ++term) {
    if (!product.left.own()) at = 0;
    for (int64_t d = 0; d < product.depths[term]; d += most) {
      const int64_t end = std::min(d + most, product.depths[term]);
      chunks.push_back({term, d, end, at});
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

}  // namespace weightops::product
