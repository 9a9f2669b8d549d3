// Convolutions on bfloat16 tiles: an image's parts lie on planes from which tiles are loaded where
// each tap reads them, so nothing is packed tap by tap.
#pragma once

#include "manifold_conv_job.h"

namespace weightops::manifold {

template <class Compiled>
class ConvolutionTiles {
 public:
  using Kernel = typename Compiled::Kernel;
  using Sum = typename Compiled::Sum;
  using Packed = typename Compiled::Packed;

  static bool suits(const ConvolutionJob<Sum>& job) {
    const Convolution<Sum>& problem = job.problem;
    if (!fills(problem.in)) return false;
    if (job.y) return true;
    const Planes back = backwards(problem.planes);
    return fills(problem.out) &&
           (!job.to_x || (problem.planes.stride[0] == 1 && problem.planes.stride[1] == 1 &&
                          back.padding[0] >= 0 && back.padding[1] >= 0));
  }

  static bool run(ConvolutionJob<Sum> job, const Team& team) {
    Convolution<Sum> problem = job.problem;
    const int64_t taps = problem.planes.taps(), size = problem.bases * problem.weight_size();
    // Channels are what sums run over: inputs forward, outputs backward. They shall follow each
    // other.
    const std::unique_ptr<char[]> turned(new char[size * problem.element()]);
    by_kind<Sum>(problem.kind, [&](auto number) {
      using T = decltype(number);
      const T* weight = static_cast<const T*>(problem.weight);
      T* to = reinterpret_cast<T*>(turned.get());
      if (job.y)
        exchange(weight, size / problem.depth(), problem.in, taps, to, team);
      else
        exchange(weight, problem.bases * problem.groups, problem.out, problem.depth(), to, team);
    });
    problem.weight = turned.get();
    static thread_local Buffer<Sum> sums;
    Sum* const to_weight = job.to_weight;
    if (to_weight) job.to_weight = sums.get(job.image_parts * size);
    std::atomic<bool> finite{true};
    const int64_t items =
        job.y ? problem.images * problem.groups * job.column_parts : job.image_parts;
    team(items, [&](int64_t begin, int64_t end) {
      ConvolutionTiles own(job, problem);
      Compiled::enter([&]() __attribute__((always_inline)) {
        if (job.y)
          own.forward(begin, end);
        else
          own.backward(begin, end);
      });
      if (!own.finite_) finite = false;
    });
    if (to_weight)
      for (int64_t part = 0; part < job.image_parts; ++part)
        exchange(job.to_weight + part * size, problem.bases * problem.groups, problem.depth(),
                 problem.out, to_weight + part * size, team);
    return finite;
  }

 private:
  using Way = typename Kernel::Way;
  using Slice = typename Kernel::Slice;

  // Parts of an image, on planes of pixels of a channel or of pairs of them.
  struct Layout {
    const Planes& planes;
    int64_t channels;
    bool pairs;

    int64_t width() const { return pairs ? 2 : 1; }
    // Of numbers between channels or pairs: an odd number of cache lines, which spreads them over
    // the sets of a cache.
    int64_t channel() const { return ((planes.channel() * width() + 31) / 32 | 1) * 32; }
    int64_t part() const { return (channels + 31) / 32 * 32 / width() * channel(); }
    int64_t size() const { return Kernel::parts * part() + 64; }
    Way way() const { return {channel(), pairs ? 32 : 16 * channel(), part()}; }
  };

  static bool fills(int64_t channels) { return (channels + 31) / 32 * 96 <= 4 * channels; }

  // A gradient's image, whose convolution with the weights turned round is an image's gradient.
  static Planes backwards(const Planes& planes) {
    Planes back = planes;
    std::swap(back.height, back.out_height);
    std::swap(back.width, back.out_width);
    back.padding[0] = planes.dilation[0] * (planes.tap_height - 1) - planes.padding[0];
    back.padding[1] = planes.dilation[1] * (planes.tap_width - 1) - planes.padding[1];
    return back;
  }

  ConvolutionTiles(const ConvolutionJob<Sum>& job, const Convolution<Sum>& problem)
      : job_(job), problem_(problem) {}

  const ConvolutionJob<Sum>& job_;
  const Convolution<Sum>& problem_;
  const Planes& planes_ = problem_.planes;
  const int64_t taps_ = planes_.taps(), in_ = problem_.in, out_ = problem_.out;
  Workspace<Kernel>& room_ = workspace_of<Kernel>();
  Sum* const scratch_ = room_.scratch.get(product::scratch_size<Kernel>() + std::max(in_, out_));
  Sum* const tiles_ = room_.sums.get(3 * Kernel::rows * Kernel::lanes);
  bool finite_ = true;

