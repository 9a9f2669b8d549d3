// Batch norm by a batch's own statistics, of which the blocks of images each give a share.
#pragma once

#include <vector>

#include "buffer.h"
#include "population_layers.h"

namespace weightops::population {

template <class Arithmetic>
class BatchNorm {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  static constexpr int64_t lanes = Arithmetic::lanes;

 public:
  explicit BatchNorm(const Layer& layer) : layer_(layer), channels_(layer.taken.channels) {
    sums_.get(2 * layer.taken.channels * lanes);
  }

  void clear() {
    count_ = 0;
    channels_.assign(channels_.size(), {});
    std::fill_n(sums_.get(0), 2 * channels_.size() * lanes, Number(0));
  }

  // Takes a block of `images` images, of `width` lanes, into the statistics: means and squared
  // distances from them of parts give those of the whole (Chan et al. 1979).
  void measure(const Number* from, int64_t width, int64_t images) {
    const int64_t pixels = layer_.taken.pixels();
    const double here = double(pixels) * double(images), whole = double(count_) + here;
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      for (Channel& channel : channels_) {
        Vector sums[kSums] = {}, squares[kSums] = {};
        each_vector(width, images,
                    [&](int64_t at, int i, const Vector& is) __attribute__((always_inline)) {
                      sums[i] += Arithmetic::load(from + at) * is;
                    });
        const double mean = total(sums) / here;
        const Number centre = mean;
        each_vector(width, images,
                    [&](int64_t at, int i, const Vector& is) __attribute__((always_inline)) {
                      const Vector rest = (Arithmetic::load(from + at) - centre) * is;
                      squares[i] += rest * rest;
                    });
        const double rest = mean - channel.mean;
        channel.mean += rest * (here / whole);
        channel.squares += total(squares) + rest * rest * (double(count_) * here / whole);
        from += pixels * width;
      }
    });
    count_ += pixels * images;
  }

  void forward(const Number* row, const Number* from, Number* out, int64_t width) const {
    const int64_t count = layer_.taken.pixels() * width;
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      for (size_t c = 0; c < channels_.size(); ++c) {
        const Number scale = inverse(channels_[c]) * weight(row, c);
        const Number bias = layer_.bias < 0 ? 0 : row[layer_.bias + c];
        rescale<Arithmetic>(count, scale, Number(bias - channels_[c].mean * scale),
                            from + c * count, out + c * count);
      }
    });
  }

  // Takes a block into the sums that the gradient needs over the whole batch.
  void gather(const Number* from, const Number* grad, int64_t width) {
    const int64_t count = layer_.taken.pixels() * width;
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      Number* to = sums_.get(0);
      for (const Channel& channel : channels_) {
        const Number mean = channel.mean, scale = inverse(channel);
        Vector plain[kSums] = {}, along[kSums] = {};
        // Images that are not there have no gradient.
        int64_t at = 0;
        for (; at + kSums * lanes <= count; at += kSums * lanes)
#pragma GCC unroll 4
          for (int i = 0; i < kSums; ++i) {
            const Vector given = Arithmetic::load(grad + at + i * lanes);
            plain[i] += given;
            along[i] += given * (Arithmetic::load(from + at + i * lanes) - mean);
          }
        for (; at < count; at += lanes) {
          plain[0] += Arithmetic::load(grad + at);
          along[0] += Arithmetic::load(grad + at) * (Arithmetic::load(from + at) - mean);
        }
        Arithmetic::store(to, Arithmetic::load(to) + added(along) * scale);
        Arithmetic::store(to + lanes, Arithmetic::load(to + lanes) + added(plain));
        to += 2 * lanes, from += count, grad += count;
      }
    });
  }

  // Gradients of the input, in a block, once all have been gathered.
  void backward(const Number* row, const Number* from, const Number* grad, Number* into, bool fresh,
                int64_t width, int64_t images) {
    const int64_t count = layer_.taken.pixels() * width;
    enter<Arithmetic::bytes>([&]() __attribute__((always_inline)) {
      const Number* sum = sums_.get(0);
      for (size_t c = 0; c < channels_.size(); ++c, sum += 2 * lanes) {
        const Number mean = channels_[c].mean, scale = inverse(channels_[c]) * weight(row, c);
        const Number along =
            inverse(channels_[c]) * Arithmetic::total(Arithmetic::load(sum)) / double(count_);
        const Number plain = Arithmetic::total(Arithmetic::load(sum + lanes)) / double(count_);
        for (int64_t at = 0; at < count; at += width)
          for (int64_t image = 0; image < width; image += lanes) {
            const int64_t i = c * count + at + image;
            const Vector rest = Arithmetic::load(from + i) - mean;
            Vector passed = (Arithmetic::load(grad + i) - plain - rest * along) * scale;
            if (image + lanes > images) passed *= mask(images - image);
            if (!fresh) passed += Arithmetic::load(into + i);
            Arithmetic::store(into + i, passed);
          }
      }
    });
  }

  // Adds the gradients of weight and bias.
  void collect(Number* grads) {
    const Number* sum = sums_.get(0);
    for (size_t c = 0; c < channels_.size(); ++c, sum += 2 * lanes)
      for (int which = 0; which < 2; ++which) {
        const int64_t place = which ? layer_.bias : layer_.weight;
        for (int64_t k = 0; place >= 0 && k < lanes; ++k)
          grads[place + c] += sum[which * lanes + k];
      }
  }

  // Moves the running statistics towards the batch's, its variance without bias, at `step`.
  void remember(Number* row, int64_t step) const {
    const double share = layer_.momentum < 0 ? 1 / double(step) : layer_.momentum;
    for (size_t c = 0; c < channels_.size(); ++c) {
      Number *mean = row + layer_.mean + c, *variance = row + layer_.variance + c;
      *mean = (1 - share) * *mean + share * channels_[c].mean;
      *variance = (1 - share) * *variance + share * channels_[c].squares / double(count_ - 1);
    }
  }

 private:
  static constexpr int kSums = 4;  // since one would wait for itself

  struct Channel {
    double mean = 0, squares = 0;
  };

  double inverse(const Channel& channel) const {
    return 1 / std::sqrt(channel.squares / double(count_) + layer_.eps);
  }
  Number weight(const Number* row, size_t c) const {
    return layer_.weight < 0 ? 1 : row[layer_.weight + c];
  }

  // 1 in the lanes of the first `images` images.
  static WEIGHTOPS_INLINE Vector mask(int64_t images) {
    Vector is = {};
    for (int64_t k = 0; k < std::min(images, lanes); ++k) is[k] = 1;
    return is;
  }

  // f(place, which sum, mask) of every vector of a channel that has images.
  template <class F>
  WEIGHTOPS_INLINE void each_vector(int64_t width, int64_t images, F&& f) const {
    const Vector all = Vector{} + Number(1), tail = mask(images % lanes);
    const int64_t end = layer_.taken.pixels() * width;
    if (images == width) {
      int64_t at = 0;
      for (; at + kSums * lanes <= end; at += kSums * lanes)
#pragma GCC unroll 4
        for (int i = 0; i < kSums; ++i) f(at + i * lanes, i, all);
      for (; at < end; at += lanes) f(at, 0, all);
      return;
    }
    for (int64_t pixel = 0; pixel < end; pixel += width)
      for (int64_t image = 0; image < images; image += lanes)
        f(pixel + image, 0, image + lanes > images ? tail : all);
  }

  static WEIGHTOPS_INLINE Vector added(const Vector (&sums)[kSums]) {
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  static WEIGHTOPS_INLINE double total(const Vector (&sums)[kSums]) {
    return Arithmetic::total(added(sums));
  }

  Layer layer_;
  std::vector<Channel> channels_;
  Buffer<Number> sums_;  // per channel: of gradients times what was made, of gradients
  int64_t count_ = 0;    // numbers of a channel so far
};

}  // namespace weightops::population
