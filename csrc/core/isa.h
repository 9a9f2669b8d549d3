// Which instruction set the kernels use: the best the machine has, lowered by WEIGHTOPS_ISA for
// tests.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define WEIGHTOPS_X86 1
#define WEIGHTOPS_AVX2 __attribute__((target("avx2,fma,f16c")))
#define WEIGHTOPS_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#else
#define WEIGHTOPS_X86 0
#endif

namespace weightops {

enum class Isa { generic, avx2, avx512 };

inline Isa detect_isa() {
  Isa best = Isa::generic;
#if WEIGHTOPS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
#endif
  const char* wish = std::getenv("WEIGHTOPS_ISA");
  if (wish == nullptr) return best;
  if (std::strcmp(wish, "generic") == 0) return Isa::generic;
  if (std::strcmp(wish, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  return best;
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

inline const char* isa_name() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "generic";
}

// Numbers below the normal ones are 0 for this thread while it lives. Where a network is sure of
// its answers gradients are full of them, and a step of training takes 20 times as long.
class FlushDenormals {
#if WEIGHTOPS_X86
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
#endif
};

// Orders streamed stores before what follows: each thread calls it after its last one.
inline void stream_fence() {
#if WEIGHTOPS_X86
  asm volatile("sfence" ::: "memory");
#endif
}

}  // namespace weightops
