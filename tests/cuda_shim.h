// csrc/cuda on the CPU, for the sanitizers: force-included by tests/test_cuda_build.py before
// kernels.cu, gradients.cu and ops.cpp, all compiled as C++.
//
// The threads of a block run one after another or, where they meet at barriers or in their warp, as
// fibers of one thread: each runs until it has to wait, and the sanitizers are told of every switch.
// neftune_shim_grid_limit makes grids smaller than the tokens, so that folds and strides over them
// count; neftune_shim_numbering does so for blocks that number documents.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define NEFTUNE_GRID_COLUMNS grid_limit
#define NEFTUNE_GRID_ROWS grid_limit
#define NEFTUNE_GRID_BLOCKS 0x7FFFFFFF
#define NEFTUNE_MANY_TOKENS many_tokens
#define NEFTUNE_SHORT_ROW short_row
#define NEFTUNE_ROW_TOKENS row_tokens
#define NEFTUNE_PIECE_TOKENS piece_tokens
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
struct uint2 {
  uint32_t x, y;
};
struct int2 {
  int32_t x, y;
};
struct int4 {
  int32_t x, y, z, w;
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

inline int64_t many_tokens = 4097, short_row = 64;
extern "C" inline __attribute__((visibility("default"), used)) void neftune_shim_many_tokens(
    int64_t tokens, int64_t row) {
  many_tokens = tokens;
  short_row = row;
}
inline int64_t grid_limit = 65535;
extern "C" inline __attribute__((visibility("default"), used)) void neftune_shim_grid_limit(
    int64_t limit) {
  grid_limit = limit;
}
inline bool backwards = false;  // blocks, and threads that do not meet, run last to first
extern "C" inline __attribute__((visibility("default"), used)) void neftune_shim_backwards(
    bool are_backwards) {
  backwards = are_backwards;
}
inline bool as_fibers = false;  // threads that do not meet, too
inline int64_t row_tokens = 4096, piece_tokens = 2048;
extern "C" inline __attribute__((visibility("default"), used)) void neftune_shim_numbering(
    int64_t row, int64_t piece) {
  row_tokens = row;
  piece_tokens = piece;
}

inline dim3 blockIdx, blockDim, gridDim;

// ---- threads of a block as fibers

namespace shim {

constexpr size_t kStack = 256 * 1024;
#define NOT_OF_THE_KERNEL __attribute__((no_sanitize("thread"), noinline)) inline

// Threads that wait for one another.
struct Group {
  uint32_t threads = 0, arrived = 0, generation = 0;
  uint64_t slots[2][32];  // what the lanes of a warp exchange, for every other time
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  bool is_done = false;
  void* sanitizer = nullptr;
};

inline std::vector<Fiber> fibers;
inline Fiber scheduler, *running = &scheduler;
inline Group block;
inline std::vector<Group> warps;
inline const std::function<void()>* body;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;

NOT_OF_THE_KERNEL dim3 thread() { return running->thread; }

NOT_OF_THE_KERNEL void enter(Fiber& from, Fiber& to, [[maybe_unused]] bool is_new = false) {
#ifdef __SANITIZE_ADDRESS__
  const bool back = &to == &scheduler;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(from.is_done ? nullptr : &fake,
                                 back ? scheduler_stack : to.stack.get(),
                                 back ? scheduler_stack_bytes : kStack);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.sanitizer, is_new ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&from.context, &to.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

NOT_OF_THE_KERNEL void first_entry() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  running->is_done = true;
#ifdef __SANITIZE_THREAD__
  __tsan_release(&block);
#endif
  enter(*running, scheduler);
}

NOT_OF_THE_KERNEL void wait(Group& group) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(&group);
#endif
  const uint32_t generation = group.generation;
  if (++group.arrived == group.threads) {
    group.arrived = 0;
    ++group.generation;
  } else {
    while (group.generation == generation) enter(*running, scheduler);
  }
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(&group);
#endif
}

NOT_OF_THE_KERNEL uint32_t steps() {
  uint32_t sum = block.generation;
  for (const Group& warp : warps) sum += warp.generation;
  return sum;
}

NOT_OF_THE_KERNEL uint64_t* slots_of(Group& warp) { return warp.slots[warp.generation % 2]; }
inline uint32_t index() { return thread().x + thread().y * blockDim.x; }

// Every lane's value.
template <class T>
const uint64_t* exchanged(uint32_t lanes, T value) {
  Group& warp = warps[index() / 32];
  uint64_t* slots = slots_of(warp);
  if (lanes != 0xFFFFFFFFu) std::abort();
  std::memcpy(&slots[index() % 32], &value, sizeof value);
  wait(warp);
  return slots;
}

template <class T>
T value_of(const uint64_t* slots, uint32_t lane) {
  T value;
  std::memcpy(&value, &slots[lane % 32], sizeof value);
  return value;
}

NOT_OF_THE_KERNEL void run_block(dim3 size, const std::function<void()>& kernel) {
  const uint32_t threads = size.x * size.y;
  if (fibers.size() < threads) fibers.resize(threads);
  body = &kernel;
  block.threads = threads;
  warps.resize((threads + 31) / 32);
  for (uint32_t i = 0; i < warps.size(); ++i)
    warps[i].threads = threads - 32 * i < 32 ? threads - 32 * i : 32;
  std::vector<bool> is_new(threads, true);
#ifdef __SANITIZE_THREAD__
  scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  for (uint32_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = {i % size.x, i / size.x, 0};
    fiber.is_done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, first_entry, 0);
#ifdef __SANITIZE_THREAD__
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
  for (uint32_t left = threads; left > 0;) {
    const uint32_t before = left, steps_before = steps();
    for (uint32_t i = 0; i < threads; ++i) {
      if (fibers[i].is_done) continue;
      running = &fibers[i];
      enter(scheduler, *running, is_new[i]);
      is_new[i] = false;
      left -= running->is_done;
    }
    if (left == before && steps() == steps_before) {
      std::fprintf(stderr, "threads wait for threads that never come\n");
      std::abort();
    }
  }
  running = &scheduler;
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(&block);
  for (uint32_t i = 0; i < threads; ++i) __tsan_destroy_fiber(fibers[i].sanitizer);
#endif
}

}  // namespace shim

