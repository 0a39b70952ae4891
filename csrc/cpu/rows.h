// One row of noise for any instruction set: include after choosing it (NEFTUNE_AVX512,
// NEFTUNE_AVX2, NEFTUNE_NEON or nothing for scalar).
//
// All in an anonymous namespace and free of std:: templates, so that nothing compiled for one CPU
// can be linked into another's path.
#pragma once

#include <cstdint>

#include "../noise.h"
#include "kernels.h"
#include "simd.h"
#include "sums.h"

namespace neftune_kernels {
namespace {

// Two groups' words side by side: interleaving two chains of rounds hides the latency that one
// leaves open.
template <class Word>
struct Twin {
  Word a;
  Word b;
};

template <class Word>
NEFTUNE_INLINE auto twin(Word a, Word b) {
  return Twin<Word>{a, b};
}
template <class Word>
NEFTUNE_INLINE auto multiply(uint32_t multiplier, Twin<Word> word) {
  return twin(multiply(multiplier, word.a), multiply(multiplier, word.b));
}
template <class Product>
NEFTUNE_INLINE auto high(Twin<Product> product) {
  return twin(high(product.a), high(product.b));
}
template <class Product>
NEFTUNE_INLINE auto low(Twin<Product> product) {
  return twin(low(product.a), low(product.b));
}
template <class Word>
NEFTUNE_INLINE auto xor3(Twin<Word> x, Twin<Word> y, uint32_t key) {
  return twin(xor3(x.a, y.a, key), xor3(x.b, y.b, key));
}
template <class Word>
NEFTUNE_INLINE auto xor3(Twin<Word> x, uint32_t y, uint32_t key) {
  return twin(xor3(x.a, y, key), xor3(x.b, y, key));
}
template <class Word>
NEFTUNE_INLINE auto xor3(uint32_t x, Twin<Word> y, uint32_t key) {
  return xor3(y, x, key);
}
template <class Product, class Word>
NEFTUNE_INLINE auto swapped_xor(Twin<Product> product, Twin<Word> word, uint32_t key) {
  return twin(swapped_xor(product.a, word.a, key), swapped_xor(product.b, word.b, key));
}

NEFTUNE_INLINE BlockProducts<Twin<Word>> twin(BlockProducts<Word> a, BlockProducts<Word> b) {
  return {{a.low0, b.low0}, {a.high1, b.high1}, {a.low1, b.low1}};
}
template <class Pair01, class Pair23>
NEFTUNE_INLINE auto first_of(PhiloxPairs<Twin<Pair01>, Twin<Pair23>> pairs) {
  return PhiloxPairs<Pair01, Pair23>{pairs.words01.a, pairs.words23.a};
}
template <class Pair01, class Pair23>
NEFTUNE_INLINE auto second_of(PhiloxPairs<Twin<Pair01>, Twin<Pair23>> pairs) {
  return PhiloxPairs<Pair01, Pair23>{pairs.words01.b, pairs.words23.b};
}

// The last columns of a row go through the same vectors, in a buffer of one group.
template <class Element>
struct Tail {
  alignas(64) typename Element::Storage values[kGroupColumns];

