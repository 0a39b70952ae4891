// The vector words of one instruction set. Each gives philox.h its arithmetic on words (see there)
// and rows.h
//     kGroupColumns                         columns per group, 8 per block
//     kTwinGroups                           whether two groups at once are faster
//     Word                                 a group's words; also high and low of a product
//     BlockIndex, first_blocks, next_blocks, broadcast_block     the first counter word: indices 0,
//     1, ...; of the next group; all equal store_words(pairs, uint32_t*)        four words per
//     block, blocks in column order Float32, BFloat16, Float16           add_noise<scaled>(pairs,
//     step, scale, source, out) and multiply_by(scale, source, out)
//
// bfloat16 is rounded by integer arithmetic: AVX512_BF16's conversion flushes subnormals
// (rows_avx512bf16.cpp says when that is harmless). A NaN needs no care there: every NaN below is
// the default one or carries a widened bfloat16's payload, so its low 16 bits are zero and rounding
// leaves it alone.
#pragma once

#include <cstdint>

#include "../noise.h"
#include "elements.h"

#if defined(NEFTUNE_AVX512) || defined(NEFTUNE_AVX2)
#include <immintrin.h>
#elif defined(NEFTUNE_NEON)
#include <arm_neon.h>
#endif

namespace neftune_kernels {
namespace {

#if defined(NEFTUNE_AVX512)

constexpr int kGroupColumns = 64;
constexpr bool kTwinGroups = true;

// Eight words in the low halves of 64-bit lanes. What lies in the high halves is never read, so the
// low word of a product is the product.
struct Word {
  __m512i lanes;
};

NEFTUNE_INLINE __m512i broadcast(uint32_t word) { return _mm512_set1_epi64(word); }
NEFTUNE_INLINE __m512i xor3(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

NEFTUNE_INLINE Word multiply(uint32_t multiplier, Word word) {
  return {_mm512_mul_epu32(word.lanes, broadcast(multiplier))};
}
NEFTUNE_INLINE Word high(Word product) { return {_mm512_srli_epi64(product.lanes, 32)}; }
NEFTUNE_INLINE Word low(Word product) { return product; }
NEFTUNE_INLINE Word xor3(Word a, Word b, uint32_t key) {
  return {xor3(a.lanes, b.lanes, broadcast(key))};
}
NEFTUNE_INLINE Word xor3(Word a, uint32_t b, uint32_t key) {
  return {_mm512_xor_si512(a.lanes, broadcast(b ^ key))};
}
NEFTUNE_INLINE Word xor3(uint32_t a, Word b, uint32_t key) { return xor3(b, a, key); }
NEFTUNE_INLINE Word swapped_xor(Word product, Word word, uint32_t key) {
  const __m512i swapped = _mm512_shuffle_epi32(product.lanes, _MM_PERM_CDAB);
  return {_mm512_mask_ternarylogic_epi32(swapped, 0x5555, word.lanes, broadcast(key),
                                         0x96)};  // low halves only
}

// Block indices grow by a constant, so their products do too: an addition per group in place of the
// first round's multiplication.
struct BlockIndex {
  __m512i product0;  // index · kPhiloxMultiplier0
};

NEFTUNE_INLINE Word multiply(uint32_t, BlockIndex block) { return {block.product0}; }
NEFTUNE_INLINE BlockIndex first_blocks() {
  const __m512i indices = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_mul_epu32(indices, broadcast(kPhiloxMultiplier0))};
}
NEFTUNE_INLINE BlockIndex next_blocks(BlockIndex block) {
  return {_mm512_add_epi64(block.product0, _mm512_set1_epi64(int64_t{8} * kPhiloxMultiplier0))};
}
NEFTUNE_INLINE BlockIndex broadcast_block(uint32_t index) {
  return {_mm512_set1_epi64(int64_t(uint64_t{index} * kPhiloxMultiplier0))};
}

// [words 0 1 2 3] of blocks 0..3 (half 0) or 4..7 (half 1).
template <int half, class Pairs>
NEFTUNE_INLINE __m512i words_of(Pairs pairs) {
  const __m512i order =
      _mm512_add_epi64(_mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), _mm512_set1_epi64(4 * half));
  return _mm512_permutex2var_epi64(pairs.words01.lanes, order, pairs.words23.lanes);
}

template <class Pairs>
NEFTUNE_INLINE void store_words(Pairs pairs, uint32_t* words) {
  _mm512_storeu_si512(words, words_of<0>(pairs));
  _mm512_storeu_si512(words + 16, words_of<1>(pairs));
}

// The same, ordered for unpacking, which reads the low (high) 64 bits of every 128: the first
// (last) 16 columns there.
template <int half, class Pairs>
NEFTUNE_INLINE __m512i unpackable_words_of(Pairs pairs) {
  const __m512i order =
      _mm512_add_epi64(_mm512_setr_epi64(0, 2, 8, 10, 1, 3, 9, 11), _mm512_set1_epi64(4 * half));
  return _mm512_permutex2var_epi64(pairs.words01.lanes, order, pairs.words23.lanes);
}

// Interleaving halves with 0x8000 widens them to x in one instruction.
NEFTUNE_INLINE __m512 low_noise(__m512i words, float step) {
  const __m512i lattice = _mm512_unpacklo_epi16(_mm512_set1_epi16(int16_t(0x8000)), words);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(lattice), _mm512_set1_ps(step));
}
NEFTUNE_INLINE __m512 high_noise(__m512i words, float step) {
  const __m512i lattice = _mm512_unpackhi_epi16(_mm512_set1_epi16(int16_t(0x8000)), words);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(lattice), _mm512_set1_ps(step));
}

