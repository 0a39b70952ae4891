// The documents of masks and position ids, numbered by one launch, of long rows by two; see
// numbering.h for the tables and layout.number_documents for the rules.
//
// A block has a row, or a piece of a row that is longer than a block; none waits for another, and
// nothing must be zero before. A row that is one run of real tokens is four words, which the same
// block finds out first. In all other rows a thread walks over a few neighbours, a ballot of the
// warp tells it which thread holds the last real token before them, and warps (and pieces) are
// joined by what their first and last tokens are. Included by kernels.cu; a warp has 32 lanes.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "launch.h"

namespace neftune_kernels {
namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int32_t kFar = 0x7FFFFFFF;
constexpr int kMostWarps = 16;  // of a block: at 4 cycles an instruction no warp waits for a turn
constexpr int kTokensOfThread = 4;
constexpr int kMoreTokensOfThread = 8;
constexpr int kTokenThreads = 256;

// ---- values

NEFTUNE_DEVICE uint32_t lane_of_thread() { return threadIdx.x % kLanes; }

// The last of some lanes, 0 of none.
NEFTUNE_DEVICE int last_lane(uint32_t lanes) { return lanes ? 31 - __clz(lanes) : 0; }

// Of a row's columns, which must be there.
template <class T, int kCount>
NEFTUNE_DEVICE void load_as(const Values& values, int64_t row, const uint32_t (&column)[kCount],
                            int64_t (&value)[kCount]) {
  const T* of_row = static_cast<const T*>(values.data) + row * values.row;
  T narrow[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) narrow[j] = of_row[column[j]];
#pragma unroll
  for (int j = 0; j < kCount; ++j) value[j] = static_cast<int64_t>(narrow[j]);
}

template <int kCount>
NEFTUNE_DEVICE void load(const Values& values, int64_t row, const uint32_t (&column)[kCount],
                         int64_t (&value)[kCount]) {
  switch (values.bytes) {
    case 1:
      return values.is_signed ? load_as<int8_t>(values, row, column, value)
                              : load_as<uint8_t>(values, row, column, value);
    case 2:
      return values.is_signed ? load_as<int16_t>(values, row, column, value)
                              : load_as<uint16_t>(values, row, column, value);
    case 4:
      return values.is_signed ? load_as<int32_t>(values, row, column, value)
                              : load_as<uint32_t>(values, row, column, value);
    default:
      return load_as<int64_t>(values, row, column, value);
  }
}

NEFTUNE_DEVICE bool is_real(const DocumentArguments& a, int64_t value) {
  return ((value ^ a.padding_value) & a.mask.absolute) != 0;
}

NEFTUNE_DEVICE bool is_nan(const DocumentArguments& a, int64_t value) {
  return (value & a.mask.absolute) > a.mask.infinity;
}

// A real token; column -1: there is none.
struct Token {
  int32_t column;
  int64_t value, place;
};

NEFTUNE_DEVICE bool jumps(const Token& token, const Token& before) {
  const uint64_t jump = static_cast<uint64_t>(token.place) - static_cast<uint64_t>(before.place),
                 distance = static_cast<uint64_t>(token.column - before.column);
  return (jump != 1) & (jump != distance);
}

// Of many tokens, as bits: how they are unlike the real token before them in their row.
struct Unlike {
  uint32_t values = 0, places = 0;