  NEFTUNE_MEMBER Tail(const typename Element::Storage* source, int64_t count) {
    __builtin_memset(values, 0, sizeof(values));
    __builtin_memcpy(values, source, count * sizeof(values[0]));
  }
  NEFTUNE_MEMBER void store(typename Element::Storage* out, int64_t count) const {
    __builtin_memcpy(out, values, count * sizeof(values[0]));
  }
};

// Into the second-level cache: in the first, a whole row ahead would push out the rows at work.
template <class Element, int columns>
NEFTUNE_INLINE void prefetch(const typename Element::Storage* next) {
  constexpr int kPerLine = 64 / sizeof(typename Element::Storage);
  for (int column = 0; column < columns; column += kPerLine)
    __builtin_prefetch(next + column, 0, 2);
}

// One to a group.
using GroupProducts = BlockProducts<Word>;
static_assert(alignof(GroupProducts) <= kProductsAlignment);

int64_t products_bytes(int64_t columns) {
  return (columns + kGroupColumns - 1) / kGroupColumns * int64_t{sizeof(GroupProducts)};
}

void fill_products(const RowSettings& settings, void* memory) {
  GroupProducts* products = static_cast<GroupProducts*>(memory);
  BlockIndex block = first_blocks();
  for (int64_t column = 0; column < settings.columns; column += kGroupColumns) {
    *products++ = block_products<Word>(block, settings.replica, settings.key);
    block = next_blocks(block);
  }
}

template <class Element, bool scaled>
void noisy_row(const RowSettings& settings, const Row& row) {
  using Storage = typename Element::Storage;
  const Storage* source = static_cast<const Storage*>(row.source);
  const Storage* next = static_cast<const Storage*>(row.next);
  Storage* out = static_cast<Storage*>(row.out);
  const int64_t columns = settings.columns;
  const PhiloxKey key = settings.key;
  const uint32_t position = row.position, sample = row.sample;
  const float step = row.step, scale = settings.scale;
  const GroupProducts* products = static_cast<const GroupProducts*>(settings.products);
  int64_t column = 0;
  if constexpr (kTwinGroups) {
    for (; column + 2 * kGroupColumns <= columns; column += 2 * kGroupColumns) {
      prefetch<Element, 2 * kGroupColumns>(next + column);
      const auto pairs = noise_words(twin(products[0], products[1]), position, sample, key);
      const int64_t column_b = column + kGroupColumns;
      Element::template add_noise<scaled>(first_of(pairs), step, scale, source + column,
                                          out + column);
      Element::template add_noise<scaled>(second_of(pairs), step, scale, source + column_b,
                                          out + column_b);
      products += 2;
    }
  }
  for (; column + kGroupColumns <= columns; column += kGroupColumns) {
    prefetch<Element, kGroupColumns>(next + column);
    Element::template add_noise<scaled>(noise_words(*products++, position, sample, key), step,
                                        scale, source + column, out + column);
  }
  if (column < columns) {
    Tail<Element> tail(source + column, columns - column);
    Element::template add_noise<scaled>(noise_words(*products, position, sample, key), step, scale,
                                        tail.values, tail.values);
    tail.store(out + column, columns - column);
  }
}

template <class Element>
void scaled_row(const RowSettings& settings, const Row& row) {
  using Storage = typename Element::Storage;
  const Storage* source = static_cast<const Storage*>(row.source);
  Storage* out = static_cast<Storage*>(row.out);
  const int64_t columns = settings.columns;
  int64_t column = 0;
  for (; column + kGroupColumns <= columns; column += kGroupColumns)
    Element::multiply_by(settings.scale, source + column, out + column);
  if (column < columns) {
    Tail<Element> tail(source + column, columns - column);
    Element::multiply_by(settings.scale, tail.values, tail.values);
    tail.store(out + column, columns - column);
  }
}

template <int rounds>
bool philox_lanes(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t words[kGroupColumns / 2];
  const PhiloxCounter<BlockIndex, uint32_t, uint32_t, uint32_t> in{
      broadcast_block(counter[0]), counter[1], counter[2], counter[3]};
  store_words(philox4x32<rounds>(in, PhiloxKey{key[0], key[1]}), words);
  for (int i = 0; i < kGroupColumns / 2; ++i) {
    if (words[i] != words[i % 4]) return false;
  }
  for (int i = 0; i < 4; ++i) out[i] = words[i];
  return true;
}

bool philox_known_answer(const uint32_t counter[4], const uint32_t key[2], int rounds,
                         uint32_t out[4]) {
  if (rounds == 7) return philox_lanes<7>(counter, key, out);
  if (rounds == 10) return philox_lanes<10>(counter, key, out);
  return false;
}

}  // namespace
}  // namespace neftune_kernels

// bfloat16_row<BFloat16, scaled> is noisy_row, or what an instruction set puts in its place.
#define NEFTUNE_DEFINE_KERNELS(level, bfloat16_row)                                          \
  namespace neftune_kernels {                                                                \
  const Kernels kernels_##level = {                                                          \
      #level,                                                                                \
      products_bytes,                                                                        \
      fill_products,                                                                         \
      {noisy_row<Float32, false>, bfloat16_row<BFloat16, false>, noisy_row<Float16, false>}, \
      {noisy_row<Float32, true>, bfloat16_row<BFloat16, true>, noisy_row<Float16, true>},    \
      {scaled_row<Float32>, scaled_row<BFloat16>, scaled_row<Float16>},                      \
      {sum_rows<Float32Sum>, sum_rows<BFloat16Sum>, sum_rows<Float16Sum>},                   \
      philox_known_answer,                                                                   \
  };                                                                                         \
  }
