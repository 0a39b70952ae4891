// The NEFTune noise (Jain et al. 2023, arXiv 2310.05914, Algorithm 1): alpha / √(L·d) · u, with u a
// pure function of place and seed.
//
//     counter = (column // 8, position, sample, replica),  key = (seed mod 2³², seed ≫ 32),
//     Philox-4x32-7 word k of block j → columns 8j+2k (low 16 bits) and 8j+2k+1 (high 16 bits) x =
//     float32(int32((half << 16) | 0x8000))          exact: (int16(half) + ½)·65536 step    =
//     float32(alpha / √(L·d)) · 2⁻³¹                  the quotient in float64, rounded once noise
//     = x · step                                        one float32 rounding out     =
//     cast(float32(e) + noise)                        never an FMA: compile with -ffp-contract=off
//     / --fmad=false
#pragma once

#include <math.h>

#include <cstdint>

#include "philox.h"

namespace neftune_kernels {

constexpr int kPhiloxRounds = 7;            // the paper's Crush-resistant count
constexpr int kColumnsPerBlock = 8;         // four words of two halves
constexpr float kSmallestStep = 0x1p-121f;  // magnitude 2⁻⁹⁰: below it there is no noise

NEFTUNE_INLINE PhiloxKey noise_key(uint64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

// Each of the first two rounds has one product that depends on the block alone, given replica and
// key: the same for every row of a call.
template <class Word>
struct BlockProducts {
  Word low0;         // round 1: the multiplier's product with the block index
  Word high1, low1;  // round 2: with the word that the first one's high half went into
};

// Of block j = column // 8; Block is uint32_t or a vector of block indices.
template <class Word, class Block>
NEFTUNE_INLINE BlockProducts<Word> block_products(Block block, uint32_t replica, PhiloxKey key) {
  const auto product0 = multiply(kPhiloxMultiplier0, block);
  const auto product1 = multiply(kPhiloxMultiplier1, xor3(high(product0), replica, key.k1));
  return {low(product0), high(product1), low(product1)};
}

// The block's four words, as two pairs.
template <class Word>
NEFTUNE_INLINE auto noise_words(BlockProducts<Word> block, uint32_t position, uint32_t sample,
                                PhiloxKey key) {
  const uint64_t product1 = multiply(kPhiloxMultiplier1, sample);
  const uint64_t product0 = multiply(kPhiloxMultiplier0, xor3(high(product1), position, key.k0));
  const PhiloxKey second = next_key(key);
  const auto w0 = xor3(block.high1, low(product1), second.k0);
  const auto w2 = xor3(high(product0), block.low0, second.k1);
  const PhiloxCounter<Word, Word, Word, uint32_t> after_two_rounds{w0, block.low1, w2,
                                                                   low(product0)};
  return philox4x32<kPhiloxRounds - 2>(after_two_rounds, next_key(second));
}

// x of a word's even column (low half) and odd column (high half).
NEFTUNE_INLINE float lattice_even(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>((word << 16) + 0x8000u));
}
NEFTUNE_INLINE float lattice_odd(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>((word & 0xFFFF0000u) | 0x8000u));
}

// x·step as one fma for a finite step: the sum h·65536·step + 32768·step, h the signed half, is
// x·step exactly and rounded once.
NEFTUNE_INLINE float noise_even(uint32_t word, float step) {
  return fmaf(static_cast<float>(static_cast<int32_t>(word << 16)), step, step * 32768.0f);
}
NEFTUNE_INLINE float noise_odd(uint32_t word, float step) {
  return fmaf(static_cast<float>(static_cast<int32_t>(word & 0xFFFF0000u)), step, step * 32768.0f);
}

// float32(alpha / √(L·d)) · 2⁻³¹, negative for a negative alpha; 0 means no noise. The caller
// passes root = √(double(L)·double(d)).
NEFTUNE_INLINE float noise_step(double noise_alpha, int64_t length, double root) {
  if (length <= 0) return 0.0f;
  const float step = static_cast<float>(noise_alpha / root) * 0x1p-31f;
  return fabsf(step) < kSmallestStep ? 0.0f : step;
}

}  // namespace neftune_kernels
