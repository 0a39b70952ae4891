// What the operators know of the CUDA kernels: their arguments and launch functions. No torch
// here and no CUDA header.
#pragma once

#include <cstdint>

#include "../element_type.h"
#include "../noise.h"
#include "../numbering.h"

namespace neftune_kernels {

// Consecutive values.
struct Integers {
  const void* data;  // int32 or int64; nullptr: not given
  bool wide;         // int64
};

// out[token] = cast(e + noise), token = row·columns + column. The layout's five are those of
// layout.Layout; out is contiguous.
struct RowArguments {
  void* out;               // (rows, columns, embedding_dim) of the ElementType
  const void* source;      // the same or, with input_ids, (num_embeddings, embedding_dim)
  const void* input_ids;   // (rows, columns) int32 or int64; nullptr: source holds the embeddings
  bool wide_ids;           // input_ids are int64
  bool scaled;             // scale is not 1
  bool vectors;            // rows may be read and written 16 bytes at a time
  int64_t index_row;       // stride of input_ids' rows, without them of source's; in elements
  int64_t index_column;    // and of their columns
  int64_t source_row;      // stride of source's rows where input_ids choose one
  int64_t source_column;   // stride of a row's elements
  int64_t rows;            // of tokens
  int64_t columns;         // tokens of a row
  int64_t embedding_dim;   // elements of a token
  int64_t num_embeddings;  // 0 without input_ids
  int64_t num_samples;     // documents or rows that lengths or cu_seqlens hold
  const int64_t* seed;     // () on the device
  Integers document;       // (rows · columns,)
  Integers position;       // (rows · columns,)
  Integers lengths;        // (num_samples,)
  Integers cu_seqlens;     // (num_samples + 1,)
  Numbering numbering;     // words nullptr: not given
  const double* device_alpha;  // () on the device; nullptr: noise_alpha and step say it
  double noise_alpha;
  float step;   // noise_step of `columns` real tokens, read where no layout is given
  float scale;  // embed_scale
  uint32_t replica;
  uint32_t sample_offset;
  uint32_t position_offset;
};

// A mask's or position ids' values as 64-bit patterns: signed ones extended by sign, all others by
// zeros.
struct Values {
  const void* data;  // (rows, columns) of `bytes` each
  int64_t row;       // stride, in elements; a row's values lie side by side
  int32_t bytes;     // 1, 2, 4 or 8
  bool is_signed;    // signed integers
  int64_t absolute;  // of floating ones all bits but the sign, else all bits
  int64_t infinity;  // of floating ones infinity's bits, else the largest number
};

// Consecutive tokens of a row.
struct alignas(16) Span {
  int32_t first;   // column of the first real one; kFar: there is none
  int32_t last;    // of the last; -1: there is none
  int32_t count;   // real ones
  int32_t opened;  // documents that open in it, but for its first real token
};

struct DocumentArguments {
  RowWords* words;       // (rows,) out, aligned to 16 bytes; these are numbering.h's tables
  Entry* table;          // (rows · columns,) out, aligned to 8 bytes
  int32_t* record;       // (rows · columns,) out
  Span* summary;         // (rows · pieces,) scratch of rows in pieces; from bit 16 of `count` on
                         // breaks, as of a Run
  Values mask;           // (rows, columns) bool, integer or floating
  Values position_ids;   // (rows, columns) integer
  int64_t padding_value; // of the mask, padding where it equals that
  uint32_t numbered;     // all bits or none: mask values that differ number documents
  uint32_t all_real;     // likewise: the mask is not given, and is the position ids
  uint32_t placed;       // likewise: the position ids are given, else they are the mask
  int64_t rows;
  int64_t columns;       // < 2³¹
  int64_t pieces;        // of a row: pieces_of(columns)
};

// Not set: position of padding, and lengths beyond the documents.
struct TokenArguments {
  int64_t* document;  // (rows · columns,) out
  int64_t* position;  // (rows · columns,) out
  int64_t* lengths;   // (rows · columns,) out
  Numbering numbering;
  int64_t rows;
  int64_t columns;
};

// Sums of rows by id, of tokens that are sorted by id; the order of reference.chunked_gradient. A
// run is the tokens of one id. A run that crosses chunks leaves a part in each: at its head where
// it comes in, at its tail where it begins there.
struct GradientArguments {
  void* out;               // (num_embeddings, embedding_dim) of the ElementType
  float* scratch;          // (2 · chunks, embedding_dim) heads and tails
  const void* grad;        // (tokens, embedding_dim) of the ElementType, columns side by side
  Integers ids;            // (tokens,) sorted; out of range: -1 or num_embeddings
  const int64_t* order;    // (tokens,) the rows of grad
  bool vectors;            // ids are int32; rows and parts may be accessed 16 bytes at a time
  bool by_freq;            // sums are divided by their number of tokens
  float scale;             // embed_scale
  int64_t grad_row;        // stride, in bytes
  int64_t tokens;          // > 0
  int64_t chunk;           // tokens of a chunk, a multiple of 4 below 2³⁰
  int64_t embedding_dim;   // > 0
  int64_t num_embeddings;
  int64_t padding_idx;     // in range, or -1 for none
  // Set by the launch:
  uint32_t strip_bits;     // a block has 2^strip_bits strips of a chunk
  uint32_t units;          // of tokens whose parts are there: chunks, or groups of them
  uint32_t group;          // units that are added up here
  int64_t unit;            // chunks of one
};

#ifndef NEFTUNE_ROW_TOKENS  // tests on the CPU have smaller ones
#define NEFTUNE_ROW_TOKENS 4096    // of a block that has a whole row
#define NEFTUNE_PIECE_TOKENS 2048  // of a block that has a piece of a longer row
#endif

inline int64_t pieces_of(int64_t columns) {
  if (columns <= NEFTUNE_ROW_TOKENS) return 1;
  return (columns + NEFTUNE_PIECE_TOKENS - 1) / NEFTUNE_PIECE_TOKENS;
}

// On the current device; a message where the launch failed, else nullptr. No synchronisation.
const char* launch_noisy_rows(const RowArguments& arguments, ElementType type, void* stream);
const char* launch_number_documents(const DocumentArguments& arguments, void* stream);
const char* launch_number_tokens(const TokenArguments& arguments, void* stream);
// Up to three launches.
const char* launch_gradient(const GradientArguments& arguments, ElementType type, void* stream);

}  // namespace neftune_kernels
