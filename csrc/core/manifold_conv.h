// Convolutions on a manifold: every image is a product of its own weights, made as they are packed,
// with the patches its taps read.
#pragma once

#include "manifold_run.h"

namespace weightops::manifold {

using product::Patches;

// x [images, groups * in, height, width], weight [bases, groups * out, in, taps], one context an
// image, y [images, groups * out, pixels].
template <class Sum>
struct Convolution {
  Patches patches;
  int64_t images, groups, in, out, bases, contexts;
  const int64_t* index;  // the context of each image; null: its own number, or 0
  const Sum* coeffs;     // [contexts, bases]
  Kind kind;
  const void* weight;
  int parts;
  int64_t threads;

  int64_t context_of(int64_t image) const { return index ? index[image] : contexts == 1 ? 0 : image; }
  int64_t depth() const { return in * patches.taps(); }
  int64_t image_size() const { return in * patches.height * patches.width; }
  int64_t weight_size() const { return groups * out * depth(); }
  int64_t element() const { return kind == Kind::same ? sizeof(Sum) : 2; }
};

template <class Sum>
struct ConvolutionJob {
  const Convolution<Sum>& problem;
  const void *x, *grad;
  void* y;           // forward, with
  const Sum* shift;  // [contexts, groups * out], or null
  void* to_x;        // or gradients, of which some may be null;
  Sum* to_coeffs;    // [images, bases]
  Sum* to_weight;    // [parts of the images, bases, groups * out, depth]
  int64_t image_parts, column_parts;
};

inline const void* offset(const void* data, int64_t bytes) {
  return static_cast<const char*>(data) + bytes;
}
inline void* offset(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }

template <class Compiled>
struct ConvolutionRunner {
  using Kernel = typename Compiled::Kernel;
  using Sum = typename Compiled::Sum;
  using Packed = typename Compiled::Packed;
  using Room = Workspace<Kernel>;

