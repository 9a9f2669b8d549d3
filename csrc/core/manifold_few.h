// Linear maps of so few rows that reading the bases takes longer than multiplying: every basis is
// read once, where it lies.
#pragma once

#include "manifold_run.h"

namespace weightops::manifold {

constexpr int64_t kStretch = 256;  // columns that are dealt with at a time

// Forward: y[r, o] = shift[r, o] + sum_k coeffs[r, k] <W_k[o], x[r]>. Backward: what is not null of
// to_x[r] = sum_k,o coeffs[r, k] grad[r, o] W_k[o], dots[r, k] = sum_o grad[r, o] <W_k[o], x[r]>
// and to_weight[k, o] = sum_r coeffs[r, k] grad[r, o] x[r].
template <class Sum>
struct FewJob {
  int64_t rows, in, out, bases;
  Kind kind;
  Source<Sum> weight;
  const Sum* x;                // [rows, in]
  const Sum* coeffs;           // [rows, bases]
  const Sum* grad = nullptr;   // [rows, out], or null: forward
  const Sum* shift = nullptr;  // [rows, out], or null
  Sum* y = nullptr;            // [rows, out]
  Sum* to_x = nullptr;         // [rows, in]
  Sum* dots = nullptr;         // [rows, bases]
  void* to_weight = nullptr;   // [bases, out, in]
};

template <class Arithmetic, class Sum>
struct Few {
  using Vector = typename Arithmetic::Vector;
  static constexpr int lanes = Arithmetic::lanes;

  static constexpr int height = 4;

  // Rows four at a time: what the others have read of the bases lies in the caches.
  static WEIGHTOPS_INLINE void forward(const FewJob<Sum>& job, const Sum* scaled, int64_t begin,
                                       int64_t end) {
    for (int64_t o = begin; o < end; o += height)
      for (int64_t r = 0; r < job.rows; r += 4) {
        const int64_t left = job.rows - r, last = std::min(o + height, end);
        if (left == 1)
          forward<1>(job, r, scaled, o, last);
        else if (left == 2)
          forward<2>(job, r, scaled, o, last);
        else if (left == 3)
          forward<3>(job, r, scaled, o, last);
        else
          forward<4>(job, r, scaled, o, last);
      }
  }

 private:
  // `scaled` are coeffs[r, k] x[r], [row, basis, in].
  template <int rows>
  static WEIGHTOPS_INLINE void forward(const FewJob<Sum>& job, int64_t row, const Sum* scaled,
                                       int64_t o, int64_t end) {
    Sum scratch[height * kStretch];
    const int64_t count = std::min<int64_t>(height, end - o);
    Vector sum[rows][height] = {};
    Sum rest[rows][height] = {};
    for (int64_t k = 0; k < job.bases; ++k)
      for (int64_t i = 0; i < job.in; i += kStretch) {
        const int64_t stretch = std::min(kStretch, job.in - i);
        const Sum* weight[height];
        for (int q = 0; q < height; ++q)
          weight[q] =
              job.weight.row(k, std::min(o + q, o + count - 1), i, stretch, scratch + q * kStretch);
        const Sum* x = scaled + (row * job.bases + k) * job.in + i;
        const int64_t stride = job.bases * job.in;
        int64_t c = 0;
        for (; c + lanes <= stretch; c += lanes) {
          Vector w[height];
#pragma GCC unroll 4
          for (int q = 0; q < height; ++q) w[q] = Arithmetic::load(weight[q] + c);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) {
            const Vector value = Arithmetic::load(x + r * stride + c);
#pragma GCC unroll 4
            for (int q = 0; q < height; ++q) sum[r][q] += value * w[q];
          }
        }
        for (; c < stretch; ++c)
          for (int r = 0; r < rows; ++r)
            for (int q = 0; q < height; ++q) rest[r][q] += x[r * stride + c] * weight[q][c];
      }
    for (int r = 0; r < rows; ++r)
      for (int q = 0; q < count; ++q) {
        const Sum plus = job.shift ? job.shift[(row + r) * job.out + o + q] : Sum(0);
        job.y[(row + r) * job.out + o + q] = plus + rest[r][q] + Arithmetic::total(sum[r][q]);
      }
  }