  __device__ __forceinline__ void compare(const Token& token, const Token& before, uint32_t bit) {
    values |= token.value != before.value ? bit : 0;
    places |= jumps(token, before) ? bit : 0;
  }
  // Which open a document if they are real.
  __device__ __forceinline__ uint32_t opens(const DocumentArguments& a) const {
    return (a.numbered & values) | (a.placed & places);
  }
};

// Whether one real token opens a document after another, the one before it in its row.
NEFTUNE_DEVICE bool opens_after(const DocumentArguments& a, int64_t row, int32_t column,
                                int32_t before) {
  const uint32_t columns[] = {static_cast<uint32_t>(before), static_cast<uint32_t>(column)};
  int64_t value[2], place[2];
  load(a.mask, row, columns, value);
  load(a.position_ids, row, columns, place);
  Unlike unlike;
  unlike.compare({column, value[1], place[1]}, {before, value[0], place[0]}, 1);
  if (is_nan(a, value[1])) unlike.values = 1;
  return unlike.opens(a) & 1;
}

// A thread's kEach neighbours and, at index 0, one more token: that before them, or another that
// the block wants to know. Bit j is that of neighbour j.
template <int kEach>
struct Neighbours {
  uint32_t column;  // of the first neighbour
  uint32_t reals;
  int64_t value[kEach + 1], place[kEach + 1];

  __device__ __forceinline__ Token token(int j) const {
    return {static_cast<int32_t>(column + j), value[j + 1], place[j + 1]};
  }
  __device__ __forceinline__ uint32_t first_real() const {
    return reals ? column + __ffs(reals) - 1 : kFar;
  }
};

// Columns wrap: what is before the first is beyond the last.
NEFTUNE_DEVICE bool is_before(uint32_t column, int32_t end) {
  return column < static_cast<uint32_t>(end);
}

template <int kEach>
NEFTUNE_DEVICE Neighbours<kEach> neighbours(const DocumentArguments& a, int64_t row, int32_t begin,
                                            int32_t end, int32_t other = -1) {
  Neighbours<kEach> own;
  own.column = static_cast<uint32_t>(begin) + threadIdx.x * kEach;
  const uint32_t last = static_cast<uint32_t>(end - 1);
  uint32_t column[kEach + 1];  // or others that are there
#pragma unroll
  for (uint32_t j = 0; j < kEach; ++j) column[j + 1] = min(own.column + j, last);
  column[0] = other >= 0 ? static_cast<uint32_t>(other) : max(column[1], 1u) - 1;
  load(a.mask, row, column, own.value);
  load(a.position_ids, row, column, own.place);
  own.reals = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) own.reals |= is_real(a, own.value[j + 1]) ? 1u << j : 0;
  const uint32_t left = is_before(own.column, end) ? static_cast<uint32_t>(end) - own.column : 0;
  own.reals = (own.reals | a.all_real) & ((1u << min(left, uint32_t{kEach})) - 1);
  return own;
}

// ---- one run

// Of a block's tokens.
struct Run {
  int32_t count;   // real ones
  int32_t first;   // column
  int32_t breaks;  // real ones that do not plainly go on from the token before in the row
  bool goes_on;    // of a piece: its first token is no break
};

template <bool kPiece, int kEach>
NEFTUNE_DEVICE Run run_of(const DocumentArguments& a, const Neighbours<kEach>& own) {
  __shared__ uint2 of_warps[kMostWarps];
  const uint32_t lane = lane_of_thread(), warp = threadIdx.x / kLanes;
  const uint32_t before_real = is_real(a, own.value[0]) ? 1 : a.all_real & 1,
                 goes_on = own.reals << 1 | (own.column > 0 ? before_real : 0);
  Unlike unlike;
  int64_t any_bit = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    unlike.compare(own.token(j), own.token(j - 1), 1u << j);
    any_bit |= own.value[j + 1];
  }
  // No two values of a run differ, so that this is one; NaN is left to `openings`.
  if ((any_bit & a.mask.absolute) >= a.mask.infinity) unlike.values = kAllLanes;
  const uint32_t breaks = own.reals & (unlike.opens(a) | ~goes_on);
  uint32_t found = __popc(own.reals) | __popc(breaks) << 16;
  if (kPiece && threadIdx.x == 0) found |= (own.reals & ~breaks) << 31;
  found = __reduce_add_sync(kAllLanes, found);
  uint32_t first = __reduce_min_sync(kAllLanes, own.first_real());
  if (lane == 0) of_warps[warp] = uint2{found, first};
  __syncthreads();
  const uint2 of_warp = lane < blockDim.x / kLanes ? of_warps[lane] : uint2{0, kFar};
  found = __reduce_add_sync(kAllLanes, of_warp.x);
  first = __reduce_min_sync(kAllLanes, of_warp.y);
  return {static_cast<int32_t>(found & 0xFFFF), static_cast<int32_t>(first),
          static_cast<int32_t>(found >> 16 & 0x7FFF), (found >> 31) != 0};
}

