// The dtypes of rows, one element at a time, for files of any instruction set: anonymous, so that
// nothing compiled for one CPU can be linked into another's path.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace neftune_kernels {
namespace {

NEFTUNE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
NEFTUNE_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Float32Scalar {
  using Storage = float;
  static NEFTUNE_MEMBER float widen(float value) { return value; }
  static NEFTUNE_MEMBER float narrow(float value) { return value; }
};

struct BFloat16Scalar {
  using Storage = uint16_t;
  static NEFTUNE_MEMBER float widen(uint16_t bits) { return float_of(uint32_t{bits} << 16); }
  static NEFTUNE_MEMBER uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value);
    return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16Scalar {
  using Storage = uint16_t;
  static NEFTUNE_MEMBER float widen(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // The exponent bias differs by 112: a product with 2¹¹² is exact and makes subnormals normal.
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
  }
  static NEFTUNE_MEMBER uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u,
                   magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u | (magnitude >> 13 & 0x1FFu));
    if (magnitude >= 0x477FF000u)
      return uint16_t(sign | 0x7C00u);  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {      // below 2⁻¹⁴: adding ½ lets float32 round at 2⁻²⁴
      return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
    }
    return uint16_t(sign | (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
  }
};

}  // namespace
}  // namespace neftune_kernels
