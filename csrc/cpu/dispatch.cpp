#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(NEFTUNE_X86_64) && defined(_MSC_VER)
#include <intrin.h>
#elif defined(NEFTUNE_X86_64)
#include <cpuid.h>
#endif

namespace neftune_kernels {
namespace {

struct Level {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(NEFTUNE_X86_64) && defined(_MSC_VER)
// Bits of leaf 7, the first word's; what the system saves of the registers counts as well.
bool has(uint32_t leaf7, uint64_t saved) {
  int leaf[4];
  __cpuid(leaf, 0);
  if (leaf[0] < 7) return false;
  __cpuid(leaf, 1);
  constexpr uint32_t kOsXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr uint32_t kNeeded = kOsXsave | kAvx | kF16c;
  if ((uint32_t(leaf[2]) & kNeeded) != kNeeded || (_xgetbv(0) & saved) != saved) return false;
  __cpuidex(leaf, 7, 0);
  return (uint32_t(leaf[1]) & leaf7) == leaf7;
}
constexpr uint32_t kAvx2 = 1u << 5;
constexpr uint32_t kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
bool has_avx2() { return has(kAvx2, 0x06); }
bool has_avx512() { return has(kAvx2 | kAvx512, 0xE6); }
#elif defined(NEFTUNE_X86_64)
bool has_avx2() {
  unsigned eax, ebx, ecx, edx;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         (ecx & bit_F16C);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool always() { return true; }

// Best first.
constexpr Level kLevels[] = {
#if defined(NEFTUNE_X86_64)
#if !defined(_MSC_VER)
    {&kernels_avx512bf16, has_avx512bf16},
#endif
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
#elif defined(NEFTUNE_AARCH64)
    {&kernels_neon, always},
#endif
    {&kernels_scalar, always},
};

// nullptr as a name asks for the best.
const Kernels* find(const char* name) {
  for (const Level& level : kLevels) {
    if ((name == nullptr || std::strcmp(name, level.kernels->name) == 0) && level.supported())
      return level.kernels;
  }
  return nullptr;
}

// The variable counts as it was when the library was loaded; empty is unset.
const std::string requested = [] {
  const char* value = std::getenv("NEFTUNE_SIMD");
  return std::string(value ? value : "");
}();
std::atomic<const Kernels*> chosen{find(requested.empty() ? nullptr : requested.c_str())};

}  // namespace

const Kernels& current_kernels() {
  const Kernels* kernels = chosen.load(std::memory_order_relaxed);
  if (kernels) return *kernels;
  std::string names;
  for (const Level& level : kLevels) {
    if (level.supported()) names += (names.empty() ? "" : ", ") + std::string(level.kernels->name);
  }
  throw std::invalid_argument("NEFTUNE_SIMD=" + requested +
                              " is not an instruction set of this CPU and build; it has " + names);
}

}  // namespace neftune_kernels

// The level in use; "none" when NEFTUNE_SIMD asked for one that is missing.
NEFTUNE_EXPORT const char* neftune_kernels_simd_level() {
  const neftune_kernels::Kernels* kernels = neftune_kernels::chosen.load(std::memory_order_relaxed);
  return kernels ? kernels->name : "none";
}

// For tests and benchmarks: 0 when the level is now in use, 1 when this CPU or build lacks it.
NEFTUNE_EXPORT int neftune_kernels_set_simd_level(const char* name) {
  const neftune_kernels::Kernels* kernels = name ? neftune_kernels::find(name) : nullptr;
  if (!kernels) return 1;
  neftune_kernels::chosen.store(kernels, std::memory_order_relaxed);
  return 0;
}

// For the known-answer vectors: the counter in every lane of the current level, 7 or 10 rounds.
// Zeros if lanes disagree, for any other number of rounds, and without a level.
NEFTUNE_EXPORT void neftune_kernels_philox4x32(const uint32_t counter[4], const uint32_t key[2],
                                               int rounds, uint32_t out[4]) {
  const neftune_kernels::Kernels* kernels = neftune_kernels::chosen.load(std::memory_order_relaxed);
  if (!kernels || !kernels->philox(counter, key, rounds, out))
    out[0] = out[1] = out[2] = out[3] = 0;
}