// 16 consecutive columns.
template <class Element, bool scaled>
NEFTUNE_INLINE void add_noise16(__m512 noise, float scale, const typename Element::Storage* source,
                                typename Element::Storage* out) {
  __m512 e = Element::load(source);
  if constexpr (scaled) e = Element::round(_mm512_mul_ps(e, _mm512_set1_ps(scale)));
  Element::store(out, _mm512_add_ps(e, noise));
}

template <class Element, bool scaled, class Pairs>
NEFTUNE_INLINE void add_noise64(Pairs pairs, float step, float scale,
                                const typename Element::Storage* source,
                                typename Element::Storage* out) {
  const __m512i words = unpackable_words_of<0>(pairs), words_high = unpackable_words_of<1>(pairs);
  add_noise16<Element, scaled>(low_noise(words, step), scale, source, out);
  add_noise16<Element, scaled>(high_noise(words, step), scale, source + 16, out + 16);
  add_noise16<Element, scaled>(low_noise(words_high, step), scale, source + 32, out + 32);
  add_noise16<Element, scaled>(high_noise(words_high, step), scale, source + 48, out + 48);
}

template <class Element>
NEFTUNE_INLINE void multiply64_by(float scale, const typename Element::Storage* source,
                                  typename Element::Storage* out) {
  for (int i = 0; i < kGroupColumns; i += 16)
    Element::store(out + i, _mm512_mul_ps(Element::load(source + i), _mm512_set1_ps(scale)));
}

struct Float32 {
  using Storage = float;
  static NEFTUNE_MEMBER __m512 load(const float* source) { return _mm512_loadu_ps(source); }
  static NEFTUNE_MEMBER void store(float* out, __m512 value) { _mm512_storeu_ps(out, value); }
  static NEFTUNE_MEMBER __m512 round(__m512 value) { return value; }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const float* source,
                                       float* out) {
    add_noise64<Float32, scaled>(pairs, step, scale, source, out);
  }
  static NEFTUNE_MEMBER void multiply_by(float scale, const float* source, float* out) {
    multiply64_by<Float32>(scale, source, out);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static NEFTUNE_MEMBER __m256i narrow(__m512 value) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static NEFTUNE_MEMBER __m512 load(const uint16_t* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }
  static NEFTUNE_MEMBER void store(uint16_t* out, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow(value));
  }
  static NEFTUNE_MEMBER __m512 round(__m512 value) { return _mm512_cvtph_ps(narrow(value)); }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const uint16_t* source,
                                       uint16_t* out) {
    add_noise64<Float16, scaled>(pairs, step, scale, source, out);
  }
  static NEFTUNE_MEMBER void multiply_by(float scale, const uint16_t* source, uint16_t* out) {
    multiply64_by<Float16>(scale, source, out);
  }
};