#define threadIdx shim::thread()
inline void __syncthreads() { shim::wait(shim::block); }
inline uint32_t __ballot_sync(uint32_t lanes, bool is_set) {
  const uint64_t* slots = shim::exchanged(lanes, is_set);
  uint32_t bits = 0;
  for (uint32_t i = 0; i < 32; ++i) bits |= uint32_t{shim::value_of<bool>(slots, i)} << i;
  return bits;
}
template <class T>
T __shfl_sync(uint32_t lanes, T value, int lane) {
  return shim::value_of<T>(shim::exchanged(lanes, value), static_cast<uint32_t>(lane));
}
template <class T>
T __shfl_up_sync(uint32_t lanes, T value, uint32_t distance) {
  const uint32_t lane = shim::index() % 32;
  return shim::value_of<T>(shim::exchanged(lanes, value), lane < distance ? lane : lane - distance);
}
template <class T, class Join>
T reduced(uint32_t lanes, T value, Join join) {
  const uint64_t* slots = shim::exchanged(lanes, value);
  T sum = shim::value_of<T>(slots, 0);
  for (uint32_t i = 1; i < 32; ++i) sum = join(sum, shim::value_of<T>(slots, i));
  return sum;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T __reduce_add_sync(uint32_t lanes, T value) {
  return reduced(lanes, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(uint32_t lanes, T value) {
  return reduced(lanes, value, min<T>);
}
template <class T>
T __reduce_max_sync(uint32_t lanes, T value) {
  return reduced(lanes, value, max<T>);
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __clz(uint32_t bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }

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
inline float __fdiv_rn(float a, float b) { return a / b; }
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
struct TokenArguments;
struct GradientArguments;
inline bool meets(const DocumentArguments&) { return true; }
inline bool meets(const TokenArguments&) { return true; }
inline bool meets(const GradientArguments&) { return as_fibers; }
template <class RowArguments>
bool meets(const RowArguments& arguments) {
  return arguments.numbering.words != nullptr;  // and a warp counts the documents before
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, dim3 block, void*,
                   const Arguments& arguments) {
  gridDim = grid;
  blockDim = block;
  const std::function<void()> run = [&] { kernel(arguments); };
  const auto place = [](uint64_t number, uint64_t count, dim3 size) {
    const uint64_t i = backwards ? count - 1 - number : number;
    return dim3{static_cast<uint32_t>(i % size.x), static_cast<uint32_t>(i / size.x % size.y),
                static_cast<uint32_t>(i / size.x / size.y)};
  };
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = block.x * block.y;
  for (uint64_t i = 0; i < blocks; ++i) {
    blockIdx = place(i, blocks, grid);
    if (meets(arguments)) {
      shim::run_block(block, run);
      continue;
    }
    for (uint64_t j = 0; j < threads; ++j) {
      shim::running->thread = place(j, threads, block);
      run();
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
