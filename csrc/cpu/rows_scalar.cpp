#include "rows.h"

NEFTUNE_DEFINE_KERNELS(scalar)