// 32 columns in two vectors of floats, as unpacking within 128 bits leaves them: the low half of
// every 8 columns, then the high half.
struct BFloat16 {
  using Storage = uint16_t;

  static NEFTUNE_MEMBER __m512 low_floats(__m512i e) {
    return _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), e));
  }
  static NEFTUNE_MEMBER __m512 high_floats(__m512i e) {
    return _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), e));
  }

  // Upper halves rounded up where the lower ones exceed one half, or equal it with the last kept
  // bit set (nearest-even).
  static NEFTUNE_MEMBER __m512i narrow(__m512 low, __m512 high) {
    // 16-bit positions of the columns' lower halves, two to a constant; 32 and above: in `high`.
    // Upper halves lie one further.
    const __m512i lower = _mm512_setr_epi32(
        0x020000, 0x060004, 0x220020, 0x260024, 0x0A0008, 0x0E000C, 0x2A0028, 0x2E002C, 0x120010,
        0x160014, 0x320030, 0x360034, 0x1A0018, 0x1E001C, 0x3A0038, 0x3E003C);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(1));
    const __m512i kept =
        _mm512_permutex2var_epi16(_mm512_castps_si512(low), upper, _mm512_castps_si512(high));
    const __m512i dropped =
        _mm512_permutex2var_epi16(_mm512_castps_si512(low), lower, _mm512_castps_si512(high));
    const __m512i sticky = _mm512_ternarylogic_epi32(dropped, kept, _mm512_set1_epi16(1),
                                                     0xF8);  // dropped | (kept & 1)
    const __mmask32 up = _mm512_cmpgt_epu16_mask(sticky, _mm512_set1_epi16(int16_t(0x8000)));
    return _mm512_mask_sub_epi16(kept, up, kept, _mm512_set1_epi16(-1));
  }

  static NEFTUNE_MEMBER __m512i scale_by(__m512i e, float scale) {
    return narrow(_mm512_mul_ps(low_floats(e), _mm512_set1_ps(scale)),
                  _mm512_mul_ps(high_floats(e), _mm512_set1_ps(scale)));
  }

  template <bool scaled>
  static NEFTUNE_MEMBER void add_noise32(__m512i words, float step, float scale,
                                         const uint16_t* source, uint16_t* out) {
    __m512i e = _mm512_loadu_si512(source);
    if constexpr (scaled) e = scale_by(e, scale);
    const __m512 low = _mm512_add_ps(low_floats(e), low_noise(words, step));
    const __m512 high = _mm512_add_ps(high_floats(e), high_noise(words, step));
    _mm512_storeu_si512(out, narrow(low, high));
  }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const uint16_t* source,
                                       uint16_t* out) {
    add_noise32<scaled>(words_of<0>(pairs), step, scale, source, out);
    add_noise32<scaled>(words_of<1>(pairs), step, scale, source + 32, out + 32);
  }

  static NEFTUNE_MEMBER void multiply_by(float scale, const uint16_t* source, uint16_t* out) {
    for (int i = 0; i < kGroupColumns; i += 32)
      _mm512_storeu_si512(out + i, scale_by(_mm512_loadu_si512(source + i), scale));
  }
};

#elif defined(NEFTUNE_AVX2)

constexpr int kGroupColumns = 32;
constexpr bool kTwinGroups = true;

