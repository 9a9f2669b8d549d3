// Functionals of networks with a matrix and a vector against plain loops, from several threads: run
// under sanitizers.
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "../core/functional_run.h"

namespace {

using namespace weightops::functional;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

template <class T>
std::vector<T> numbers(int64_t count, int64_t seed) {
  std::vector<T> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = T((i * 7919 + seed * 31) % 101 - 50) / 50;
  return made;
}

// A matrix [n, m] with a label an axis, and a vector [n] with the first one.
std::vector<int64_t> code_of(int64_t n, int64_t m) {
  const int64_t numel = n * m + n;
  std::vector<int64_t> side{2, 0, 2,  n,  m, m, 1, n * m, 1, n, 1,  // tensors
                            6, 0, -1, -1, 0, 1, 0, 0,     1, 0, 0,
                            0, 1, -1, -1, 0, 0, 1, 0,     1, 3, 0};
  std::vector<int64_t> code{numel, numel, 10, 1};
  for (int s = 0; s < 2; ++s) code.insert(code.end(), side.begin(), side.end());
  const std::vector<int64_t> types{4,                                // by kept labels
                                   0, 2, 2, 4, 5, 4, 5, 0, 1, 2, 3,  // none
                                   1, n, 2, 2, 1, 0, 3, 0, 1, 0, 3, 0, 4, 5, 6, 7,  // the first
                                   1, m, 1, 1, 2, 0, 2, 0, 8,                       // the second
                                   2, n, m, 1, 1, 0, 0, 1, 0, 0, 1, 9};             // both
  code.insert(code.end(), types.begin(), types.end());
  return code;
}

struct Problem {
  int64_t n, m, hidden, layers;
  static constexpr int64_t networks = 2, momenta = 3, shared = 2;
  int64_t numel() const { return n * m + n; }
  std::vector<int64_t> widths() const {
    std::vector<int64_t> made{2 + momenta + shared};
    made.resize(layers, hidden);
    made.push_back(1);
    return made;
  }
};

// One network's f.
std::vector<double> expected(const Problem& p, const std::vector<std::vector<double>>& raw,
                             const double* shared, const double* theta, double eps) {
  const int64_t numel = p.numel(), matrix = p.n * p.m;
  std::vector<std::vector<double>> h(numel);
  for (const auto& channel : raw) {
    double squares[2] = {};
    for (int64_t i = 0; i < numel; ++i) squares[i >= matrix] += channel[i] * channel[i];
    squares[0] /= matrix, squares[1] /= p.n;
    for (int64_t i = 0; i < numel; ++i)
      h[i].push_back(channel[i] / std::sqrt(squares[i >= matrix] + eps));
  }
  for (auto& row : h) row.insert(row.end(), shared, shared + Problem::shared);
  const auto widths = p.widths();
  const double* bias = theta;
  for (size_t l = 0; l + 1 < widths.size(); ++l)
    bias += widths[l] * widths[l + 1] * (l + 2 == widths.size() ? 10 : 1);
  for (size_t l = 0; l + 2 < widths.size(); ++l) {
    for (auto& row : h) {
      std::vector<double> next(bias, bias + widths[l + 1]);
      for (int64_t i = 0; i < widths[l]; ++i)
        for (int64_t o = 0; o < widths[l + 1]; ++o)
          next[o] += row[i] * theta[i * widths[l + 1] + o];
      for (double& each : next) each = std::max(each, 0.0);
      row = next;
    }
    theta += widths[l] * widths[l + 1];
    bias += widths[l + 1];
  }
  const auto dot = [&](const std::vector<double>& row, int64_t term) {
    double sum = 0;
    for (int64_t k = 0; k < p.hidden; ++k) sum += row[k] * theta[term * p.hidden + k];
    return sum;
  };
  const auto mean = [&](int64_t begin, int64_t count, int64_t stride) {
    std::vector<double> sum(p.hidden);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < p.hidden; ++k) sum[k] += h[begin + i * stride][k] / count;
    return sum;
  };
  const auto all = mean(0, matrix, 1), vector = mean(matrix, p.n, 1);
  std::vector<double> f(numel);
  for (int64_t i = 0; i < numel; ++i) {
    const bool second = i >= matrix;
    const int64_t row = second ? i - matrix : i / p.m;
    f[i] = bias[second] + dot(all, second) + dot(vector, 2 + second) +
           dot(mean(row * p.m, p.m, 1), 4 + second) + dot(h[matrix + row], 6 + second);
    if (!second) f[i] += dot(mean(i % p.m, p.n, p.m), 8) + dot(h[i], 9);
  }
  return f;
}

template <class T>
void check(const Problem& p, int64_t parts) {
  const int64_t numel = p.numel(), networks = Problem::networks;
  const auto widths = p.widths();
  int64_t length = 2;
  for (size_t l = 0; l + 1 < widths.size(); ++l) {
    const bool last = l + 2 == widths.size();
    length += widths[l] * widths[l + 1] * (last ? 10 : 1) + (last ? 0 : widths[l + 1]);
  }
  // Exactly as long as they may be read, so that the address sanitizer sees a step too far.
  const auto flat = numbers<T>(networks * numel, 1), grads = numbers<T>(networks * numel, 2),
             momenta = numbers<T>(Problem::momenta * networks * numel, 3),
             shared = numbers<T>(networks * Problem::shared, 4),
             theta = numbers<T>(networks * length, 5);
  std::vector<T> out(networks * numel, T(99));
  const double eps = 1e-3;
  const auto made = readout(code_of(p.n, p.m));
  const Task<T> task{*made,
                     {0, p.n * p.m, numel},
                     widths,
                     networks,
                     Problem::momenta,
                     Problem::shared,
                     parts,
                     eps,
                     flat.data(),
                     grads.data(),
                     momenta.data(),
                     shared.data(),
                     theta.data(),
                     numel,
                     numel,
                     {networks * numel, numel},
                     Problem::shared,
                     length,
                     out.data()};
  const Team<T> team = [](int64_t count, const auto& f) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
      threads.emplace_back([&, t] {
        Scratch<T> scratch;
        f(count * t / 3, count * (t + 1) / 3, scratch);
      });
    for (std::thread& thread : threads) thread.join();
  };
  State<T> state;
  for (int64_t network = 0; network < networks; ++network)
    weightops::functional::run(task, network, state, team);
  for (int64_t network = 0; network < networks; ++network) {
    std::vector<std::vector<double>> raw;
    for (int64_t c = 0; c < task.channels(); ++c)
      raw.emplace_back(task.channel(network, c), task.channel(network, c) + numel);
    const std::vector<double> of_theta(theta.data() + network * length,
                                       theta.data() + (network + 1) * length),
        of_shared(shared.data() + network * Problem::shared,
                  shared.data() + (network + 1) * Problem::shared);
    const auto f = expected(p, raw, of_shared.data(), of_theta.data(), eps);
    double most = 0, away = 0;
    for (int64_t i = 0; i < numel; ++i) {
      most = std::max(most, std::abs(f[i]));
      away = std::max(away, std::abs(f[i] - double(out[network * numel + i])));
    }
    require(away <= most * (sizeof(T) == 4 ? 1e-5 : 1e-13), "functional");
  }
}

template <class T>
void check_all() {
  for (const Problem& p : {Problem{3, 5, 4, 2}, Problem{7, 40, 16, 3}, Problem{50, 33, 20, 4},
                           Problem{1, 300, 48, 3}, Problem{130, 1, 5, 2}})
    for (int64_t parts : {1, 2, 5}) check<T>(p, parts);
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  std::puts("functional: ok");
}
