// Weighted sums of permuted networks: out[l] = sum_m weights[l, m] P_m(flat[m]), one pass.
//
// float16 and bfloat16 are summed in float32 and rounded once.
#pragma once

#include <type_traits>

#include "number.h"
#include "permute.h"

namespace weightops {

namespace detail {

// The same loops for each instruction set.
#define WEIGHTOPS_MERGE_LOOPS(suffix, attribute)                                            \
  template <class T, class Sum>                                                             \
  attribute void scale_##suffix(Sum* sum, const T* value, Sum weight, int64_t count) {      \
    for (int64_t i = 0; i < count; ++i) sum[i] = weight * widen(value[i]);                  \
  }                                                                                         \
  template <class T, class Sum>                                                             \
  attribute void accumulate_##suffix(Sum* sum, const T* value, Sum weight, int64_t count) { \
    for (int64_t i = 0; i < count; ++i) sum[i] += weight * widen(value[i]);                 \
  }                                                                                         \
  template <class T, class Sum>                                                             \
  attribute void round_##suffix(T* out, const Sum* sum, int64_t count) {                    \
    for (int64_t i = 0; i < count; ++i) narrow(sum[i], out[i]);                             \
  }
WEIGHTOPS_MERGE_LOOPS(generic, )
#if WEIGHTOPS_X86
WEIGHTOPS_MERGE_LOOPS(avx2, WEIGHTOPS_AVX2)
WEIGHTOPS_MERGE_LOOPS(avx512, WEIGHTOPS_AVX512)
#define WEIGHTOPS_BY_ISA(function, ...)                          \
  (isa() == Isa::avx512 ? detail::function##_avx512(__VA_ARGS__) \
   : isa() == Isa::avx2 ? detail::function##_avx2(__VA_ARGS__)   \
                        : detail::function##_generic(__VA_ARGS__))
#else
#define WEIGHTOPS_BY_ISA(function, ...) detail::function##_generic(__VA_ARGS__)
#endif
#undef WEIGHTOPS_MERGE_LOOPS

}  // namespace detail

// sums (+)= weight * the cursor's next `count` elements; what can be is added as it is gathered.
inline void add_permuted(Cursor& cursor, const Maps& maps, const char* network, char* stage,
                         int64_t count, float weight, float* sums, bool first) {
  if (first) std::fill(sums, sums + count, 0.0f);
  cursor.fill(maps, network, stage, count, [&](char* to, const RowGather& job) {
    float* own = sums + (to - stage) / sizeof(float);
    if (gather_add(own, job, weight)) return;
    gather(to, job);
    const int64_t elements = job.num_rows * job.count * job.bytes / sizeof(float);
    WEIGHTOPS_BY_ISA(accumulate, own, reinterpret_cast<const float*>(to), weight, elements);
  });
}

template <class T>
bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(T) == 0;
}

// Networks of one merge: `index` is absent (data null) where they are taken as they are.
struct MergeProblem {
  const Plan& plan;
  int64_t networks, outputs;
  Rows<const char> flat;
  Rows<const int64_t> index;
};

// Output elements [begin, end) of every merged network. False on an index that is no permutation.
template <class T>
bool merge_range(const MergeProblem& problem, const typename Accumulator<T>::type* weights,
                 Rows<char> out, int64_t begin, int64_t end) {
  using Sum = typename Accumulator<T>::type;
  const bool permuted = problem.index.data != nullptr;
  std::vector<Maps> maps(permuted ? problem.networks : 0);
  for (size_t m = 0; m < maps.size(); ++m)
    if (!maps[m].load(problem.plan, problem.index.data + m * problem.index.stride, false))
      return false;
  // Sums of all outputs over a run stay in the second-level cache.
  const int64_t run_limit = std::max<int64_t>(
      512, std::min<int64_t>(8192, 131072 / std::max<int64_t>(1, problem.outputs)));
  std::vector<Sum> sums(problem.outputs * run_limit);
  std::vector<T> staged(run_limit);
  Cursor start(problem.plan, sizeof(T), false);
  while (begin < end) {
    start.seek(begin);
    const int64_t run = start.good_run(std::min(run_limit, end - begin));
    for (int64_t m = 0; m < problem.networks; ++m) {
      const char* network = problem.flat.data + m * problem.flat.stride * sizeof(T);
      const T* values = staged.data();
      if (permuted) {
        Cursor cursor = start;
        char* const stage = reinterpret_cast<char*>(staged.data());
        if constexpr (std::is_same_v<T, float>) {
          if (problem.outputs == 1) {
            add_permuted(cursor, maps[m], network, stage, run, weights[m], sums.data(), m == 0);
            continue;
          }
        }
        cursor.fill(maps[m], network, stage, run, gather);
      } else if (is_aligned<T>(network)) {
        values = reinterpret_cast<const T*>(network) + begin;
      } else {
        std::memcpy(staged.data(), network + begin * sizeof(T), run * sizeof(T));
      }
      for (int64_t l = 0; l < problem.outputs; ++l) {
        Sum* sum = sums.data() + l * run_limit;
        const Sum weight = weights[l * problem.networks + m];
        if (m == 0)
          WEIGHTOPS_BY_ISA(scale, sum, values, weight, run);
        else
          WEIGHTOPS_BY_ISA(accumulate, sum, values, weight, run);
      }
    }
    for (int64_t l = 0; l < problem.outputs; ++l) {
      const Sum* sum = sums.data() + l * run_limit;
      char* to = out.data + (l * out.stride + begin) * sizeof(T);
      T* rounded = is_aligned<T>(to) ? reinterpret_cast<T*>(to) : staged.data();
      WEIGHTOPS_BY_ISA(round, rounded, sum, run);
      if (rounded == staged.data()) std::memcpy(to, rounded, run * sizeof(T));
    }
    begin += run;
  }
  return true;
}

}  // namespace weightops
