#pragma once

#include <cstdint>

namespace weightops::population {

// What a layer's backward reads and writes.
template <class Number>
struct Backward {
  const Number* row;  // the network's weights
  const Number *from[2], *out, *grad;
  Number* into[2];  // gradients of the inputs, null where nobody asks
  bool fresh[2];    // nothing is in them yet
  bool rectifies;   // a pool: its input is what a ReLU made, whose part is done here, on fewer
                    // numbers
  bool slope;       // an activation: its input's place holds its slope
  Number *weight, *bias;  // sums of every lane, null without
  int64_t width;
};

}  // namespace weightops::population
