// The unpacked Gram of narrow matrices against its definition, for sizes around every vector width.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "../core/gram.h"

using namespace weightops;

namespace {

template <class T>
bool agrees(int64_t n, int64_t depth, bool picked, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  // Exactly as much memory as run() may read: the sanitizer sees what goes beyond.
  const int64_t size = depth * n + gram::kMargin;
  const std::unique_ptr<T[]> left(new T[size]()), right(new T[size]());
  std::vector<T> found(n * n, -1);
  std::vector<int64_t> rows(depth), others(depth);
  for (int64_t at = 0; at < depth * n; ++at) {
    left[at] = normal(random);
    right[at] = normal(random);
  }
  for (int64_t k = 0; k < depth; ++k) {
    rows[k] = picked ? random() % depth : k;
    others[k] = picked ? random() % depth : k;
  }
  gram::run<T>({left.get(), right.get(), picked ? rows.data() : nullptr,
                picked ? others.data() : nullptr, depth, n, found.data()});
  const double tolerance = (sizeof(T) == 4 ? 1e-5 : 1e-13) * (1 + depth);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k)
        sum += double(left[rows[k] * n + i]) * double(right[others[k] * n + j]);
      if (!(std::abs(sum - found[i * n + j]) <= tolerance)) return false;
    }
  return true;
}

}  // namespace

int main() {
  std::mt19937_64 random(0);
  for (const int64_t n : {1, 2, 3, 7, 8, 12, 13, 16, 17, 31, 32, 33, 48, 63, 64})
    for (const int64_t depth : {0, 1, 2, 9, 40})
      for (const bool picked : {false, true})
        if (!agrees<float>(n, depth, picked, random) || !agrees<double>(n, depth, picked, random)) {
          std::printf("gram: n=%d depth=%d picked=%d differs\n", int(n), int(depth), int(picked));
          return 1;
        }
  std::printf("gram: ok (%s)\n", isa_name());
  return 0;
}