  static bool run(const ConvolutionJob<Sum>& job, int64_t, const Team& team) {
    std::atomic<bool> finite{true};
    const Convolution<Sum>& problem = job.problem;
    if (job.y)
      team(problem.images * problem.groups * job.column_parts, [&](int64_t begin, int64_t end) {
        if (!forward(job, begin, end)) finite = false;
      });
    else
      team(job.image_parts, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part)
          if (!backward(job, part)) finite = false;
      });
    return finite;
  }

 private:
  // The weights of an image, [out, depth].
  static Source<Sum> weights(const Convolution<Sum>& problem, int64_t context, int64_t group,
                             Lies lies) {
    const int64_t begin = group * problem.out * problem.depth();
    Source<Sum> source{offset(problem.weight, begin * problem.element()), problem.kind, lies,
                       problem.depth()};
    source.coeffs = problem.coeffs + context * problem.bases;
    source.bases = problem.bases;
    source.basis_stride = problem.weight_size();
    source.reader = Compiled::read;
    return source;
  }
  static Source<Sum> read(const Convolution<Sum>& problem, const void* x, int64_t image,
                          int64_t group, Lies lies) {
    const int64_t begin = (image * problem.groups + group) * problem.image_size();
    Source<Sum> source{offset(x, begin * problem.element()), problem.kind, lies, 0};
    source.patches = &problem.patches;
    source.reader = Compiled::read;
    return source;
  }
  static Source<Sum> result(const Convolution<Sum>& problem, const void* grad, int64_t image,
                            int64_t group, Lies lies) {
    const int64_t pixels = problem.patches.pixels(),
                  begin = (image * problem.groups + group) * problem.out * pixels;
    Source<Sum> source{offset(grad, begin * problem.element()), problem.kind, lies, pixels};
    source.reader = Compiled::read;
    return source;
  }

  // As many columns at a time as the cache holds.
  template <class Out>
  static bool multiply(const Product<Sum>& product, int64_t rows, Range columns, Out& out,
                       const Packed* packed, Room& room) {
    const int64_t depth = product.depths[0],
                  panel = (Kernel::panel(Kernel::depth) * (depth / Kernel::depth) +
                           Kernel::panel(depth % Kernel::depth)) *
                          sizeof(Packed);
    const int64_t most = std::max<int64_t>(1, product::kCacheBytes / 2 / panel) * Kernel::lanes;
    bool finite = true;
    for (int64_t j = columns.begin; j < columns.end; j += most)
      finite = Compiled::multiply(product, {0, rows}, {j, std::min(columns.end, j + most)}, out,
                                  packed, room);
    return finite;
  }

  static const Packed* pack(const Product<Sum>& product, int64_t rows, Room& room) {
    const int64_t blocks = product::blocks_of<Kernel>(rows);
    Packed* packed = room.rows.get(blocks * product::cut<Kernel>(product, room.chunks));
    Compiled::pack(product, rows, {0, blocks}, packed, room);
    return packed;
  }

  static bool forward(const ConvolutionJob<Sum>& job, int64_t begin, int64_t end) {
    Room& room = workspace_of<Kernel>();
    const Convolution<Sum>& problem = job.problem;
    const int64_t pixels = problem.patches.pixels();
    const Packed* packed = nullptr;
    int64_t held_context = -1, held_group = -1;
    bool finite = true;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / job.column_parts % problem.groups,
                    image = item / job.column_parts / problem.groups,
                    context = problem.context_of(image);
      const Product<Sum> product{weights(problem, context, group, Lies::along),
                                 read(problem, job.x, image, group, Lies::across),
                                 {problem.depth()}};
      if (context != held_context || group != held_group)
        packed = pack(product, problem.out, room);
      held_context = context;
      held_group = group;
      RowSums<Kernel> out{};
      out.kind = problem.kind;
      out.stride = pixels;
      out.to = offset(job.y, (image * problem.groups + group) * problem.out * pixels *
                                 problem.element());
      out.terms = 1;
      if (job.shift) out.row_shift = job.shift + (context * problem.groups + group) * problem.out;
      const Range own = Cut::share(product::panels_of<Kernel>(pixels), item % job.column_parts,
                                   job.column_parts);
      const Range columns{own.begin * Kernel::lanes, std::min(pixels, own.end * Kernel::lanes)};
      finite = multiply(product, problem.out, columns, out, packed, room) && finite;
    }
    return finite;
  }

  static bool backward(const ConvolutionJob<Sum>& job, int64_t part) {
    const Convolution<Sum>& problem = job.problem;
    const Range images = Cut::share(problem.images, part, job.image_parts);
    const int64_t size = problem.bases * problem.weight_size();
    Sum* sums = job.to_weight ? job.to_weight + part * size : nullptr;
    if (sums) std::fill_n(sums, size, Sum(0));
    bool finite = true;
    for (int64_t image = images.begin; image < images.end; ++image)
      for (int64_t group = 0; group < problem.groups; ++group) {
        if (job.to_x) finite = to_image(job, image, group) && finite;
        if (job.to_coeffs || sums) finite = to_bases(job, image, group, sums) && finite;
      }
    return finite;
  }

  static bool to_image(const ConvolutionJob<Sum>& job, int64_t image, int64_t group) {
    Room& room = workspace_of<Kernel>();
    const Convolution<Sum>& problem = job.problem;
    const int64_t begin = (image * problem.groups + group) * problem.image_size();
    const Product<Sum> product{weights(problem, problem.context_of(image), group, Lies::across),
                               result(problem, job.grad, image, group, Lies::across),
                               {problem.out}};
    const bool direct = problem.kind == Kind::same;
    Sum* gradient = direct ? static_cast<Sum*>(job.to_x) + begin
                           : room.results.get(problem.image_size());
    std::fill_n(gradient, problem.image_size(), Sum(0));
    ImageSums<Kernel> out(problem.patches, gradient);
    const bool finite = multiply(product, problem.depth(), {0, problem.patches.pixels()}, out,
                                 pack(product, problem.depth(), room), room);
    if (!direct) put(job.to_x, problem.kind, begin, gradient, problem.image_size());
    return finite;
  }

  static bool to_bases(const ConvolutionJob<Sum>& job, int64_t image, int64_t group, Sum* sums) {
    Room& room = workspace_of<Kernel>();
    const Convolution<Sum>& problem = job.problem;
    const int64_t depth = problem.depth(), size = problem.out * depth, begin = group * size,
                  context = problem.context_of(image);
    const Product<Sum> product{read(problem, job.x, image, group, Lies::along),
                               result(problem, job.grad, image, group, Lies::along),
                               {problem.patches.pixels()}};
    // Patches are the rows, of which there are more; what comes out lies the other way round.
    Sum* turned = room.results.get(2 * size);
    Sum* gradient = turned + size;
    RowSums<Kernel> out{};
    out.to = turned;
    out.stride = problem.out;
    out.terms = 1;
    const bool finite = multiply(product, depth, {0, problem.out}, out, nullptr, room);
    Sum* scratch = room.scratch.get(product::kScratch);
    const Source<Sum> source{turned, Kind::same, Lies::along, problem.out};
    for (int64_t o = 0; o < problem.out; o += product::kTurned)
      Compiled::turn(source, depth, o, std::min(product::kTurned, problem.out - o),
                     gradient + o * depth, scratch);
    Source<Sum> basis{problem.weight, problem.kind, Lies::along, problem.weight_size()};
    basis.reader = Compiled::read;
    for (int64_t k = 0; k < problem.bases; ++k) {
      if (job.to_coeffs)
        for (int64_t at = 0; at < size; at += product::kScratch) {
          const int64_t count = std::min(product::kScratch, size - at);
          job.to_coeffs[image * problem.bases + k] += Compiled::dot(
              basis.row(0, k, begin + at, count, scratch), gradient + at, count);
        }
      if (sums)
        Compiled::add(problem.coeffs[context * problem.bases + k], gradient, size,
                      sums + k * problem.weight_size() + begin);
    }
    return finite;
  }
};

