// The element types, and in what they are summed: halves in float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace weightops {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// Written without branches so that the loops around them vectorise.
inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
inline float widen(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  // The multiplication rebiases the exponent and normalises subnormal numbers.
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  const uint32_t finite = float_to_bits(scaled), special = 0x7f800000u | magnitude << 13;
  return bits_to_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }
inline void narrow(float value, BFloat16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  out.bits =
      static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40 : rounded);
}
inline void narrow(float value, Half& out) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  // Below 2^-14 the addition of 0.5 puts half's last place at float's last place, rounding to even.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : rounded;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

}  // namespace weightops
