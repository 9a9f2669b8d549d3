// Weight matching by coordinate descent: label by label the best permutation given all others is a
// linear assignment on a sum of Gram matrices (Ainsworth et al., "Git Re-Basin", arXiv 2209.04836,
// algorithm 1).
//
// Of every label's tensors there is a copy [depth, units], so that permuting the other axes only
// picks rows of it and the Gram is one product over picked rows. A label whose neighbours have not
// moved is passed over. Where few rows changed since the last visit their differences are added to
// the old Gram. Assignments start from the label's last potentials.
#pragma once

#include <cmath>
#include <limits>

#include "assign.h"
#include "manifold_regime.h"
#include "match_copies.h"

namespace weightops::match {

// What is known of one label of one network.
template <class Sum>
struct Side {
  Buffer<Sum> rows;            // the copy of the network's tensors
  std::vector<Sum> score;      // [unit of the reference, unit of the network]; empty: none yet
  bool exact = false;          // computed at once, without additions since
  std::vector<int64_t> taken;  // the others' positions that it was computed with
  std::vector<int64_t> seen;   // versions of the neighbours then
  std::vector<double> duals;
  int64_t version = 0;  // of its permutation
};

// One network's descent towards the reference.
template <class Sum>
class Descent {
 public:
  // perms[label] is what is looked for.
  Descent(const Plan& plan, const Reference<Sum>& reference, const Sum* network,
          std::vector<int64_t*> perms, int64_t threads, const Team& team)
      : plan_(plan),
        reference_(reference),
        perms_(std::move(perms)),
        threads_(threads),
        team_(team),
        sides_(plan.labels.size()) {
    std::vector<Sum*> copies;
    for (size_t l = 0; l < sides_.size(); ++l) {
      const Label& label = plan_.labels[l];
      copies.push_back(sides_[l].rows.get(label.depth * label.size + gram::kMargin));
      std::iota(perms_[l], perms_[l] + label.size, 0);
      sides_[l].exact = label.depth == 0;
    }
    copy_all(plan_, network, copies, threads_, team_);
    for (const auto& range : plan_.fixed)
      for (int64_t at = range.begin; at < range.end; ++at)
        fixed_ += double(reference.data[at]) * double(network[at]);
  }

  // The inner product of the permuted network with the reference.
  double objective() {
    std::vector<double> sums(threads_);
    team_(threads_, [&](int64_t begin, int64_t end) {
      for (int64_t l = 0; l < int64_t(sides_.size()); ++l) {
        const int64_t size = plan_.labels[l].size;
        for (const Place& place : plan_.labels[l].places)
          if (place.counts)
            sums[begin] += inner(l, place, {size * begin / threads_, size * end / threads_});
      }
    });
    return std::accumulate(sums.begin(), sums.end(), fixed_);
  }

  // Visits every label; returns what the objective gained. `afresh`: no score that has been added
  // to is trusted. False in `finite`: a score is not.
  double sweep(const int64_t* order, bool afresh, bool& finite) {
    double gained = 0;
    for (size_t i = 0; i < sides_.size() && finite; ++i) gained += visit(order[i], afresh, finite);
    return gained;
  }

  bool all_exact() const {
    return std::all_of(sides_.begin(), sides_.end(),
                       [](const Side<Sum>& side) { return side.exact; });
  }

 private:
  double visit(int64_t l, bool afresh, bool& finite) {
    const Label& label = plan_.labels[l];
    if (label.depth == 0) return 0;
    Side<Sum>& side = sides_[l];
    std::vector<int64_t> versions;
    for (const int64_t other : label.neighbours) versions.push_back(sides_[other].version);
    const bool known = !side.score.empty() && (side.exact || !afresh);
    if (known && versions == side.seen) return 0;
    side.seen.swap(versions);
    if (!update(l, known)) return 0;

    const int64_t n = label.size;
    std::vector<int64_t> columns(n);
    const bool warm = !side.duals.empty();
    side.duals.resize(n);
    if (!assign::solve(side.score.data(), n, n, n, true, columns.data(), side.duals.data(), warm,
                       workspace_)) {
      finite = false;
      return 0;
    }
    double gain = 0, magnitude = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (columns[i] == perms_[l][i]) continue;
      const double now = side.score[i * n + columns[i]], before = side.score[i * n + perms_[l][i]];
      gain += now - before;
      magnitude += std::abs(now) + std::abs(before);
    }
    // What is less is rounding, and would be traded back and forth.
    if (gain <= 4 * double(std::numeric_limits<Sum>::epsilon()) * magnitude) return 0;
    const double before = label.repeated ? around(l) : 0;
    columns.swap(kept_);
    columns.assign(perms_[l], perms_[l] + n);
    std::copy(kept_.begin(), kept_.end(), perms_[l]);
    if (label.repeated) {
      const double after = around(l);
      gain = after - before;
      if (gain <= 1e-12 * std::abs(before)) {
        std::copy(columns.begin(), columns.end(), perms_[l]);
        return 0;
      }
    }
    ++side.version;
    return gain;
  }

