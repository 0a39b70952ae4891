// Every AArch64 CPU has NEON: no flags.
#define NEFTUNE_NEON
#include "rows.h"

NEFTUNE_DEFINE_KERNELS(neon, noisy_row)
