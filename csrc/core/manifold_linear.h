// Linear maps on a manifold: which products a call is made of.
#pragma once

#include "manifold_few.h"
#include "manifold_regime.h"

namespace weightops::manifold {

// x [items, rows_each, in], weight [bases, out, in], coeffs [contexts, bases]; all dense.
template <class Sum>
struct Linear {
  int64_t items, rows_each, in, out, bases, contexts;
  const int64_t* index;  // the context of each item; null: item i has context i, or all have one
  const Sum* coeffs;
  Kind kind;  // of x, y, weight and their gradients
  const void* weight;
  int parts;  // of kernels on split numbers; 0: none
  int64_t threads;

  int64_t rows() const { return items * rows_each; }
  int64_t context_of(int64_t item) const { return index ? index[item] : contexts == 1 ? 0 : item; }
};

// Rows of equal context: order[starts[g]:starts[g + 1]] have context ids[g].
struct Groups {
  std::vector<int64_t> order, starts, ids;
  int64_t count() const { return ids.size(); }
  int64_t size(int64_t g) const { return starts[g + 1] - starts[g]; }
};

template <class Sum>
Groups group(const Linear<Sum>& problem) {
  std::vector<int64_t> at(problem.contexts + 1);
  for (int64_t item = 0; item < problem.items; ++item)
    at[problem.context_of(item) + 1] += problem.rows_each;
  for (int64_t g = 0; g < problem.contexts; ++g) at[g + 1] += at[g];
  Groups groups;
  for (int64_t g = 0; g < problem.contexts; ++g)
    if (at[g + 1] > at[g]) {
      groups.ids.push_back(g);
      groups.starts.push_back(at[g]);
    }
  groups.starts.push_back(problem.rows());
  groups.order.resize(problem.rows());
  for (int64_t item = 0; item < problem.items; ++item)
    for (int64_t r = 0; r < problem.rows_each; ++r)
      groups.order[at[problem.context_of(item)]++] = item * problem.rows_each + r;
  return groups;
}

template <class Sum>
Regime regime_of(const Linear<Sum>& problem, const Groups& groups, bool backward) {
  std::vector<int64_t> sizes;
  for (int64_t g = 0; g < groups.count(); ++g) sizes.push_back(groups.size(g));
  return choose(problem.rows(), problem.bases, problem.parts, sizes, backward);
}

template <class Sum>
std::vector<int64_t> contexts_of_rows(const Linear<Sum>& problem) {
  std::vector<int64_t> contexts(problem.rows());
  for (int64_t row = 0; row < problem.rows(); ++row)
    contexts[row] = problem.context_of(row / problem.rows_each);
  return contexts;
}

// A basis' rows lie along the inputs.
template <class Sum>
Source<Sum> weight_of(const Linear<Sum>& problem, Lies lies) {
  Source<Sum> source{problem.weight, problem.kind, lies, problem.in};
  source.term_stride = problem.in * problem.out;
  return source;
}

template <class Sum>
Source<Sum> made_weight(const Linear<Sum>& problem, Lies lies, int64_t context) {
  Source<Sum> source{problem.weight, problem.kind, lies, problem.in};
  source.coeffs = problem.coeffs + context * problem.bases;
  source.bases = problem.bases;
  source.basis_stride = problem.in * problem.out;
  return source;
}

// to[r] = W(context of r) from[r], or its transpose's; `dots`, where asked for, are <W_k^T from[r],
// other[r]> of a product with the transpose, [row, basis].
template <class Sum>
void apply(const Linear<Sum>& problem, const Groups* groups, bool transpose, const void* from,
           void* to, const Sum* shift, const void* other, Sum* dots, const Team& team) {
  const int64_t depth = transpose ? problem.out : problem.in,
                columns = transpose ? problem.in : problem.out;
  const Lies lies = transpose ? Lies::across : Lies::along;
  const Source<Sum> left{from, problem.kind, Lies::along, depth},
      others{other, problem.kind, Lies::along, columns};
  RowsJob<Sum> job{{}, columns, to, problem.kind, columns, nullptr, shift, others, dots};
  std::vector<int64_t> contexts;
  if (groups) {
    for (int64_t g = 0; g < groups->count(); ++g) {
      Source<Sum> own = left;
      own.order = groups->order.data() + groups->starts[g];
      job.each.push_back({{own, made_weight(problem, lies, groups->ids[g]), {depth}},
                          groups->size(g),
                          own.order,
                          nullptr,
                          groups->ids[g]});
    }
  } else {
    contexts = contexts_of_rows(problem);
    job.factors = problem.coeffs;
    job.each.push_back(
        {{left, weight_of(problem, lies), std::vector<int64_t>(problem.bases, depth)},
         problem.rows(),
         nullptr,
         contexts.data(),
         0});
  }
  run(job, parts_for(problem.rows(), problem.parts), problem.threads, team);
}

// A tensor's numbers as sums, for so few rows that a copy is nothing.
template <class Sum>
std::vector<Sum> widened(const void* from, Kind kind, int64_t count) {
  std::vector<Sum> found(count);
  for (int64_t at = 0; at < count; ++at)
    found[at] = kind == Kind::half       ? Sum(widen(static_cast<const Half*>(from)[at]))
                : kind == Kind::bfloat16 ? Sum(widen(static_cast<const BFloat16*>(from)[at]))
                                         : static_cast<const Sum*>(from)[at];
  return found;
}

template <class Sum>
std::vector<Sum> by_row(const Linear<Sum>& problem, const Sum* of_contexts, int64_t width) {
  std::vector<Sum> found(problem.rows() * width);
  for (int64_t row = 0; row < problem.rows(); ++row)
    std::copy_n(of_contexts + problem.context_of(row / problem.rows_each) * width, width,
                found.data() + row * width);
  return found;
}

template <class Sum>
void forward(const Linear<Sum>& problem, const void* x, const Sum* shift, void* y,
             const Team& team) {
  if (problem.in == 0) {
    const std::vector<Sum> nothing(problem.out);
    for (int64_t row = 0; row < problem.rows(); ++row)
      put(y, problem.kind, row * problem.out,
          shift ? shift + problem.context_of(row / problem.rows_each) * problem.out
                : nothing.data(),
          problem.out);
    return;
  }
  const Groups groups = group(problem);
  const Regime regime = regime_of(problem, groups, false);
  if (regime == Regime::few_rows) {
    const auto values = widened<Sum>(x, problem.kind, problem.rows() * problem.in),
               coeffs = by_row(problem, problem.coeffs, problem.bases);
    std::vector<Sum> plus, result(problem.rows() * problem.out);
    if (shift) plus = by_row(problem, shift, problem.out);
    FewJob<Sum> job{problem.rows(), problem.in,   problem.out,
                    problem.bases,  problem.kind, weight_of(problem, Lies::along),
                    values.data(),  coeffs.data()};
    job.shift = shift ? plus.data() : nullptr;
    job.y = result.data();
    run_few(job, problem.threads, team);
    put(y, problem.kind, 0, result.data(), problem.rows() * problem.out);
    return;
  }
  apply(problem, regime == Regime::weights ? &groups : nullptr, false, x, y, shift,
        static_cast<const void*>(nullptr), static_cast<Sum*>(nullptr), team);
}

// Gradients that are not wanted are null; to_coeffs [contexts, bases].
template <class Sum>
void backward(const Linear<Sum>& problem, const void* x, const void* grad, void* to_x,
              Sum* to_coeffs, void* to_weight, const Team& team) {
  const int64_t bases = problem.bases;
  if (to_coeffs) std::fill_n(to_coeffs, problem.contexts * bases, Sum(0));
  std::vector<Sum> dots;
  const auto add_dots = [&] {
    for (int64_t row = 0; to_coeffs && row < problem.rows(); ++row)
      for (int64_t k = 0; k < bases; ++k)
        to_coeffs[problem.context_of(row / problem.rows_each) * bases + k] += dots[row * bases + k];
  };
  const Groups groups = group(problem);
  const Regime regime = regime_of(problem, groups, true);
  if (regime == Regime::few_rows) {
    const auto values = widened<Sum>(x, problem.kind, problem.rows() * problem.in),
               grads = widened<Sum>(grad, problem.kind, problem.rows() * problem.out),
               coeffs = by_row(problem, problem.coeffs, bases);
    std::vector<Sum> result(to_x ? problem.rows() * problem.in : 0);
    dots.resize(problem.rows() * bases);
    FewJob<Sum> job{problem.rows(), problem.in,    problem.out,
                    bases,          problem.kind,  weight_of(problem, Lies::along),
                    values.data(),  coeffs.data(), grads.data()};
    job.to_x = to_x ? result.data() : nullptr;
    job.dots = to_coeffs ? dots.data() : nullptr;
    job.to_weight = to_weight;
    run_few(job, problem.threads, team);
    if (to_x) put(to_x, problem.kind, 0, result.data(), problem.rows() * problem.in);
    add_dots();
    return;
  }
  const Source<Sum> weight = weight_of(problem, Lies::along);
  if (regime == Regime::weights) {
    if (to_x)
      apply(problem, &groups, true, grad, to_x, static_cast<const Sum*>(nullptr), nullptr,
            static_cast<Sum*>(nullptr), team);
    if (!to_coeffs && !to_weight) return;
    std::vector<Sum> coeffs(groups.count() * bases);
    std::vector<int64_t> depths(groups.count());
    for (int64_t g = 0; g < groups.count(); ++g) {
      std::copy_n(problem.coeffs + groups.ids[g] * bases, bases, coeffs.data() + g * bases);
      depths[g] = groups.size(g);
    }
    if (to_coeffs) dots.resize(groups.count() * bases);
    Source<Sum> left{grad, problem.kind, Lies::across, problem.out},
        right{x, problem.kind, Lies::across, problem.in};
    left.order = right.order = groups.order.data();
    left.starts = right.starts = groups.starts.data();
    run(BasesJob<Sum>{{left, right, depths},
                      problem.out,
                      problem.in,
                      to_weight,
                      problem.kind,
                      bases,
                      coeffs.data(),
                      weight,
                      to_coeffs ? dots.data() : nullptr},
        parts_for(problem.rows(), problem.parts), problem.threads, team);
    if (to_coeffs)
      for (int64_t g = 0; g < groups.count(); ++g)
        std::copy_n(dots.data() + g * bases, bases, to_coeffs + groups.ids[g] * bases);
    return;
  }
  const std::vector<int64_t> contexts = contexts_of_rows(problem);
  if (to_x || to_coeffs) {
    if (to_coeffs) dots.resize(problem.rows() * bases);
    apply(problem, nullptr, true, grad, to_x, static_cast<const Sum*>(nullptr), x,
          to_coeffs ? dots.data() : nullptr, team);
    add_dots();
  }
  if (to_weight) {
    std::vector<Sum> scale(problem.rows() * bases);
    for (int64_t row = 0; row < problem.rows(); ++row)
      std::copy_n(problem.coeffs + contexts[row] * bases, bases, scale.data() + row * bases);
    const Source<Sum> left{grad, problem.kind, Lies::across, problem.out};
    Source<Sum> right{x, problem.kind, Lies::across, problem.in};
    right.scale = scale.data();
    right.scale_stride = bases;
    run(BasesJob<Sum>{{left, right, std::vector<int64_t>(bases, problem.rows()), true},
                      problem.out,
                      problem.in,
                      to_weight,
                      problem.kind,
                      bases,
                      nullptr,
                      weight,
                      nullptr},
        parts_for(problem.rows(), problem.parts), problem.threads, team);
  }
}

}  // namespace weightops::manifold