// Four words in the low halves of 64-bit lanes, of blocks 0, 2, 1, 3: then unpacking within 128
// bits gives consecutive blocks.
struct Word {
  __m256i lanes;
};

NEFTUNE_INLINE __m256i broadcast(uint32_t word) { return _mm256_set1_epi64x(word); }

NEFTUNE_INLINE Word multiply(uint32_t multiplier, Word word) {
  return {_mm256_mul_epu32(word.lanes, broadcast(multiplier))};
}
NEFTUNE_INLINE Word high(Word product) { return {_mm256_srli_epi64(product.lanes, 32)}; }
NEFTUNE_INLINE Word low(Word product) { return product; }
NEFTUNE_INLINE Word xor3(Word a, Word b, uint32_t key) {
  return {_mm256_xor_si256(a.lanes, _mm256_xor_si256(b.lanes, broadcast(key)))};
}
NEFTUNE_INLINE Word xor3(Word a, uint32_t b, uint32_t key) {
  return {_mm256_xor_si256(a.lanes, broadcast(b ^ key))};
}
NEFTUNE_INLINE Word xor3(uint32_t a, Word b, uint32_t key) { return xor3(b, a, key); }
NEFTUNE_INLINE Word swapped_xor(Word product, Word word, uint32_t key) {
  const __m256i swapped = _mm256_shuffle_epi32(product.lanes, _MM_SHUFFLE(2, 3, 0, 1));
  return {
      _mm256_blend_epi32(xor3(Word{swapped}, word, key).lanes, swapped, 0xAA)};  // low halves only
}

// Block indices grow by a constant, so their products do too: an addition per group in place of the
// first round's multiplication.
struct BlockIndex {
  __m256i product0;  // index · kPhiloxMultiplier0
};

NEFTUNE_INLINE Word multiply(uint32_t, BlockIndex block) { return {block.product0}; }
NEFTUNE_INLINE BlockIndex first_blocks() {
  return {_mm256_mul_epu32(_mm256_setr_epi64x(0, 2, 1, 3), broadcast(kPhiloxMultiplier0))};
}
NEFTUNE_INLINE BlockIndex next_blocks(BlockIndex block) {
  return {_mm256_add_epi64(block.product0, _mm256_set1_epi64x(int64_t{4} * kPhiloxMultiplier0))};
}
NEFTUNE_INLINE BlockIndex broadcast_block(uint32_t index) {
  return {_mm256_set1_epi64x(int64_t(uint64_t{index} * kPhiloxMultiplier0))};
}

// [words 0 1 2 3] of blocks 0, 1 (half 0) or 2, 3 (half 1).
template <int half, class Pairs>
NEFTUNE_INLINE __m256i words_of(Pairs pairs) {
  return half == 0 ? _mm256_unpacklo_epi64(pairs.words01.lanes, pairs.words23.lanes)
                   : _mm256_unpackhi_epi64(pairs.words01.lanes, pairs.words23.lanes);
}

template <class Pairs>
NEFTUNE_INLINE void store_words(Pairs pairs, uint32_t* words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), words_of<0>(pairs));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 8), words_of<1>(pairs));
}

template <class Element, bool scaled>
NEFTUNE_INLINE void add_noise8(__m256i lattice, float step, float scale,
                               const typename Element::Storage* source,
                               typename Element::Storage* out) {
  const __m256 noise = _mm256_mul_ps(_mm256_cvtepi32_ps(lattice), _mm256_set1_ps(step));
  __m256 e = Element::load(source);
  if constexpr (scaled) e = Element::round(_mm256_mul_ps(e, _mm256_set1_ps(scale)));
  Element::store(out, _mm256_add_ps(e, noise));
}

