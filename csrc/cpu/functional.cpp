// functional for the CPU dispatch key.
#include "../core/functional_run.h"

#include "common.h"

namespace weightops {
namespace {

using functional::Scratch;
using functional::State;
using functional::Task;

constexpr int64_t kMostParts = 16;
constexpr int64_t kPartWeights = 8192;  // at least

// One a thread: they are a network's size and would be given back to the system at every call.
template <class T>
Scratch<T>& scratch() {
  static thread_local Scratch<T> own;
  return own;
}
template <class T>
State<T>& state() {
  static thread_local State<T> own;
  return own;
}

// The parts that a network is shared out in: few sums are held apart, and results do not depend on
// the number of threads.
int64_t parts_of(int64_t networks, int64_t numel) {
  if (networks >= kMostParts / 2) return 1;
  int64_t parts = 1;
  while (2 * parts * networks <= kMostParts && 2 * parts * kPartWeights <= numel) parts *= 2;
  return parts;
}

template <class T>
void run(const Task<T>& task) {
  if (task.parts == 1) {
    const functional::Team<T> alone = [](int64_t count, const auto& f) {
      f(0, count, scratch<T>());
    };
    torch::stable::parallel_for(0, task.networks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t network = begin; network < end; ++network)
        functional::run(task, network, state<T>(), alone);
    });
    return;
  }
  const functional::Team<T> team = [](int64_t count, const auto& f) {
    torch::stable::parallel_for(0, count, 1,
                                [&](int64_t begin, int64_t end) { f(begin, end, scratch<T>()); });
  };
  for (int64_t network = 0; network < task.networks; ++network)
    functional::run(task, network, state<T>(), team);
}

template <class T>
void in_type(const functional::Readout& readout, const Tensor& flat, const Tensor& grads,
             const Tensor& momenta, const Tensor& shared, const Tensor& theta,
             std::vector<int64_t> segments, const std::vector<int64_t>& widths, double eps,
             Tensor& out) {
  const int64_t networks = flat.size(0);
  run<T>({readout,
          std::move(segments),
          widths,
          networks,
          momenta.size(0),
          shared.size(1),
          parts_of(networks, flat.size(1)),
          eps,
          flat.const_data_ptr<T>(),
          grads.const_data_ptr<T>(),
          momenta.const_data_ptr<T>(),
          shared.const_data_ptr<T>(),
          theta.const_data_ptr<T>(),
          row_stride(flat),
          row_stride(grads),
          {momenta.stride(0), momenta.stride(1)},
          row_stride(shared),
          row_stride(theta),
          out.mutable_data_ptr<T>()});
}

Tensor functional_forward(const Tensor& flat, const Tensor& grads, const Tensor& momenta,
                          const Tensor& shared, const Tensor& theta,
                          const std::vector<int64_t>& sizes, const std::vector<int64_t>& widths,
                          const std::vector<int64_t>& code, double eps) {
  STD_TORCH_CHECK(flat.dim() == 2 && grads.dim() == 2 && momenta.dim() == 3 && shared.dim() == 2 &&
                      theta.dim() == 2,
                  "functional: wrong number of axes");
  const int64_t networks = flat.size(0), numel = flat.size(1);
  STD_TORCH_CHECK(grads.size(0) == networks && grads.size(1) == numel &&
                      momenta.size(1) == networks && momenta.size(2) == numel,
                  "functional: networks, gradients and momenta differ in shape");
  const auto per_network = [&](int64_t rows) { return rows == 1 || rows == networks; };
  STD_TORCH_CHECK(per_network(shared.size(0)) && per_network(theta.size(0)),
                  "functional: shared and theta have a row, or one for each network");
  STD_TORCH_CHECK(widths.size() > 2 && widths.back() == 1 &&
                      widths[0] == 2 + momenta.size(0) + shared.size(1) &&
                      *std::min_element(widths.begin(), widths.end()) > 0,
                  "functional: the widths do not fit");
  for (const Tensor* each : {&grads, &momenta, &shared, &theta})
    STD_TORCH_CHECK(each->scalar_type() == flat.scalar_type(), "functional: dtypes differ");
  const auto readout = functional::readout(code);
  STD_TORCH_CHECK(readout->plan.sides[0].numel == numel, "functional: the plan is of ",
                  readout->plan.sides[0].numel, " weights, not ", numel);
  std::vector<int64_t> segments{0};
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "functional: a negative size");
    segments.push_back(segments.back() + size);
  }
  STD_TORCH_CHECK(segments.back() == numel, "functional: the sizes do not sum to all weights");
  const int64_t terms = readout->plan.terms, biases = readout->plan.sides[1].tensors.size();
  int64_t length = biases;
  for (size_t l = 0; l + 1 < widths.size(); ++l) {
    const bool last = l + 2 == widths.size();
    length += widths[l] * widths[l + 1] * (last ? terms : 1) + (last ? 0 : widths[l + 1]);
  }
  STD_TORCH_CHECK(theta.size(1) == length, "functional: theta must have ", length, " numbers");
  Tensor out = torch::stable::new_empty(flat, {networks, numel});
  if (out.numel() == 0) return out;
  const Tensor moments =
      numel < 2 || momenta.stride(2) == 1 ? momenta : torch::stable::contiguous(momenta);
  const auto run = [&](auto in) {
    in(*readout, with_contiguous_rows(flat), with_contiguous_rows(grads), moments,
       with_contiguous_rows(shared), with_contiguous_rows(theta), segments, widths, eps, out);
  };
  switch (flat.scalar_type()) {
    case ScalarType::Float: run(in_type<float>); break;
    case ScalarType::Double: run(in_type<double>); break;
    default: STD_TORCH_CHECK(false, "functional: unsupported dtype");
  }
  return out;
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("functional", TORCH_BOX(&weightops::functional_forward));
}
