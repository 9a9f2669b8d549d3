// Equivariant layers on batches of networks, and their gradients: what one thread does of them.
#pragma once

#include "equivariant.h"

namespace weightops::equivariant {

// x [batch, P, channels[0]], theta [groups, T, channels[0], channels[1]], bias [groups, tensors,
// channels[1]]; sample b belongs to group b / (batch / groups).
template <class T>
struct Problem {
  const Plan& plan;
  int64_t batch, groups, channels[2];
  const T* theta;
  int64_t theta_size() const { return plan.terms * channels[0] * channels[1]; }
  int64_t samples_a_group() const { return batch / groups; }
};

// Networks one after the other, `stride` elements apart.
template <class T>
struct Batch {
  T* data;
  int64_t stride;
};

// The sums of a group's gradients are taken over fixed runs of samples, whatever the threads, so
// that results do not depend on them.
struct Runs {
  int64_t groups, samples, runs_a_group;
  Runs(int64_t batch, int64_t num_groups, int64_t batch_bytes, int64_t gradient_bytes)
      : groups(num_groups), samples(batch / groups) {
    // A run's sums are cleared and added up, which should be little beside reading its features.
    const int64_t worth = batch_bytes / std::max<int64_t>(1, 4 * gradient_bytes * groups);
    runs_a_group =
        std::min(samples, std::clamp<int64_t>(worth, 2, std::max<int64_t>(2, 16 / groups)));
  }
  int64_t count() const { return groups * runs_a_group; }
  int64_t begin(int64_t run) const {
    return run / runs_a_group * samples + samples * (run % runs_a_group) / runs_a_group;
  }
  int64_t end(int64_t run) const {
    return run / runs_a_group * samples + samples * (run % runs_a_group + 1) / runs_a_group;
  }
};

template <class T>
struct Layer {
  Problem<T> problem;
  const T* bias;  // may be null
  std::shared_ptr<const Program> program;
};

// Layers one after the other, with relu between, and behind the last where `activate_last`.
template <class T>
struct ForwardTask {
  std::vector<Layer<T>> layers;
  Batch<const T> x;
  Batch<T> out;
  bool activate_last, stream;
  bool same_nodes;  // of both sides of the plan, so that one's sums are the other's

  // A team works on one after the other. Whether it may does not depend on the threads, nor do
  // results then.
  bool few() const { return layers[0].problem.batch < 8; }
};

template <class T>
struct BackwardTask {
  const Problem<T>& problem;
  Batch<const T> x, grad;
  Batch<T> to_x;          // data may be null
  T *to_theta, *to_bias;  // [runs, T, channels[0], padded], [runs, tensors, channels[1]]
  const Runs& runs;
  const Program& program;
  bool stream;
};

template <class T, int Bytes>
struct Batches {
  using Single = Network<T, Bytes>;
  using Kernels = equivariant::Kernels<T>;
  static WEIGHTOPS_INLINE int64_t padded(int64_t channels) {
    return Single::Arithmetic::padded(channels);
  }

  // Blocks [term, channels read, padded channels written] of one group's theta.
  static WEIGHTOPS_INLINE const T* blocks_of(const Problem<T>& problem, int64_t group, int reads,
                                             int64_t width, Buffer<T>& buffer) {
    const T* theta = problem.theta + group * problem.theta_size();
    const int64_t in = problem.channels[0], out = problem.channels[1];
    const int64_t rows = problem.channels[reads], columns = problem.channels[1 - reads];
    if (reads == 0 && width == columns) return theta;
    T* blocks = buffer.get(problem.plan.terms * rows * width);
    for (int64_t t = 0; t < problem.plan.terms; ++t) {
      const T* from = theta + t * in * out;
      T* to = blocks + t * rows * width;
      for (int64_t r = 0; r < rows; ++r, to += width) {
        for (int64_t c = 0; c < columns; ++c)
          to[c] = reads == 0 ? from[r * out + c] : from[c * out + r];
        std::fill(to + columns, to + width, T(0));
      }
    }
    return blocks;
  }

  // A group's share of a layer.
  static WEIGHTOPS_INLINE Parameters<T> parameters_of(const Layer<T>& layer, int64_t group,
                                                      Buffer<T>& blocks, Buffer<T>& bias) {
    const Program& program = *layer.program;
    const T* own = blocks_of(layer.problem, group, program.reads, program.padded, blocks);
    if (layer.bias == nullptr) return {own, nullptr};
    const int64_t tensors = layer.problem.plan.sides[1 - program.reads].tensors.size();
    const int64_t width = program.padded, written = program.channels_written;
    const T* from = layer.bias + group * tensors * written;
    T* to = bias.get(tensors * width);
    for (int64_t i = 0; i < tensors * width; ++i)
      to[i] = i % width < written ? from[i / width * written + i % width] : T(0);
    return {own, to};
  }