  // Brings a label's score up to date; returns whether it changed.
  bool update(int64_t l, bool known) {
    const Label& label = plan_.labels[l];
    Side<Sum>& side = sides_[l];
    const int64_t n = label.size;
    std::vector<int64_t> taken;
    taken.reserve(label.positions);
    picked_.clear();  // changed rows, of the reference and of the network, now and before
    replaced_.clear();
    rows_.clear();
    for (const Place& place : label.places) {
      const int64_t first = taken.size();
      take(place, taken);
      for (int64_t p = 0; p < place.positions(); ++p) {
        const int64_t now = taken[first + p], before = known ? side.taken[first + p] : -1;
        if (now == before) continue;
        for (int64_t r = 0; r < place.run; ++r) {
          rows_.push_back(place.row + p * place.run + r);
          picked_.push_back(place.row + now * place.run + r);
          replaced_.push_back(place.row + before * place.run + r);
        }
      }
    }
    side.taken.swap(taken);
    const int64_t changed = rows_.size();
    if (known && changed == 0) return false;
    const Sum* own = side.rows.get(0);
    if (known && 2 * changed < label.depth) {
      // Differences are taken a part at a time, which stays in the cache.
      const int64_t part = std::max<int64_t>(64, (1 << 19) / n);
      for (int64_t begin = 0; begin < changed; begin += part) {
        const int64_t count = std::min(part, changed - begin);
        Sum* differences = differences_.get(count * n + gram::kMargin);
        on_numbers(count * n, n, [&](int64_t from, int64_t to) {
          for (int64_t k = from; k < to; ++k) {
            const Sum *now = own + picked_[begin + k] * n, *before = own + replaced_[begin + k] * n;
            for (int64_t j = 0; j < n; ++j) differences[k * n + j] = now[j] - before[j];
          }
        });
        std::vector<Sum>& more = more_;
        more.resize(n * n);
        multiply(l, rows_.data() + begin, differences, nullptr, count, more.data());
        on_numbers(n * n, 1, [&](int64_t from, int64_t to) {
          for (int64_t at = from; at < to; ++at) side.score[at] += more[at];
        });
      }
      side.exact = false;
    } else {
      if (!known) {
        side.score.resize(n * n);
      } else {
        rows_.clear();
        picked_.clear();
        int64_t first = 0;
        for (const Place& place : label.places) {
          for (int64_t p = 0; p < place.positions(); ++p)
            for (int64_t r = 0; r < place.run; ++r) {
              rows_.push_back(place.row + p * place.run + r);
              picked_.push_back(place.row + side.taken[first + p] * place.run + r);
            }
          first += place.positions();
        }
      }
      multiply(l, nullptr, own, picked_.data(), label.depth, side.score.data());
      side.exact = true;
    }
    return true;
  }

  // f on ranges of `count / each` items, on several threads where that many numbers are worth it.
  template <class F>
  void on_numbers(int64_t count, int64_t each, const F& f) {
    if (count < kManyNumbers)
      f(0, count / each);
    else
      team_(count / each, f);
  }

  // The numbers of the others' positions that come to each one under the present permutations.
  void take(const Place& place, std::vector<int64_t>& numbers) const {
    const int64_t first = numbers.size();
    numbers.push_back(0);
    for (const Factor& factor : place.others) {
      const int64_t count = numbers.size() - first;
      numbers.resize(first + count * factor.size);
      for (int64_t k = count - 1; k >= 0; --k) {
        const int64_t coarse = numbers[first + k] * factor.size;
        for (int64_t d = factor.size - 1; d >= 0; --d)
          numbers[first + k * factor.size + d] =
              coarse + (factor.label < 0 ? d : perms_[factor.label][d]);
      }
    }
  }

