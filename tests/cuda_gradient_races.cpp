// The kernels of the weight's gradient under ThreadSanitizer: a fiber to each thread, that none waits
// for; compiled by tests/test_cuda_build.py.
#include <algorithm>
#include <cstdlib>

#include "cuda_shim.h"
// after the shim
#include "cuda/gradients.cu"

int main() {
  using namespace neftune_kernels;
  as_fibers = true;
  for (int trial = 0; trial < 4; ++trial) {
    const int64_t tokens = 1 + std::rand() % 90, rows = 1 + std::rand() % 5, chunk = 4,
                  columns = trial % 2 ? 8 : 264;
    std::vector<int32_t> ids(tokens);
    for (int32_t& id : ids) id = std::rand() % rows;
    std::sort(ids.begin(), ids.end());
    std::vector<int64_t> order(tokens);
    for (int64_t i = 0; i < tokens; ++i) order[i] = i;
    std::vector<float> grad(tokens * columns, 1.0f), out(rows * columns);
    std::vector<float> scratch(2 * ((tokens + chunk - 1) / chunk) * columns);
    GradientArguments arguments{};
    arguments.out = out.data();
    arguments.scratch = scratch.data();
    arguments.grad = grad.data();
    arguments.ids = {ids.data(), false};
    arguments.order = order.data();
    arguments.vectors = true;
    arguments.scale = 1.0f;
    arguments.grad_row = columns * sizeof(float);
    arguments.tokens = tokens;
    arguments.chunk = chunk;
    arguments.embedding_dim = columns;
    arguments.num_embeddings = rows;
    arguments.padding_idx = -1;
    if (launch_gradient(arguments, kFloat32, nullptr)) return 1;
    for (int64_t id = 0; id < rows; ++id) {
      if (out[id * columns] != static_cast<float>(std::count(ids.begin(), ids.end(), id))) return 2;
    }
  }
}
