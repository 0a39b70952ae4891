#define NEFTUNE_NEON
#include "rows.h"

NEFTUNE_DEFINE_KERNELS(neon)
