// Lookup, scale and NEFTune noise in one launch, masks and position ids numbered in one more
// (documents.h); see noise.h for the formula.
//
//     out[token] = cast(e + x·step),  e = source[id] or cast(source[id]·scale)
//
// The blocks of 8 columns of a token are dealt out to a warp, to part of one or to several: one
// Philox block, one 16-byte access of 16-bit rows or two of float32 rows. Product and sum are
// rounded apart by __fmul_rn and __fadd_rn, not in pairs: ptxas contracts mul.rn.f32x2 and
// add.rn.f32x2 even under -fmad=false.
#include <cmath>

#include "documents.h"
#include "kernel.h"
#include "launch.h"

namespace neftune_kernels {
namespace {

constexpr int kThreads = 128;                // of a block
constexpr int kBlocksPerMultiprocessor = 8;  // 32 warps: at most 64 registers a thread
constexpr int64_t kFewTokens = 512;  // which leave most of a GPU idle

// ---- where a token is

struct TokenNoise {
  uint32_t sample, position;
  float step;  // 0: no noise
};

// What a kernel can be given of a layout: nothing; document, position and lengths; cu_seqlens; a
// numbering; any of these; any of these, and alpha on the device.
enum LayoutKind { kNoLayout, kPerToken, kBounds, kNumbered, kAnyLayout, kCapturable };

template <LayoutKind kind>
NEFTUNE_DEVICE float step_of(const RowArguments& a, int64_t length) {
  return noise_step(kind == kCapturable ? *a.device_alpha : a.noise_alpha, length,
                    std::sqrt(static_cast<double>(length) * static_cast<double>(a.embedding_dim)));
}

// The last document that starts at or before the token, by bisection; -1 or `num_samples` outside
// all of them.
NEFTUNE_DEVICE int64_t document_of(const RowArguments& a, int64_t token) {
  int32_t low = 0, high = static_cast<int32_t>(a.num_samples + 1);
  while (low < high) {
    const int32_t middle = low + ((high - low) >> 1);
    if (value_at(a.cu_seqlens, middle) <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

// layout.per_token of one token. Bad values reach nothing: documents that lengths or cu_seqlens do
// not hold are padding.
template <LayoutKind kind, class Index>
NEFTUNE_DEVICE TokenNoise place_of(const RowArguments& a, int64_t token, Index row, Index column) {
  int64_t sample = row, position = column, length = 0;
  if (kind == kNoLayout) {
    return {static_cast<uint32_t>(row) + a.sample_offset,
            static_cast<uint32_t>(column) + a.position_offset, a.step};
  } else if (kind == kBounds || (kind >= kAnyLayout && a.cu_seqlens.data)) {
    sample = document_of(a, token);
    if (sample >= 0 && sample < a.num_samples) {
      const uint64_t start =
          value_at(a.cu_seqlens,
                   sample);  // differences of bad bounds may overflow, as those of unsigned numbers
      position = static_cast<int64_t>(token - start);
      length = static_cast<int64_t>(value_at(a.cu_seqlens, sample + 1) - start);
    }
  } else if (kind == kNumbered || (kind >= kAnyLayout && a.numbering.words)) {
    const RowWords words = a.numbering.words[row];
    const uint32_t lane = (threadIdx.y * blockDim.x + threadIdx.x) % kLanes;
    const NumberedToken found = token_of(
        a.numbering, words, documents_before(a.numbering, words, row, lane), token, column);
    sample = found.document;
    position = found.position;
    length = found.length;
  } else {
    if (a.position.data) position = value_at(a.position, token);
    if (a.document.data) sample = value_at(a.document, token);
    if (!a.lengths.data) {
      length = a.columns;
    } else if (sample >= 0 && sample < a.num_samples) {
      length = value_at(a.lengths, sample);
      if (!a.document.data && static_cast<uint32_t>(position) + a.position_offset >= length)
        length = 0;
    }
  }
  return {static_cast<uint32_t>(sample) + a.sample_offset,
          static_cast<uint32_t>(position) + a.position_offset, step_of<kind>(a, length)};
}

// Where source holds the token's row, in elements; -1 for an id out of range.
template <class Index>
NEFTUNE_DEVICE int64_t offset_of(const RowArguments& a, Index row, Index column) {
  const int64_t index = row * a.index_row + column * a.index_column;
  if (!a.input_ids) return index;
  const int64_t id = a.wide_ids ? static_cast<const int64_t*>(a.input_ids)[index]
                                : static_cast<const int32_t*>(a.input_ids)[index];
  return id >= 0 && id < a.num_embeddings ? id * a.source_row : -1;
}

// ---- one row

struct RowNoise {
  uint32_t sample, position, replica;
  PhiloxKey key;
  float step;

  __device__ __forceinline__ void words(uint32_t block, uint32_t (&word)[4]) const {
    const auto pairs =
        noise_words(block_products<uint32_t>(block, replica, key), position, sample, key);
    word[0] = low(pairs.words01);
    word[1] = high(pairs.words01);
    word[2] = low(pairs.words23);
    word[3] = high(pairs.words23);
  }

  // Of columns 8·block .. 8·block + 7, for a finite step.
  __device__ __forceinline__ void operator()(uint32_t block,
                                             float (&noise)[kColumnsPerBlock]) const {
    uint32_t word[4];
    words(block, word);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      noise[2 * k] = noise_even(word[k], step);
      noise[2 * k + 1] = noise_odd(word[k], step);
    }
  }
};

template <class Element, bool kScaled>
NEFTUNE_DEVICE void noisy_block(const RowNoise& noise_of, uint32_t block, float scale,
                                uint4* values) {
  float noise[kColumnsPerBlock];
#pragma unroll
  for (int k = 0; k < Element::kVectors; ++k) {
    if (kScaled) values[k] = Element::scaled(values[k], scale);
  }
  noise_of(block, noise);
#pragma unroll
  for (int k = 0; k < Element::kVectors; ++k) values[k] = Element::noisy(values[k], noise + 4 * k);
}

template <class Element, int kAhead, bool kScaled>
NEFTUNE_DEVICE void noisy_blocks(const RowNoise& noise_of, const uint4*& source, uint4*& out,
                                 int block, int lanes, float scale) {
  constexpr int kVectors = Element::kVectors;
  uint4 values[kAhead][kVectors];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) values[i][k] = source[k];
    source += lanes * kVectors;
  }
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    noisy_block<Element, kScaled>(noise_of, block + i * lanes, scale, values[i]);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) out[k] = values[i][k];
    out += lanes * kVectors;
  }
}

