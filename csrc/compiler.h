// What g++, clang++ and MSVC say in different words. clang-cl speaks both languages and counts as
// clang; MSVC was never tried.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define NEFTUNE_X86_64
#elif defined(__aarch64__)
#define NEFTUNE_AARCH64
#endif

#if defined(_WIN32)
#define NEFTUNE_EXPORT extern "C" __declspec(dllexport)
#else
#define NEFTUNE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#if _MSC_VER < 1930
#error "Visual Studio 2022 or newer is needed: older ones contract x * step + e into an FMA"
#endif
#include <immintrin.h>
#include <math.h>
#include <string.h>
#define NEFTUNE_INLINE_STATIC static __forceinline
#define NEFTUNE_MEMBER __forceinline
#define __builtin_fabs fabs
#define __builtin_memcpy memcpy
#define __builtin_memset memset
#define __builtin_prefetch(address, write, locality) \
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1)
#else
#define NEFTUNE_INLINE_STATIC static inline __attribute__((always_inline))
#define NEFTUNE_MEMBER inline __attribute__((always_inline))
#endif