// ---- documents

// Of a block's tokens.
struct Openings {
  uint32_t opens;      // bit j: the thread's neighbour j opens a document
  int32_t documents;   // that open in the warps before
  int32_t earlier;     // real tokens there
  int32_t opened;      // documents that open in the block
  int32_t last;        // the last real token, -1: none
};

// previous: the last real token in the row before the block's.
template <int kEach>
NEFTUNE_DEVICE Openings openings(const DocumentArguments& a, const Neighbours<kEach>& own,
                                 const Token& previous) {
  __shared__ Token last_of[kMostWarps];
  __shared__ uint32_t found_in[kMostWarps];
  const uint32_t lane = lane_of_thread(), warp = threadIdx.x / kLanes;
  Token before{-1, 0, 0};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (own.reals >> j & 1) before = own.token(j);
  }
  const uint32_t real_lanes = __ballot_sync(kAllLanes, own.reals != 0),
                 below = real_lanes & ((1u << lane) - 1);
  if (lane == static_cast<uint32_t>(last_lane(real_lanes))) last_of[warp] = before;
  const int from = last_lane(below);
  before = {__shfl_sync(kAllLanes, before.column, from), __shfl_sync(kAllLanes, before.value, from),
            __shfl_sync(kAllLanes, before.place, from)};
  __syncthreads();
  const bool is_warp = lane < blockDim.x / kLanes;
  const int32_t last = is_warp ? last_of[lane].column : -1;
  const uint32_t warps_below = __ballot_sync(kAllLanes, last >= 0) & ((1u << warp) - 1);
  if (!below) before = warps_below ? last_of[last_lane(warps_below)] : previous;

  uint32_t opens = own.reals;
  if (before.column < 0) opens &= opens - 1;  // the row's first is no further one
  Unlike unlike;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    unlike.compare(own.token(j), before, 1u << j);
    if (is_nan(a, own.value[j + 1])) unlike.values |= 1u << j;  // unlike itself
    if (own.reals >> j & 1) before = own.token(j);
  }
  opens &= unlike.opens(a);

  const uint32_t own_found = __popc(own.reals) | __popc(opens) << 16,
                 warp_found = __reduce_add_sync(kAllLanes, own_found);
  if (lane == 0) found_in[warp] = warp_found;
  __syncthreads();
  const uint32_t found = is_warp ? found_in[lane] : 0,
                 found_before = __reduce_add_sync(kAllLanes, lane < warp ? found : 0);
  return {opens, static_cast<int32_t>(found_before >> 16),
          static_cast<int32_t>(found_before & 0xFFFF),
          static_cast<int32_t>(__reduce_add_sync(kAllLanes, found) >> 16),
          __reduce_max_sync(kAllLanes, last)};
}

// Of one row.
struct Tables {
  int4* words;
  int2* table;
  int32_t* record;
};

NEFTUNE_DEVICE Tables tables_of(const DocumentArguments& a, int64_t row) {
  const int64_t token = row * a.columns;
  return {reinterpret_cast<int4*>(a.words) + row, reinterpret_cast<int2*>(a.table) + token,
          a.record + token};
}

// documents: 0 for a row that is one run.
NEFTUNE_DEVICE void store_row(const DocumentArguments& a, const Tables& row_tables, int64_t row,
                              int32_t documents, int32_t first, int32_t count) {
  if (count == 0) first = 0;
  // Rows without numbers and places are one document each.
  const int32_t before = a.numbered | a.placed ? row == 0 ? 0 : -1 : static_cast<int32_t>(row);
  *row_tables.words = int4{documents, first, count, before};
  if (documents > 0) *row_tables.table = int2{first, 0};
}