template <class Element, bool kScaled>
NEFTUNE_DEVICE void noisy_vectors(const RowNoise& noise_of, const uint4* source, uint4* out,
                                  int blocks, float scale) {
  constexpr int kVectors = Element::kVectors, kAhead = Element::kAhead;
  const int lanes = blockDim.x;
  int block = threadIdx.x;
  source += block * kVectors;
  out += block * kVectors;
#pragma unroll 1
  for (; block + (kAhead - 1) * lanes < blocks; block += kAhead * lanes) {
    noisy_blocks<Element, kAhead, kScaled>(noise_of, source, out, block, lanes, scale);
  }
#pragma unroll 1
  for (; block < blocks; block += lanes) {
    noisy_blocks<Element, 1, kScaled>(noise_of, source, out, block, lanes, scale);
  }
}

// A row without noise; without a source a row of NaN.
template <class Element, bool kScaled>
NEFTUNE_DEVICE void plain_vectors(const uint4* source, uint4* out, int blocks, float scale) {
#pragma unroll 1
  for (int i = threadIdx.x; i < blocks * Element::kVectors; i += blockDim.x) {
    uint4 values{Element::kNaN, Element::kNaN, Element::kNaN, Element::kNaN};
    if (source) {
      values = source[i];
      if (kScaled) values = Element::scaled(values, scale);
    }
    out[i] = values;
  }
}