  // 16 numbers of a line, zeros past its end.
  template <class T>
  static WEIGHTOPS_INLINE auto read(const T* from, int64_t step, int64_t count) {
    if constexpr (std::is_same_v<T, Sum>)
      if (step == 1 && count == 16) return Kernel::Arithmetic::load(from);
    alignas(64) Sum values[16] = {};
    for (int64_t x = 0; x < count; ++x) values[x] = widen(from[x * step]);
    return Kernel::Arithmetic::load(values);
  }

  template <class T>
  static WEIGHTOPS_INLINE void spread(const Layout& layout, const T* from, Packed* to) {
    const Planes& planes = layout.planes;
    const int64_t step = planes.stride[1], size = planes.height * planes.width,
                  part = layout.part();
    for (int64_t c = 0; c < layout.channels; c += layout.width(), to += layout.channel())
      for (int64_t y = 0; y < planes.height; ++y)
        for (int64_t phase = 0; phase < std::min(step, planes.width); ++phase) {
          const T* line = from + c * size + y * planes.width + phase;
          const int64_t end = (planes.width - phase + step - 1) / step,
                        place = planes.place(y + planes.padding[0], phase + planes.padding[1]);
          for (int64_t x = 0; x < end; x += 16) {
            const int64_t count = std::min<int64_t>(16, end - x);
            const auto values = read(line + x * step, step, count);
            if (!layout.pairs)
              Kernel::split(values, count, to + place + x, part);
            else if (c + 1 < layout.channels)
              Kernel::split_pairs(values, read(line + size + x * step, step, count), count,
                                  to + 2 * (place + x), part);
            else
              Kernel::split_pairs(values, typename Kernel::Vector{}, count, to + 2 * (place + x),
                                  part);
          }
        }
  }
  static WEIGHTOPS_INLINE void spread(const Layout& layout, Kind kind, const void* from, int64_t at,
                                      Packed* to) {
    if (kind == Kind::same)
      spread(layout, static_cast<const Sum*>(from) + at, to);
    else if (kind == Kind::half)
      spread(layout, static_cast<const Half*>(from) + at, to);
    else
      spread(layout, static_cast<const BFloat16*>(from) + at, to);
  }

  // The weights of an image in blocks of rows, tap after tap: row i of tap t lies at row(i, t) and
  // column(t) of a matrix of `stride` columns.
  template <class Row, class Column>
  WEIGHTOPS_INLINE void pack_weights(int64_t context, int64_t group, int64_t stride, int64_t rows,
                                     int64_t channels, const Row& row, const Column& column,
                                     Packed* to) const {
    const int64_t begin = group * problem_.weight_size() / problem_.groups,
                  tap_size = Kernel::block(channels);
    Source<Sum> source{offset(problem_.weight, begin * problem_.element()), problem_.kind,
                       Lies::along, stride};
    source.coeffs = problem_.coeffs + context * problem_.bases;
    source.bases = problem_.bases;
    source.basis_stride = problem_.weight_size();
    source.reader = Compiled::read;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t t = 0; t < taps_; ++t)
        Kernel::pack_row(to + (i / Kernel::rows * taps_ + t) * tap_size, i % Kernel::rows, 0,
                         source.row(0, row(i, t), column(t), channels, scratch_), channels);
  }

  // What lies in memory and is wanted next: it is fetched beside so many slices of products.
  struct Next {
    const char *begin, *end;

    product::Ahead beside(int64_t slices) const {
      return {begin, end, ((end - begin) / slices / 64 + 1) * 64};
    }
  };
  Next next(const void* data, int64_t item, int64_t end, int64_t size) const {
    const char* from = static_cast<const char*>(data) + item * size * problem_.element();
    return {from, item < end ? from + size * problem_.element() : from};
  }

  // A tile of a sum over slices, as many of them at a time as are summed in registers.
  template <class Out>
  WEIGHTOPS_INLINE void multiply(Part part, const std::vector<Slice>& slices, const Packed* rows,
                                 const Way& row_way, const Packed* columns, const Way& column_way,
                                 product::Meanwhile<Kernel, Out>& meanwhile) const {
    constexpr int64_t area = Kernel::rows * Kernel::lanes;
    const int64_t count = slices.size(),
                  chains = (count * Kernel::slice + product::kChain - 1) / product::kChain;
    for (int64_t c = 0; c < chains; ++c) {
      const Range own = Cut::share(count, c, chains);
      part.first = c == 0;
      part.last = c + 1 == chains;
      Sum* tile = meanwhile.tile == tiles_ ? tiles_ + area : tiles_;
      meanwhile.begin(own.size() * Kernel::slice);
      Kernel::multiply(slices.data() + own.begin, own.size(), rows, row_way, columns, column_way,
                       meanwhile, tile);
      meanwhile.end(part, tile, tiles_ + 2 * area);
    }
  }

