// token_pair_add and token_pair_sum for the CPU dispatch key.
#include "../core/token_pair.h"

#include "common.h"

namespace weightops {
namespace {

// `pairs` [M or 1, B, 2] of M networks, dense, and refused where one lies outside the tables.
struct Pairs {
  Tensor dense;
  token_pair::Shape shape;

  Pairs(const char* name, const Tensor& pairs, int64_t networks, int64_t tokens, int64_t width)
      : dense(torch::stable::contiguous(pairs)) {
    STD_TORCH_CHECK(pairs.dim() == 3 && pairs.size(2) == 2 &&
                        (pairs.size(0) == networks || pairs.size(0) == 1) &&
                        pairs.scalar_type() == ScalarType::Long,
                    name, ": pairs must be int64 [M or 1, B, 2]");
    shape = {tokens, width, pairs.size(1), pairs.size(0) == 1 ? 0 : 2 * pairs.size(1)};
    const int64_t* data = of(0);
    const bool valid = all_of_range(dense.numel(), 8, [=](int64_t begin, int64_t end) {
      return std::all_of(data + begin, data + end,
                         [=](int64_t token) { return token >= 0 && token < tokens; });
    });
    if (valid) return;
    int64_t at = 0;
    while (data[at] >= 0 && data[at] < tokens) ++at;
    STD_TORCH_CHECK(false, name, ": pairs[", at / 2 / shape.count, ", ", at / 2 % shape.count, ", ",
                    at % 2, "] is ", data[at], ", outside 0..", tokens - 1);
  }

  const int64_t* of(int64_t network) const {
    return dense.const_data_ptr<int64_t>() + network * shape.stride;
  }
};

// f(arithmetic) for the element type of a tensor.
template <class F>
void by_type(const Tensor& tensor, const char* name, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return with_arithmetic<float>(f);
    case ScalarType::Double: return with_arithmetic<double>(f);
    default: STD_TORCH_CHECK(false, name, ": unsupported dtype");
  }
}

Tensor token_pair_add(const Tensor& tables, const Tensor& pairs) {
  const char* const name = "token_pair_add";
  STD_TORCH_CHECK(tables.dim() == 4 && tables.size(1) == 2, name,
                  ": tables must have shape [M, 2, p, h]");
  const int64_t networks = tables.size(0), width = tables.size(3);
  const Pairs read(name, pairs, networks, tables.size(2), width);
  const Tensor from = torch::stable::contiguous(tables);
  Tensor out = torch::stable::new_empty(tables, {networks, read.shape.count, width});
  if (out.numel() == 0) return out;
  by_type(tables, name, [&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    using Number = typename Arithmetic::Number;
    auto* const to = out.mutable_data_ptr<Number>();
    const int64_t bytes = token_pair::kRows * width * int64_t(sizeof(Number));
    const int64_t rows = networks * read.shape.count;
    const bool stream = rows * width * int64_t(sizeof(Number)) >= kStreamBytes &&
                        reinterpret_cast<uintptr_t>(to) % 64 == 0;
    torch::stable::parallel_for(
        0, (rows + token_pair::kRows - 1) / token_pair::kRows,
        std::max<int64_t>(1, kGrainBytes / bytes), [&](int64_t begin, int64_t end) {
          token_pair::add<Arithmetic>(read.shape, from.const_data_ptr<Number>(), read.of(0),
                                      begin * token_pair::kRows,
                                      std::min(end * token_pair::kRows, rows), to, stream);
        });
  });
  return out;
}

Tensor token_pair_sum(const Tensor& values, const Tensor& pairs, int64_t tokens) {
  const char* const name = "token_pair_sum";
  STD_TORCH_CHECK(values.dim() == 3 && tokens >= 0, name, ": values must have shape [M, B, h]");
  const int64_t networks = values.size(0), width = values.size(2);
  const Pairs read(name, pairs, networks, tokens, width);
  STD_TORCH_CHECK(values.size(1) == read.shape.count, name, ": pairs and values differ in length");
  const Tensor from = torch::stable::contiguous(values);
  Tensor out = torch::stable::new_empty(values, {networks, 2, tokens, width});
  if (out.numel() == 0) return out;
  by_type(values, name, [&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    using Number = typename Arithmetic::Number;
    const auto* const data = from.const_data_ptr<Number>();
    auto* const to = out.mutable_data_ptr<Number>();
    // A column's sum is one thread's, whichever: the same bits from any number of threads.
    constexpr int64_t line = 64 / sizeof(Number);
    const int64_t lines = (width + line - 1) / line;
    const int64_t bytes = 64 * std::max<int64_t>(1, read.shape.count);
    torch::stable::parallel_for(
        0, networks * lines, std::max<int64_t>(1, kGrainBytes / bytes),
        [&](int64_t begin, int64_t end) {
          while (begin < end) {
            const int64_t network = begin / lines, first = begin % lines;
            const int64_t last = std::min(lines, first + end - begin);
            token_pair::sum<Arithmetic>(
                read.shape, data + network * read.shape.count * width, read.of(network),
                first * line, std::min(last * line, width), to + network * 2 * tokens * width);
            begin += last - first;
          }
        });
  });
  return out;
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("token_pair_add", TORCH_BOX(&weightops::token_pair_add));
  m.impl("token_pair_sum", TORCH_BOX(&weightops::token_pair_sum));
}
