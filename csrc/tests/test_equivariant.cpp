// core/equivariant_*.h against the definition of a layer: sums over indices, products with theta
// and broadcasts, position by position in double precision. Exits with the number of failures.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../core/equivariant_batch.h"
#include "../core/equivariant_cache.h"

// What was not written is no number, and no plan makes anything ask for a machine's memory.
void* operator new(size_t bytes) {
  void* data = bytes < (size_t{1} << 28) ? std::malloc(bytes) : nullptr;
  if (data == nullptr) throw std::bad_alloc();
  return data;
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
  void* data = nullptr;
  if (bytes > (size_t{1} << 28) || posix_memalign(&data, size_t(alignment), bytes) != 0)
    throw std::bad_alloc();
  std::memset(data, 0xff, bytes);
  return data;
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes); }
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, size_t) noexcept { std::free(data); }
void operator delete[](void* data, std::align_val_t) noexcept { std::free(data); }

namespace {

using namespace weightops::equivariant;
using Code = std::vector<int64_t>;
using Random = std::mt19937;

// Threads take the same ways whatever the plan, and watching them is slow.
#ifdef __SANITIZE_THREAD__
constexpr bool kFew = true;
#else
constexpr bool kFew = false;
#endif

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

int64_t below(int64_t limit, Random& random) { return int64_t(random() % uint64_t(limit)); }

// ---- Plans, as weightops/ops/equivariant/plan.py makes them.

// Axes by label, and `copies` tensors interleaved like the positions of a fixed axis before `at`.
struct Labelled {
  std::vector<int> labels;
  int64_t copies = 1;
  size_t at = 0;
};

struct Weights {
  std::vector<Labelled> in, out;
  Sizes sizes;  // of labels
};

using Block = std::vector<int>;
using Blocks = std::vector<Block>;

class Maker {
 public:
  Maker(const std::vector<Labelled>& tensors, const Sizes& sizes) : sizes_(sizes) {
    for (const Labelled& tensor : tensors) {
      const size_t rank = tensor.labels.size();
      Part part{numel, tensor.labels, Sizes(rank)};
      int64_t stride = 1, shift = 0;
      for (size_t axis = rank + 1; axis-- > 0;) {
        if (axis == tensor.at) shift = stride, stride *= tensor.copies;
        if (axis == 0) break;
        part.strides[axis - 1] = stride;
        stride *= sizes[tensor.labels[axis - 1]];
      }
      for (int64_t copy = 0; copy < tensor.copies; ++copy, part.offset += shift)
        parts.push_back(part);
      numel += stride;
    }
  }

  struct Part {
    int64_t offset;
    std::vector<int> labels;
    Sizes strides;
  };
  struct Made {
    int part;
    Blocks kept;
    int64_t parent, dropped;
  };
  struct Kept {  // labels, and the blocks they stand for
    std::vector<int> kind;
    int part;
    Blocks kept, dropped;
  };

  // Every way to read or write a tensor; readers in every order of blocks of one label.
  std::vector<Kept> operands(bool every_order) const {
    std::vector<Kept> found;
    for (size_t part = 0; part < parts.size(); ++part) {
      std::vector<Blocks> partitions = {{}};
      for (size_t axis = 0; axis < parts[part].labels.size(); ++axis) {
        std::vector<Blocks> longer;
        for (const Blocks& each : partitions) {
          for (size_t b = 0; b < each.size(); ++b)
            if (label(part, each[b]) == parts[part].labels[axis]) {
              longer.push_back(each);
              longer.back()[b].push_back(int(axis));
            }
          longer.push_back(each);
          longer.back().push_back({int(axis)});
        }
        partitions = longer;
      }
      for (const Blocks& each : partitions)
        for (int subset = 0; subset < 1 << each.size(); ++subset) {
          Kept one{{}, int(part), {}, {}};
          for (size_t b = 0; b < each.size(); ++b)
            (subset >> b & 1 ? one.kept : one.dropped).push_back(each[b]);
          const auto before = [&](const Block& a, const Block& b) {
            return std::pair(label(part, a), a) < std::pair(label(part, b), b);
          };
          std::sort(one.kept.begin(), one.kept.end(), before);
          std::sort(one.dropped.begin(), one.dropped.end());
          for (const Block& block : one.kept) one.kind.push_back(label(part, block));
          do {
            std::vector<int> kind;
            for (const Block& block : one.kept) kind.push_back(label(part, block));
            if (kind == one.kind) found.push_back(one);
          } while (every_order && std::next_permutation(one.kept.begin(), one.kept.end(), before));
        }
    }
    return found;
  }