  // A network goes through all layers before the next, so what lies between stays in the caches.
  static WEIGHTOPS_INLINE void forward(const ForwardTask<T>& task, int64_t begin, int64_t end,
                                       Workspace<T>& workspace, const Kernels& kernels,
                                       const Team<T>* team) {
    const size_t count = task.layers.size();
    workspace.layers(count);
    std::vector<Parameters<T>> parameters(count);
    for (const Layer<T>& layer : task.layers) Single::reserve(*layer.program, workspace);
    const int64_t samples = task.layers[0].problem.samples_a_group();
    for (int64_t b = begin, group = -1; b < end; ++b) {
      if (b / samples != group) {
        group = b / samples;
        for (size_t l = 0; l < count; ++l)
          parameters[l] =
              parameters_of(task.layers[l], group, workspace.blocks[l], workspace.bias[l]);
      }
      const Program& first = *task.layers[0].program;
      const Side& side = first.plan->sides[first.reads];
      Features<T> features{&side, task.x.data + b * task.x.stride, first.channels_read,
                           workspace.sums[0].get(side.slots * first.channels_read)};
      Single::pool(features, first, kernels, team);
      for (size_t l = 0; l + 1 < count; ++l) {
        const Program &program = *task.layers[l].program, &after = *task.layers[l + 1].program;
        const int64_t channels = program.channels_written;
        T* out = workspace.between[l % 2].get(side.numel * channels);
        const Features<T> next{&side, out, channels,
                               workspace.sums[(l + 1) % 2].get(side.slots * channels)};
        // A tile's sums are taken while it is in the first-level cache.
        const bool streams = task.same_nodes && channels % Single::lanes == 0 && !task.few();
        if (streams) Single::clear(program, next);
        Single::run({program, features, parameters[l], out, workspace.broadcast.get(0), false, true,
                     workspace, nullptr, streams ? &next : nullptr, kernels, team});
        if (streams)
          Single::Pooling::pool(next, after.mean, after.banded[after.reads], &program.streamed);
        else
          Single::pool(next, after, kernels, team);
        features = next;
      }
      Single::run({*task.layers.back().program, features, parameters.back(),
                   task.out.data + b * task.out.stride, workspace.broadcast.get(0), task.stream,
                   task.activate_last, workspace, nullptr, nullptr, kernels, team});
    }
  }

