#pragma once

#include <algorithm>

#include "../core/population_plan.h"
#include "common.h"

namespace weightops {

// What the first layer looks up must be there.
inline void check_tokens(const char* op, const population::Plan& plan, const Tensor& x) {
  const int64_t tokens = plan.tokens();
  if (tokens == 0) return;
  const auto held = [&](const auto* from) {
    return std::all_of(from, from + x.numel(),
                       [&](auto t) { return t >= 0 && t < tokens && t == int64_t(t); });
  };
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float ? held(x.const_data_ptr<float>())
                                                       : held(x.const_data_ptr<double>()),
                  op, ": x must be tokens in [0, ", tokens, ")");
}

}  // namespace weightops