  int64_t number(int part, Blocks kept, const Blocks& dropped) {
    std::sort(kept.begin(), kept.end());
    const auto key = std::tuple(part, kept, dropped);
    if (const auto it = numbers_.find(key); it != numbers_.end()) return it->second;
    Made made{part, kept, -1, -1};
    if (!dropped.empty()) {
      size_t back = 0;
      for (size_t b = 1; b < dropped.size(); ++b)
        if (size(part, dropped[b]) < size(part, dropped[back])) back = b;
      Blocks more = kept, fewer = dropped;
      more.push_back(dropped[back]);
      std::sort(more.begin(), more.end());
      fewer.erase(fewer.begin() + back);
      made.parent = number(part, more, fewer);
      made.dropped = std::find(more.begin(), more.end(), dropped[back]) - more.begin();
    }
    nodes.push_back(made);
    return numbers_[key] = int64_t(nodes.size()) - 1;
  }

  int label(int part, const Block& block) const { return parts[part].labels[block[0]]; }
  int64_t size(int part, const Block& block) const { return sizes_[label(part, block)]; }

  void write(Code& code) const {
    code.push_back(parts.size());
    for (const Part& part : parts) {
      code.insert(code.end(), {part.offset, int64_t(part.labels.size())});
      for (size_t axis = 0; axis < part.labels.size(); ++axis)
        code.insert(code.end(), {sizes_[part.labels[axis]], part.strides[axis]});
    }
    code.push_back(nodes.size());
    for (const Made& node : nodes) {
      code.insert(code.end(), {node.part, node.parent, node.dropped});
      if (node.parent >= 0) continue;
      std::vector<int64_t> dim_of_axis(parts[node.part].labels.size());
      for (size_t dim = 0; dim < node.kept.size(); ++dim)
        for (int axis : node.kept[dim]) dim_of_axis[axis] = dim;
      code.insert(code.end(), dim_of_axis.begin(), dim_of_axis.end());
    }
  }

  int64_t numel = 0;
  std::vector<Part> parts;
  std::vector<Made> nodes;

