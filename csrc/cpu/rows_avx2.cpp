#define NEFTUNE_AVX2
#include "rows.h"

NEFTUNE_DEFINE_KERNELS(avx2)
