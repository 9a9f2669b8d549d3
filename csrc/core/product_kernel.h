// The inner products of matrix products: a tile of sums from a packed block of rows and a packed
// panel of columns. Two kinds: multiply-adds in vectors, and bfloat16 tiles (AMX), where a float32
// is the exact sum of three bfloat16 and six products of them give float32's accuracy.
#pragma once

#include <algorithm>

#include "simd.h"

#if WEIGHTOPS_X86
#include <sys/syscall.h>
#include <unistd.h>
#define WEIGHTOPS_AMX_TARGET "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define WEIGHTOPS_AMX __attribute__((target(WEIGHTOPS_AMX_TARGET)))
#endif

namespace weightops::product {

// Both kinds: a tile is `rows` x `lanes`; operands are packed in chunks of at most `depth`.

// A packed chunk of rows and one of columns, whose products go into the same sums.
template <class Packed>
struct Segment {
  const Packed* rows;
  const Packed* columns;
  int64_t depth;
};

// What is fetched meanwhile: the rows that come next. They lie in memory or far caches, and the
// first products of a block would wait for all of them.
struct Ahead {
  const char* at;
  const char* end;
  int64_t step;  // bytes for 32 depths

  WEIGHTOPS_INLINE void fetch() {
    const char* to = at + step < end ? at + step : end;
    for (; at < to; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

template <class T, int Bytes>
struct MultiplyAdd {
  using Sum = T;
  using Packed = T;
  using Arithmetic = Simd<T, Bytes>;
  using Vector = typename Arithmetic::Vector;
  static constexpr int bytes = Bytes;
  static constexpr int rows = Bytes == 64 ? 14 : 6;
  static constexpr int lanes = 2 * Arithmetic::lanes;
  static constexpr int64_t depth = 512, streamed_depth = depth;
  // Known to the compiler, so that all rows are addressed from one register; and no multiple of
  // 4 KiB, which would put all of them into one set of the cache.
  static constexpr int64_t row_stride = depth + 16;
  static constexpr int64_t slice = depth;
  static constexpr int pieces = 1;  // its registers are full: nothing else is done meanwhile

  // Sizes of a packed chunk of rows, and of columns.
  static int64_t block(int64_t) { return rows * row_stride; }
  static int64_t panel(int64_t d) { return d * lanes; }
  // Where depth d of a chunk lies in its packed rows, and in a panel.
  static int64_t rows_at(int64_t d) { return d; }
  static int64_t columns_at(int64_t d) { return panel(d); }

  static WEIGHTOPS_INLINE void begin() {}
  static WEIGHTOPS_INLINE void end() {}

  // values[0:count] become row `r` of a block, from depth `d` on.
  static WEIGHTOPS_INLINE void pack_row(Packed* block, int64_t r, int64_t d, const Sum* values,
                                        int64_t count) {
    std::copy_n(values, count, block + r * row_stride + d);
  }
  // A panel's columns at depths d and d + 1; `second` may be null where that is past the end.
  static WEIGHTOPS_INLINE void pack_columns(Packed* panel, int64_t d, const Sum* first,
                                            const Sum* second) {
    for (int v = 0; v < 2; ++v) {
      const int at = v * Arithmetic::lanes;
      Arithmetic::store(panel + d * lanes + at, Arithmetic::load(first + at));
      if (second) Arithmetic::store(panel + (d + 1) * lanes + at, Arithmetic::load(second + at));
    }
  }

  static WEIGHTOPS_INLINE void finish_panel(Packed*, int64_t) {}

  // tile = sum over segments, of which `count` rows matter.
  template <class Meanwhile>
  static WEIGHTOPS_INLINE void multiply(const Segment<Packed>* segments, int64_t number,
                                        int64_t count, Meanwhile& meanwhile, Sum* tile) {
    if (count > rows / 2)
      multiply_rows<rows>(segments, number, meanwhile.ahead, tile);
    else if (count > 2)
      multiply_rows<rows / 2>(segments, number, meanwhile.ahead, tile);
    else
      multiply_rows<2>(segments, number, meanwhile.ahead, tile);
  }

 private:
  template <int height>
  static WEIGHTOPS_INLINE void multiply_rows(const Segment<Packed>* segments, int64_t number,
                                             Ahead ahead, Sum* tile) {
    Vector sum[height][2] = {};
    for (int64_t s = 0; s < number; ++s) {
      const Packed *block = segments[s].rows, *panel = segments[s].columns;
      for (const Packed* end = block + segments[s].depth; block != end; ++block, panel += lanes) {
        if ((end - block) % 32 == 0) ahead.fetch();
        const Vector b[2] = {Arithmetic::load(panel), Arithmetic::load(panel + Arithmetic::lanes)};
#pragma GCC unroll 16
        for (int m = 0; m < height; ++m) {
          const T a = block[m * row_stride];
          sum[m][0] += b[0] * a;
          sum[m][1] += b[1] * a;
        }
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < height; ++m) {
      Arithmetic::store(tile + m * lanes, sum[m][0]);
      Arithmetic::store(tile + m * lanes + Arithmetic::lanes, sum[m][1]);
    }
  }
};

#if WEIGHTOPS_X86

// `Parts` bfloat16 stand for a float32: one rounds it, two hold 16 bits of it, three all 24.
// Products of parts below the last place of the sum are left out: 1, 3 and 6 are formed.
template <int Parts>
struct Bfloat16Tiles {
  using Sum = float;
  using Packed = uint16_t;
  using Arithmetic = Simd<float, 64>;
  using Vector = Arithmetic::Vector;
  static constexpr int bytes = 64;
  static constexpr int rows = 32, lanes = 32, parts = Parts;
  static constexpr int64_t depth = 512, streamed_depth = 256, slice = 32;
  static constexpr int pieces = 16;  // in which a slice is packed

  // How the tiles of a slice lie: their 16 rows, their two halves and the parts.
  struct Way {
    int64_t row, half, part;
  };
  struct Slice {
    int64_t rows, columns;
  };
  static constexpr Way kPacked{32, 512, 1024};

  static int64_t padded(int64_t d) { return (d + 31) / 32 * 32; }
  static int64_t block(int64_t d) { return padded(d) * rows * Parts; }
  static int64_t panel(int64_t d) { return padded(d) * lanes * Parts; }
  static int64_t rows_at(int64_t d) { return block(d); }
  static int64_t columns_at(int64_t d) { return panel(d); }

  // Whether the system lets this process use the tiles.
  static bool available() {
    static const bool granted = [] {
      __builtin_cpu_init();
      unsigned eax = 7, ebx, ecx = 0, edx;
      __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
      const bool bf16 = edx >> 22 & 1, tile = edx >> 24 & 1;
      constexpr long kRequestPermission = 0x1023, kTileData = 18;
      // A test that asks for an instruction set means to go without.
      return bf16 && tile && isa() == Isa::avx512 && std::getenv("WEIGHTOPS_ISA") == nullptr &&
             syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
  }

  static WEIGHTOPS_INLINE void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t row_count[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.row_count[i] = 16;
    }
    // The compiler's own intrinsic does not say that it reads all of the shape.
    asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  }
  static WEIGHTOPS_INLINE void end() { asm volatile("tilerelease" ::: "memory"); }

  static WEIGHTOPS_INLINE void pack_row(Packed* block, int64_t r, int64_t d, const Sum* values,
                                        int64_t count) {
    Packed* to = block + d / 32 * kStep + r * 32;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32, to += kStep)
      store_row(to, load(values + i), load(values + i + 16));
    if (i == count) return;
    alignas(64) Sum rest[32] = {};
    std::copy(values + i, values + count, rest);
    store_row(to, load(rest), load(rest + 16));
  }

  // 32 values that are at hand, from a depth on that begins a slice.
  static WEIGHTOPS_INLINE void pack_row(Packed* block, int64_t r, int64_t d, const Vector& first,
                                        const Vector& second) {
    store_row(block + d / 32 * kStep + r * 32, Bits(first), Bits(second));
  }

  static WEIGHTOPS_INLINE void pack_columns(Packed* panel, int64_t d, const Sum* first,
                                            const Sum* second) {
    for (int half = 0; half < 2; ++half)
      pack_half(panel, d, half, Arithmetic::load(first + 16 * half),
                second ? Arithmetic::load(second + 16 * half) : Vector{});
  }
  // 16 columns of them.
  static WEIGHTOPS_INLINE void pack_half(Packed* panel, int64_t d, int half, const Vector& first,
                                         const Vector& second) {
    split_pairs(first, second, 16, panel + d / 32 * kStep + d % 32 / 2 * 32 + half * kTile,
                2 * kTile);
  }

  // The parts of `count` numbers, or of pairs of them side by side; `to_part` lies between two.
  static WEIGHTOPS_INLINE void split_pairs(const Vector& first, const Vector& second, int64_t count,
                                           Packed* to, int64_t to_part) {
    Bits low = Bits(first), high = Bits(second);
#pragma GCC unroll 3
    for (int p = 0; p < Parts; ++p) {
      const Bits a = take(low, p), b = take(high, p);
      const Bits pairs = a >> 16 | b;
      copy(&pairs, 2 * count, to + p * to_part);
    }
  }
  static WEIGHTOPS_INLINE void split(const Vector& values, int64_t count, Packed* to,
                                     int64_t to_part) {
    Bits rest = Bits(values);
#pragma GCC unroll 3
    for (int p = 0; p < Parts; ++p) {
      typedef uint16_t Words __attribute__((vector_size(32)));
      const Words part = __builtin_convertvector(take(rest, p) >> 16, Words);
      copy(&part, count, to + p * to_part);
    }
  }
  // Zeros at depths that only fill up a tile.
  static WEIGHTOPS_INLINE void finish_panel(Packed* panel, int64_t d) {
    alignas(64) const Sum zeros[lanes] = {};
    for (d += d % 2; d < padded(d); d += 2) pack_columns(panel, d, zeros, zeros);
  }

  template <class Meanwhile>
  static WEIGHTOPS_INLINE void multiply(const Segment<Packed>* segments, int64_t number, int64_t,
                                        Meanwhile& meanwhile, Sum* tile) {
    clear();
    for (int64_t s = 0; s < number; ++s) {
      const Packed *a = segments[s].rows, *b = segments[s].columns;
      for (const Packed* end = a + block(segments[s].depth); a != end; a += kStep, b += kStep)
        slice_of(a, kPacked, b, kPacked, meanwhile);
    }
    store(tile);
  }

  // The same of operands that lie in several places.
  template <class Meanwhile>
  static WEIGHTOPS_INLINE void multiply(const Slice* slices, int64_t number, const Packed* rows,
                                        const Way& row_way, const Packed* columns,
                                        const Way& column_way, Meanwhile& meanwhile, Sum* tile) {
    clear();
    for (int64_t s = 0; s < number; ++s)
      slice_of(rows + slices[s].rows, row_way, columns + slices[s].columns, column_way, meanwhile);
    store(tile);
  }

  // Two blocks of rows that follow each other by the first half of a panel: tile[64][16]. One block
  // alone would have each product wait for the one before.
  template <class Meanwhile>
  static WEIGHTOPS_INLINE void multiply_narrow(const Packed* rows, const Packed* panel,
                                               int64_t depth, Meanwhile& meanwhile, Sum* tile) {
    static_assert(Parts == 3);
    constexpr int kRowPart[] = {2, 1, 1, 0, 0, 0}, kColumnPart[] = {0, 0, 1, 1, 2, 0};
    const int64_t next = block(depth);
    clear();
    for (const Packed* end = rows + next; rows != end; rows += kStep, panel += kStep)
#pragma GCC unroll 6
      for (int k = 0; k < 6; ++k) {
        const Packed *a = rows + kRowPart[k] * 2 * kTile, *b = panel + kColumnPart[k] * 2 * kTile;
        constexpr int64_t stride = 64;
        asm volatile(
            "tileloadd (%2,%3), %%tmm6\n"
            "tileloadd (%0,%3), %%tmm4\n tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n"
            "tileloadd 1024(%0,%3), %%tmm5\n tdpbf16ps %%tmm6, %%tmm5, %%tmm1\n"
            "tileloadd (%1,%3), %%tmm7\n tdpbf16ps %%tmm6, %%tmm7, %%tmm2\n"
            "tileloadd 1024(%1,%3), %%tmm4\n tdpbf16ps %%tmm6, %%tmm4, %%tmm3" ::"r"(a),
            "r"(a + next), "r"(b), "r"(stride)
            : "memory");
        meanwhile.step(k, 6);
      }
    constexpr int64_t stride = 64;
    asm volatile(
        "tilestored %%tmm0, (%0,%1)\n tilestored %%tmm1, 1024(%0,%1)\n"
        "tilestored %%tmm2, 2048(%0,%1)\n tilestored %%tmm3, 3072(%0,%1)" ::"r"(tile),
        "r"(stride)
        : "memory");
  }

 private:
  static constexpr int64_t kTile = 512;                // bfloat16 in 1 KiB
  static constexpr int64_t kStep = Parts * 2 * kTile;  // 32 depths of 32 rows or columns

  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(64)));

  static WEIGHTOPS_INLINE Bits load(const Sum* from) { return Bits(Arithmetic::load(from)); }

  // Takes part p off `rest` and gives it in the upper halves of the lanes, rounded to nearest:
  // parts that are left over are half as large as if it were cut off. A last one of three needs no
  // rounding, and keeps any NaN. Infinities have NaN for further parts: whatever they meet comes
  // out as no number, too.
  static WEIGHTOPS_INLINE Bits take(Bits& rest, int p) {
    if (p == 2) return rest & 0xffff0000u;
    if (p + 1 == Parts) {
      const Bits finite = Bits((rest & 0x7f800000u) != 0x7f800000u);
      return (rest + ((0x7fffu + (rest >> 16 & 1)) & finite)) & 0xffff0000u;
    }
    const Bits part = (rest + 0x8000u) & 0xffff0000u;
    rest = Bits(Vector(rest) - Vector(part));
    return part;
  }

  static WEIGHTOPS_INLINE void store_row(Packed* to, Bits first, Bits second) {
    const Halves upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                          33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
#pragma GCC unroll 3
    for (int p = 0; p < Parts; ++p) {
      const Bits a = take(first, p), b = take(second, p);
      const Halves both = __builtin_shuffle(Halves(a), Halves(b), upper);
      std::memcpy(to + p * 2 * kTile, &both, 64);
    }
  }

  // The first ones of a vector's numbers, mostly all of them.
  template <class V>
  static WEIGHTOPS_INLINE void copy(const V* from, int64_t count, Packed* to) {
    if (count == sizeof(V) / sizeof(Packed))
      std::memcpy(to, from, sizeof(V));
    else
      std::memcpy(to, from, count * sizeof(Packed));
  }

  // All products of 32 depths, in such an order that a new operand is loaded on one side at a time.
  template <class Meanwhile>
  static WEIGHTOPS_INLINE void slice_of(const Packed* a, const Way& a_way, const Packed* b,
                                        const Way& b_way, Meanwhile& meanwhile) {
    if constexpr (Parts == 3) {
      load_rows(a, a_way, 2);
      load_columns(b, b_way, 0);
      accumulate();
      meanwhile.step(0, 6);
      load_rows(a, a_way, 1);
      accumulate();
      meanwhile.step(1, 6);
      load_columns(b, b_way, 1);
      accumulate();
      meanwhile.step(2, 6);
      load_rows(a, a_way, 0);
      accumulate();
      meanwhile.step(3, 6);
      load_columns(b, b_way, 2);
      accumulate();
      meanwhile.step(4, 6);
      load_columns(b, b_way, 0);
      accumulate();
      meanwhile.step(5, 6);
    } else if constexpr (Parts == 2) {
      load_rows(a, a_way, 1);
      load_columns(b, b_way, 0);
      accumulate();
      meanwhile.step(0, 3);
      load_rows(a, a_way, 0);
      accumulate();
      meanwhile.step(1, 3);
      load_columns(b, b_way, 1);
      accumulate();
      meanwhile.step(2, 3);
    } else {
      load_rows(a, a_way, 0);
      load_columns(b, b_way, 0);
      accumulate();
      meanwhile.step(0, 1);
    }
  }

  static WEIGHTOPS_INLINE void clear() {
    asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::
                     : "memory");
  }
  static WEIGHTOPS_INLINE void store(Sum* tile) {
    constexpr int64_t stride = lanes * sizeof(Sum);
    asm volatile("tilestored %%tmm0, (%0,%1)" ::"r"(tile), "r"(stride) : "memory");
    asm volatile("tilestored %%tmm1, (%0,%1)" ::"r"(tile + 16), "r"(stride) : "memory");
    asm volatile("tilestored %%tmm2, (%0,%1)" ::"r"(tile + 16 * lanes), "r"(stride) : "memory");
    asm volatile("tilestored %%tmm3, (%0,%1)" ::"r"(tile + 16 * lanes + 16), "r"(stride)
                 : "memory");
  }

  static WEIGHTOPS_INLINE void load_rows(const Packed* from, const Way& way, int p) {
    from += p * way.part;
    const int64_t stride = way.row * sizeof(Packed);
    asm volatile("tileloadd (%0,%1), %%tmm4" ::"r"(from), "r"(stride) : "memory");
    asm volatile("tileloadd (%0,%1), %%tmm5" ::"r"(from + way.half), "r"(stride) : "memory");
  }
  static WEIGHTOPS_INLINE void load_columns(const Packed* from, const Way& way, int p) {
    from += p * way.part;
    const int64_t stride = way.row * sizeof(Packed);
    asm volatile("tileloadd (%0,%1), %%tmm6" ::"r"(from), "r"(stride) : "memory");
    asm volatile("tileloadd (%0,%1), %%tmm7" ::"r"(from + way.half), "r"(stride) : "memory");
  }
  static WEIGHTOPS_INLINE void accumulate() {
    asm volatile(
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::
            : "memory");
  }
};

#endif

}  // namespace weightops::product