 private:
  Sizes sizes_;
  std::map<std::tuple<int, Blocks, Blocks>, int64_t> numbers_;
};

// All terms, but for about one in `leave_out`.
Code make(const Weights& weights, bool mean, int leave_out, Random& random) {
  struct Types {
    Sizes sizes;
    std::vector<std::pair<int64_t, Sizes>> operands[2];
    Sizes table;
  };
  Maker sides[2] = {{weights.in, weights.sizes}, {weights.out, weights.sizes}};
  std::map<std::vector<int>, std::vector<Maker::Kept>> kinds[2];
  for (int which = 0; which < 2; ++which)
    for (const Maker::Kept& each : sides[which].operands(which == 0))
      kinds[which][each.kind].push_back(each);
  std::vector<Types> types;
  int64_t terms = 0;
  for (auto& [kind, readers] : kinds[0]) {
    auto& writers = kinds[1][kind];
    std::vector<bool> chosen(readers.size() * writers.size());
    std::vector<bool> served[2] = {std::vector<bool>(readers.size()),
                                   std::vector<bool>(writers.size())};
    for (size_t i = 0; i < chosen.size(); ++i)
      if ((chosen[i] = leave_out == 0 || below(leave_out, random) > 0))
        served[0][i / writers.size()] = served[1][i % writers.size()] = true;
    Types type;
    std::vector<size_t> order(kind.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (size_t d : order) type.sizes.push_back(weights.sizes[kind[d]]);
    for (int which = 0; which < 2; ++which)
      for (size_t i = 0; i < served[which].size(); ++i) {
        if (!served[which][i]) continue;
        const Maker::Kept& each = (which == 0 ? readers : writers)[i];
        Blocks sorted = each.kept;
        std::sort(sorted.begin(), sorted.end());
        Sizes dims;
        for (size_t d : order)
          dims.push_back(std::find(sorted.begin(), sorted.end(), each.kept[d]) - sorted.begin());
        type.operands[which].emplace_back(sides[which].number(each.part, each.kept, each.dropped),
                                          dims);
      }
    for (size_t i = 0; i < chosen.size(); ++i)
      if (served[0][i / writers.size()] && served[1][i % writers.size()])
        type.table.push_back(chosen[i] ? terms++ : -1);
    if (!type.table.empty()) types.push_back(type);
  }
  for (int which = 0; which < 2; ++which) {
    Maker& side = sides[which];
    for (size_t part = 0; part < side.parts.size(); ++part) {
      Blocks axes;
      for (size_t axis = 0; axis < side.parts[part].labels.size(); ++axis)
        axes.push_back({int(axis)});
      side.number(part, axes, {});
      if (which == 1) side.number(part, {}, axes);
    }
    std::vector<bool> served(side.nodes.size());
    for (const Types& type : types)
      for (const auto& operand : type.operands[which]) served[operand.first] = true;
    for (size_t number = 0; number < side.nodes.size(); ++number) {
      if (served[number]) continue;
      const Maker::Made& node = side.nodes[number];
      Types type;
      Sizes dims(node.kept.size());
      std::iota(dims.begin(), dims.end(), 0);
      for (const Block& block : node.kept) type.sizes.push_back(side.size(node.part, block));
      type.operands[which].emplace_back(number, dims);
      types.push_back(type);
    }
  }
  std::stable_sort(types.begin(), types.end(),
                   [](const Types& a, const Types& b) { return a.sizes.size() < b.sizes.size(); });
  Sizes numbers(terms);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::shuffle(numbers.begin(), numbers.end(), random);
  Code code = {sides[0].numel, sides[1].numel, terms, mean};
  for (const Maker& side : sides) side.write(code);
  code.push_back(types.size());
  for (const Types& type : types) {
    code.push_back(type.sizes.size());
    code.insert(code.end(), type.sizes.begin(), type.sizes.end());
    for (const auto& operands : type.operands) code.push_back(operands.size());
    for (const auto& operands : type.operands)
      for (const auto& [node, dims] : operands) {
        code.push_back(node);
        code.insert(code.end(), dims.begin(), dims.end());
      }
    for (int64_t term : type.table) code.push_back(term < 0 ? -1 : numbers[term]);
  }
  return code;
}

// ---- The definition.

struct Axis {
  int64_t size, stride;
};
using Axes = std::vector<Axis>;

Sizes positions(int64_t offset, const Axes& axes) {
  Sizes found = {offset};
  for (const Axis& axis : axes) {
    Sizes longer;
    for (int64_t before : found)
      for (int64_t i = 0; i < axis.size; ++i) longer.push_back(before + i * axis.stride);
    found = longer;
  }
  return found;
}

struct Definition {
  struct Piece {
    int64_t offset;
    Axes kept, dropped;
  };
  struct Part {
    int64_t offset;
    Axes axes;
  };
  struct Composed {
    std::vector<Sizes> at[2], spread[2];  // positions of each operand: kept, summed or broadcast
    Sizes table;
    int64_t count;
  };
  int64_t numel[2], terms;
  bool mean;
  std::vector<Part> parts[2];
  std::vector<Composed> types;

  explicit Definition(const Code& code) {
    auto next = code.begin();
    for (int64_t& each : numel) each = *next++;
    terms = *next++;
    mean = *next++ == 1;
    std::vector<Piece> pieces[2];
    for (int side = 0; side < 2; ++side) {
      parts[side].resize(*next++);
      for (Part& part : parts[side]) {
        part.offset = *next++;
        part.axes.resize(*next++);
        for (Axis& axis : part.axes) axis.size = *next++, axis.stride = *next++;
      }
      for (int64_t left = *next++; left > 0; --left) {
        const Part& part = parts[side][*next++];
        const int64_t parent = *next++, dropped = *next++;
        Piece piece{part.offset, {}, {}};
        if (parent < 0) {
          for (const Axis& axis : part.axes) {
            const size_t dim = *next++;
            piece.kept.resize(std::max(piece.kept.size(), dim + 1));
            piece.kept[dim] = {axis.size, piece.kept[dim].stride + axis.stride};
          }
        } else {
          piece = pieces[side][parent];
          piece.dropped.push_back(piece.kept[dropped]);
          piece.kept.erase(piece.kept.begin() + dropped);
        }
        pieces[side].push_back(piece);
      }
    }
    for (int64_t left = *next++; left > 0; --left) {
      Composed type;
      const int64_t rank = *next++;
      type.count = std::accumulate(next, next + rank, int64_t{1}, std::multiplies<>());
      next += rank;
      const int64_t counts[2] = {next[0], next[1]};
      next += 2;
      for (int side = 0; side < 2; ++side)
        for (int64_t i = 0; i < counts[side]; ++i) {
          const Piece& piece = pieces[side][*next++];
          Axes kept;
          for (int64_t d = 0; d < rank; ++d) kept.push_back(piece.kept[*next++]);
          type.at[side].push_back(positions(piece.offset, kept));
          type.spread[side].push_back(positions(0, piece.dropped));
        }
      type.table.assign(next, next + counts[0] * counts[1]);
      next += counts[0] * counts[1];
      types.push_back(type);
    }
    expect(next == code.end(), "a plan of the test has another length");
  }

  int64_t work() const {
    int64_t sum = 0;
    for (const Composed& type : types) sum += type.table.size() * type.count;
    return sum;
  }
};

using Values = std::vector<double>;

struct Results {
  Values out, to_x, to_theta;
};

// Of one network: the layer of x, its transpose of y, and the gradient of <y, layer(x)> by theta.
Results apply(const Definition& definition, int64_t in, int64_t out, const double* x,
              const double* theta, const double* y) {
  const int64_t channels[2] = {in, out};
  Results results{Values(definition.numel[1] * out), Values(definition.numel[0] * in),
                  Values(definition.terms * in * out)};
  for (const auto& type : definition.types) {
    std::vector<Values> sums[2], mixed[2];
    Values scale[2];
    for (int side = 0; side < 2; ++side)
      for (size_t i = 0; i < type.at[side].size(); ++i) {
        const int64_t c = channels[side];
        Values sum(type.count * c);
        const bool mean = definition.mean && side == 0 && !type.spread[side][i].empty();
        scale[side].push_back(mean ? 1.0 / type.spread[side][i].size() : 1.0);
        for (int64_t p = 0; p < type.count; ++p)
          for (int64_t shift : type.spread[side][i])
            for (int64_t k = 0; k < c; ++k)
              sum[p * c + k] +=
                  scale[side][i] * (side == 0 ? x : y)[(type.at[side][i][p] + shift) * c + k];
        mixed[side].emplace_back(type.count * c);
        sums[side].push_back(std::move(sum));
      }
    for (size_t r = 0; r < sums[0].size(); ++r)
      for (size_t w = 0; w < sums[1].size(); ++w) {
        const int64_t term = type.table[r * sums[1].size() + w];
        if (term < 0) continue;
        const double* block = theta + term * in * out;
        double* to_block = results.to_theta.data() + term * in * out;
        for (int64_t p = 0; p < type.count; ++p) {
          const double *read = sums[0][r].data() + p * in, *write = sums[1][w].data() + p * out;
          double *to_read = mixed[0][r].data() + p * in, *to_write = mixed[1][w].data() + p * out;
          for (int64_t i = 0; i < in; ++i)
            for (int64_t o = 0; o < out; ++o) {
              to_write[o] += read[i] * block[i * out + o];
              to_read[i] += write[o] * block[i * out + o];
              to_block[i * out + o] += read[i] * write[o];
            }
        }
      }
    for (int side = 0; side < 2; ++side) {
      double* to = (side == 0 ? results.to_x : results.out).data();
      const int64_t c = channels[side];
      for (size_t i = 0; i < sums[side].size(); ++i)
        for (int64_t p = 0; p < type.count; ++p)
          for (int64_t shift : type.spread[side][i])
            for (int64_t k = 0; k < c; ++k)
              to[(type.at[side][i][p] + shift) * c + k] +=
                  scale[side][i] * mixed[side][i][p * c + k];
    }
  }
  return results;
}

// ---- The kernels.

// Exactly as long as it may be read, so that the address sanitizer sees a step too far; aligned, or
// off by one element. Nothing is a number before it is written.
template <class T>
class Array {
 public:
  Array(int64_t count, int64_t shift) : size(count), shift_(shift) { held_.get(count + shift); }
  Array(const Values& values, int64_t shift) : Array(values.size(), shift) {
    for (int64_t i = 0; i < size; ++i) data()[i] = static_cast<T>(values[i]);
  }
  T* data() { return held_.get(0) + shift_; }
  bool same(Array& other) {
    return size == other.size &&
           (size == 0 || std::memcmp(data(), other.data(), size * sizeof(T)) == 0);
  }
  const int64_t size;

 private:
  Buffer<T> held_;
  int64_t shift_;
};

// Networks `gap` elements apart that are never to be looked at.
template <class T>
Array<T> with_gaps(const Values& values, int64_t networks, int64_t gap, int64_t shift) {
  const int64_t size = values.size() / networks;
  Array<T> spaced(networks * (size + gap) - gap, shift);
  for (int64_t n = 0; n < networks; ++n)
    for (int64_t i = 0; i < size; ++i)
      spaced.data()[n * (size + gap) + i] = static_cast<T>(values[n * size + i]);
  return spaced;
}

template <class T>
void close(const T* found, const Values& expected, const std::string& what) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    const double own = std::abs(found[i] - expected[i]);
    error = own <= error ? error : std::isnan(own) ? INFINITY : own;
  }
  const double accepted = (sizeof(T) == 4 ? 3e-5 : 3e-14) * largest;
  expect(error <= accepted,
         what + ": off by " + std::to_string(error) + " of " + std::to_string(largest));
}

