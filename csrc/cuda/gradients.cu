// The weight's gradient of a lookup, of tokens sorted by id: sums in the order of
// reference.chunked_gradient, in one launch and, where runs cross chunks and groups of 32 chunks,
// in one more for each. What an earlier launch has left is all that warps share.
//
// A warp has 256 columns of a chunk, or of a run that goes on from one; a lane 8 of them. A run
// within a chunk is added and written there. carry_over adds up the parts of the others within a
// group, leaves what goes beyond it in the same places, and then adds up groups.
#include <type_traits>

#include "kernel.h"
#include "launch.h"

namespace neftune_kernels {
namespace {

constexpr int kThreads = 128;  // of a block
constexpr int kWarps = kThreads / kLanes;
constexpr int kBlocksPerMultiprocessor = 7;  // 28 warps: at most 72 registers a thread
constexpr int kColumns = 8;                  // of a lane
constexpr int kStrip = kLanes * kColumns;
// Rows, or parts, that are asked for before the first is added; fewer where 72 registers do not
// hold them: of single values, and of float32 values where sums are divided.
constexpr int kAheadOfFew = 4, kAheadOfMany = 2;

template <class T>
NEFTUNE_DEVICE const T* bytes_on(const T* values, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(values) + bytes);
}
template <class T>
NEFTUNE_DEVICE T* bytes_on(T* values, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(values) + bytes);
}

// ---- how a lane reads and writes its columns

// 16 bytes at a time. A part has the lanes' first fours and then all second ones, side by side, and
// so has a strip of a float32 row.
template <class Element>
struct Vectors {
  using Storage = typename Element::Storage;
  static constexpr int kVectors = Element::kVectors;
  struct Row {
    uint4 values[kVectors];
  };

  __device__ __forceinline__ Vectors(int64_t strip, int64_t embedding_dim) {
    const int64_t begin = strip * kStrip, left = embedding_dim - begin;
    const int half = static_cast<int>(left < kStrip ? left / 2 : kStrip / 2),
              column = threadIdx.x * (kColumns / 2);
    are_there = column < half;
    first = static_cast<uint32_t>(begin) + column;
    second = first + half;
    of_row = kVectors == 1 ? first + column : first;
  }

  // From the lane's first column on.
  __device__ __forceinline__ Row row(const Storage* grad) const {
    Row row;
    row.values[0] = *vectors(grad);
    if (kVectors == 2) row.values[kVectors - 1] = *vectors(grad + (second - first));
    return row;
  }
  NEFTUNE_DEVICE void add(const Row& row, float (&sum)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      Element::add_to(sum + i * (kColumns / kVectors), row.values[i]);
  }
  __device__ __forceinline__ void store(Storage* out, const float (&sum)[kColumns]) const {
    *vectors(out + of_row) = Element::packed(sum);
    if (kVectors == 2) *vectors(out + second) = Element::packed(sum + kColumns / kVectors);
  }

  __device__ __forceinline__ void load_part(const float* part, float (&values)[kColumns]) const {
    const uint4 low = *vectors(part + first), high = *vectors(part + second);
    const uint32_t words[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] = __uint_as_float(words[i]);
  }
  __device__ __forceinline__ void store_part(float* part, const float (&sum)[kColumns]) const {
    *vectors(part + first) = Float32::packed(sum);
    *vectors(part + second) = Float32::packed(sum + kColumns / 2);
  }

  bool are_there;
  uint32_t first, second, of_row;
};

// One at a time, those of a warp side by side: any width, any alignment.
template <class Element>
struct Singles {
  using Storage = typename Element::Storage;
  static constexpr int kVectors = kColumns;  // of one element
  struct Row {
    Storage values[kColumns];
  };

  __device__ __forceinline__ Singles(int64_t strip, int64_t embedding_dim)
      : first(strip * kStrip + threadIdx.x), are_there(first < embedding_dim) {
    const int64_t left = embedding_dim - first;
    end = static_cast<int>(left < kStrip ? left : kStrip);
  }

  __device__ __forceinline__ Row row(const Storage* grad) const {
    Row row{};
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (i * kLanes < end) row.values[i] = grad[i * kLanes];
    return row;
  }
  NEFTUNE_DEVICE void add(const Row& row, float (&sum)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] = __fadd_rn(sum[i], Element::wide(row.values[i]));
  }
  __device__ __forceinline__ void store(Storage* out, const float (&sum)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (i * kLanes < end) out[first + i * kLanes] = Element::narrow(sum[i]);
  }

  __device__ __forceinline__ void load_part(const float* part, float (&values)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      values[i] = i * kLanes < end ? part[first + i * kLanes] : 0.0f;
  }
  __device__ __forceinline__ void store_part(float* part, const float (&sum)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (i * kLanes < end) part[first + i * kLanes] = sum[i];
  }

  int64_t first, of_row = first;
  bool are_there;
  int end;  // of the columns, from the lane's first on
};

// ---- ids

