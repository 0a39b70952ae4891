// Compiled with rows_avx512.cpp's flags and -mavx512bf16; dispatch.cpp asks the CPU for the same.
// Differs in the rounding of bfloat16 sums.
#include "../compiler.h"

#if defined(NEFTUNE_X86_64) && defined(__AVX512BF16__)  // MSVC has no flag for it
#define NEFTUNE_AVX512
#include "rows.h"

namespace neftune_kernels {
namespace {

// vcvtne2ps2bf16 rounds to nearest even whatever the mode and keeps NaN and infinity, but flushes
// subnormal operands and results to zero. From this |step| on no sum W(e) + noise is subnormal:
// |noise| ≥ 2⁻⁸⁵, as x is an odd multiple of 2¹⁵, so noise is a multiple of 2⁻¹⁰⁸.
//     |W(e)| < 2⁻¹⁰¹:  the sum exceeds 2⁻⁸⁶. W(e) itself may be subnormal: it is an operand of the
//     addition, not of the conversion. |W(e)| ≥ 2⁻¹⁰¹:  W(e) is a multiple of 2⁻¹⁰⁸, too, having 8
//     bits; so the sum is one: at least 2⁻¹⁰⁸, or zero (positive, both ways).
constexpr float kSmallestNormalStep = 0x1p-100f;

struct BFloat16NormalSums {
  using Storage = uint16_t;

  // Columns 16·half to 16·half + 15 of 32.
  template <int half>
  static NEFTUNE_MEMBER __m512 floats(__m512i e) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order =
        _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16 * half)), 16);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, order, e));
  }

  template <bool scaled>
  static NEFTUNE_MEMBER void add_noise32(__m512i words, float step, float scale,
                                         const uint16_t* source, uint16_t* out) {
    __m512i e = _mm512_loadu_si512(source);
    if constexpr (scaled) e = BFloat16::scale_by(e, scale);  // a product may well be subnormal
    const __m512 first = _mm512_add_ps(floats<0>(e), low_noise(words, step));
    const __m512 second = _mm512_add_ps(floats<1>(e), high_noise(words, step));
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }

  template <bool scaled, class Pairs>
  static NEFTUNE_MEMBER void add_noise(Pairs pairs, float step, float scale, const uint16_t* source,
                                       uint16_t* out) {
    add_noise32<scaled>(unpackable_words_of<0>(pairs), step, scale, source, out);
    add_noise32<scaled>(unpackable_words_of<1>(pairs), step, scale, source + 32, out + 32);
  }
};

template <class, bool scaled>
void noisy_bfloat16_row(const RowSettings& settings, const Row& row) {
  if (row.step >= kSmallestNormalStep || row.step <= -kSmallestNormalStep) {
    noisy_row<BFloat16NormalSums, scaled>(settings, row);
  } else {
    noisy_row<BFloat16, scaled>(settings, row);
  }
}

}  // namespace
}  // namespace neftune_kernels

NEFTUNE_DEFINE_KERNELS(avx512bf16, noisy_bfloat16_row)
#endif