// How work is given out: over threads with new workspaces, or piece by piece to an old one.
struct Way {
  int64_t shift;
  bool stream, reuse;
  int threads;
};
constexpr Way kWays[] = {{0, false, false, 1}, {0, true, false, 3}, {1, true, true, 2}};

template <class T, class Piece>
void give_out(const Way& way, int64_t count, const Piece& piece) {
  if (way.reuse) {
    static Workspace<T> old;
    for (int64_t i = count; i-- > 0;) piece(i, i + 1, old);
    return;
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < way.threads; ++t)
    threads.emplace_back([&, t] {
      Workspace<T> own;
      piece(count * t / way.threads, count * (t + 1) / way.threads, own);
    });
  for (std::thread& thread : threads) thread.join();
}

struct Case {
  int64_t groups, samples, in, out;
};

template <class T>
void check(const Code& code, const Case& size, const std::string& name, Random& random) {
  const auto [groups, samples, in, out] = size;
  const int64_t batch = groups * samples, lanes = vector_bytes() / sizeof(T);
  const std::string what = name + ", " + std::to_string(8 * sizeof(T)) + " bits, channels " +
                           std::to_string(in) + " to " + std::to_string(out);
  const Definition definition(code);
  const Plan plan = Plan::parse(code.data(), code.size());
  const int64_t numel[2] = {definition.numel[0], definition.numel[1]}, channels[2] = {in, out};
  const int64_t theta_size = plan.terms * in * out, tensors = definition.parts[1].size();

  std::normal_distribution<float> normal;
  const auto drawn = [&](int64_t count) {
    Values values(count);
    for (double& value : values) value = normal(random);
    return values;
  };
  const Values x = drawn(batch * numel[0] * in), y = drawn(batch * numel[1] * out),
               theta = drawn(groups * theta_size), bias = drawn(groups * tensors * out);
  Values expected_out, expected_x, expected_theta(groups * theta_size),
      expected_bias(groups * tensors * out);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t group = b / samples;
    const Results each = apply(definition, in, out, x.data() + b * numel[0] * in,
                               theta.data() + group * theta_size, y.data() + b * numel[1] * out);
    expected_out.insert(expected_out.end(), each.out.begin(), each.out.end());
    expected_x.insert(expected_x.end(), each.to_x.begin(), each.to_x.end());
    for (int64_t i = 0; i < theta_size; ++i)
      expected_theta[group * theta_size + i] += each.to_theta[i];
  }
  Values with_bias = expected_out;
  for (int64_t t = 0; t < tensors; ++t) {
    const auto& part = definition.parts[1][t];
    for (int64_t position : positions(part.offset, part.axes))
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t c = 0; c < out; ++c) {
          const int64_t at = (b * numel[1] + position) * out + c,
                        to = (b / samples * tensors + t) * out + c;
          with_bias[at] += bias[to];
          expected_bias[to] += y[at];
        }
  }

  // The layer without and with bias, its transpose.
  for (int which = 0; which < 3; ++which) {
    const int reads = which == 2 ? 1 : 0;
    const Program program(plan, reads, channels[reads], channels[1 - reads], lanes);
    std::unique_ptr<Array<T>> first;
    for (const Way& way : kWays) {
      const int64_t gap = 5 * way.shift, stride = numel[1 - reads] * channels[1 - reads];
      Array<T> from = with_gaps<T>(reads == 0 ? x : y, batch, gap, way.shift),
               blocks(theta, way.shift), biases(bias, way.shift);
      auto to = std::make_unique<Array<T>>(batch * stride, way.shift);
      const Problem<T> problem{plan, batch, groups, {in, out}, blocks.data()};
      const ForwardTask<T> task{problem,
                                {from.data(), numel[reads] * channels[reads] + gap},
                                which == 1 ? biases.data() : nullptr,
                                {to->data(), stride},
                                program,
                                way.stream};
      give_out<T>(way, batch, [&](int64_t begin, int64_t end, Workspace<T>& workspace) {
        forward(task, begin, end, workspace);
      });
      if (!first) {
        const char* names[] = {": forward", ": forward with bias", ": transposed"};
        close(to->data(),
              which == 0   ? expected_out
              : which == 1 ? with_bias
                           : expected_x,
              what + names[which]);
        first = std::move(to);
      } else {
        expect(first->same(*to), what + ": bits of the layer depend on how work is given out");
      }
    }
  }

  const int64_t padded = (out + lanes - 1) / lanes * lanes, padded_size = plan.terms * in * padded;
  const Program program(plan, 1, out, in, lanes);
  for (const int64_t batch_bytes : {int64_t{0}, int64_t{1} << 40}) {
    const Runs runs(batch, groups, batch_bytes, padded_size * sizeof(T));
    std::unique_ptr<Array<T>> first[3];
    for (const Way& way : kWays)
      for (const bool need_x : {true, false}) {
        const int64_t gap = 5 * way.shift;
        Array<T> from = with_gaps<T>(x, batch, gap, way.shift),
                 grad = with_gaps<T>(y, batch, gap, way.shift), blocks(theta, way.shift);
        std::unique_ptr<Array<T>> to[3];
        const int64_t counts[] = {batch * numel[0] * in, runs.count() * padded_size,
                                  runs.count() * tensors * out};
        for (int i = 0; i < 3; ++i) to[i] = std::make_unique<Array<T>>(counts[i], way.shift);
        const Problem<T> problem{plan, batch, groups, {in, out}, blocks.data()};
        const BackwardTask<T> task{problem,
                                   {from.data(), numel[0] * in + gap},
                                   {grad.data(), numel[1] * out + gap},
                                   {need_x ? to[0]->data() : nullptr, numel[0] * in},
                                   to[1]->data(),
                                   to[2]->data(),
                                   runs,
                                   program,
                                   way.stream};
        give_out<T>(way, runs.count(), [&](int64_t begin, int64_t end, Workspace<T>& workspace) {
          backward(task, begin, end, workspace);
        });
        if (first[0]) {
          bool same = true;
          for (int i = need_x ? 0 : 1; i < 3; ++i) same = same && first[i]->same(*to[i]);
          expect(same, what + ": bits of gradients depend on how work is given out");
          continue;
        }
        std::vector<T> to_theta(groups * theta_size), to_bias(groups * tensors * out);
        for (int64_t run = 0; run < runs.count(); ++run) {
          const int64_t group = run / runs.runs_a_group;
          for (int64_t i = 0; i < theta_size; ++i)
            to_theta[group * theta_size + i] +=
                to[1]->data()[run * padded_size + i / out * padded + i % out];
          for (int64_t i = 0; i < tensors * out; ++i)
            to_bias[group * tensors * out + i] += to[2]->data()[run * tensors * out + i];
        }
        close(to[0]->data(), expected_x, what + ": gradient by x");
        close(to_theta.data(), expected_theta, what + ": gradient by theta");
        close(to_bias.data(), expected_bias, what + ": gradient by bias");
        for (int i = 0; i < 3; ++i) first[i] = std::move(to[i]);
      }
  }
}

