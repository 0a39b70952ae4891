// What the kernels of every device know of a dtype. No torch here, and no code.
#pragma once

namespace neftune_kernels {

enum ElementType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kElementTypes = 3 };

}  // namespace neftune_kernels