// Words of two blocks with pair 01 in the low and pair 23 in the high 128 bits; interleaving halves
// with 0x8000 widens them to x.
template <class Element, bool scaled, class Pairs>
NEFTUNE_INLINE void add_noise32(Pairs pairs, float step, float scale,
                                const typename Element::Storage* source,
                                typename Element::Storage* out) {
  const __m256i half_step = _mm256_set1_epi16(int16_t(0x8000));
  const __m256i blocks02 =
      _mm256_permute2x128_si256(pairs.words01.lanes, pairs.words23.lanes, 0x20);
  const __m256i blocks13 =
      _mm256_permute2x128_si256(pairs.words01.lanes, pairs.words23.lanes, 0x31);
  add_noise8<Element, scaled>(_mm256_unpacklo_epi16(half_step, blocks02), step, scale, source, out);
  add_noise8<Element, scaled>(_mm256_unpacklo_epi16(half_step, blocks13), step, scale, source + 8,
                              out + 8);
  add_noise8<Element, scaled>(_mm256_unpackhi_epi16(half_step, blocks02), step, scale, source + 16,
                              out + 16);
  add_noise8<Element, scaled>(_mm256_unpackhi_epi16(half_step, blocks13), step, scale, source + 24,
                              out + 24);
}

template <class Element>
NEFTUNE_INLINE void multiply32_by(float scale, const typename Element::Storage* source,
                                  typename Element::Storage* out) {
  for (int i = 0; i < kGroupColumns; i += 8)
    Element::store(out + i, _mm256_mul_ps(Element::load(source + i), _mm256_set1_ps(scale)));
}

struct Float32 {
  using Storage = float;
  static NEFTUNE_MEMBER __m256 load(const float* source) { return _mm256_loadu_ps(source); }
  static NEFTUNE_MEMBER void store(float* out, __m256 value) { _mm256_storeu_ps(out, value); }
  static NEFTUNE_MEMBER __m256 round(__m256 value) { return value; }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const float* source,
                                       float* out) {
    add_noise32<Float32, scaled>(pairs, step, scale, source, out);
  }
  static NEFTUNE_MEMBER void multiply_by(float scale, const float* source, float* out) {
    multiply32_by<Float32>(scale, source, out);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static NEFTUNE_MEMBER __m128i narrow(__m256 value) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static NEFTUNE_MEMBER __m256 load(const uint16_t* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }
  static NEFTUNE_MEMBER void store(uint16_t* out, __m256 value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow(value));
  }
  static NEFTUNE_MEMBER __m256 round(__m256 value) { return _mm256_cvtph_ps(narrow(value)); }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const uint16_t* source,
                                       uint16_t* out) {
    add_noise32<Float16, scaled>(pairs, step, scale, source, out);
  }
  static NEFTUNE_MEMBER void multiply_by(float scale, const uint16_t* source, uint16_t* out) {
    multiply32_by<Float16>(scale, source, out);
  }
};

// 16 columns as 8 lanes of two: the even column in a lane's low half, the odd one in its high half,
// as in the words of random bits.
struct BFloat16 {
  using Storage = uint16_t;
  static constexpr int kOdd = 0xAA;