void check_both(const Code& code, const Case& size, const std::string& name, Random& random) {
  check<float>(code, size, name, random);
  check<double>(code, size, name, random);
}

struct Named {
  std::string name;
  Weights weights;
};

std::vector<Named> small_weights() {
  const auto same = [](std::string name, std::vector<Labelled> tensors, Sizes sizes) {
    return Named{std::move(name), {tensors, tensors, std::move(sizes)}};
  };
  return {
      same("MLP", {{{1, 0}}, {{1}}, {{2, 1}}, {{2}}}, {7, 5, 9}),
      same("RNN", {{{1, 0}}, {{1, 1}}, {{1}}, {{0, 1}}}, {3, 6}),
      same("cube", {{{0, 0, 0}}}, {5}),
      same("convolution", {{{1, 0, 2, 3}}, {{1}}}, {4, 6, 3, 3}),
      same("scalar", {{{}}}, {}),
      same("scalars and a vector", {{{}}, {{0}}, {{}}}, {3}),
      same("fixed axes", {{{0, 1}, 3, 2}, {{1}, 2, 0}, {{1, 0}, 2, 1}}, {5, 4}),
      same("nothing", {{{0, 1}}, {{0}}}, {0, 4}),
      same("ones", {{{0, 1, 2}}, {{0, 2}}}, {1, 1, 1}),
      {"to a vector", {{{{0, 1}}, {{1}}}, {{{0}}}, {6, 7}}},
      {"from a scalar", {{{{}}}, {{{0, 0}}, {{1}}}, {6, 2}}},
      {"out of nothing", {{}, {{{0, 0}}}, {3}}},
      {"into nothing", {{{{0, 0}}}, {}, {3}}},
  };
}

