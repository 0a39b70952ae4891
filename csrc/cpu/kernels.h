// What the operators know of an instruction set: one table of functions over rows. No torch here,
// and no code: these types cross between files compiled with different flags.
#pragma once

#include <cstdint>

#include "../element_type.h"
#include "../philox.h"

namespace neftune_kernels {

constexpr int kProductsAlignment = 64;  // bytes

// Equal for every row of one call.
struct RowSettings {
  int64_t columns;       // embedding_dim
  PhiloxKey key;         // of the seed
  uint32_t replica;      // the counter's last word
  float scale;           // embed_scale; read by the scaled functions only
  const void* products;  // (products_bytes,) by fill_products; read by the noisy functions only
};

struct Row {
  const void* source;  // (columns,) consecutive elements
  const void* next;    // (columns,) to prefetch meanwhile; any readable or unreadable address
  void* out;           // (columns,) consecutive elements; may equal source
  float step;          // noise_step of the row's sample; not 0 for the noisy functions
  uint32_t position;   // the counter's second word
  uint32_t sample;     // the counter's third word
};

using RowFunction = void (*)(const RowSettings&, const Row&);

// A row of the weight's gradient, or some of its columns.
struct SumJob {
  const void* source;      // element 0 of the gradient's first row, at the first of the columns
  const int64_t* offsets;  // (count,) elements from there to each row that is added, in order
  int64_t count;           // at least 1
  int64_t columns;         // at most kSumColumns, consecutive
  double scale;            // the sum is multiplied by it
  double divisor;          // and divided by this one
  void* out;               // (columns,)
};

constexpr int64_t kSumColumns = 512;

using SumFunction = void (*)(const SumJob&);

struct Kernels {
  const char* name;
  // The products of Philox's first rounds that all rows share: how many bytes they take, and
  // filling these; see block_products.
  int64_t (*products_bytes)(int64_t columns);
  void (*fill_products)(const RowSettings&, void* products);
  RowFunction noisy[kElementTypes];         // out = cast(e + noise), e = source
  RowFunction noisy_scaled[kElementTypes];  // the same, e = cast(source · scale)
  RowFunction scaled[kElementTypes];        // out = cast(source · scale): padding
  SumFunction sums[kElementTypes];          // of gradient rows, float64, rounded once
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