// Any strides, any width, any alignment, any step; without a source a row of NaN.
template <class Element>
NEFTUNE_DEVICE void any_row(const RowArguments& a, const RowNoise& noise_of,
                            const typename Element::Storage* source,
                            typename Element::Storage* out) {
  for (int64_t column = threadIdx.x * kColumnsPerBlock; column < a.embedding_dim;
       column += blockDim.x * kColumnsPerBlock) {
    uint32_t words[4];
    noise_of.words(static_cast<uint32_t>(column / kColumnsPerBlock), words);
#pragma unroll
    for (int k = 0; k < kColumnsPerBlock; ++k) {
      if (column + k >= a.embedding_dim) break;
      typename Element::Storage value = Element::narrow(__uint_as_float(Float32::kNaN));
      if (source) {
        value = source[(column + k) * a.source_column];
        if (a.scaled) value = Element::narrow(__fmul_rn(Element::wide(value), a.scale));
        const float lattice = k % 2 ? lattice_odd(words[k / 2]) : lattice_even(words[k / 2]);
        if (noise_of.step != 0)
          value =
              Element::narrow(__fadd_rn(Element::wide(value), __fmul_rn(lattice, noise_of.step)));
      }
      out[column + k] = value;
    }
  }
}

// ---- kernels over rows: block (threads of a token, tokens of a row)

NEFTUNE_DEVICE RowNoise noise_of_place(const RowArguments& a, const TokenNoise& place) {
  return {place.sample, place.position, a.replica, noise_key(static_cast<uint64_t>(*a.seed)),
          place.step};
}

// The grid covers all tokens: loops over them would take registers from the loop over columns.
template <class Element, LayoutKind kind, bool kScaled>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    noisy_vector_rows(const RowArguments a) {
  using Storage = typename Element::Storage;
  const uint32_t row = blockIdx.y + blockIdx.z * gridDim.y,
                 own_column = blockIdx.x * blockDim.y + threadIdx.y;
  const uint32_t columns = static_cast<uint32_t>(a.columns),
                 embedding_dim = static_cast<uint32_t>(a.embedding_dim);
  if (row >= static_cast<uint32_t>(a.rows)) return;
  const uint32_t column = own_column < columns ? own_column : columns - 1;  // a warp asks together
  const int64_t token = uint64_t{row} * columns + column;
  const int blocks = static_cast<int>(embedding_dim / kColumnsPerBlock);
  const int64_t offset = offset_of(a, row, column);
  const Storage* source = static_cast<const Storage*>(a.source);
  Storage* out = static_cast<Storage*>(a.out) + token * embedding_dim;
  const TokenNoise place = place_of<kind>(a, token, row, column);
  if (own_column >= columns) return;
  if (offset >= 0 && place.step != 0) {
    noisy_vectors<Element, kScaled>(noise_of_place(a, place), vectors(source + offset),
                                    vectors(out), blocks, a.scale);
  } else {
    plain_vectors<Element, kScaled>(offset >= 0 ? vectors(source + offset) : nullptr, vectors(out),
                                    blocks, a.scale);
  }
}

// The grid may be smaller than the tokens.
template <class Element, LayoutKind kind>
__global__ void __launch_bounds__(kThreads) noisy_rows(const RowArguments a) {
  using Storage = typename Element::Storage;
  const int64_t first_row = blockIdx.y + int64_t{blockIdx.z} * gridDim.y;
  const int64_t first_column = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  for (int64_t row = first_row; row < a.rows; row += int64_t{gridDim.y} * gridDim.z) {
    for (int64_t column = first_column; column < a.columns;
         column += int64_t{gridDim.x} * blockDim.y) {
      const int64_t offset = offset_of(a, row, column);
      const Storage* source = offset < 0 ? nullptr : static_cast<const Storage*>(a.source) + offset;
      const int64_t token = row * a.columns + column;
      Storage* out = static_cast<Storage*>(a.out) + token * a.embedding_dim;
      any_row<Element>(a, noise_of_place(a, place_of<kind>(a, token, row, column)), source, out);
    }
  }
}

// ---- launches

// Threads of one token: a part of a warp for narrow rows of long calls, so that no lane is idle and
// what finds a row is done for several at once; up to four warps in short calls.
inline int64_t threads_of_token(const RowArguments& a) {
  const int64_t tokens = a.rows * a.columns, blocks = a.embedding_dim / kColumnsPerBlock;
  if (!a.vectors) return kLanes;
  if (tokens >= NEFTUNE_MANY_TOKENS && a.columns >= NEFTUNE_SHORT_ROW && blocks <= 256)
    return blocks <= 128 ? kLanes / 4 : kLanes / 2;
  int64_t threads = kLanes;
  while (tokens <= kFewTokens && threads < kThreads && 2 * threads <= blocks) threads *= 2;
  return threads;
}