// Runs that are split, joined and longer than a tile, and tensors that are read in parts.
std::vector<Named> large_weights() {
  const auto same = [](std::string name, std::vector<Labelled> tensors, Sizes sizes) {
    return Named{std::move(name), {tensors, tensors, std::move(sizes)}};
  };
  return {
      same("long", {{{0}}, {{0, 1}}}, {401, 3}),
      same("wide", {{{1, 0}}, {{1}}}, {211, 4}),
      same("prime", {{{0, 1}}, {{1, 0}}}, {67, 13}),
      same("square", {{{0, 0}}, {{0}}}, {60}),
      same("long square", {{{0, 0}}}, {97}),
      same("kernels", {{{1, 0, 2, 3}}}, {11, 7, 5, 5}),
      same("a few", {{{0, 1, 2}}, {{2, 0}}}, {65, 2, 12}),
  };
}

constexpr int64_t kChannels[] = {1, 2, 3, 8, 15, 16, 17, 31, 32, 33};

void given_plans(Random& random) {
  for (const Named& each : small_weights())
    for (const bool mean : {true, false}) {
      const Code code = make(each.weights, mean, mean ? 0 : 3, random);
      const int64_t work = Definition(code).work();
      check_both(code, {1, 5, 3, 2}, each.name, random);
      if (work < 10000) check_both(code, {3, 1, 20, 33}, each.name, random);
      for (const int64_t in : {1, 3, 16, 17, 32})
        for (const int64_t out : {1, 3, 16, 17, 32})
          if (in * out * work < (kFew ? 40000 : 1000000))
            check_both(code, {2, 1 + below(2, random), in, out}, each.name, random);
    }
  for (const Named& each : large_weights()) {
    const Code code = make(each.weights, true, 4, random);
    for (const auto& [in, out] : {std::pair(16, 16), std::pair(3, 5), std::pair(17, 1)})
      if (!kFew || in == 3) check_both(code, {1, in == 3 ? 2 : 1, in, out}, each.name, random);
  }
}