 public:
  // Adds to to_x and dots, which are the caller's own.
  static WEIGHTOPS_INLINE void backward(const FewJob<Sum>& job, int64_t begin, int64_t end,
                                        Sum* to_x, Sum* dots) {
    Sum scratch[kStretch], row[kStretch];
    for (int64_t o = begin; o < end; ++o)
      for (int64_t k = 0; k < job.bases; ++k)
        for (int64_t i = 0; i < job.in; i += kStretch) {
          const int64_t stretch = std::min(kStretch, job.in - i);
          if (to_x || dots) {
            const Sum* weight = job.weight.row(k, o, i, stretch, scratch);
            for (int64_t r = 0; r < job.rows; ++r) {
              const Sum grad = job.grad[r * job.out + o];
              if (dots)
                dots[r * job.bases + k] +=
                    grad * dot<Arithmetic>(weight, job.x + r * job.in + i, stretch);
              if (!to_x) continue;
              const Sum factor = grad * job.coeffs[r * job.bases + k];
              Sum* to = to_x + r * job.in + i;
              for (int64_t c = 0; c < stretch; ++c) to[c] += factor * weight[c];
            }
          }
          if (!job.to_weight) continue;
          for (int64_t r = 0; r < job.rows; ++r) {
            const Sum factor = job.grad[r * job.out + o] * job.coeffs[r * job.bases + k];
            const Sum* x = job.x + r * job.in + i;
            if (r == 0)
              for (int64_t c = 0; c < stretch; ++c) row[c] = factor * x[c];
            else
              for (int64_t c = 0; c < stretch; ++c) row[c] += factor * x[c];
          }
          put(job.to_weight, job.kind, (k * job.out + o) * job.in + i, row, stretch);
        }
  }
};

#define WEIGHTOPS_FEW_COMPILED(isa, attribute, bytes)                                              \
  template <class Sum>                                                                             \
  attribute void few_forward_##isa(const FewJob<Sum>& job, const Sum* scaled, int64_t begin,       \
                                   int64_t end) {                                                  \
    Few<Simd<Sum, bytes>, Sum>::forward(job, scaled, begin, end);                                  \
  }                                                                                                \
  template <class Sum>                                                                             \
  attribute void few_backward_##isa(const FewJob<Sum>& job, int64_t begin, int64_t end, Sum* to_x, \
                                    Sum* dots) {                                                   \
    Few<Simd<Sum, bytes>, Sum>::backward(job, begin, end, to_x, dots);                             \
  }                                                                                                \
  template <class Sum>                                                                             \
  attribute const Sum* few_read_##isa(const Source<Sum>& source, int term, int64_t i, int64_t j,   \
                                      int64_t count, Sum* scratch) {                               \
    return source.template made<Simd<Sum, bytes>>(term, i, j, count, scratch);                     \
  }
WEIGHTOPS_FEW_COMPILED(generic, , 16)
#if WEIGHTOPS_X86
WEIGHTOPS_FEW_COMPILED(avx2, WEIGHTOPS_AVX2, 32)
WEIGHTOPS_FEW_COMPILED(avx512, WEIGHTOPS_AVX512, 64)
#define WEIGHTOPS_BEST(function)                 \
  (isa() == Isa::avx512 ? function##_avx512<Sum> \
   : isa() == Isa::avx2 ? function##_avx2<Sum>   \
                        : function##_generic<Sum>)
#else
#define WEIGHTOPS_BEST(function) function##_generic<Sum>
#endif
#undef WEIGHTOPS_FEW_COMPILED

template <class Sum>
void run_few(FewJob<Sum> job, int64_t threads, const Team& team) {
  job.weight.reader = WEIGHTOPS_BEST(few_read);
  const int64_t parts = std::clamp<int64_t>(job.out / 4, 1, threads);
  const auto share = [&](int64_t part) { return Cut::share(job.out, part, parts); };
  if (!job.grad) {
    std::vector<Sum> scaled(job.rows * job.bases * job.in);
    for (int64_t r = 0; r < job.rows; ++r)
      for (int64_t k = 0; k < job.bases; ++k)
        for (int64_t i = 0; i < job.in; ++i)
          scaled[(r * job.bases + k) * job.in + i] =
              job.coeffs[r * job.bases + k] * job.x[r * job.in + i];
    team(parts, [&](int64_t begin, int64_t end) {
      WEIGHTOPS_BEST(few_forward)(job, scaled.data(), share(begin).begin, share(end - 1).end);
    });
    return;
  }
  const int64_t x_size = job.to_x ? job.rows * job.in : 0,
                dot_size = job.dots ? job.rows * job.bases : 0;
  std::vector<Sum> own(parts * (x_size + dot_size));
  team(parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Sum* mine = own.data() + part * (x_size + dot_size);
      WEIGHTOPS_BEST(few_backward)(job, share(part).begin, share(part).end,
                                   job.to_x ? mine : nullptr, job.dots ? mine + x_size : nullptr);
    }
  });
  for (int64_t part = 0; part < parts; ++part) {
    const Sum* mine = own.data() + part * (x_size + dot_size);
    for (int64_t at = 0; at < x_size; ++at)
      job.to_x[at] = (part ? job.to_x[at] : Sum(0)) + mine[at];
    for (int64_t at = 0; at < dot_size; ++at)
      job.dots[at] = (part ? job.dots[at] : Sum(0)) + mine[x_size + at];
  }
}
#undef WEIGHTOPS_BEST

}  // namespace weightops::manifold
