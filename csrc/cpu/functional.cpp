// functional and functional_update for the CPU dispatch key.
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

// Functionals of networks; if `shares` is given, momenta are moved first, in place.
struct Arguments {
  const Tensor &flat, &grads, &momenta, &shared, &theta;
  const std::vector<int64_t>&sizes, &widths, &code;
  double eps;
  const Tensor* shares;
};

std::vector<int64_t> segments_of(const Arguments& given) {
  std::vector<int64_t> segments{0};
  for (int64_t size : given.sizes) {
    STD_TORCH_CHECK(size >= 0, "functional: a negative size");
    segments.push_back(segments.back() + size);
  }
  STD_TORCH_CHECK(segments.back() == given.flat.size(1),
                  "functional: the sizes do not sum to all weights");
  return segments;
}

// How many momenta are channels.
int64_t check(const Arguments& given, const functional::Readout& readout) {
  const Tensor &flat = given.flat, &momenta = given.momenta;
  const std::vector<int64_t>& widths = given.widths;
  const int64_t networks = flat.size(0), numel = flat.size(1);
  STD_TORCH_CHECK(given.grads.size(0) == networks && given.grads.size(1) == numel &&
                      momenta.size(1) == networks && momenta.size(2) == numel,
                  "functional: networks, gradients and momenta differ in shape");
  const auto per_network = [&](int64_t rows) { return rows == 1 || rows == networks; };
  STD_TORCH_CHECK(per_network(given.shared.size(0)) && per_network(given.theta.size(0)),
                  "functional: shared and theta have a row, or one for each network");
  const int64_t used = widths.empty() ? -1 : widths[0] - 2 - given.shared.size(1);
  STD_TORCH_CHECK(widths.size() > 2 && widths.back() == 1 && used >= 0 &&
                      (given.shares ? used <= momenta.size(0) : used == momenta.size(0)) &&
                      *std::min_element(widths.begin(), widths.end()) > 0,
                  "functional: the widths do not fit");
  for (const Tensor* each : {&given.grads, &momenta, &given.shared, &given.theta})
    STD_TORCH_CHECK(each->scalar_type() == flat.scalar_type(), "functional: dtypes differ");
  STD_TORCH_CHECK(readout.plan.sides[0].numel == numel, "functional: the plan is of ",
                  readout.plan.sides[0].numel, " weights, not ", numel);
  int64_t length = readout.plan.sides[1].tensors.size();
  for (size_t l = 0; l + 1 < widths.size(); ++l) {
    const bool last = l + 2 == widths.size();
    length += widths[l] * widths[l + 1] * (last ? readout.plan.terms : 1);
    length += last ? 0 : widths[l + 1];
  }
  STD_TORCH_CHECK(given.theta.size(1) == length, "functional: theta must have ", length,
                  " numbers");
  if (given.shares)
    STD_TORCH_CHECK(given.shares->dim() == 2 && given.shares->size(0) == momenta.size(0) &&
                        per_network(given.shares->size(1)) &&
                        given.shares->scalar_type() == flat.scalar_type(),
                    "functional: shares must be [R, 1 or N]");
  return used;
}

template <class T>
void in_type(const Arguments& given, const functional::Readout& readout,
             std::vector<int64_t> segments, int64_t used, Tensor& out) {
  const int64_t networks = given.flat.size(0);
  const Tensor flat = with_contiguous_rows(given.flat), grads = with_contiguous_rows(given.grads),
               shared = with_contiguous_rows(given.shared),
               theta = with_contiguous_rows(given.theta);
  const Tensor& momenta = given.momenta;
  Task<T> task{readout,
               std::move(segments),
               given.widths,
               networks,
               used,
               shared.size(1),
               parts_of(networks, flat.size(1)),
               given.eps,
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
               out.mutable_data_ptr<T>()};
  if (const Tensor* shares = given.shares) {
    task.moving = momenta.mutable_data_ptr<T>();
    task.moving_rows = momenta.size(0);
    task.shares = shares->const_data_ptr<T>();
    task.share_strides[0] = shares->stride(0);
    task.share_strides[1] = shares->size(1) < 2 ? 0 : shares->stride(1);
  }
  run<T>(task);
}

Tensor forward(const Arguments& given) {
  STD_TORCH_CHECK(given.flat.dim() == 2 && given.grads.dim() == 2 && given.momenta.dim() == 3 &&
                      given.shared.dim() == 2 && given.theta.dim() == 2,
                  "functional: wrong number of axes");
  const auto readout = functional::readout(given.code);
  const int64_t used = check(given, *readout);
  std::vector<int64_t> segments = segments_of(given);
  Tensor out = torch::stable::new_empty(given.flat, {given.flat.size(0), given.flat.size(1)});
  if (out.numel() == 0) return out;
  switch (given.flat.scalar_type()) {
    case ScalarType::Float: in_type<float>(given, *readout, std::move(segments), used, out); break;
    case ScalarType::Double:
      in_type<double>(given, *readout, std::move(segments), used, out);
      break;
    default: STD_TORCH_CHECK(false, "functional: unsupported dtype");
  }
  return out;
}

bool contiguous_rows(const Tensor& momenta) {
  return momenta.dim() == 3 && (momenta.size(2) < 2 || momenta.stride(2) == 1);
}

Tensor functional_forward(const Tensor& flat, const Tensor& grads, const Tensor& momenta,
                          const Tensor& shared, const Tensor& theta,
                          const std::vector<int64_t>& sizes, const std::vector<int64_t>& widths,
                          const std::vector<int64_t>& code, double eps) {
  const Tensor rows = contiguous_rows(momenta) ? momenta : torch::stable::contiguous(momenta);
  return forward({flat, grads, rows, shared, theta, sizes, widths, code, eps, nullptr});
}

Tensor functional_update(const Tensor& momenta, const Tensor& flat, const Tensor& grads,
                         const Tensor& shares, const Tensor& shared, const Tensor& theta,
                         const std::vector<int64_t>& sizes, const std::vector<int64_t>& widths,
                         const std::vector<int64_t>& code, double eps) {
  STD_TORCH_CHECK(contiguous_rows(momenta), "functional: momenta must have contiguous rows");
  return forward({flat, grads, momenta, shared, theta, sizes, widths, code, eps, &shares});
}

}  // namespace
}  // namespace weightops

STABLE_TORCH_LIBRARY_IMPL(weightops, CPU, m) {
  m.impl("functional", TORCH_BOX(&weightops::functional_forward));
  m.impl("functional_update", TORCH_BOX(&weightops::functional_update));
}
