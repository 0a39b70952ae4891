// Philox-4x32: a counter and a key to four uniform words (Salmon, Moraes, Dror, Shaw 2011,
// "Parallel random numbers: as easy as 1, 2, 3").
//
// Written once for a uint32_t on a CPU or GPU thread and for SIMD vectors of words. A vector type V
// brings, found by argument lookup,
//     multiply(uint32_t, V) → product,  high(product), low(product) → V,  xor3(a, b, key) → V for
//     any mix of V and uint32_t in a and b, swapped_xor(product, V, key) → pair of words:
//     high(product) ^ V ^ key, then low(product).
// Each counter word keeps its own type: those that are equal for a whole row stay scalars, so the
// first two rounds cost a vector one multiplication each instead of two.
#pragma once

#include <cstdint>

#include "compiler.h"

// Internal linkage matters: a copy compiled for one instruction set must never be the one another
// set's code is linked to.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define NEFTUNE_INLINE static __host__ __device__ __forceinline__
#else
#define NEFTUNE_INLINE NEFTUNE_INLINE_STATIC
#endif

namespace neftune_kernels {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;  // ⌊2³²·(φ-1)⌋
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;  // ⌊2³²·(√3-1)⌋

template <class W0, class W1, class W2, class W3>
struct PhiloxCounter {
  W0 w0;
  W1 w1;
  W2 w2;
  W3 w3;
};

// The four result words, two and two: for uint32_t a pair is a uint64_t with the earlier word in
// its low half.
template <class Pair01, class Pair23>
struct PhiloxPairs {
  Pair01 words01;
  Pair23 words23;
};

struct PhiloxKey {
  uint32_t k0;
  uint32_t k1;
};

NEFTUNE_INLINE PhiloxKey next_key(PhiloxKey key) {
  return {key.k0 + kPhiloxKeyStep0, key.k1 + kPhiloxKeyStep1};
}

NEFTUNE_INLINE uint64_t multiply(uint32_t multiplier, uint32_t word) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return static_cast<uint64_t>(__umulhi(multiplier, word)) << 32 |
         multiplier * word;  // the 64-bit product compiles to three instructions
#else
  return static_cast<uint64_t>(multiplier) * word;
#endif
}
NEFTUNE_INLINE uint32_t high(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
NEFTUNE_INLINE uint32_t low(uint64_t product) { return static_cast<uint32_t>(product); }
NEFTUNE_INLINE uint32_t xor3(uint32_t a, uint32_t b, uint32_t key) { return a ^ b ^ key; }
NEFTUNE_INLINE uint64_t swapped_xor(uint64_t product, uint32_t word, uint32_t key) {
  return (product >> 32 | product << 32) ^ (word ^ key);
}

template <int rounds, class W0, class W1, class W2, class W3>
NEFTUNE_INLINE auto philox4x32(PhiloxCounter<W0, W1, W2, W3> counter, PhiloxKey key) {
  static_assert(rounds >= 1, "Philox needs at least one round");
  const auto product0 = multiply(kPhiloxMultiplier0, counter.w0);
  const auto product1 = multiply(kPhiloxMultiplier1, counter.w2);
  if constexpr (rounds == 1) {
    auto words01 = swapped_xor(product1, counter.w1, key.k0);
    auto words23 = swapped_xor(product0, counter.w3, key.k1);
    return PhiloxPairs<decltype(words01), decltype(words23)>{words01, words23};
  } else {
    auto w0 = xor3(high(product1), counter.w1, key.k0);
    auto w1 = low(product1);
    auto w2 = xor3(high(product0), counter.w3, key.k1);
    auto w3 = low(product0);
    PhiloxCounter<decltype(w0), decltype(w1), decltype(w2), decltype(w3)> next{w0, w1, w2, w3};
    return philox4x32<rounds - 1>(next, next_key(key));
  }
}

}  // namespace neftune_kernels
