// What all tiles of one network share.
#pragma once

#include <functional>

#include "equivariant_rows.h"

namespace weightops::equivariant {

// The gradient of a layer's parameters: `other` is what the layer reads, where its transpose
// runs.
template <class T>
struct Outer {
  const Features<T>* other;
  T* gradient;  // [term, channels of other, padded channels of from]
  bool sums;    // whether other's sums are taken on the way
};

template <class T>
struct Job;

// Compiled once for each instruction set. Ranges are of a step's or a group's outer positions.
template <class T>
struct Kernels {
  void (*reserve)(const Program&, Workspace<T>&);
  void (*run_step)(const Job<T>&, const Step&, int64_t, int64_t);
  void (*run_taps)(const Job<T>&, const Taps&, const Features<T>*, bool, int64_t, int64_t);
  void (*pool_part)(const Features<T>&, const PoolPart&, bool);
};

// Threads that work on one network: calls f(begin, end, a workspace of the thread's own) on ranges
// that make up [0, count).
template <class T>
using Team = std::function<void(int64_t count,
                                const std::function<void(int64_t, int64_t, Workspace<T>&)>& f)>;

template <class T>
struct Job {
  const Program& program;
  const Features<T>& from;
  const Parameters<T>& parameters;
  T* out;        // may be null
  T* broadcast;  // what the targets that are not whole tensors come to
  bool stream, activate;
  Workspace<T>& workspace;
  const Outer<T>* outer;    // may be null
  const Features<T>* next;  // what becomes of `out`, where its sums are taken on the way, or null
  const Kernels<T>& kernels;
  const Team<T>* team;  // may be null

  Job with(Workspace<T>& other) const {
    return {program,  from,  parameters, out,  broadcast, stream,
            activate, other, outer,      next, kernels,   nullptr};
  }
};

}  // namespace weightops::equivariant
