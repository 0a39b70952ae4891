// The documents' kernel, whose threads share memory, on random masks under ThreadSanitizer;
// compiled by tests/test_cuda_build.py.
#include <cstdlib>

#include "cuda_shim.h"
// after the shim
#include "cuda/kernels.cu"

int main() {
  for (int trial = 0; trial < 20; ++trial) {
    const int64_t rows = 1 + std::rand() % 7, columns = 1 + std::rand() % 90,
                  tokens = rows * columns;
    std::vector<int64_t> mask(tokens), document(tokens), position(tokens), lengths(tokens);
    for (int64_t& value : mask) value = std::rand() % 3;
    neftune_kernels::DocumentArguments arguments{};
    arguments.document = document.data();
    arguments.position = position.data();
    arguments.lengths = lengths.data();
    arguments.mask = {mask.data(), columns, 1, 8, true, 0, 0};
    arguments.numbered = true;
    arguments.rows = rows;
    arguments.columns = columns;
    if (neftune_kernels::launch_number_documents(arguments, nullptr)) return 1;
  }
}
