// Any CPU: no flags beyond the build's own.
#include "rows.h"

NEFTUNE_DEFINE_KERNELS(scalar, noisy_row)
