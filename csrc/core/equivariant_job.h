// What all tiles of one network share.
#pragma once

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

// Compiled once for each instruction set.
template <class T>
struct Kernels {
  void (*run_step)(const Job<T>&, const Step&, int64_t, int64_t);
  void (*run_taps)(const Job<T>&, const Taps&, const Features<T>*, bool);
};

template <class T>
struct Job {
  const Program& program;
  const Features<T>& from;
  const Parameters<T>& parameters;
  T* out;  // may be null
  bool stream, activate;
  Workspace<T>& workspace;
  const Outer<T>* outer;    // may be null
  const Features<T>* next;  // what becomes of `out`, where its sums are taken on the way, or null
  const Kernels<T>& kernels;
};

}  // namespace weightops::equivariant
