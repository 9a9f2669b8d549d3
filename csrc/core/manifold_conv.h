// Convolutions on a manifold: every image is a product of its own weights, made as they are packed,
// with what its taps read.
#pragma once

#include "manifold_run.h"

namespace weightops::manifold {

// Where things lie while an image is dealt with: padded, and for a stride of s every s-th line and
// column on a plane of its own. Then all that a tap reads, of all pixels, follows each other as the
// pixels do, on lines of `pitch`: nothing is gathered. Pixels past the end of a line are not
// results.
struct Planes {
  int64_t height, width, out_height, out_width, tap_height, tap_width;
  int64_t stride[2], padding[2], dilation[2];

  int64_t taps() const { return tap_height * tap_width; }
  int64_t lines() const { return (height + 2 * padding[0] + stride[0] - 1) / stride[0]; }
  int64_t pitch() const { return (width + 2 * padding[1] + stride[1] - 1) / stride[1]; }
  int64_t plane() const { return lines() * pitch(); }
  int64_t channel() const { return plane() * stride[0] * stride[1]; }
  int64_t pixels() const { return out_height * out_width; }
  int64_t spread_pixels() const { return (out_height - 1) * pitch() + out_width; }

  // Where a padded line and column lie in a channel.
  int64_t place(int64_t y, int64_t x) const {
    return (y % stride[0] * stride[1] + x % stride[1]) * plane() + y / stride[0] * pitch() +
           x / stride[1];
  }
  // Where each channel's taps begin to read.
  std::vector<int64_t> places(int64_t channels) const {
    std::vector<int64_t> found;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < tap_height; ++y)
        for (int64_t x = 0; x < tap_width; ++x)
          found.push_back(c * channel() + place(y * dilation[0], x * dilation[1]));
    return found;
  }
  // f(first column of a line or of its phase, its place, how many columns).
  template <class F>
  void each_line(const F& f) const {
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < std::min(stride[1], width); ++x)
        f(y * width + x, place(y + padding[0], x + padding[1]),
          (width - x + stride[1] - 1) / stride[1]);
  }
};

// x [images, groups * in, height, width], weight [bases, groups * out, in, taps], one context an
// image, y [images, groups * out, pixels].
template <class Sum>
struct Convolution {
  Planes planes;
  int64_t images, groups, in, out, bases, contexts;
  const int64_t* index;  // the context of each image; null: its own number, or 0
  const Sum* coeffs;     // [contexts, bases]
  Kind kind;
  const void* weight;
  int parts;
  int64_t threads;

  int64_t context_of(int64_t image) const {
    return index ? index[image] : contexts == 1 ? 0 : image;
  }
  int64_t depth() const { return in * planes.taps(); }
  int64_t image_size() const { return in * planes.height * planes.width; }
  int64_t weight_size() const { return groups * out * depth(); }
  int64_t element() const { return kind == Kind::same ? sizeof(Sum) : 2; }
};

template <class Sum>
struct ConvolutionJob {
  const Convolution<Sum>& problem;
  std::vector<int64_t> places;
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

// f(T) for the elements of a tensor.
template <class Sum, class F>
void by_kind(Kind kind, const F& f) {
  if (kind == Kind::half) return f(Half());
  if (kind == Kind::bfloat16) return f(BFloat16());
  f(Sum());
}

template <class Compiled>
struct ConvolutionRunner {
  using Kernel = typename Compiled::Kernel;
  using Sum = typename Compiled::Sum;
  using Packed = typename Compiled::Packed;

  static bool run(const ConvolutionJob<Sum>& job, int64_t, const Team& team) {
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
  // A gradient of a result, [out, lines of pitch], zeros at the ends of the lines.
  void spread_result(int64_t image, int64_t group, Sum* to) const {
    const int64_t begin = (image * problem_.groups + group) * problem_.out * planes_.pixels(),
                  width = planes_.out_width, pitch = planes_.pitch();
    by_kind<Sum>(problem_.kind, [&](auto number) {
      const auto* from = static_cast<const decltype(number)*>(job_.grad) + begin;
      for (int64_t line = 0; line < problem_.out * planes_.out_height; ++line, from += width) {
        for (int64_t x = 0; x < width; ++x) to[line * pitch + x] = widen(from[x]);
        std::fill(to + line * pitch + width, to + (line + 1) * pitch, Sum(0));
      }
    });
  }
  // The results of pixels that begin in [begin, end) of every row.
  void gather_result(int64_t image, int64_t group, const Sum* from, Range own) const {
    const int64_t begin = (image * problem_.groups + group) * problem_.out * planes_.pixels(),
                  width = planes_.out_width, pitch = planes_.pitch();
    by_kind<Sum>(problem_.kind, [&](auto number) {
      auto* to = static_cast<decltype(number)*>(job_.y) + begin;
      for (int64_t o = 0; o < problem_.out; ++o)
        for (int64_t y = own.begin / pitch; y * pitch < own.end; ++y) {
          const int64_t first = std::max<int64_t>(0, own.begin - y * pitch),
                        last = std::min(width, own.end - y * pitch);
          const Sum* line = from + (o * planes_.out_height + y) * pitch;
          auto* into = to + (o * planes_.out_height + y) * width;
          for (int64_t x = first; x < last; ++x) narrow(line[x], into[x]);
        }
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
      gather_result(image, group, result_room, columns);
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
          spread_result(image, group, result_room);
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
    const int64_t size = problem_.out * depth_, begin = group * size,
                  context = problem_.context_of(image);
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
    Source<Sum> basis{problem_.weight, problem_.kind, Lies::along, problem_.weight_size()};
    basis.reader = Compiled::read;
    for (int64_t k = 0; k < problem_.bases; ++k) {
      if (job_.to_coeffs)
        for (int64_t at = 0; at < size; at += product::kScratch) {
          const int64_t count = std::min(product::kScratch, size - at);
          job_.to_coeffs[image * problem_.bases + k] +=
              Compiled::dot(basis.row(0, k, begin + at, count, scratch), gradient + at, count);
        }
      if (sums)
        Compiled::add(problem_.coeffs[context * problem_.bases + k], gradient, size,
                      sums + k * problem_.weight_size() + begin);
    }
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
