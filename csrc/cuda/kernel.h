// What the kernels of several files share: the compiler's words, element types, a launch.
#pragma once

#include <cstdint>

#include "launch.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define NEFTUNE_GRID_COLUMNS 0x7FFFFFFF
#define NEFTUNE_GRID_ROWS 65535
#define NEFTUNE_GRID_BLOCKS 0x7FFFFFFF
#define NEFTUNE_MANY_TOKENS 4097  // which fill a GPU
#define NEFTUNE_SHORT_ROW 64      // tokens
#endif

#define NEFTUNE_DEVICE static __device__ __forceinline__

namespace neftune_kernels {
namespace {

constexpr int kLanes = 32;  // of a warp
// 16-byte loads of a row under way before the first is used; of 16-bit values sm_80 would spill one
// of 64 registers with four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kPairsAhead = 3;
#else
constexpr int kPairsAhead = 4;
#endif

// ---- element types: vectors of 16 bytes, or single values

struct Float32 {
  using Storage = float;
  static constexpr int kVectors = 2;             // of one block of 8 columns
  static constexpr int kAhead = 2;               // blocks
  static constexpr uint32_t kNaN = 0x7FC00000u;  // in every element of a word

  NEFTUNE_DEVICE float wide(float value) { return value; }
  NEFTUNE_DEVICE float narrow(float value) { return value; }
  NEFTUNE_DEVICE uint32_t times(uint32_t word, float scale) {
    return __float_as_uint(__fmul_rn(__uint_as_float(word), scale));
  }
  NEFTUNE_DEVICE uint32_t plus(uint32_t word, float noise) {
    return __float_as_uint(__fadd_rn(__uint_as_float(word), noise));
  }
  NEFTUNE_DEVICE uint4 scaled(uint4 v, float scale) {
    return {times(v.x, scale), times(v.y, scale), times(v.z, scale), times(v.w, scale)};
  }
  NEFTUNE_DEVICE uint4 noisy(uint4 v, const float* noise) {
    return {plus(v.x, noise[0]), plus(v.y, noise[1]), plus(v.z, noise[2]), plus(v.w, noise[3])};
  }
  NEFTUNE_DEVICE void add_to(float* sum, uint4 v) {
    sum[0] = __fadd_rn(sum[0], __uint_as_float(v.x));
    sum[1] = __fadd_rn(sum[1], __uint_as_float(v.y));
    sum[2] = __fadd_rn(sum[2], __uint_as_float(v.z));
    sum[3] = __fadd_rn(sum[3], __uint_as_float(v.w));
  }
  NEFTUNE_DEVICE uint4 packed(const float* values) {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
  }
};

// Two values to a word; Pair brings low, high and pack.
template <class Pair>
struct Sixteen {
  using Storage = uint16_t;
  static constexpr int kVectors = 1;
  static constexpr int kAhead = kPairsAhead;
  static constexpr uint32_t kNaN = Pair::kNaN;

  NEFTUNE_DEVICE float wide(uint16_t value) { return Pair::low(value); }
  NEFTUNE_DEVICE uint16_t narrow(float value) {
    return static_cast<uint16_t>(Pair::pack(value, 0.0f));
  }
  NEFTUNE_DEVICE uint32_t times(uint32_t word, float scale) {
    return Pair::pack(__fmul_rn(Pair::low(word), scale), __fmul_rn(Pair::high(word), scale));
  }
  NEFTUNE_DEVICE uint32_t plus(uint32_t word, const float* noise) {
    return Pair::pack(__fadd_rn(Pair::low(word), noise[0]), __fadd_rn(Pair::high(word), noise[1]));
  }
  NEFTUNE_DEVICE uint4 scaled(uint4 v, float scale) {
    return {times(v.x, scale), times(v.y, scale), times(v.z, scale), times(v.w, scale)};
  }
  NEFTUNE_DEVICE uint4 noisy(uint4 v, const float* noise) {
    return {plus(v.x, noise), plus(v.y, noise + 2), plus(v.z, noise + 4), plus(v.w, noise + 6)};
  }
  NEFTUNE_DEVICE void add_pair_to(float* sum, uint32_t word) {
    sum[0] = __fadd_rn(sum[0], Pair::low(word));
    sum[1] = __fadd_rn(sum[1], Pair::high(word));
  }
  NEFTUNE_DEVICE void add_to(float* sum, uint4 v) {
    add_pair_to(sum, v.x);
    add_pair_to(sum + 2, v.y);
    add_pair_to(sum + 4, v.z);
    add_pair_to(sum + 6, v.w);
  }
  NEFTUNE_DEVICE uint4 packed(const float* values) {
    return {Pair::pack(values[0], values[1]), Pair::pack(values[2], values[3]),
            Pair::pack(values[4], values[5]), Pair::pack(values[6], values[7])};
  }
};

struct BFloat16Pair {
  static constexpr uint32_t kNaN = 0x7FC07FC0u;
  NEFTUNE_DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  NEFTUNE_DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
  NEFTUNE_DEVICE uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

struct Float16Pair {
  static constexpr uint32_t kNaN = 0x7E007E00u;
  NEFTUNE_DEVICE float low(uint32_t pair) {
    return __low2float(reinterpret_cast<const __half2&>(pair));
  }
  NEFTUNE_DEVICE float high(uint32_t pair) {
    return __high2float(reinterpret_cast<const __half2&>(pair));
  }
  NEFTUNE_DEVICE uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

using BFloat16 = Sixteen<BFloat16Pair>;
using Float16 = Sixteen<Float16Pair>;

// ---- memory

NEFTUNE_DEVICE int64_t value_at(const Integers& values, int64_t index) {
  return values.wide ? static_cast<const int64_t*>(values.data)[index]
                     : static_cast<const int32_t*>(values.data)[index];
}

NEFTUNE_DEVICE const uint4* vectors(const void* values) {
  return static_cast<const uint4*>(values);
}
NEFTUNE_DEVICE uint4* vectors(void* values) { return static_cast<uint4*>(values); }

// ---- launches

#if defined(__CUDACC__) || defined(__HIPCC__)
template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, dim3 block, void* stream,
                   const Arguments& arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace
}  // namespace neftune_kernels
