// What a convolution on a manifold is, and where its images lie.
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
  // Where a tap begins to read in a channel,
  int64_t place(int64_t tap) const {
    return place(tap / tap_width * dilation[0], tap % tap_width * dilation[1]);
  }
  // and where those of each channel do.
  std::vector<int64_t> places(int64_t channels) const {
    std::vector<int64_t> found;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < taps(); ++tap) found.push_back(c * channel() + place(tap));
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

// to[i, b, a] = from[i, a, b].
template <class T>
void exchange(const T* from, int64_t count, int64_t a, int64_t b, T* to, const Team& team) {
  team(count, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t y = 0; y < a; ++y)
        for (int64_t x = 0; x < b; ++x) to[(i * b + x) * a + y] = from[(i * a + y) * b + x];
  });
}

// A result's rows on lines of pitch, zeros at their ends.
template <class Sum>
void spread_lines(const Planes& planes, int64_t rows, Kind kind, const void* data, int64_t at,
                  Sum* to) {
  const int64_t width = planes.out_width, pitch = planes.pitch();
  by_kind<Sum>(kind, [&](auto number) {
    const auto* from = static_cast<const decltype(number)*>(data) + at;
    for (int64_t line = 0; line < rows * planes.out_height; ++line, from += width) {
      if constexpr (std::is_same_v<decltype(number), Sum>)
        std::copy_n(from, width, to + line * pitch);
      else
        for (int64_t x = 0; x < width; ++x) to[line * pitch + x] = widen(from[x]);
      std::fill(to + line * pitch + width, to + (line + 1) * pitch, Sum(0));
    }
  });
}

// And back, of pixels that begin in `own` of every row.
template <class Sum>
void gather(const Planes& planes, int64_t rows, const Sum* from, Range own, Kind kind, void* data,
            int64_t at) {
  const int64_t width = planes.out_width, pitch = planes.pitch();
  by_kind<Sum>(kind, [&](auto number) {
    auto* to = static_cast<decltype(number)*>(data) + at;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t y = own.begin / pitch; y * pitch < own.end; ++y) {
        const int64_t first = std::max<int64_t>(0, own.begin - y * pitch),
                      last = std::min(width, own.end - y * pitch);
        const Sum* line = from + (row * planes.out_height + y) * pitch;
        auto* into = to + (row * planes.out_height + y) * width;
        if constexpr (std::is_same_v<decltype(number), Sum>)
          std::copy(line + first, line + last, into + first);
        else
          for (int64_t x = first; x < last; ++x) narrow(line[x], into[x]);
      }
  });
}

// What the gradient of an image's weights adds to those of its coefficients and of the bases.
template <class Compiled, class Sum>
void basis_gradients(const Convolution<Sum>& problem, int64_t group, int64_t context,
                     const Sum* gradient, Sum* to_coeffs, Sum* sums) {
  const int64_t size = problem.weight_size() / problem.groups, begin = group * size;
  alignas(64) Sum scratch[product::kScratch];
  Source<Sum> basis{problem.weight, problem.kind, Lies::along, problem.weight_size()};
  basis.reader = Compiled::read;
  for (int64_t k = 0; k < problem.bases; ++k) {
    if (to_coeffs)
      for (int64_t at = 0; at < size; at += product::kScratch) {
        const int64_t count = std::min(product::kScratch, size - at);
        to_coeffs[k] +=
            Compiled::dot(basis.row(0, k, begin + at, count, scratch), gradient + at, count);
      }
    if (sums)
      Compiled::add(problem.coeffs[context * problem.bases + k], gradient, size,
                    sums + k * problem.weight_size() + begin);
  }
}

}  // namespace weightops::manifold
