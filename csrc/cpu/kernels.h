// What the operators know of an instruction set: one table of functions over rows. No torch here,
// and no code: these types cross between files compiled with different flags.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace neftune_kernels {

enum ElementType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kElementTypes = 3 };

constexpr int kProductsAlignment = 64;  // bytes

// Equal for every row of one call.
struct RowSettings {
  int64_t columns;
  PhiloxKey key;
  uint32_t replica;
  float scale;  // embed_scale; read by the scaled functions only
  const void*
      products;  // what Kernels::fill_products made of the rest; read by the noisy functions only
};

struct Row {
  const void* source;  // `columns` consecutive elements
  const void* next;    // row to prefetch meanwhile; any readable or unreadable address
  void* out;           // may equal source
  float step;          // not 0
  uint32_t position;
  uint32_t sample;
};

using RowFunction = void (*)(const RowSettings&, const Row&);

struct Kernels {
  const char* name;
  // The products of Philox's first rounds that all rows share: how many bytes they take, and
  // filling these; see block_products.
  int64_t (*products_bytes)(int64_t columns);
  void (*fill_products)(const RowSettings&, void* products);
  RowFunction noisy[kElementTypes];         // out = cast(e + noise), e = source
  RowFunction noisy_scaled[kElementTypes];  // the same, e = cast(source · scale)
  RowFunction scaled[kElementTypes];        // out = cast(source · scale): padding
  // Philox with the counter in every lane and 7 or 10 rounds; false if lanes disagree or rounds is
  // another number.
  bool (*philox)(const uint32_t counter[4], const uint32_t key[2], int rounds, uint32_t out[4]);
};

// Defined where the build has the instruction set.
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
extern const Kernels kernels_neon;
extern const Kernels kernels_scalar;

}  // namespace neftune_kernels