template <class Element>
const char* launch_rows(const RowArguments& a, void* stream) {
  const int64_t threads = threads_of_token(a), most = kThreads / threads,
                tokens = threads < kLanes || a.columns >= most ? most : a.columns;  // whole warps
  const int64_t blocks = (a.columns + tokens - 1) / tokens,
                grid_columns = blocks < NEFTUNE_GRID_COLUMNS ? blocks : NEFTUNE_GRID_COLUMNS;
  const int64_t grid_rows = a.rows < NEFTUNE_GRID_ROWS ? a.rows : NEFTUNE_GRID_ROWS;
  const int64_t folds = (a.rows + grid_rows - 1) / grid_rows,
                grid_folds = folds < NEFTUNE_GRID_ROWS ? folds : NEFTUNE_GRID_ROWS;
  const dim3 grid(grid_columns, grid_rows, grid_folds), block(threads, tokens);
  // its loop over columns must not end earlier for part of a warp, which asks together
  const dim3 warps(kLanes, tokens < kThreads / kLanes ? tokens : kThreads / kLanes);
  const bool covered = grid_columns == blocks && grid_folds == folds && a.columns <= UINT32_MAX &&
                       a.rows <= UINT32_MAX;
  if (a.device_alpha) {
    if (!a.vectors || !covered)
      return launch(noisy_rows<Element, kCapturable>, grid, warps, stream, a);
    if (a.scaled)
      return launch(noisy_vector_rows<Element, kCapturable, true>, grid, block, stream, a);
    return launch(noisy_vector_rows<Element, kCapturable, false>, grid, block, stream, a);
  }
  if (!a.vectors || !covered)
    return launch(noisy_rows<Element, kAnyLayout>, grid, warps, stream, a);
  if (a.scaled)
    return launch(noisy_vector_rows<Element, kAnyLayout, true>, grid, block, stream, a);
  if (a.cu_seqlens.data)
    return launch(noisy_vector_rows<Element, kBounds, false>, grid, block, stream, a);
  if (a.numbering.words)
    return launch(noisy_vector_rows<Element, kNumbered, false>, grid, block, stream, a);
  if (a.document.data || a.position.data || a.lengths.data)
    return launch(noisy_vector_rows<Element, kPerToken, false>, grid, block, stream, a);
  return launch(noisy_vector_rows<Element, kNoLayout, false>, grid, block, stream, a);
}

}  // namespace

const char* launch_noisy_rows(const RowArguments& arguments, ElementType type, void* stream) {
  switch (type) {
    case kBFloat16:
      return launch_rows<BFloat16>(arguments, stream);
    case kFloat16:
      return launch_rows<Float16>(arguments, stream);
    default:
      return launch_rows<Float32>(arguments, stream);
  }
}

const char* launch_number_documents(const DocumentArguments& a, void* stream) {
  const int64_t blocks = a.rows * a.pieces;
  if (blocks > NEFTUNE_GRID_BLOCKS) return "there are more rows than a grid has blocks";
  const dim3 grid(blocks);
  const auto threads = [](int64_t tokens, int each) {
    return dim3((tokens + each * kLanes - 1) / (each * kLanes) * kLanes);
  };
  if (a.pieces > 1) {
    const dim3 block = threads(NEFTUNE_PIECE_TOKENS, kTokensOfThread);
    const char* error = launch(summarise_pieces, grid, block, stream, a);
    return error ? error : launch(number_pieces, grid, block, stream, a);
  }
  if (a.columns <= kLanes * kMostWarps * kTokensOfThread)
    return launch(number_rows<kTokensOfThread>, grid, threads(a.columns, kTokensOfThread), stream,
                  a);
  return launch(number_rows<kMoreTokensOfThread>, grid, threads(a.columns, kMoreTokensOfThread),
                stream, a);
}

const char* launch_number_tokens(const TokenArguments& a, void* stream) {
  const int64_t blocks = a.rows * ((a.columns + kTokenThreads - 1) / kTokenThreads);
  if (blocks > NEFTUNE_GRID_BLOCKS) return "there are more rows than a grid has blocks";
  return launch(number_tokens, dim3(blocks), dim3(kTokenThreads), stream, a);
}

}  // namespace neftune_kernels
