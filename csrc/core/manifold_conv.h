// Convolutions on a manifold: every image is a product of its own weights, made as they are packed,
// with what its taps read.
#pragma once

#include "manifold_conv_tiles.h"

namespace weightops::manifold {

template <class Compiled>
struct ConvolutionRunner {
  using Kernel = typename Compiled::Kernel;
  using Sum = typename Compiled::Sum;
  using Packed = typename Compiled::Packed;

  static bool run(const ConvolutionJob<Sum>& job, int64_t, const Team& team) {
    if constexpr (Compiled::Kernel::pieces > 1)
      if (ConvolutionTiles<Compiled>::suits(job)) return ConvolutionTiles<Compiled>::run(job, team);
    std::atomic<bool> finite{true};
    const Convolution<Sum>& problem = job.problem;
    const int64_t items =
        job.y ? problem.images * problem.groups * job.column_parts : job.image_parts;
    team(items, [&](int64_t begin, int64_t end) {
      ConvolutionRunner own(job);
      if (!(job.y ? own.forward(begin, end) : own.backward(begin, end))) finite = false;
    });
    return finite;
  }

 private:
  explicit ConvolutionRunner(const ConvolutionJob<Sum>& job) : job_(job) {}

  const ConvolutionJob<Sum>& job_;
  const Convolution<Sum>& problem_ = job_.problem;
  const Planes& planes_ = problem_.planes;
  Workspace<Kernel>& room_ = workspace_of<Kernel>();
  const int64_t depth_ = problem_.depth(), pixels_ = planes_.spread_pixels(),
                result_size_ = problem_.out * planes_.out_height * planes_.pitch(),
                image_size_ = problem_.in * planes_.channel();

  // The weights of an image, [out, depth].
  Source<Sum> weights(int64_t context, int64_t group, Lies lies) const {
    const int64_t begin = group * problem_.out * depth_;
    Source<Sum> source{offset(problem_.weight, begin * problem_.element()), problem_.kind, lies,
                       depth_};
    source.coeffs = problem_.coeffs + context * problem_.bases;
    source.bases = problem_.bases;
    source.basis_stride = problem_.weight_size();
    source.reader = Compiled::read;
    return source;
  }
  // What the taps read of an image, [depth, pixels].
  Source<Sum> patches(const Sum* image, Lies lies) const {
    Source<Sum> source{image, Kind::same, lies, 1};
    source.order = job_.places.data();
    return source;
  }
  Source<Sum> result(const Sum* grad, Lies lies) const {
    return {grad, Kind::same, lies, planes_.out_height * planes_.pitch()};
  }

  // An image of a group on planes; `to` is zeros where nothing lies.
  void spread_image(int64_t image, int64_t group, Sum* to) const {
    const int64_t begin = (image * problem_.groups + group) * problem_.image_size(),
                  step = planes_.stride[1];
    std::fill_n(to, image_size_, Sum(0));
    by_kind<Sum>(problem_.kind, [&](auto number) {
      const auto* from = static_cast<const decltype(number)*>(job_.x) + begin;
      for (int64_t c = 0; c < problem_.in; ++c, from += planes_.height * planes_.width)
        planes_.each_line([&](int64_t line, int64_t place, int64_t count) {
          Sum* own = to + c * planes_.channel() + place;
          if (step == 1)
            for (int64_t x = 0; x < count; ++x) own[x] = widen(from[line + x]);
          else
            for (int64_t x = 0; x < count; ++x) own[x] = widen(from[line + x * step]);
        });
    });
  }
  void gather_image(int64_t image, int64_t group, const Sum* from) const {
    const int64_t begin = (image * problem_.groups + group) * problem_.image_size(),
                  step = planes_.stride[1];
    by_kind<Sum>(problem_.kind, [&](auto number) {
      auto* to = static_cast<decltype(number)*>(job_.to_x) + begin;
      for (int64_t c = 0; c < problem_.in; ++c, to += planes_.height * planes_.width)
        planes_.each_line([&](int64_t line, int64_t place, int64_t count) {
          const Sum* own = from + c * planes_.channel() + place;
          for (int64_t x = 0; x < count; ++x) narrow(own[x], to[line + x * step]);
        });
    });
  }
  // As many columns at a time as the cache holds.
  template <class Out>
  bool multiply(const Product<Sum>& product, int64_t rows, Range columns, Out& out,
                const Packed* packed) {
    const int64_t depth = product.depths[0],
                  panel = (Kernel::panel(Kernel::depth) * (depth / Kernel::depth) +
                           Kernel::panel(depth % Kernel::depth)) *
                          sizeof(Packed);
    const int64_t most = std::max<int64_t>(1, product::kCacheBytes / 2 / panel) * Kernel::lanes;
    bool finite = true;
    for (int64_t j = columns.begin; j < columns.end; j += most)
      finite = Compiled::multiply(product, {0, rows}, {j, std::min(columns.end, j + most)}, out,
                                  packed, room_);
    return finite;
  }

  const Packed* pack(const Product<Sum>& product, int64_t rows) {
    const int64_t blocks = product::blocks_of<Kernel>(rows);
    Packed* packed = room_.rows.get(blocks * product::cut<Kernel>(product, room_.chunks));
    Compiled::pack(product, rows, {0, blocks}, packed, room_);
    return packed;
  }