  static NEFTUNE_MEMBER __m256 even(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  }
  static NEFTUNE_MEMBER __m256 odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_setzero_si256(), pairs, kOdd));
  }

  // Upper halves rounded up where the lower ones exceed one half, or equal it with the last kept
  // bit set (nearest-even).
  static NEFTUNE_MEMBER __m256i narrow(__m256 even, __m256 odd) {
    const __m256i even_bits = _mm256_castps_si256(even), odd_bits = _mm256_castps_si256(odd);
    const __m256i kept = _mm256_blend_epi16(_mm256_srli_epi32(even_bits, 16), odd_bits, kOdd);
    const __m256i dropped = _mm256_blend_epi16(even_bits, _mm256_slli_epi32(odd_bits, 16), kOdd);
    const __m256i sticky = _mm256_or_si256(dropped, _mm256_and_si256(kept, _mm256_set1_epi16(1)));
    const __m256i up = _mm256_cmpgt_epi16(
        _mm256_xor_si256(sticky, _mm256_set1_epi16(int16_t(0x8000))), _mm256_setzero_si256());
    return _mm256_sub_epi16(kept, up);
  }

  static NEFTUNE_MEMBER __m256i scale_pairs(__m256i pairs, float scale) {
    return narrow(_mm256_mul_ps(even(pairs), _mm256_set1_ps(scale)),
                  _mm256_mul_ps(odd(pairs), _mm256_set1_ps(scale)));
  }

  static NEFTUNE_MEMBER __m256i load(const uint16_t* source) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  }
  static NEFTUNE_MEMBER void store(uint16_t* out, __m256i pairs) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), pairs);
  }

  template <bool scaled>
  static NEFTUNE_MEMBER void add_noise16(__m256i words, float step, float scale,
                                         const uint16_t* source, uint16_t* out) {
    const __m256i half_step = _mm256_set1_epi32(0x8000);
    const __m256i lattice_even = _mm256_or_si256(_mm256_slli_epi32(words, 16), half_step);
    const __m256i lattice_odd = _mm256_blend_epi16(half_step, words, kOdd);
    const __m256 noise_even = _mm256_mul_ps(_mm256_cvtepi32_ps(lattice_even), _mm256_set1_ps(step));
    const __m256 noise_odd = _mm256_mul_ps(_mm256_cvtepi32_ps(lattice_odd), _mm256_set1_ps(step));
    __m256i e = load(source);
    if constexpr (scaled) e = scale_pairs(e, scale);
    store(out, narrow(_mm256_add_ps(even(e), noise_even), _mm256_add_ps(odd(e), noise_odd)));
  }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const uint16_t* source,
                                       uint16_t* out) {
    add_noise16<scaled>(words_of<0>(pairs), step, scale, source, out);
    add_noise16<scaled>(words_of<1>(pairs), step, scale, source + 16, out + 16);
  }

  static NEFTUNE_MEMBER void multiply_by(float scale, const uint16_t* source, uint16_t* out) {
    for (int i = 0; i < kGroupColumns; i += 16)
      store(out + i, scale_pairs(load(source + i), scale));
  }
};

#elif defined(NEFTUNE_NEON)

constexpr int kGroupColumns = 32;
constexpr bool kTwinGroups = true;

// Words of four blocks. NEON multiplies two words at a time and unzips four products' halves at
// once.
struct Word {
  uint32x4_t lanes;
};
struct Product {
  uint32x4_t blocks01;  // [low, high, low, high]
  uint32x4_t blocks23;
};
struct WordPair {
  uint32x4_t first;
  uint32x4_t second;
};

NEFTUNE_INLINE Product multiply(uint32_t multiplier, Word word) {
  return {vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(word.lanes), multiplier)),
          vreinterpretq_u32_u64(vmull_high_n_u32(word.lanes, multiplier))};
}
NEFTUNE_INLINE Word high(Product product) {
  return {vuzp2q_u32(product.blocks01, product.blocks23)};
}
NEFTUNE_INLINE Word low(Product product) {
  return {vuzp1q_u32(product.blocks01, product.blocks23)};
}
NEFTUNE_INLINE Word xor3(Word a, uint32_t b, uint32_t key) {
  return {veorq_u32(a.lanes, vdupq_n_u32(b ^ key))};
}
NEFTUNE_INLINE Word xor3(uint32_t a, Word b, uint32_t key) { return xor3(b, a, key); }
NEFTUNE_INLINE Word xor3(Word a, Word b, uint32_t key) {
  return {veorq_u32(a.lanes, veorq_u32(b.lanes, vdupq_n_u32(key)))};
}
NEFTUNE_INLINE WordPair swapped_xor(Product product, Word word, uint32_t key) {
  return {xor3(high(product), word, key).lanes, low(product).lanes};
}

using BlockIndex = Word;