  // to = reference's rows^T * rows, the former at `order`, the latter at `picked`.
  void multiply(int64_t l, const int64_t* order, const Sum* rows, const int64_t* picked,
                int64_t depth, Sum* to) {
    using product::Kind;
    using product::Lies;
    const int64_t n = plan_.labels[l].size;
    if (n <= kNarrow)
      return gram::run<Sum>({reference_.rows[l], rows, order, picked, depth, n, to});
    manifold::BasesJob<Sum> job{};
    job.product.left = {reference_.rows[l], Kind::same, Lies::across, n};
    job.product.left.order = order;
    job.product.right = {rows, Kind::same, Lies::across, n};
    job.product.right.order = picked;
    job.product.depths = {depth};
    job.product.streams = true;
    job.rows = job.columns = n;
    job.to = to;
    job.kind = Kind::same;
    job.bases = 1;
    if (order == nullptr && reference_.keeps) job.kept = &reference_.kept[l];
    const bool small = n * n * depth < kSmall;
    const Team alone = [](int64_t count, const auto& f) { f(0, count); };
    manifold::run_best<manifold::Runner, Sum>(job, manifold::parts_available(3),
                                              small ? 1 : threads_, small ? alone : team_, [] {});
  }

  double inner(int64_t l, const Place& place, Range units) {
    const int64_t n = plan_.labels[l].size;
    const int64_t* perm = perms_[l];
    const Sum *reference = reference_.rows[l], *own = sides_[l].rows.get(0);
    std::vector<int64_t> numbers;
    take(place, numbers);
    double total = 0;
    for (int64_t p = 0; p < place.positions(); ++p)
      for (int64_t r = 0; r < place.run; ++r) {
        const Sum* ours = reference + (place.row + p * place.run + r) * n;
        const Sum* theirs = own + (place.row + numbers[p] * place.run + r) * n;
        double sums[4] = {};  // one alone would wait for itself
        int64_t j = units.begin;
        for (; j + 4 <= units.end; j += 4)
          for (int64_t k = 0; k < 4; ++k)
            sums[k] += double(ours[j + k]) * double(theirs[perm[j + k]]);
        for (; j < units.end; ++j) sums[0] += double(ours[j]) * double(theirs[perm[j]]);
        total += sums[0] + sums[1] + sums[2] + sums[3];
      }
    return total;
  }

  // The objective's share of the tensors that a label stands in.
  double around(int64_t l) {
    double total = 0;
    int64_t last = -1;
    for (const Place& place : plan_.labels[l].places) {
      if (place.tensor != last) total += inner(l, place, {0, plan_.labels[l].size});
      last = place.tensor;
    }
    return total;
  }

  static constexpr int64_t kNarrow = 64;  // products whose packing would cost as much
  static constexpr int64_t kManyNumbers = 1 << 16;
  static constexpr int64_t kSmall = 1 << 24;  // products not worth another thread

  const Plan& plan_;
  const Reference<Sum>& reference_;
  std::vector<int64_t*> perms_;
  int64_t threads_;
  const Team& team_;
  std::vector<Side<Sum>> sides_;
  double fixed_ = 0;
  assign::Workspace<Sum> workspace_;
  Buffer<Sum> differences_;
  std::vector<Sum> more_;
  std::vector<int64_t> rows_, picked_, replaced_, kept_;
};

// Descends until a sweep over exact scores changes nothing, or `sweeps` are done; writes the
// objective before and after each into history[k * stride] and returns how many there were, or -1
// where numbers are not finite. order is [sweeps, labels].
template <class Sum>
int64_t descend(Descent<Sum>& descent, const int64_t* order, int64_t labels, int64_t sweeps,
                double* history, int64_t stride) {
  double objective = descent.objective();
  history[0] = objective;
  bool finite = std::isfinite(objective), afresh = false;
  int64_t done = 0;
  while (finite && done < sweeps) {
    const double gained = descent.sweep(order + done * labels, afresh, finite);
    ++done;
    objective += gained;
    history[done * stride] = objective;
    if (gained != 0) {
      afresh = false;
    } else {
      if (descent.all_exact()) break;
      afresh = true;
    }
  }
  if (!finite) return -1;
  history[done * stride] = descent.objective();
  return done;
}

}  // namespace weightops::match
