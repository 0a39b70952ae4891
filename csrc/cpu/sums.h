// Sums of gradient rows for any instruction set: float64, in the order of the rows, rounded once.
// Include after choosing the instruction set, as rows.h.
//
// Loops over consecutive columns without a branch, which the compiler makes vectors of.
#pragma once

#include <cstdint>

#include "elements.h"
#include "kernels.h"

#if defined(NEFTUNE_AVX512) || defined(NEFTUNE_AVX2)
#include <immintrin.h>
#endif

namespace neftune_kernels {
namespace {

// The float32 beside a float64, exact or with an odd last bit: rounded to 22 bits or fewer, it
// gives what the float64 itself would (Boldo and Melquiond 2008). NaN and infinity stay.
NEFTUNE_INLINE float rounded_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = nearest, magnitude = __builtin_fabs(value);
  const uint32_t away = __builtin_fabs(back) > magnitude;
  const uint32_t inexact = away | (__builtin_fabs(back) < magnitude);
  return float_of((bits_of(nearest) - away) | inexact);
}

constexpr int64_t kBlock = 8;  // columns whose conversion may be one instruction

// The same of a block.
NEFTUNE_INLINE void round_block_to_odd(const double* in, float* out) {
#if defined(NEFTUNE_AVX512)
  // Instruction by instruction: g++ 12 takes (double)(float)value of eight for the values
  // themselves, so that none is inexact.
  const __m512d values = _mm512_loadu_pd(in);
  const __m256 cut = _mm512_cvt_roundpd_ps(values, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 inexact = _mm512_cmp_pd_mask(_mm512_cvtps_pd(cut), values, _CMP_NEQ_OQ);
  const __m256i bits = _mm256_castps_si256(cut);
  const __m256i odd = _mm256_mask_or_epi32(bits, inexact, bits, _mm256_set1_epi32(1));
  _mm256_storeu_ps(out, _mm256_castsi256_ps(odd));
#else
  for (int64_t i = 0; i < kBlock; ++i) out[i] = rounded_to_odd(in[i]);
#endif
}

struct Float32Sum : Float32Scalar {
  static NEFTUNE_MEMBER float one(float value) { return value + 0.0f; }  // of −0 comes +0
  static NEFTUNE_MEMBER float round(double value) { return static_cast<float>(value); }
  static NEFTUNE_MEMBER void widen_block(const float* in, float* out) {
    __builtin_memcpy(out, in, kBlock * sizeof(*out));
  }
  static NEFTUNE_MEMBER void round_block(const double* in, float* out) {
    for (int64_t i = 0; i < kBlock; ++i) out[i] = round(in[i]);
  }
};

template <class Scalar>
struct NarrowSum : Scalar {
  static NEFTUNE_MEMBER uint16_t one(uint16_t bits) { return bits == 0x8000u ? 0 : bits; }
  static NEFTUNE_MEMBER uint16_t round(double value) {
    return Scalar::narrow(rounded_to_odd(value));
  }
  static NEFTUNE_MEMBER void widen_block(const uint16_t* in, float* out) {
    for (int64_t i = 0; i < kBlock; ++i) out[i] = Scalar::widen(in[i]);
  }
  static NEFTUNE_MEMBER void round_block(const double* in, uint16_t* out) {
    float odd[kBlock];
    round_block_to_odd(in, odd);
    for (int64_t i = 0; i < kBlock; ++i) out[i] = Scalar::narrow(odd[i]);
  }
};

using BFloat16Sum = NarrowSum<BFloat16Scalar>;

#if defined(NEFTUNE_AVX512) || defined(NEFTUNE_AVX2)

#if defined(NEFTUNE_AVX512)  // which brings these without F16C's own
NEFTUNE_INLINE __m256 widen8(__m128i halves) { return _mm256_maskz_cvtph_ps(0xFF, halves); }
NEFTUNE_INLINE __m128i narrow8(__m256 floats) {
  return _mm256_maskz_cvtps_ph(0xFF, floats, _MM_FROUND_TO_NEAREST_INT);
}
#else
NEFTUNE_INLINE __m256 widen8(__m128i halves) { return _mm256_cvtph_ps(halves); }
NEFTUNE_INLINE __m128i narrow8(__m256 floats) {
  return _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT);
}
#endif

struct Float16Sum : NarrowSum<Float16Scalar> {
  static NEFTUNE_MEMBER void widen_block(const uint16_t* in, float* out) {
    _mm256_storeu_ps(out, widen8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
  }
  static NEFTUNE_MEMBER void round_block(const double* in, uint16_t* out) {
    alignas(32) float odd[kBlock];
    round_block_to_odd(in, odd);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow8(_mm256_load_ps(odd)));
  }
};

#else

using Float16Sum = NarrowSum<Float16Scalar>;

#endif

// At most kSumColumns columns: the sums stay in the first-level cache.
template <class Element>
void sum_rows(const SumJob& job) {
  using Storage = typename Element::Storage;
  const Storage* source = static_cast<const Storage*>(job.source);
  Storage* out = static_cast<Storage*>(job.out);
  const int64_t columns = job.columns, whole = columns - columns % kBlock;
  if (job.count == 1 && job.scale == 1 && job.divisor == 1) {
    const Storage* row = source + job.offsets[0];
    for (int64_t i = 0; i < columns; ++i) out[i] = Element::one(row[i]);
    return;
  }
  double sums[kSumColumns];
  for (int64_t i = 0; i < columns; ++i) sums[i] = 0;
  for (int64_t number = 0; number < job.count; ++number) {
    const Storage* row = source + job.offsets[number];
    for (int64_t column = 0; column < whole; column += kBlock) {
      float values[kBlock];
      Element::widen_block(row + column, values);
      for (int64_t i = 0; i < kBlock; ++i) sums[column + i] += static_cast<double>(values[i]);
    }
    for (int64_t i = whole; i < columns; ++i) sums[i] += static_cast<double>(Element::widen(row[i]));
  }
  for (int64_t i = 0; i < columns; ++i) sums[i] *= job.scale;
  if (job.divisor != 1) {
    for (int64_t i = 0; i < columns; ++i) sums[i] /= job.divisor;
  }
  for (int64_t column = 0; column < whole; column += kBlock)
    Element::round_block(sums + column, out + column);
  for (int64_t i = whole; i < columns; ++i) out[i] = Element::round(sums[i]);
}

}  // namespace
}  // namespace neftune_kernels
