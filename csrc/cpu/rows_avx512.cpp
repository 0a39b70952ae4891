#define NEFTUNE_AVX512
#include "rows.h"

NEFTUNE_DEFINE_KERNELS(avx512)
