// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl; dispatch.cpp asks the CPU for the same.
#include "../compiler.h"

#if defined(NEFTUNE_X86_64)
#define NEFTUNE_AVX512
#include "rows.h"

NEFTUNE_DEFINE_KERNELS(avx512, noisy_row)
#endif