NEFTUNE_INLINE BlockIndex first_blocks() {
  const uint32_t indices[4] = {0, 1, 2, 3};
  return {vld1q_u32(indices)};
}
NEFTUNE_INLINE BlockIndex next_blocks(BlockIndex block) {
  return {vaddq_u32(block.lanes, vdupq_n_u32(4))};
}
NEFTUNE_INLINE BlockIndex broadcast_block(uint32_t index) { return {vdupq_n_u32(index)}; }

template <class Pairs>
NEFTUNE_INLINE void store_words(Pairs pairs, uint32_t* words) {
  const uint32x4x4_t blocks = {
      {pairs.words01.first, pairs.words01.second, pairs.words23.first, pairs.words23.second}};
  vst4q_u32(words, blocks);
}

template <class Element, bool scaled>
NEFTUNE_INLINE void add_noise4(uint16x8_t lattice, float step, float scale,
                               const typename Element::Storage* source,
                               typename Element::Storage* out) {
  const float32x4_t noise = vmulq_n_f32(vcvtq_f32_s32(vreinterpretq_s32_u16(lattice)), step);
  float32x4_t e = Element::load(source);
  if constexpr (scaled) e = Element::round(vmulq_n_f32(e, scale));
  Element::store(out, vaddq_f32(e, noise));
}

// words: one pair of two blocks, the first four (pair 01) or last four (pair 23) columns of each.
template <class Element, bool scaled>
NEFTUNE_INLINE void add_noise_pair(uint32x4_t words, float step, float scale,
                                   const typename Element::Storage* source,
                                   typename Element::Storage* out) {
  const uint16x8_t half_step = vdupq_n_u16(0x8000);
  add_noise4<Element, scaled>(vzip1q_u16(half_step, vreinterpretq_u16_u32(words)), step, scale,
                              source, out);
  add_noise4<Element, scaled>(vzip2q_u16(half_step, vreinterpretq_u16_u32(words)), step, scale,
                              source + 8, out + 8);
}

template <class Element, bool scaled, class Pairs>
NEFTUNE_INLINE void add_noise32(Pairs pairs, float step, float scale,
                                const typename Element::Storage* source,
                                typename Element::Storage* out) {
  add_noise_pair<Element, scaled>(vzip1q_u32(pairs.words01.first, pairs.words01.second), step,
                                  scale, source, out);
  add_noise_pair<Element, scaled>(vzip1q_u32(pairs.words23.first, pairs.words23.second), step,
                                  scale, source + 4, out + 4);
  add_noise_pair<Element, scaled>(vzip2q_u32(pairs.words01.first, pairs.words01.second), step,
                                  scale, source + 16, out + 16);
  add_noise_pair<Element, scaled>(vzip2q_u32(pairs.words23.first, pairs.words23.second), step,
                                  scale, source + 20, out + 20);
}

template <class Element>
NEFTUNE_INLINE void multiply32_by(float scale, const typename Element::Storage* source,
                                  typename Element::Storage* out) {
  for (int i = 0; i < kGroupColumns; i += 4)
    Element::store(out + i, vmulq_n_f32(Element::load(source + i), scale));
}