Weights random_weights(Random& random) {
  Weights weights;
  const int64_t labels = 1 + below(3, random);
  constexpr int64_t sizes[] = {1, 2, 3, 4, 5, 8, 13, 16, 24};
  for (int64_t i = 0; i < labels; ++i) weights.sizes.push_back(sizes[below(9, random)]);
  if (below(20, random) == 0) weights.sizes[0] = 0;
  for (auto* tensors : {&weights.in, &weights.out}) {
    tensors->resize(1 + below(3, random));
    for (Labelled& tensor : *tensors) {
      tensor.labels.resize(below(4, random));
      for (int& label : tensor.labels) label = int(below(labels, random));
      if (below(4, random) == 0)
        tensor.copies = 2, tensor.at = below(int64_t(tensor.labels.size()) + 1, random);
    }
  }
  if (below(3, random) == 0) weights.out = weights.in;
  return weights;
}

void random_plans(Random& random) {
  for (int done = 0; done < (kFew ? 10 : 120);) {
    const Code code =
        make(random_weights(random), below(2, random) == 0, int(below(3, random)) * 2, random);
    const Definition definition(code);
    Case size{1 + below(2, random), 1 + below(3, random), kChannels[below(10, random)],
              kChannels[below(10, random)]};
    const int64_t cost = definition.work() * size.groups * size.samples * size.in * size.out;
    if (definition.terms > 500 || cost > 1000000 || definition.numel[0] > 20000) continue;
    check_both(code, size, "random " + std::to_string(done++), random);
  }
}

// ---- Plans that are none.

