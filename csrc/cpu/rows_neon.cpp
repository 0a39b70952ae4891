// Every AArch64 CPU has NEON: no flags.
#include "../compiler.h"

#if defined(NEFTUNE_AARCH64)
#define NEFTUNE_NEON
#include "rows.h"

NEFTUNE_DEFINE_KERNELS(neon, noisy_row)
#endif
