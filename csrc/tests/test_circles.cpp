// Pairs of tokens and signals against plain loops, from several threads: run under sanitizers.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../core/fourier.h"
#include "../core/token_pair.h"

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

template <class Run>
void in_threads(int64_t total, const Run& run) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] { run(total * t / 3, total * (t + 1) / 3); });
  for (std::thread& thread : threads) thread.join();
}

// Small integers, whose sums are exact.
template <class T>
std::vector<T> numbers(int64_t count, int64_t seed) {
  // Exactly as long as it may be read, so that the address sanitizer sees a step too far.
  std::vector<T> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = T((i * 7919 + seed) % 23 - 11);
  return made;
}

template <class T>
void check_pairs(int64_t networks, int64_t tokens, int64_t width, int64_t count, bool shared) {
  using namespace weightops::token_pair;
  const Shape shape{tokens, width, count, shared ? 0 : 2 * count};
  std::vector<int64_t> pairs(2 * count * (shared ? 1 : networks));
  for (size_t i = 0; i < pairs.size(); ++i) pairs[i] = (i * 31 + i / 7) % tokens;
  const auto tables = numbers<T>(networks * 2 * tokens * width, 1);
  const int64_t rows = networks * count, blocks = (rows + kRows - 1) / kRows;
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> room(rows * width * sizeof(T) / 64 + 1);
  T* const to = reinterpret_cast<T*>(room.data());
  const auto row_of = [&](int64_t r, int which) {
    const int64_t token = pairs[r / count * shape.stride + 2 * (r % count) + which];
    return ((2 * (r / count) + which) * tokens + token) * width;
  };
  for (const bool stream : {false, true})
    weightops::with_arithmetic<T>([&](auto arithmetic) {
      std::fill_n(to, rows * width, T(99));
      in_threads(blocks, [&](int64_t begin, int64_t end) {
        add<decltype(arithmetic)>(shape, tables.data(), pairs.data(), begin * kRows,
                                  std::min(end * kRows, rows), to, stream);
      });
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i)
          require(to[r * width + i] == tables[row_of(r, 0) + i] + tables[row_of(r, 1) + i], "add");
    });
  const auto values = numbers<T>(rows * width, 2);
  std::vector<T> sums(tables.size(), T(99)), expected(tables.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int which : {0, 1})
      for (int64_t i = 0; i < width; ++i) expected[row_of(r, which) + i] += values[r * width + i];
  weightops::with_arithmetic<T>([&](auto arithmetic) {
    for (int64_t network = 0; network < networks; ++network)
      in_threads(width, [&](int64_t begin, int64_t end) {
        sum<decltype(arithmetic)>(shape, values.data() + network * count * width,
                                  pairs.data() + network * shape.stride, begin, end,
                                  sums.data() + network * 2 * tokens * width);
      });
  });
  require(sums == expected, "sum");
}

template <class T>
void check_signals(int64_t frequencies, int64_t tokens, int64_t size) {
  const auto embedding = numbers<T>(tokens * size, 3),
             matrix = numbers<T>(2 * frequencies * tokens, 4);
  std::vector<T> signals(frequencies, T(99));
  weightops::with_arithmetic<T>([&](auto arithmetic) {
    using Signal = weightops::fourier::Signal<decltype(arithmetic)>;
    const Signal signal({frequencies, tokens, size}, matrix.data());
    in_threads(signal.tiles(), [&](int64_t begin, int64_t end) {
      typename Signal::Workspace workspace;
      signal(embedding.data(), begin, end, signals.data(), workspace);
    });
  });
  for (int64_t k = 0; k < frequencies; ++k) {
    double squares = 0;
    for (int part : {0, 1})
      for (int64_t i = 0; i < size; ++i) {
        double row = 0;
        for (int64_t n = 0; n < tokens; ++n)
          row += double(matrix[(part * frequencies + k) * tokens + n] * embedding[n * size + i]);
        squares += row * row;
      }
    require(std::abs(signals[k] - std::sqrt(squares)) <= 1e-5 * std::sqrt(squares), "signals");
  }
}

template <class T>
void check() {
  for (const int64_t width : {1, 7, 16, 33, 100})
    for (const int64_t count : {1, 16, 93})
      for (const bool shared : {false, true}) check_pairs<T>(3, 11, width, count, shared);
  check_pairs<T>(1, 2, 3000, 40, false);
  for (const int64_t size : {1, 16, 32, 45})
    for (const int64_t tokens : {3, 4, 13, 59}) check_signals<T>((tokens - 1) / 2, tokens, size);
  check_signals<T>(20, 300, 40);
}

}  // namespace

int main() {
  check<float>();
  check<double>();
  std::printf("circles: ok (%s)\n", weightops::isa_name());
}
