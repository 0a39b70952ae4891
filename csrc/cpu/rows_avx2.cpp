// Compiled with -mavx2 -mf16c; dispatch.cpp asks the CPU for the same.
#include "../compiler.h"

#if defined(NEFTUNE_X86_64)
#define NEFTUNE_AVX2
#include "rows.h"

NEFTUNE_DEFINE_KERNELS(avx2, noisy_row)
#endif
