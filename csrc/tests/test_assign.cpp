// core/assign.h against the definition: all permutations for small problems, and the optimality
// certificate that the potentials are for larger ones. Exits with the number of failures.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>

#include "../core/assign.h"

namespace {

using namespace weightops::assign;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

template <typename T>
struct Matrix {
  int64_t rows, cols, stride;
  std::vector<T> values;

  Matrix(int64_t rows, int64_t cols, int64_t gap = 0)
      : rows(rows), cols(cols), stride(cols + gap), values(rows * stride) {}

  T& at(int64_t row, int64_t column) { return values[row * stride + column]; }
};

template <typename T>
double best_by_enumeration(Matrix<T>& score, bool maximize, int64_t row, std::vector<bool>& taken) {
  if (row == score.rows) return 0;
  double best = maximize ? -INFINITY : INFINITY;
  for (int64_t column = 0; column < score.cols; ++column) {
    if (taken[column]) continue;
    taken[column] = true;
    const double sum = score.at(row, column) + best_by_enumeration(score, maximize, row + 1, taken);
    best = maximize ? std::max(best, sum) : std::min(best, sum);
    taken[column] = false;
  }
  return best;
}

template <typename T>
using Solve = bool (*)(const internal::Problem<T>&, Workspace<T>&);

template <typename T>
std::vector<Solve<T>> instruction_sets() {
  std::vector<Solve<T>> all = {internal::solve_generic<T>};
#if WEIGHTOPS_X86
  if (weightops::isa() != weightops::Isa::generic) all.push_back(internal::solve_avx2<T>);
  if (weightops::isa() == weightops::Isa::avx512) all.push_back(internal::solve_avx512<T>);
#endif
  return all;
}

// Solves, checks the assignment and its certificate, and returns the sum of the chosen scores.
template <typename T>
double checked(Matrix<T>& score, bool maximize, Solve<T> solve_with, bool warm,
               std::vector<double>& potentials, const std::string& what) {
  static Workspace<T> workspace;
  std::vector<int64_t> columns(score.rows, -1);
  const bool finite = solve_with({score.values.data(), score.rows, score.cols, score.stride,
                                  maximize, warm, columns.data(), potentials.data()},
                                 workspace);
  expect(finite, what + ": taken for infinite");
  std::vector<bool> taken(score.cols);
  double sum = 0, largest = 0, violation = 0;
  for (int64_t row = 0; row < score.rows; ++row) {
    const int64_t own = columns[row];
    if (own < 0 || own >= score.cols || taken[own]) {
      expect(false, what + ": not an assignment");
      return NAN;
    }
    taken[own] = true;
    sum += score.at(row, own);
    for (int64_t column = 0; column < score.cols; ++column) {
      const double lead =
          (score.at(row, column) - potentials[column]) - (score.at(row, own) - potentials[own]);
      violation = std::max(violation, maximize ? lead : -lead);
      largest = std::max({largest, std::abs(static_cast<double>(score.at(row, column))),
                          std::abs(potentials[column])});
    }
  }
  expect(violation <= 1e-13 * largest, what + ": the potentials do not certify the optimum");
  if (score.rows < score.cols) {
    const auto [least, greatest] = std::minmax_element(potentials.begin(), potentials.end());
    bool extreme = true;
    for (int64_t column = 0; column < score.cols; ++column)
      extreme = extreme && (taken[column] || potentials[column] == (maximize ? *least : *greatest));
    expect(extreme, what + ": a free column does not hold the extreme potential");
  }
  return sum;
}

template <typename T>
void fill(Matrix<T>& score, int family, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  for (int64_t row = 0; row < score.rows; ++row)
    for (int64_t column = 0; column < score.cols; ++column) {
      double value = 0;
      switch (family) {
        case 0: value = normal(random); break;
        case 1: value = uniform(random); break;
        case 2: value = std::floor(4 * uniform(random)); break;
        case 3: value = -2.5; break;
        case 4: value = row >= 2 ? score.at(row - 2, column) : normal(random); break;
        case 5: value = 1e30 * normal(random); break;
        case 6: value = 1e-30 * normal(random); break;
        case 7: value = std::pow(10.0, 60 * uniform(random) - 30); break;
        case 8: value = static_cast<double>(row * column); break;
        case 9: value = uniform(random) < 0.8 ? 1e30 : uniform(random); break;
        default: break;
      }
      score.at(row, column) = static_cast<T>(value);
    }
}

constexpr int kFamilies = 11;

template <typename T>
void small_problems_match_enumeration() {
  std::mt19937_64 random(1);
  for (int family = 0; family < kFamilies; ++family)
    for (int64_t rows = 1; rows <= 6; ++rows)
      for (int64_t cols = rows; cols <= rows + 2; ++cols)
        for (const bool maximize : {false, true})
          for (const auto solve_with : instruction_sets<T>()) {
            const std::string what = "family " + std::to_string(family) + ", " +
                                     std::to_string(rows) + " x " + std::to_string(cols);
            Matrix<T> score(rows, cols, family % 3);
            fill(score, family, random);
            std::vector<bool> taken(cols);
            const double best = best_by_enumeration(score, maximize, 0, taken);
            std::vector<double> potentials(cols);
            for (const bool warm : {false, true}) {
              const double sum = checked(score, maximize, solve_with, warm, potentials, what);
              expect(std::abs(sum - best) <= 1e-12 * std::abs(best), what + ": not the optimum");
            }
          }
}

template <typename T>
void potentials_certify_larger_problems() {
  std::mt19937_64 random(2);
  for (int family = 0; family < kFamilies; ++family)
    for (const int64_t rows : {17, 64, 65, 100})
      for (const int64_t cols : {rows, rows + 1, 2 * rows + 3})
        for (const bool maximize : {false, true}) {
          const std::string what = "family " + std::to_string(family) + ", " +
                                   std::to_string(rows) + " x " + std::to_string(cols);
          Matrix<T> score(rows, cols, family % 3), other(rows, cols);
          fill(score, family, random);
          fill(other, family, random);
          for (const auto solve_with : instruction_sets<T>()) {
            std::vector<double> same(cols), unrelated(cols), zero(cols), huge(cols),
                no_number(cols);
            const double cold = checked(score, maximize, solve_with, false, same, what);
            checked(other, maximize, solve_with, false, unrelated, what);
            for (double& value : huge) value = 1e35 * std::generate_canonical<double, 53>(random);
            no_number[cols / 2] = NAN;
            for (auto* given : {&same, &unrelated, &zero, &huge, &no_number}) {
              const double sum = checked(score, maximize, solve_with, true, *given, what);
              expect(std::abs(sum - cold) <= 1e-12 * std::abs(cold), what + ": warm differs");
            }
          }
        }
}

void ends_on_overflow() {
  for (const auto solve_with : instruction_sets<double>()) {
    std::mt19937_64 random(3);
    Matrix<double> score(70, 70);
    for (double& value : score.values) value = random() % 2 ? 1.7e308 : -1.7e308;
    std::vector<int64_t> columns(70);
    std::vector<double> potentials(70);
    Workspace<double> workspace;
    solve_with({score.values.data(), 70, 70, 70, true, false, columns.data(), potentials.data()},
               workspace);
    std::vector<bool> taken(70);
    for (const int64_t column : columns) taken.at(column) = true;
    expect(std::find(taken.begin(), taken.end(), false) == taken.end(), "overflow: no permutation");
  }
}

void empty_problems_are_allowed() {
  Workspace<float> workspace;
  std::vector<double> potentials(3, 7);
  solve<float>(nullptr, 0, 0, 0, true, nullptr, nullptr, false, workspace);
  for (const bool warm : {false, true})
    solve<float>(nullptr, 0, 3, 3, true, nullptr, potentials.data(), warm, workspace);
  expect(potentials[0] == potentials[2], "no rows: free columns differ in potential");
}

template <typename T>
void any_infinite_score_is_found() {
  const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  Workspace<T> workspace;
  for (const int64_t rows : {1, 5, 64, 70})
    for (const int64_t cols : {rows, rows + 3})
      for (const int64_t gap : {0, 2})
        for (const auto solve_with : instruction_sets<T>())
          for (const bool warm : {false, true}) {
            Matrix<T> score(rows, cols, gap);
            std::fill(score.values.begin(), score.values.end(), nan);  // the gaps are not looked at
            for (int64_t row = 0; row < rows; ++row)
              for (int64_t column = 0; column < cols; ++column)
                score.at(row, column) = std::numeric_limits<T>::denorm_min() * (row * column % 7);
            std::vector<int64_t> columns(rows);
            const auto is_finite = [&] {
              std::vector<double> potentials(cols);
              return solve_with({score.values.data(), rows, cols, score.stride, true, warm,
                                 columns.data(), potentials.data()},
                                workspace);
            };
            expect(is_finite(), "finite: taken for infinite");
            for (const T bad : {infinity, -infinity, nan, -nan})
              for (const int64_t row : {int64_t{0}, rows / 2, rows - 1})
                for (const int64_t column : {int64_t{0}, cols / 2, cols - 1}) {
                  const T good = score.at(row, column);
                  score.at(row, column) = bad;
                  expect(!is_finite(), "infinite: missed");
                  score.at(row, column) = good;
                }
          }
}

}  // namespace

int main() {
  small_problems_match_enumeration<float>();
  small_problems_match_enumeration<double>();
  potentials_certify_larger_problems<float>();
  potentials_certify_larger_problems<double>();
  ends_on_overflow();
  empty_problems_are_allowed();
  any_infinite_score_is_found<float>();
  any_infinite_score_is_found<double>();
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