  // result[row, pixel] of the pixels that panels hold, from packed weights and pairs of channels.
  WEIGHTOPS_INLINE void convolve(const Layout& layout, bool flips, const Packed* weights,
                                 int64_t rows, const Packed* image, Range panels, const Sum* shift,
                                 Sum* result, const Next& next) {
    const Planes& planes = layout.planes;
    const int64_t pixels = planes.spread_pixels();
    std::vector<Slice> slices;
    for (int64_t t = 0; t < taps_; ++t)
      for (int64_t c = 0; c < layout.channels; c += 32)
        slices.push_back({int64_t(slices.size()) * Kernel::block(32),
                          c / 2 * layout.channel() + 2 * planes.place(flips ? taps_ - 1 - t : t)});
    const int64_t block = slices.size() * Kernel::block(32);
    RowSums<Kernel> out{};
    out.to = result;
    out.stride = planes.out_height * planes.pitch();
    out.terms = 1;
    out.row_shift = shift;
    product::Meanwhile<Kernel, RowSums<Kernel>> meanwhile{out,
                                                          Compiled::template work<RowSums<Kernel>>};
    meanwhile.ahead =
        next.beside(panels.size() * product::blocks_of<Kernel>(rows) * int64_t(slices.size()));
    for (int64_t p = panels.begin; p < panels.end; ++p)
      for (int64_t i = 0; i < rows; i += Kernel::rows) {
        const int64_t j = p * Kernel::lanes;
        multiply({0, i, std::min<int64_t>(Kernel::rows, rows - i), j,
                  std::min<int64_t>(Kernel::lanes, pixels - j), true, true, true, true},
                 slices, weights + i / Kernel::rows * block, Kernel::kPacked, image + 2 * j,
                 layout.way(), meanwhile);
      }
    meanwhile.finish();
    if (!out.finite()) finite_ = false;
  }