// Each token's document, and of every one that opens here where it does. documents, earlier: that
// have opened and real tokens that lie in the row before the warp.
template <int kEach>
NEFTUNE_DEVICE void store_documents(const Tables& tables, int32_t end,
                                    const Neighbours<kEach>& own, uint32_t opens,
                                    int32_t documents, int32_t earlier) {
  const uint32_t found = __popc(own.reals) | __popc(opens) << 16;
  uint32_t scanned = found;
#pragma unroll
  for (uint32_t distance = 1; distance < kLanes; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, scanned, distance);
    if (lane_of_thread() >= distance) scanned += other;
  }
  earlier += static_cast<int32_t>((scanned - found) & 0xFFFF);
  int32_t number = documents + static_cast<int32_t>((scanned - found) >> 16);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int32_t column = static_cast<int32_t>(own.column + j);
    const bool real = own.reals >> j & 1, opened = opens >> j & 1;
    number += opened;
    if (opened) tables.table[number] = int2{column, earlier};
    if (is_before(own.column + j, end)) tables.record[column] = real ? number : -1;
    earlier += real;
  }
}

// ---- kernels

// A block has a row. Grid (rows).
template <int kEach>
__global__ void __launch_bounds__(kLanes* kMostWarps, 1) number_rows(const DocumentArguments a) {
  const int64_t row = blockIdx.x;
  const int32_t columns = static_cast<int32_t>(a.columns);
  const Neighbours<kEach> own = neighbours<kEach>(a, row, 0, columns);
  const Run run = run_of<false>(a, own);
  const Tables tables = tables_of(a, row);
  int32_t documents = 0;
  if (run.breaks > 1) {
    const Openings found = openings(a, own, {-1, 0, 0});
    documents = found.opened + 1;
    store_documents(tables, columns, own, found.opens, found.documents, found.earlier);
  }
  if (threadIdx.x == 0) store_row(a, tables, row, documents, run.first, run.count);
}

// The first launch of rows longer than a block: what each piece is. Grid (rows · pieces).
__global__ void __launch_bounds__(kLanes* kMostWarps, 1) summarise_pieces(const DocumentArguments a) {
  const uint32_t pieces = static_cast<uint32_t>(a.pieces);
  const int64_t row = blockIdx.x / pieces;
  const int32_t piece_tokens = static_cast<int32_t>(blockDim.x * kTokensOfThread),
                columns = static_cast<int32_t>(a.columns),
                begin = static_cast<int32_t>(blockIdx.x % pieces) * piece_tokens,
                end = min(columns - begin, piece_tokens) + begin;
  const auto own = neighbours<kTokensOfThread>(a, row, begin, end);
  const Run run = run_of<true>(a, own);
  Span span{run.first, run.count > 0 ? run.first + run.count - 1 : -1, run.count, 0};
  if (run.breaks + run.goes_on > 1) {
    const Openings found = openings(a, own, {-1, 0, 0});
    span.last = found.last;
    span.opened = found.opened;
  }
  span.count |= run.breaks << 16;
  if (threadIdx.x == 0) a.summary[blockIdx.x] = span;
}

