// Where labels stand in a network, as weightops/ops/match/plan.py writes it.
#pragma once

#include <stdexcept>
#include <vector>

#include "product.h"

namespace weightops::match {

using product::Range;

struct Factor {
  int64_t label, size, stride;  // label < 0: fixed
};

// Where a label stands in a tensor: its neighbouring units are `stride` apart, and each meets
// `run` numbers that follow each other at each of the other factors' positions.
struct Place {
  int64_t offset, stride, run;
  bool counts;  // in the objective, which takes one place of each tensor
  int64_t tensor;
  std::vector<Factor> others;
  std::vector<int64_t> at;  // of the others' positions
  int64_t row = 0;          // its first one in the label's copies

  int64_t positions() const { return at.size(); }
  int64_t rows() const { return positions() * run; }
};

struct Label {
  int64_t size, depth = 0, positions = 0;
  std::vector<Place> places;
  std::vector<int64_t> neighbours;  // labels that share a tensor with it
  bool repeated = false;            // twice in a tensor: scores are a linearisation
};

struct Plan {
  std::vector<Label> labels;
  std::vector<Range> fixed;  // numbers of tensors without labels

  // As weightops/ops/match/plan.py writes it. Throws where it does not fit `numel` numbers.
  static Plan parse(const int64_t* code, int64_t count, int64_t numel) {
    Plan plan;
    const int64_t* end = code + count;
    const auto next = [&] {
      if (code == end) throw std::length_error("the plan ends early");
      return *code++;
    };
    plan.labels.resize(next());
    for (Label& label : plan.labels) label.size = next();
    plan.fixed.resize(next());
    for (auto& range : plan.fixed) {
      range.begin = next();
      range.end = next();
      check(0 <= range.begin && range.begin <= range.end && range.end <= numel);
    }
    for (int64_t l = 0; l < int64_t(plan.labels.size()); ++l) {
      Label& label = plan.labels[l];
      label.places.resize(next());
      for (Place& place : label.places) {
        place.offset = next();
        place.stride = next();
        place.run = next();
        place.counts = next() != 0;
        place.tensor = next();
        place.others.resize(next());
        place.at = {0};
        // Places hold no number twice, so none has more of them than there are.
        check(0 <= place.offset && place.offset < numel);
        int64_t held = 1, last = place.offset;
        const auto add = [&](int64_t size, int64_t stride) {
          check(size > 0 && size <= numel / held && stride >= 0 &&
                (size == 1 || stride <= (numel - 1 - last) / (size - 1)));
          held *= size;
          last += (size - 1) * stride;
        };
        add(place.run, 1);
        add(label.size, place.stride);
        for (Factor& factor : place.others) {
          factor = {next(), next(), next()};
          add(factor.size, factor.stride);
          check(factor.label < int64_t(plan.labels.size()) &&
                (factor.label < 0 || factor.size == plan.labels[factor.label].size));
          std::vector<int64_t> finer;
          for (const int64_t at : place.at)
            for (int64_t d = 0; d < factor.size; ++d) finer.push_back(at + d * factor.stride);
          place.at.swap(finer);
          if (factor.label < 0) continue;
          label.neighbours.push_back(factor.label);
          label.repeated |= factor.label == l;
        }
        place.row = label.depth;
        label.depth += place.rows();
        label.positions += place.positions();
      }
    }
    return plan;
  }

 private:
  static void check(bool fits) {
    if (!fits) throw std::out_of_range("the plan does not fit the networks");
  }
};

}  // namespace weightops::match
