#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

namespace weightops {

// Room that grows, is neither cleared nor given back, and begins on a cache line. What fills much
// of the second-level cache lies in huge pages where the system has them: scattered over small ones
// it evicts itself.
template <class T>
class Buffer {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      static_assert(std::is_trivially_destructible_v<T>);
      const int64_t alignment = count * int64_t(sizeof(T)) < kHuge / 4 ? 64 : kHuge;
      const int64_t bytes = (count * int64_t(sizeof(T)) + alignment - 1) / alignment * alignment;
      data_.reset(static_cast<T*>(std::aligned_alloc(alignment, bytes)));
      if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (alignment == kHuge) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
      size_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr int64_t kHuge = 1 << 21;
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

}  // namespace weightops
