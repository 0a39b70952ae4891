// Which instruction set runs: the best this CPU has, or the one that NEFTUNE_SIMD or a test asks
// for.
#pragma once

#include "kernels.h"

namespace neftune_kernels {

// Throws std::invalid_argument when NEFTUNE_SIMD asks for what this CPU or build lacks.
const Kernels& current_kernels();

}  // namespace neftune_kernels