template <class Sum>
void forward(const Convolution<Sum>& problem, const void* x, const Sum* shift, void* y,
             const Team& team) {
  const int64_t items = problem.images * problem.groups;
  const ConvolutionJob<Sum> job{problem, x, nullptr, y, shift, nullptr, nullptr, nullptr, 1,
                                (problem.threads + items - 1) / items};
  run_best<ConvolutionRunner, Sum>(job, problem.parts, problem.threads, team, [] {});
}

// Gradients that are not wanted are null; to_coeffs [contexts, bases].
template <class Sum>
void backward(const Convolution<Sum>& problem, const void* x, const void* grad, void* to_x,
              Sum* to_coeffs, void* to_weight, const Team& team) {
  const int64_t parts = std::min(problem.images, problem.threads), bases = problem.bases,
                size = bases * problem.weight_size();
  std::vector<Sum> dots(to_coeffs ? problem.images * bases : 0);
  Sum* sums = to_weight ? shared_room<Sum>().get(parts * size) : nullptr;
  const ConvolutionJob<Sum> job{problem,        x,    grad,  nullptr, nullptr, to_x,
                                to_coeffs ? dots.data() : nullptr, sums, parts, 1};
  run_best<ConvolutionRunner, Sum>(job, problem.parts, problem.threads, team,
                                    [&] { std::fill(dots.begin(), dots.end(), Sum(0)); });
  if (to_coeffs) {
    std::fill_n(to_coeffs, problem.contexts * bases, Sum(0));
    for (int64_t image = 0; image < problem.images; ++image)
      for (int64_t k = 0; k < bases; ++k)
        to_coeffs[problem.context_of(image) * bases + k] += dots[image * bases + k];
  }
  if (to_weight) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t at = 0; at < size; ++at) sums[at] += sums[part * size + at];
    put(to_weight, problem.kind, 0, sums, size);
  }
}

}  // namespace weightops::manifold