// The second. Grid (rows · pieces).
__global__ void __launch_bounds__(kLanes* kMostWarps, 1) number_pieces(const DocumentArguments a) {
  const uint32_t pieces = static_cast<uint32_t>(a.pieces);
  const int64_t row = blockIdx.x / pieces;
  const int32_t piece_tokens = static_cast<int32_t>(blockDim.x * kTokensOfThread),
                columns = static_cast<int32_t>(a.columns),
                piece = static_cast<int32_t>(blockIdx.x % pieces),
                begin = piece * piece_tokens, end = min(columns - begin, piece_tokens) + begin;
  const Span* summary = a.summary + row * pieces;
  const uint32_t lane = lane_of_thread();
  const Span empty{kFar, -1, 0, 0};
  const Tables tables = tables_of(a, row);
  int32_t first = kFar, count = 0, breaks = 0;
#pragma unroll 1
  for (uint32_t start = 0; start < pieces; start += kLanes) {
    const Span span = start + lane < pieces ? summary[start + lane] : empty;
    first = min(first, __reduce_min_sync(kAllLanes, span.first));
    count += __reduce_add_sync(kAllLanes, span.count & 0xFFFF);
    breaks += __reduce_add_sync(kAllLanes, span.count >> 16);
  }
  if (breaks <= 1) {
    if (piece == 0 && threadIdx.x == 0) store_row(a, tables, row, 0, first, count);
    return;
  }
  // Which pieces' first real tokens open a document, after those of the pieces before.
  int32_t documents = 0, opened = 0, earlier = 0, previous = -1, last = -1;
#pragma unroll 1
  for (uint32_t start = 0; start < pieces; start += kLanes) {
    Span span = start + lane < pieces ? summary[start + lane] : empty;
    span.count &= 0xFFFF;
    const bool is_earlier = start + lane < static_cast<uint32_t>(piece);
    const uint32_t below = __ballot_sync(kAllLanes, span.count > 0) & ((1u << lane) - 1);
    int32_t before = __shfl_sync(kAllLanes, span.last, last_lane(below));
    if (!below) before = last;
    if (span.count > 0 && before >= 0) span.opened += opens_after(a, row, span.first, before);
    last = max(last, __reduce_max_sync(kAllLanes, span.last));
    previous = max(previous, __reduce_max_sync(kAllLanes, is_earlier ? span.last : -1));
    opened += __reduce_add_sync(kAllLanes, span.opened);
    documents += __reduce_add_sync(kAllLanes, is_earlier ? span.opened : 0);
    earlier += __reduce_add_sync(kAllLanes, is_earlier ? span.count : 0);
  }
  if (piece == 0 && threadIdx.x == 0) store_row(a, tables, row, opened + 1, first, count);
  const auto own = neighbours<kTokensOfThread>(a, row, begin, end, previous);
  const Openings found = openings(a, own, {previous, own.value[0], own.place[0]});
  store_documents(tables, end, own, found.opens, documents + found.documents,
                  earlier + found.earlier);
}

// The number of document 0 of the row that `words` are of; all lanes of a warp ask together.
NEFTUNE_DEVICE int32_t documents_before(const Numbering& numbering, const RowWords& words,
                                        int64_t row, uint32_t lane) {
  if (words.before >= 0) return words.before;
  const RowWords* earlier = numbering.words + lane;
  int32_t documents = 0;
#pragma unroll 1
  for (int64_t left = row; left > 0; left -= kLanes) {
    const bool is_there = lane < left;
    documents += __reduce_add_sync(kAllLanes, is_there ? max(earlier->documents, 1) : 0);
    earlier += kLanes;
  }
  return documents;
}

// layout.mask_layout of a numbering, a thread to a token. Grid (rows · blocks of a row).
__global__ void __launch_bounds__(kTokenThreads) number_tokens(const TokenArguments a) {
  const uint32_t blocks = static_cast<uint32_t>((a.columns + kTokenThreads - 1) / kTokenThreads);
  const int64_t row = blockIdx.x / blocks,
                column = int64_t{blockIdx.x % blocks} * kTokenThreads + threadIdx.x;
  const RowWords words = a.numbering.words[row];
  const int64_t before = documents_before(a.numbering, words, row, lane_of_thread());
  if (column >= a.columns) return;
  const int64_t token = row * a.columns + column;
  const NumberedToken found = token_of(a.numbering, words, before, token, column);
  a.document[token] = found.length > 0 ? found.document : -1;
  a.position[token] = found.position;
  // A document's first real token tells its length, that of a row without any its first one.
  if (found.length > 0 ? found.position == 0 : words.count == 0 && column == 0)
    a.lengths[found.document] = found.length;
}

}  // namespace
}  // namespace neftune_kernels
