// The permute and merge cores against plain loops, from several threads: run under sanitizers.
#include "../core/permute.h"

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../core/merge.h"

namespace {

using weightops::kFixed;
using weightops::Plan;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

struct Problem {
  Plan plan;
  std::vector<int64_t> index;  // per network: a permutation of the rows, then of the columns
  int64_t networks, rows, columns, block;

  int64_t source(int64_t network, int64_t at) const {
    const int64_t within = at % block, column = at / block % columns, row = at / block / columns;
    const int64_t* own = index.data() + network * (rows + columns);
    return (own[row] * columns + own[rows + column]) * block + within;
  }
};

Problem make(int64_t networks, int64_t rows, int64_t columns, int64_t block, std::mt19937& random) {
  Problem p{{}, {}, networks, rows, columns, block};
  p.plan.add_label(rows);
  p.plan.add_label(columns);
  p.plan.add_map({{0, rows}});
  p.plan.add_map({{1, columns}});
  const int64_t sizes[] = {rows, columns, block}, maps[] = {0, 1, kFixed};
  p.plan.add_tensor(sizes, maps, 3);
  for (int64_t n = 0; n < networks; ++n)
    for (const int64_t size : {rows, columns}) {
      const size_t begin = p.index.size();
      p.index.resize(begin + size);
      std::iota(p.index.begin() + begin, p.index.end(), 0);
      std::shuffle(p.index.begin() + begin, p.index.end(), random);
    }
  return p;
}

template <class T>
void check_permute(const Problem& p, bool stream) {
  const int64_t numel = p.plan.numel, total = p.networks * numel, stride = p.rows + p.columns;
  // Exactly as long as it may be read, so that the address sanitizer sees a step too far.
  std::vector<T> flat(total), out(total), back(total);
  for (int64_t i = 0; i < total; ++i) flat[i] = static_cast<T>(i * 7 + 1);
  const auto run = [&](const std::vector<T>& from, std::vector<T>& to, bool inverse) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
      threads.emplace_back([&, t] {
        const bool valid = weightops::permute_range(
            p.plan, {reinterpret_cast<const char*>(from.data()), numel}, {p.index.data(), stride},
            inverse, {reinterpret_cast<char*>(to.data()), numel}, sizeof(T), stream, total * t / 3,
            total * (t + 1) / 3);
        require(valid, "permutations are accepted");
      });
    for (std::thread& thread : threads) thread.join();
  };
  run(flat, out, false);
  for (int64_t i = 0; i < total; ++i)
    require(out[i] == flat[i / numel * numel + p.source(i / numel, i % numel)], "permute");
  run(out, back, true);
  require(back == flat, "inverse");
}

void check_merge(const Problem& p) {
  const int64_t numel = p.plan.numel, stride = p.rows + p.columns;
  std::vector<float> flat(p.networks * numel), out(2 * numel), weights(2 * p.networks);
  for (size_t i = 0; i < flat.size(); ++i) flat[i] = static_cast<float>(i % 101) - 50;
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i + 1);
  const weightops::MergeProblem problem{p.plan,
                                        p.networks,
                                        2,
                                        {reinterpret_cast<const char*>(flat.data()), numel},
                                        {p.index.data(), stride}};
  const bool valid = weightops::merge_range<float>(
      problem, weights.data(), {reinterpret_cast<char*>(out.data()), numel}, 0, numel);
  require(valid, "permutations are accepted");
  for (int64_t l = 0; l < 2; ++l)
    for (int64_t i = 0; i < numel; ++i) {
      double sum = 0;
      for (int64_t m = 0; m < p.networks; ++m)
        sum += double{weights[l * p.networks + m]} * flat[m * numel + p.source(m, i)];
      require(out[l * numel + i] == static_cast<float>(sum), "merge");
    }
}

void check_refusal(std::mt19937& random) {
  Problem p = make(1, 4, 3, 1, random);
  std::vector<float> flat(12), out(12);
  for (const int64_t bad : {int64_t{-1}, int64_t{4}, p.index[1], INT64_MAX, INT64_MIN})
    for (const bool inverse : {false, true}) {
      Problem broken = p;
      broken.index[0] = bad;
      require(
          !weightops::permute_range(broken.plan, {reinterpret_cast<const char*>(flat.data()), 12},
                                    {broken.index.data(), 7}, inverse,
                                    {reinterpret_cast<char*>(out.data()), 12}, 4, false, 0, 12),
          "no permutation is refused");
    }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const int64_t columns : {1, 2, 3, 7, 16, 33, 200})
    for (const int64_t block : {1, 2, 3, 9, 25, 70}) {
      const Problem p = make(2, 5, columns, block, random);
      check_permute<uint8_t>(p, false);
      check_permute<uint16_t>(p, false);
      check_permute<uint32_t>(p, true);
      check_permute<uint64_t>(p, true);
      check_merge(p);
    }
  check_refusal(random);
  std::puts("permute: passed");
}