  WEIGHTOPS_INLINE void forward(int64_t begin, int64_t end) {
    const Layout layout{planes_, in_, true};
    const int64_t pixels = planes_.spread_pixels(), columns = product::panels_of<Kernel>(pixels),
                  blocks = product::blocks_of<Kernel>(out_);
    Packed* image_room = room_.columns.get(layout.size());
    Packed* weights = room_.rows.get(blocks * taps_ * Kernel::block(in_));
    Sum* result = room_.results.get(out_ * planes_.out_height * planes_.pitch());
    std::fill_n(image_room, layout.size(), Packed(0));
    int64_t held_context = -1, held_group = -1, held_image = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t at = item / job_.column_parts, group = at % problem_.groups,
                    image = at / problem_.groups, context = problem_.context_of(image);
      if (image != held_image || group != held_group)
        spread(layout, problem_.kind, job_.x, at * problem_.image_size(), image_room);
      if (context != held_context || group != held_group)
        pack_weights(
            context, group, problem_.depth(), out_, in_, [](int64_t i, int64_t) { return i; },
            [&](int64_t t) { return t * in_; }, weights);
      held_context = context;
      held_group = group;
      held_image = image;
      const Range panels = Cut::share(columns, item % job_.column_parts, job_.column_parts);
      convolve(layout, false, weights, out_, image_room, panels,
               job_.shift ? job_.shift + (context * problem_.groups + group) * out_ : nullptr,
               result, next(job_.x, at + 1, end / job_.column_parts, problem_.image_size()));
      gather(planes_, out_, result,
             {panels.begin * Kernel::lanes, std::min(pixels, panels.end * Kernel::lanes)},
             problem_.kind, job_.y, at * out_ * planes_.pixels());
    }
  }

  WEIGHTOPS_INLINE void backward(int64_t begin, int64_t end) {
    const Planes back = backwards(planes_);
    const Layout pairs{back, out_, true}, singles{planes_, in_, false};
    const int64_t size = problem_.bases * problem_.weight_size(), weights = out_ * problem_.depth(),
                  blocks = product::blocks_of<Kernel>(in_), pixels = planes_.spread_pixels(),
                  result_size = out_ * planes_.out_height * planes_.pitch(),
                  panels = product::panels_of<Kernel>(out_);
    Packed* pair_room =
        room_.columns.get(pairs.size() + singles.size() + panels * Kernel::panel(pixels) +
                          blocks * taps_ * Kernel::block(out_));
    Packed *single_room = pair_room + pairs.size(), *grad_room = single_room + singles.size(),
           *packed = grad_room + panels * Kernel::panel(pixels);
    std::fill(pair_room, grad_room, Packed(0));
    Sum* results =
        room_.results.get(std::max(in_ * back.out_height * back.pitch(), result_size + weights));
    for (int64_t part = begin; part < end; ++part) {
      const Range images = Cut::share(problem_.images, part, job_.image_parts);
      Sum* sums = job_.to_weight ? job_.to_weight + part * size : nullptr;
      if (sums) std::fill_n(sums, size, Sum(0));
      const int64_t end_item = images.end * problem_.groups;
      for (int64_t item = images.begin * problem_.groups; item < end_item; ++item) {
        const int64_t group = item % problem_.groups, image = item / problem_.groups,
                      context = problem_.context_of(image),
                      result_at = item * out_ * planes_.pixels();
        if (job_.to_x) {
          spread(pairs, problem_.kind, job_.grad, result_at, pair_room);
          pack_weights(
              context, group, out_, in_, out_, [&](int64_t i, int64_t t) { return i * taps_ + t; },
              [](int64_t) { return 0; }, packed);
          const int64_t columns = product::panels_of<Kernel>(back.spread_pixels());
          convolve(pairs, true, packed, in_, pair_room, {0, columns}, nullptr, results,
                   next(job_.x, item, end_item, problem_.image_size()));
          gather(back, in_, results, {0, back.spread_pixels()}, problem_.kind, job_.to_x,
                 item * problem_.image_size());
        }
        if (!job_.to_coeffs && !sums) continue;
        spread(singles, problem_.kind, job_.x, item * problem_.image_size(), single_room);
        spread_lines(planes_, out_, problem_.kind, job_.grad, result_at, results);
        const Source<Sum> grad{results, Kind::same, Lies::along,
                               planes_.out_height * planes_.pitch()};
        for (int64_t p = 0; p < panels; ++p)
          product::pack_columns<Kernel>(grad, 0, p * Kernel::lanes,
                                        std::min<int64_t>(Kernel::lanes, out_ - p * Kernel::lanes),
                                        0, pixels, grad_room + p * Kernel::panel(pixels), scratch_);
        Sum* gradient = results + result_size;
        to_weights(singles, single_room, grad_room, gradient,
                   next(job_.grad, item + 1, end_item, out_ * planes_.pixels()));
        basis_gradients<Compiled>(
            problem_, group, context, gradient,
            job_.to_coeffs ? job_.to_coeffs + image * problem_.bases : nullptr, sums);
      }
    }
  }

  // gradient[channel, tap, out] of an image's weights.
  WEIGHTOPS_INLINE void to_weights(const Layout& layout, const Packed* image, const Packed* grad,
                                   Sum* gradient, const Next& next) {
    const int64_t pixels = planes_.spread_pixels();
    std::vector<Slice> slices;
    for (int64_t at = 0; at < pixels; at += 32) slices.push_back({at, Kernel::panel(at)});
    std::vector<int64_t> order;
    for (int64_t t = 0; t < taps_; ++t)
      for (int64_t c = 0; c < in_; ++c) order.push_back(c * taps_ + t);
    RowSums<Kernel> out{};
    out.to = gradient;
    out.stride = out_;
    out.order = order.data();
    out.terms = 1;
    product::Meanwhile<Kernel, RowSums<Kernel>> meanwhile{out,
                                                          Compiled::template work<RowSums<Kernel>>};
    meanwhile.ahead = next.beside(product::blocks_of<Kernel>(in_) * taps_ *
                                  product::panels_of<Kernel>(out_) * int64_t(slices.size()));
    for (int64_t c = 0; c < in_; c += Kernel::rows)
      for (int64_t t = 0; t < taps_; ++t)
        for (int64_t j = 0; j < out_; j += Kernel::lanes)
          multiply({0, t * in_ + c, std::min<int64_t>(Kernel::rows, in_ - c), j,
                    std::min<int64_t>(Kernel::lanes, out_ - j), true, true, true, true},
                   slices, image + c * layout.channel() + planes_.place(t), layout.way(),
                   grad + j / Kernel::lanes * Kernel::panel(pixels), Kernel::kPacked, meanwhile);
    meanwhile.finish();
    if (!out.finite()) finite_ = false;
  }
};

}  // namespace weightops::manifold