// Runs what was accepted, at little cost: whatever it computes, it stays within its arrays.
void run_accepted(const Code& code, const Plan& plan, Random& random) {
  if (plan.terms > 2000) return;
  for (const Side& side : plan.sides)
    if (side.numel > 20000 || side.slots > 100000 || side.write_slots > 100000) return;
  const int64_t in = 1 + 2 * below(3, random), out = 1 + below(20, random);
  const int64_t channels[] = {in, out}, lanes = vector_bytes() / sizeof(float);
  const std::string what = "an accepted plan";
  try {
    Array<float> theta(Values(plan.terms * in * out, 1.0), 0),
        x(Values(plan.sides[0].numel * in, 1.0), 0), y(Values(plan.sides[1].numel * out, 1.0), 0),
        to_x(plan.sides[0].numel * in, 0), to_y(plan.sides[1].numel * out, 0);
    const Problem<float> problem{plan, 1, 1, {in, out}, theta.data()};
    Workspace<float> workspace;
    for (int reads = 0; reads < 2; ++reads) {
      const Program program(plan, reads, channels[reads], channels[1 - reads], lanes);
      const ForwardTask<float> task{problem, {(reads ? y : x).data(), 0},
                                    nullptr, {(reads ? to_x : to_y).data(), 0},
                                    program, false};
      forward(task, 0, 1, workspace);
    }
    const int64_t padded = (out + lanes - 1) / lanes * lanes;
    const Runs runs(1, 1, 0, 1);
    Array<float> to_theta(plan.terms * in * padded, 0),
        to_bias(plan.sides[1].tensors.size() * out, 0);
    const Program program(plan, 1, out, in, lanes);
    const BackwardTask<float> task{
        problem, {x.data(), 0}, {y.data(), 0}, {to_x.data(), 0}, to_theta.data(), to_bias.data(),
        runs,    program,       false};
    backward(task, 0, 1, workspace);
  } catch (const std::exception& error) {
    expect(false, what + " of " + std::to_string(code.size()) + " integers: " + error.what());
  }
}

bool accepted(const Code& code, const std::string& what, Random& random) {
  // Exactly as long as it may be read.
  std::unique_ptr<int64_t[]> held(new int64_t[code.size()]);
  std::copy(code.begin(), code.end(), held.get());
  try {
    const Plan plan = Plan::parse(held.get(), code.size());
    run_accepted(code, plan, random);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  } catch (const std::exception& error) {
    expect(false, what + ": not invalid_argument, but " + error.what());
    return false;
  }
}

void malformed_plans(Random& random) {
  const int64_t strange[] = {-1,        -2,        0,         1,         2,         3,
                             63,        64,        1 << 20,   1LL << 31, 1LL << 32, (1LL << 40) - 1,
                             1LL << 40, INT64_MAX, INT64_MIN, 1LL << 62};
  for (const Named& each : small_weights()) {
    const Code code = make(each.weights, true, 2, random);
    expect(accepted(code, each.name, random), each.name + ": a plan is refused");
    Code longer = code;
    longer.push_back(0);
    expect(!accepted(longer, each.name, random), each.name + ": a plan too long is accepted");
    const int64_t length = code.size(), step = std::max<int64_t>(1, length / 100);
    for (int64_t end = 0; end < length; end += end + 1 < length - 20 ? step : 1)
      expect(!accepted({code.begin(), code.begin() + end}, each.name, random),
             each.name + ": a plan cut short is accepted");
    for (int mutant = 0; mutant < 400; ++mutant) {
      Code other = code;
      std::string what = each.name + " with";
      for (int64_t left = 1 + below(2, random); left > 0; --left) {
        // The lists of tensors and nodes come first.
        const int64_t at =
            below(below(2, random) == 0 ? std::min<int64_t>(length, 60) : length, random);
        other[at] = below(2, random) == 0 ? strange[below(16, random)]
                                          : other[at] + (below(2, random) == 0 ? 1 : -1);
        what += " [" + std::to_string(at) + "] = " + std::to_string(other[at]);
      }
      accepted(other, what, random);
    }
  }
}

// More plans than are kept, asked for at once.
void plans_are_kept(Random& random) {
  std::vector<Code> codes;
  for (int64_t size = 1; size <= 40; ++size)
    codes.push_back(make({{{{0}}}, {{{0, 0}}}, {size}}, true, 0, random));
  std::vector<std::thread> threads;
  std::vector<int> wrong(3);
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 120; ++i) {
        const Code& code = codes[(i * (t + 1)) % codes.size()];
        const auto prepared = prepare(code);
        const auto program = prepared->program(i % 2, 3, 5, 4);
        wrong[t] += prepared->code != code || program->plan != &prepared->plan ||
                    program != prepared->program(i % 2, 3, 5, 4);
      }
    });
  for (std::thread& thread : threads) thread.join();
  expect(wrong == std::vector<int>(3), "another plan was kept");
}

}  // namespace

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(count > 1 ? std::atoi(arguments[1]) : 0);
  given_plans(random);
  random_plans(random);
  plans_are_kept(random);
  if (!kFew) malformed_plans(random);
  std::printf(failures == 0 ? "equivariant: passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
