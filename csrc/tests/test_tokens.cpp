// The token core against plain loops, from several threads: run under sanitizers.
#include "../core/tokens.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

using weightops::tokens::Plan;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// A layer of 5 rows of 7 and, behind another tensor, 1; that tensor, 9 in one row; and nothing.
std::vector<int64_t> code_of(int64_t size) {
  return {size, 49, 4, 3, 5, 2, 0, 0, 7, 2, 44, 1, 1, 1, 1, 35, 9, 0, 1, 3, 44, 3};
}

// Where a token's element comes from, or -1.
std::vector<int64_t> sources(int64_t size) {
  std::vector<int64_t> found;
  const auto pad = [&] {
    while (found.size() % size) found.push_back(-1);
  };
  for (int64_t row = 0; row < 5; ++row) {
    for (int64_t i = 0; i < 7; ++i) found.push_back(row * 7 + i);
    found.push_back(44 + row);
    pad();
  }
  for (int64_t i = 0; i < 9; ++i) found.push_back(35 + i);
  pad();
  return found;
}

int64_t tensor_of(int64_t at) { return at < 35 ? 0 : at < 44 ? 1 : 2; }

template <class Run>
void in_threads(int64_t total, const Run& run) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] { run(total * t / 3, total * (t + 1) / 3); });
  for (std::thread& thread : threads) thread.join();
}

template <class T>
void check(int64_t size, int64_t networks, bool scaled, bool stream) {
  const std::vector<int64_t> code = code_of(size), from = sources(size);
  const Plan plan = Plan::parse(code.data(), code.size());
  require(plan.count == int64_t(from.size()), "tokens are counted");
  // Exactly as long as it may be read, so that the address sanitizer sees a step too far.
  std::vector<T> flat(networks * plan.numel), packed(networks * plan.count), back(flat.size());
  for (size_t i = 0; i < flat.size(); ++i) flat[i] = static_cast<T>(i % 97 + 1);
  const std::vector<T> shift{1, 2, 3, 4}, scale{2, 4, 8, 16}, inverse{.5, .25, .125, .0625};
  in_threads(packed.size(), [&](int64_t begin, int64_t end) {
    weightops::tokens::pack<T>({plan,
                                {flat.data(), plan.numel},
                                scaled ? shift.data() : nullptr,
                                scaled ? scale.data() : nullptr,
                                packed.data(),
                                stream},
                               begin, end);
  });
  for (size_t i = 0; i < packed.size(); ++i) {
    const int64_t at = from[i % plan.count];
    T expected = at < 0 ? 0 : flat[i / plan.count * plan.numel + at];
    if (at >= 0 && scaled) expected = (expected - shift[tensor_of(at)]) * scale[tensor_of(at)];
    require(packed[i] == expected, "pack");
  }
  in_threads(back.size(), [&](int64_t begin, int64_t end) {
    weightops::tokens::unpack<T>({plan,
                                  {packed.data(), plan.count},
                                  scaled ? shift.data() : nullptr,
                                  scaled ? inverse.data() : nullptr,
                                  back.data(),
                                  stream},
                                 begin, end);
  });
  require(back == flat, "unpack");
}

void check_moments() {
  for (const int64_t count : {1, 2, 31, 33, 2048, 2049, 10000}) {
    std::vector<float> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = 1e4f + static_cast<float>(i % 13);
    double mean = 0, squares = 0, found[2];
    for (const float value : values) mean += value / double(count);
    for (const float value : values) squares += (value - mean) * (value - mean);
    weightops::tokens::moments(values.data(), count, found);
    require(std::abs(found[0] - mean) < 1e-8, "mean");
    require(std::abs(found[1] - squares) < 1e-8 * (1 + squares), "squares");
  }
}

void check_refusal() {
  const std::vector<int64_t> good = code_of(4);
  const auto refused = [](const std::vector<int64_t>& code) {
    try {
      Plan::parse(code.data(), code.size());
    } catch (const std::length_error&) {
      return true;
    }
    return false;
  };
  require(!refused(good), "a plan is accepted");
  for (size_t length = 0; length < good.size(); ++length)
    require(refused({good.begin(), good.begin() + length}), "a plan that ends early is refused");
  for (const auto& [at, value] : {std::pair<size_t, int64_t>{0, 0},
                                  {1, 48},
                                  {1, 50},
                                  {6, 4},
                                  {6, -1},
                                  {7, 1},
                                  {7, -7},
                                  {8, 8},
                                  {10, 43}})
    for (std::vector<int64_t> bad : {good}) {
      bad[at] = value;
      require(refused(bad), "a plan that reaches outside is refused");
    }
}

}  // namespace

int main() {
  for (const int64_t size : {1, 3, 4, 8, 16, 100, 5000})
    for (const bool scaled : {false, true})
      for (const bool stream : {false, true}) {
        check<float>(size, 11, scaled, stream);
        check<double>(size, 5, scaled, stream);
      }
  check_moments();
  check_refusal();
  std::puts("tokens: passed");
}