  static WEIGHTOPS_INLINE void backward(const BackwardTask<T>& task, int64_t begin, int64_t end,
                                        Workspace<T>& workspace, const Kernels& kernels) {
    const Problem<T>& problem = task.problem;
    const auto& sides = problem.plan.sides;
    const int64_t in = problem.channels[0], out = problem.channels[1];
    const int64_t tensors = sides[1].tensors.size();
    const int64_t theta_size = problem.plan.terms * in * padded(out), bias_size = tensors * out;
    Parameters<T> parameters{nullptr, nullptr};
    Single::reserve(task.program, workspace);
    workspace.layers(1);
    for (int64_t run = begin, group = -1; run < end; ++run) {
      if (task.to_x.data && run / task.runs.runs_a_group != group) {
        group = run / task.runs.runs_a_group;
        parameters.blocks = blocks_of(problem, group, 1, task.program.padded, workspace.blocks[0]);
      }
      T *to_theta = task.to_theta + run * theta_size, *to_bias = task.to_bias + run * bias_size;
      std::fill(to_theta, to_theta + theta_size, T(0));
      std::fill(to_bias, to_bias + bias_size, T(0));
      for (int64_t b = task.runs.begin(run); b < task.runs.end(run); ++b) {
        const Features<T> x{&sides[0], task.x.data + b * task.x.stride, in,
                            workspace.sums[0].get(sides[0].slots * in)};
        const Features<T> grad{&sides[1], task.grad.data + b * task.grad.stride, out,
                               workspace.sums[1].get(sides[1].slots * out)};
        Single::Pooling::pool(grad, false, task.program.banded[1]);
        T* to_x = task.to_x.data ? task.to_x.data + b * task.to_x.stride : nullptr;
        Single::run_backward({task.program, grad, parameters, to_x, workspace.broadcast.get(0),
                              task.stream, false, workspace, nullptr, nullptr, kernels, nullptr},
                             x, problem.plan.mean, to_theta);
        for (int64_t t = 0; t < tensors; ++t) {
          const T* sum = Single::Pooling::view(grad, sides[1].tensors[t].mean).data;
          for (int64_t c = 0; c < out; ++c) to_bias[t * out + c] += sum[c];
        }
      }
    }
  }
};

// Compiled once for each instruction set, and called by the entries, which would hold many copies
// of it.
#define WEIGHTOPS_EQUIVARIANT_ENTRY(suffix, attribute, bytes)                                 \
  template <class T>                                                                          \
  struct Kernels_##suffix {                                                                   \
    using Single = Network<T, bytes>;                                                         \
    using Job = typename Single::Job;                                                         \
    attribute static __attribute__((noinline)) void step(const Job& job, const Step& step,    \
                                                         int64_t from, int64_t to) {          \
      Single::run_step(job, step, from, to);                                                  \
    }                                                                                         \
    attribute static __attribute__((noinline)) void taps(const Job& job, const Taps& taps,    \
                                                         const Features<T>* other, bool mean, \
                                                         int64_t from, int64_t to) {          \
      if constexpr (bytes == 64) Single::run_taps(job, taps, other, mean, from, to);          \
    }                                                                                         \
    attribute static void reserve(const Program& program, Workspace<T>& workspace) {          \
      Single::reserve(program, workspace);                                                    \
    }                                                                                         \
    attribute static void part(const Features<T>& from, const PoolPart& part, bool mean) {    \
      Single::Pooling::pool_part(from, part, mean);                                           \
    }                                                                                         \
    static constexpr equivariant::Kernels<T> all{reserve, step, taps, part};                  \
  };                                                                                          \
  template <class T>                                                                          \
  attribute void forward_##suffix(const ForwardTask<T>& task, int64_t begin, int64_t end,     \
                                  Workspace<T>& workspace, const Team<T>* team) {             \
    Batches<T, bytes>::forward(task, begin, end, workspace, Kernels_##suffix<T>::all, team);  \
  }                                                                                           \
  template <class T>                                                                          \
  attribute void backward_##suffix(const BackwardTask<T>& task, int64_t begin, int64_t end,   \
                                   Workspace<T>& workspace) {                                 \
    Batches<T, bytes>::backward(task, begin, end, workspace, Kernels_##suffix<T>::all);       \
  }
// With sanitizers each set takes minutes to compile, and all are this one source.
#if defined(__SANITIZE_ADDRESS__)
#define WEIGHTOPS_EQUIVARIANT_SETS 0
#else
#define WEIGHTOPS_EQUIVARIANT_SETS WEIGHTOPS_X86
#endif
WEIGHTOPS_EQUIVARIANT_ENTRY(generic, , 16)
#if WEIGHTOPS_EQUIVARIANT_SETS
WEIGHTOPS_EQUIVARIANT_ENTRY(avx2, WEIGHTOPS_AVX2, 32)
WEIGHTOPS_EQUIVARIANT_ENTRY(avx512, WEIGHTOPS_AVX512, 64)
#endif
#undef WEIGHTOPS_EQUIVARIANT_ENTRY

inline int vector_bytes() {
  if (!WEIGHTOPS_EQUIVARIANT_SETS) return 16;
  return isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16;
}

// Networks [begin, end), each shared by a team if there is one.
template <class T>
void forward(const ForwardTask<T>& task, int64_t begin, int64_t end, Workspace<T>& workspace,
             const Team<T>* team) {
#if WEIGHTOPS_EQUIVARIANT_SETS
  if (isa() == Isa::avx512) return forward_avx512(task, begin, end, workspace, team);
  if (isa() == Isa::avx2) return forward_avx2(task, begin, end, workspace, team);
#endif
  forward_generic(task, begin, end, workspace, team);
}

template <class T>
void backward(const BackwardTask<T>& task, int64_t begin, int64_t end, Workspace<T>& workspace) {
#if WEIGHTOPS_EQUIVARIANT_SETS
  if (isa() == Isa::avx512) return backward_avx512(task, begin, end, workspace);
  if (isa() == Isa::avx2) return backward_avx2(task, begin, end, workspace);
#endif
  backward_generic(task, begin, end, workspace);
}

}  // namespace weightops::equivariant