  bool forward(int64_t begin, int64_t end) {
    const Packed* packed = nullptr;
    int64_t held_context = -1, held_group = -1, held_image = -1;
    Sum* image_room = room_.results.get(image_size_ + result_size_);
    Sum* result_room = image_room + image_size_;
    bool finite = true;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / job_.column_parts % problem_.groups,
                    image = item / job_.column_parts / problem_.groups,
                    context = problem_.context_of(image);
      if (image != held_image || group != held_group) spread_image(image, group, image_room);
      const Product<Sum> product{
          weights(context, group, Lies::along), patches(image_room, Lies::across), {depth_}};
      if (context != held_context || group != held_group) packed = pack(product, problem_.out);
      held_context = context;
      held_group = group;
      held_image = image;
      RowSums<Kernel> out{};
      out.to = result_room;
      out.stride = planes_.out_height * planes_.pitch();
      out.terms = 1;
      if (job_.shift)
        out.row_shift = job_.shift + (context * problem_.groups + group) * problem_.out;
      const Range own = Cut::share(product::panels_of<Kernel>(pixels_), item % job_.column_parts,
                                   job_.column_parts);
      const Range columns{own.begin * Kernel::lanes, std::min(pixels_, own.end * Kernel::lanes)};
      finite = multiply(product, problem_.out, columns, out, packed) && finite;
      gather(planes_, problem_.out, result_room, columns, problem_.kind, job_.y,
             (image * problem_.groups + group) * problem_.out * planes_.pixels());
    }
    return finite;
  }

  bool backward(int64_t begin, int64_t end) {
    const int64_t size = problem_.bases * problem_.weight_size(), weights = problem_.out * depth_;
    Sum* image_room = room_.results.get(image_size_ + result_size_ + 2 * weights);
    Sum* result_room = image_room + image_size_;
    bool finite = true;
    for (int64_t part = begin; part < end; ++part) {
      const Range images = Cut::share(problem_.images, part, job_.image_parts);
      Sum* sums = job_.to_weight ? job_.to_weight + part * size : nullptr;
      if (sums) std::fill_n(sums, size, Sum(0));
      for (int64_t image = images.begin; image < images.end; ++image)
        for (int64_t group = 0; group < problem_.groups; ++group) {
          spread_lines(planes_, problem_.out, problem_.kind, job_.grad,
                       (image * problem_.groups + group) * problem_.out * planes_.pixels(),
                       result_room);
          if (job_.to_x) finite = to_image(image, group, result_room, image_room) && finite;
          if (!job_.to_coeffs && !sums) continue;
          spread_image(image, group, image_room);
          finite =
              to_bases(image, group, result_room, image_room, result_room + result_size_, sums) &&
              finite;
        }
    }
    return finite;
  }

  bool to_image(int64_t image, int64_t group, const Sum* grad, Sum* image_room) {
    const Product<Sum> product{weights(problem_.context_of(image), group, Lies::across),
                               result(grad, Lies::across),
                               {problem_.out}};
    std::fill_n(image_room, image_size_, Sum(0));
    PlaceSums<Kernel> out{};
    out.to = image_room;
    out.places = job_.places.data();
    const bool finite = multiply(product, depth_, {0, pixels_}, out, pack(product, depth_));
    gather_image(image, group, image_room);
    return finite;
  }

  bool to_bases(int64_t image, int64_t group, const Sum* grad, const Sum* image_room, Sum* turned,
                Sum* sums) {
    const int64_t size = problem_.out * depth_, context = problem_.context_of(image);
    // Patches are the rows, of which there are more; what comes out lies the other way round.
    const Product<Sum> product{
        patches(image_room, Lies::along), result(grad, Lies::along), {pixels_}};
    Sum* gradient = turned + size;
    RowSums<Kernel> out{};
    out.to = turned;
    out.stride = problem_.out;
    out.terms = 1;
    const bool finite = multiply(product, depth_, {0, problem_.out}, out, nullptr);
    Sum* scratch = room_.scratch.get(product::kScratch);
    const Source<Sum> source{turned, Kind::same, Lies::along, problem_.out};
    for (int64_t o = 0; o < problem_.out; o += product::kTurned)
      Compiled::turn(source, depth_, o, std::min(product::kTurned, problem_.out - o),
                     gradient + o * depth_, scratch);
    basis_gradients<Compiled>(problem_, group, context, gradient,
                              job_.to_coeffs ? job_.to_coeffs + image * problem_.bases : nullptr,
                              sums);
    return finite;
  }
};

template <class Sum>
void forward(const Convolution<Sum>& problem, const void* x, const Sum* shift, void* y,
             const Team& team) {
  const int64_t items = problem.images * problem.groups;
  const ConvolutionJob<Sum> job{problem,
                                problem.planes.places(problem.in),
                                x,
                                nullptr,
                                y,
                                shift,
                                nullptr,
                                nullptr,
                                nullptr,
                                1,
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
  const ConvolutionJob<Sum> job{
      problem, problem.planes.places(problem.in), x,    grad,  nullptr, nullptr,
      to_x,    to_coeffs ? dots.data() : nullptr, sums, parts, 1};
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