struct Float32 {
  using Storage = float;
  static NEFTUNE_MEMBER float32x4_t load(const float* source) { return vld1q_f32(source); }
  static NEFTUNE_MEMBER void store(float* out, float32x4_t value) { vst1q_f32(out, value); }
  static NEFTUNE_MEMBER float32x4_t round(float32x4_t value) { return value; }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const float* source,
                                       float* out) {
    add_noise32<Float32, scaled>(pairs, step, scale, source, out);
  }
  static NEFTUNE_MEMBER void multiply_by(float scale, const float* source, float* out) {
    multiply32_by<Float32>(scale, source, out);
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static NEFTUNE_MEMBER uint16x4_t narrow(float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t last_kept = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddhn_u32(
        bits, vaddq_u32(last_kept, vdupq_n_u32(0x7FFF)));  // nearest-even: the sum's upper halves
  }
  static NEFTUNE_MEMBER float32x4_t widen(uint16x4_t bits) {
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }
  static NEFTUNE_MEMBER float32x4_t load(const uint16_t* source) { return widen(vld1_u16(source)); }
  static NEFTUNE_MEMBER void store(uint16_t* out, float32x4_t value) {
    vst1_u16(out, narrow(value));
  }
  static NEFTUNE_MEMBER float32x4_t round(float32x4_t value) { return widen(narrow(value)); }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const uint16_t* source,
                                       uint16_t* out) {
    add_noise32<BFloat16, scaled>(pairs, step, scale, source, out);
  }
  static NEFTUNE_MEMBER void multiply_by(float scale, const uint16_t* source, uint16_t* out) {
    multiply32_by<BFloat16>(scale, source, out);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static NEFTUNE_MEMBER float32x4_t load(const uint16_t* source) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source)));
  }
  static NEFTUNE_MEMBER void store(uint16_t* out, float32x4_t value) {
    vst1_u16(out, vreinterpret_u16_f16(vcvt_f16_f32(value)));
  }
  static NEFTUNE_MEMBER float32x4_t round(float32x4_t value) {
    return vcvt_f32_f16(vcvt_f16_f32(value));
  }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const uint16_t* source,
                                       uint16_t* out) {
    add_noise32<Float16, scaled>(pairs, step, scale, source, out);
  }
  static NEFTUNE_MEMBER void multiply_by(float scale, const uint16_t* source, uint16_t* out) {
    multiply32_by<Float16>(scale, source, out);
  }
};

#else  // scalar

constexpr int kGroupColumns = kColumnsPerBlock;
constexpr bool kTwinGroups = false;

using Word = uint32_t;
using BlockIndex = Word;

// philox.h's own words: named here so that what is overloaded beside them does not hide them.
using neftune_kernels::high;
using neftune_kernels::low;
using neftune_kernels::multiply;
using neftune_kernels::swapped_xor;
using neftune_kernels::xor3;

NEFTUNE_INLINE BlockIndex first_blocks() { return 0; }
NEFTUNE_INLINE BlockIndex next_blocks(BlockIndex block) { return block + 1; }
NEFTUNE_INLINE BlockIndex broadcast_block(uint32_t index) { return index; }

template <class Pairs>
NEFTUNE_INLINE void store_words(Pairs pairs, uint32_t* words) {
  words[0] = low(pairs.words01);
  words[1] = high(pairs.words01);
  words[2] = low(pairs.words23);
  words[3] = high(pairs.words23);
}

template <class Scalar>
struct OneBlock : Scalar {
  using Storage = typename Scalar::Storage;

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const Storage* source,
                                       Storage* out) {
    uint32_t words[4];
    store_words(pairs, words);
    for (int k = 0; k < 4; ++k) {
      out[2 * k] = sum<scaled>(lattice_even(words[k]) * step, scale, source[2 * k]);
      out[2 * k + 1] = sum<scaled>(lattice_odd(words[k]) * step, scale, source[2 * k + 1]);
    }
  }
  template <bool scaled>
  static NEFTUNE_MEMBER Storage sum(float noise, float scale, Storage source) {
    float e = Scalar::widen(source);
    if constexpr (scaled) e = Scalar::widen(Scalar::narrow(e * scale));
    return Scalar::narrow(e + noise);
  }
  static NEFTUNE_MEMBER void multiply_by(float scale, const Storage* source, Storage* out) {
    for (int i = 0; i < kGroupColumns; ++i)
      out[i] = Scalar::narrow(Scalar::widen(source[i]) * scale);
  }
};

using Float32 = OneBlock<Float32Scalar>;
using BFloat16 = OneBlock<BFloat16Scalar>;
using Float16 = OneBlock<Float16Scalar>;

#endif

}  // namespace
}  // namespace neftune_kernels
