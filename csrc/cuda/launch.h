// What the operators know of the CUDA kernels: their arguments and two launch functions. No torch
// here and no CUDA header.
#pragma once

#include <cstdint>

#include "../noise.h"

namespace neftune_kernels {

enum ElementType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Consecutive int32 or int64 values.
struct Integers {
  const void* data;  // nullptr: not given
  bool wide;
};

// out[token] = cast(e + noise), token = row·columns + column. The layout's four are those of
// layout.Layout; out is contiguous.
struct RowArguments {
  void* out;
  const void* source;
  const void* input_ids;  // int32 or int64; nullptr: source holds the embeddings themselves
  bool wide_ids;
  bool scaled;
  bool vectors;  // rows may be read and written 16 bytes at a time
  int64_t index_row,
      index_column;  // strides of input_ids; without them of source's rows, in elements
  int64_t source_row, source_column;
  int64_t rows, columns, embedding_dim, num_embeddings;
  int64_t samples;  // that lengths or cu_seqlens hold
  const int64_t* seed;
  Integers document, position, lengths, cu_seqlens;
  double noise_alpha;
  float step;  // noise_step of `columns` real tokens, read where no layout is given
  float scale;
  uint32_t replica, sample_offset, position_offset;
};

// A mask's or position ids' values as 64-bit patterns: signed ones extended by sign, all others by
// zeros.
struct Values {
  const void* data;  // nullptr: not given
  int64_t row, column;
  int8_t bytes;
  bool is_signed;
  int64_t absolute,
      infinity;  // of floating ones: all bits but the sign, and infinity's; of integers 0
};

// document, position and lengths are int64, one per token. Not set: position of padding, and
// lengths beyond the documents.
struct DocumentArguments {
  int64_t *document, *position, *lengths;
  Values mask, position_ids;
  bool has_padding_value;  // the mask's values are ids, padding where they equal padding_value
  bool numbered;           // values that differ number documents
  int64_t padding_value;
  int64_t rows, columns, rows_each;
};

// On the current device; a message where the launch failed, else nullptr. No synchronisation.
const char* launch_noisy_rows(const RowArguments& arguments, ElementType type, void* stream);
const char* launch_number_documents(DocumentArguments arguments, void* stream);

}  // namespace neftune_kernels
