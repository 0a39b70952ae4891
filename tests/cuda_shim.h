// csrc/cuda on the CPU, for the sanitizers: force-included by tests/test_cuda.py before kernels.cu
// and ops.cpp, both compiled as C++.
//
// The threads of a block run one after another, or at once where the kernel has barriers.
// neftune_shim_grid_limit makes grids smaller than the tokens, so that folds and strides over them
// count.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define NEFTUNE_GRID_COLUMNS grid_limit
#define NEFTUNE_GRID_ROWS grid_limit
#define NEFTUNE_DOCUMENT_BLOCKS 3
#define NEFTUNE_DOCUMENT_THREADS 4
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(4) __nv_bfloat162 {
  uint16_t x, y;
};
struct alignas(4) __half2 {
  _Float16 x, y;
};

inline bool alpha_on_device = false;  // noise_alpha is taken for the device's
extern "C" inline __attribute__((visibility("default"), used)) void neftune_shim_alpha_on_device(
    bool on_device) {
  alpha_on_device = on_device;
}

inline int64_t grid_limit = 65535;
extern "C" inline __attribute__((visibility("default"), used)) void neftune_shim_grid_limit(
    int64_t limit) {
  grid_limit = limit;
}

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline std::barrier<>* block_barrier;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint16_t rounded_to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isnan(value) ? 0x7FFF
                           : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {rounded_to_bfloat16(low), rounded_to_bfloat16(high)};
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {static_cast<_Float16>(low), static_cast<_Float16>(high)};
}
inline float __low2float(__half2 pair) { return static_cast<float>(pair.x); }
inline float __high2float(__half2 pair) { return static_cast<float>(pair.y); }

namespace neftune_kernels {

struct DocumentArguments;
struct RowArguments;
inline bool has_barriers(const DocumentArguments&) { return true; }
inline bool has_barriers(const RowArguments&) { return false; }

template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, dim3 block, void*,
                   const Arguments& arguments) {
  gridDim = grid;
  blockDim = block;
  for (dim3 b{0, 0, 0}; b.z < grid.z; ++b.z) {
    for (b.y = 0; b.y < grid.y; ++b.y) {
      for (b.x = 0; b.x < grid.x; ++b.x) {
        std::barrier<> barrier(block.x * block.y);
        block_barrier = &barrier;
        std::vector<std::thread> threads;
        for (uint32_t y = 0; y < block.y; ++y) {
          for (uint32_t x = 0; x < block.x; ++x) {
            const auto run = [&, x, y, b] {
              threadIdx = {x, y, 0};
              blockIdx = b;
              kernel(arguments);
            };
            if (has_barriers(arguments)) {
              threads.emplace_back(run);
            } else {
              run();
            }
          }
        }
        for (std::thread& thread : threads) thread.join();
      }
    }
  }
  return nullptr;
}

}  // namespace neftune_kernels

#ifdef TORCH_TARGET_VERSION  // ops.cpp
#define NEFTUNE_CUDA_DISPATCH_KEY CPU
#include "../csrc/tensors.h"

namespace neftune_kernels {

struct Device {
  explicit Device(const Tensor&) {}
  void check(const Tensor& tensor, const char* name) const {
    if (!tensor.is_cpu()) fail<std::runtime_error>(name, " must be on the device of this test");
  }
  static bool is_on_host(const Tensor&) { return !alpha_on_device; }
  void* stream() const { return nullptr; }
};

}  // namespace neftune_kernels
#endif
