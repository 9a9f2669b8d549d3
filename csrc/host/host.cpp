// The module weightops._host: numpy in, numpy out, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <thread>
#include <vector>

#include "../core/assign.h"
#include "../core/isa.h"
#include "../core/manifold_regime.h"
#include "../core/population.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
py::tuple assign(const Array<T>& score, bool maximize, const std::optional<Array<double>>& duals,
                 int threads) {
  if (score.ndim() != 3) throw py::value_error("assign: score must have shape [B, n, m]");
  const int64_t problems = score.shape(0), rows = score.shape(1), cols = score.shape(2);
  if (rows > cols) throw py::value_error("assign: score has more rows than columns");
  py::array_t<int64_t> columns({problems, rows});
  py::array_t<double> potentials({problems, cols});
  double* prices = potentials.mutable_data();
  const int64_t num_prices = problems * cols;
  if (duals.has_value()) {
    if (duals->size() != num_prices) throw py::value_error("assign: duals must have shape [B, m]");
    std::copy_n(duals->data(), num_prices, prices);
  } else {
    std::fill_n(prices, num_prices, 0.0);
  }
  int64_t* chosen = columns.mutable_data();
  const T* scores = score.data();
  std::atomic<bool> finite{true};
  std::atomic<int64_t> next{0};
  {
    const py::gil_scoped_release release;
    const auto work = [&] {
      weightops::assign::Workspace<T> workspace;
      for (int64_t b = next++; b < problems; b = next++) {
        const T* own = scores + b * rows * cols;
        if (!weightops::assign::solve(own, rows, cols, cols, maximize, chosen + b * rows,
                                      prices + b * cols, duals.has_value(), workspace)) {
          finite = false;
          return;
        }
      }
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < std::min<int64_t>(threads, problems); ++t) others.emplace_back(work);
    work();
    for (std::thread& thread : others) thread.join();
  }
  if (!finite) throw py::value_error("assign: score must be finite");
  return py::make_tuple(columns, potentials);
}

}  // namespace

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() = "Kernels on numpy arrays; weightops.assign calls them.";
  const char* doc =
      "(score [B, n, m], maximize, duals [B, m] or None, threads) -> (columns, duals)";
  m.def("assign", &assign<float>, doc, py::arg("score").noconvert(), py::arg("maximize"),
        py::arg("duals"), py::arg("threads"));
  m.def("assign", &assign<double>, doc, py::arg("score").noconvert(), py::arg("maximize"),
        py::arg("duals"), py::arg("threads"));
  m.def(
      "population_by_tiles",
      [](const std::vector<int64_t>& code, int64_t weights, int64_t samples) {
        using namespace weightops::population;
        return by_tiles(Plan::parse(code.data(), code.size(), weights), samples);
      },
      "Whether population_logits and population_eval in float32 go by bfloat16 tiles.",
      py::arg("code"), py::arg("weights"), py::arg("samples"));
  m.attr("isa") = weightops::isa_name();
  m.def(
      "manifold_regime",
      [](int64_t rows, int64_t bases, int parts, const std::vector<int64_t>& groups) {
        using namespace weightops::manifold;
        return py::make_tuple(name_of(choose(rows, bases, parts, groups, false)),
                              parts_for(rows, parts));
      },
      py::arg("rows"), py::arg("bases"), py::arg("parts"), py::arg("groups"));
}