struct NarrowIds {
  using Id = int32_t;
  __device__ __forceinline__ explicit NarrowIds(const Integers& ids)
      : data(static_cast<const int32_t*>(ids.data)) {}
  __device__ __forceinline__ Id operator[](int64_t place) const { return data[place]; }
  const int32_t* data;
};

struct AnyIds {
  using Id = int64_t;
  __device__ __forceinline__ explicit AnyIds(const Integers& ids) : ids(ids) {}
  __device__ __forceinline__ Id operator[](int64_t place) const { return value_at(ids, place); }
  Integers ids;
};

constexpr int kNoId = -1;  // has no row

// Not padding, and in range.
template <class Id>
NEFTUNE_DEVICE bool has_row(const GradientArguments& a, Id id) {
  using Unsigned = std::make_unsigned_t<Id>;  // in which -1 is the largest
  return static_cast<Unsigned>(id) < static_cast<Unsigned>(a.num_embeddings) &&
         id != static_cast<Id>(a.padding_idx);
}

// The first of the places in [low, high), `step` ids apart, with an id beyond that one, by
// bisection; high if there is none.
template <class Ids>
NEFTUNE_DEVICE int64_t first_beyond(const Ids& ids, typename Ids::Id id, int64_t low, int64_t high,
                                    int64_t step) {
#pragma unroll 1
  while (low < high) {
    const int64_t middle = low + ((high - low) >> 1);
    if (ids[middle * step] <= id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// ---- kernels: grid (blocks of strips, blocks of units and folds of them), block (lanes, warps)

NEFTUNE_DEVICE int64_t strip_of_warp(const GradientArguments& a) {
  const uint32_t own = threadIdx.y & ((1u << a.strip_bits) - 1);
  return (int64_t{blockIdx.x} << a.strip_bits) + own;
}

// May lie beyond the last.
NEFTUNE_DEVICE uint32_t unit_of_warp(const GradientArguments& a) {
  const uint32_t block = blockIdx.y + blockIdx.z * gridDim.y;
  return block * (kWarps >> a.strip_bits) + (threadIdx.y >> a.strip_bits);
}

// The id's row: cast(sum · scale / count).
template <class Columns, bool kByFreq, class Id>
NEFTUNE_DEVICE void store_sum(const GradientArguments& a, const Columns& columns, Id id,
                              const float (&sum)[kColumns], int64_t count) {
  float value[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    value[i] = __fmul_rn(sum[i], a.scale);
    if (kByFreq) value[i] = __fdiv_rn(value[i], static_cast<float>(count));
  }
  auto* out = static_cast<typename Columns::Storage*>(a.out);
  const Id row = static_cast<Id>(a.embedding_dim * sizeof *out);  // of 32 bits for vectors
  columns.store(bytes_on(out, int64_t{id} * row), value);
}

template <class Columns, class Ids, bool kByFreq>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sum_chunks(const GradientArguments a) {
  using Id = typename Ids::Id;
  constexpr bool are_many = Columns::kVectors > (kByFreq ? 1 : 2);  // accesses of a row
  constexpr int kAhead = are_many ? kAheadOfMany : kAheadOfFew;
  const uint32_t chunk = unit_of_warp(a);
  const int64_t begin = chunk * a.chunk;
  const Columns columns(strip_of_warp(a), a.embedding_dim);
  if (begin >= a.tokens || !columns.are_there) return;
  using Storage = typename Columns::Storage;
  const Storage* grad = static_cast<const Storage*>(a.grad) + columns.of_row;
  const Ids ids(a.ids);
  const int64_t left = a.tokens - begin;
  const int end = static_cast<int>(left < a.chunk ? left : a.chunk),  // places count from `begin`
      known = static_cast<int>(left < a.chunk + 1 ? left : a.chunk + 1);
  float sum[kColumns] = {};
  int start = 0;  // of the run
  Id id = ids[begin];
  bool comes = begin > 0 && ids[begin - 1] == id;
#pragma unroll 1
  for (int place = 0; place < end; place += kAhead) {
    Id following[kAhead];  // behind the last token stands one that has no row
    int64_t source[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      following[k] = place + k + 1 < known ? ids[begin + place + k + 1] : Id{kNoId};
      source[k] = place + k < end ? a.order[begin + place + k] : 0;
    }
    typename Columns::Row rows[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      rows[k] = {};
      if (has_row(a, k == 0 ? id : following[k - 1]))
        rows[k] = columns.row(bytes_on(grad, source[k] * a.grad_row));
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      Columns::add(rows[k], sum);
      const bool goes = following[k] == id, ends = place + k + 1 == end || !goes;
      if (ends && has_row(a, id)) {
        if (comes || goes) {
          columns.store_part(a.scratch + (2 * int64_t{chunk} + !comes) * a.embedding_dim, sum);
        } else {
          store_sum<Columns, kByFreq>(a, columns, id, sum, place + k + 1 - start);
        }
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[i] = ends ? 0.0f : sum[i];
      comes = comes && !ends;
      start = ends ? place + k + 1 : start;
      id = following[k];
    }
  }
}

// The run that goes on from a unit, if this is its first unit in the group: from the tail it leaves
// there, or the head where it came into the group. A unit's head is its first chunk's, its tail its
// last chunk's.
template <class Columns, class Ids, bool kByFreq>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    carry_over(const GradientArguments a) {
  using Id = typename Ids::Id;
  constexpr int kAhead = kByFreq ? kAheadOfMany : kAheadOfFew;  // parts are float32
  const int64_t unit = unit_of_warp(a);
  const Columns columns(strip_of_warp(a), a.embedding_dim);
  if (unit + 1 >= a.units || !columns.are_there) return;
  const Ids ids(a.ids);
  const uint32_t opening = static_cast<uint32_t>(unit) / a.group * a.group;
  const int64_t limit = int64_t{opening} + a.group < a.units ? int64_t{opening} + a.group : a.units;
  const int64_t tokens = a.unit * a.chunk, begin = unit * tokens, end = begin + tokens;
  const Id id = ids[end - 1];
  if (unit + 1 >= limit || ids[end] != id || !has_row(a, id)) return;
  const bool comes = begin > 0 && ids[begin - 1] == id;
  if (comes && unit != opening) return;
  const int64_t stop = first_beyond(ids, id, unit + 2, limit, tokens);  // unit
  const int64_t bound = stop * tokens;
  const bool leaves = bound < a.tokens && ids[bound] == id;
  const auto head_of = [&](int64_t other) {
    return a.scratch + 2 * other * a.unit * a.embedding_dim;
  };
  const auto tail_of = [&](int64_t other) { return head_of(other + 1) - a.embedding_dim; };
  float sum[kColumns];
  columns.load_part(comes ? head_of(unit) : tail_of(unit), sum);
#pragma unroll 1
  for (int64_t other = unit + 1; other < stop; other += kAhead) {
    float parts[kAhead][kColumns] = {};
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (other + k < stop) columns.load_part(head_of(other + k), parts[k]);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[i] = __fadd_rn(sum[i], parts[k][i]);
    }
  }
  if (comes || leaves) {
    columns.store_part(comes ? head_of(unit) : tail_of(stop - 1), sum);
    return;
  }
  int64_t count = 0;
  if (kByFreq) {
    count = first_beyond(ids, id, bound - tokens, bound < a.tokens ? bound : a.tokens, 1) -
            first_beyond(ids, static_cast<Id>(id - 1), begin, end, 1);
  }
  store_sum<Columns, kByFreq>(a, columns, id, sum, count);
}

// ---- launches

// Blocks of units beyond a grid's y are folded into its z.
template <class Kernel>
const char* launch_units(Kernel kernel, const GradientArguments& a, int64_t units, void* stream) {
  const int64_t strips = (a.embedding_dim + kStrip - 1) / kStrip,
                of_block = int64_t{1} << a.strip_bits,
                blocks = (units * of_block + kWarps - 1) / kWarps;
  const int64_t rows = blocks < NEFTUNE_GRID_ROWS ? blocks : NEFTUNE_GRID_ROWS;
  const dim3 grid((strips + of_block - 1) / of_block, rows, (blocks + rows - 1) / rows);
  return launch(kernel, grid, dim3(kLanes, kWarps), stream, a);
}

template <class Columns, class Ids, bool kByFreq>
const char* launch_sums(GradientArguments a, void* stream) {
  const int64_t chunks = (a.tokens + a.chunk - 1) / a.chunk;
  a.strip_bits = a.embedding_dim > 2 * kStrip ? 2 : a.embedding_dim > kStrip ? 1 : 0;
  const char* error = launch_units(sum_chunks<Columns, Ids, kByFreq>, a, chunks, stream);
  for (const bool last : {false, true}) {
    a.unit = last ? a.chunk : 1;
    a.units = static_cast<uint32_t>((chunks + a.unit - 1) / a.unit);
    a.group = last ? a.units : static_cast<uint32_t>(a.chunk);
    if (error || a.units == 1) break;
    error = launch_units(carry_over<Columns, Ids, kByFreq>, a, a.units - 1, stream);
  }
  return error;
}

template <class Element>
const char* launch_gradient_of(const GradientArguments& a, void* stream) {
  if (a.vectors) {
    return a.by_freq ? launch_sums<Vectors<Element>, NarrowIds, true>(a, stream)
                     : launch_sums<Vectors<Element>, NarrowIds, false>(a, stream);
  }
  return a.by_freq ? launch_sums<Singles<Element>, AnyIds, true>(a, stream)
                   : launch_sums<Singles<Element>, AnyIds, false>(a, stream);
}

}  // namespace

const char* launch_gradient(const GradientArguments& arguments, ElementType type, void* stream) {
  switch (type) {
    case kBFloat16:
      return launch_gradient_of<BFloat16>(arguments, stream);
    case kFloat16:
      return launch_gradient_of<Float16>(arguments, stream);
    default:
      return launch_gradient_of<Float32>(arguments, stream);
  }
}

}  // namespace neftune_kernels
