// The kernels that number documents, whose threads share memory, on random masks under
// ThreadSanitizer; compiled by tests/test_cuda_build.py.
#include <cstdlib>

#include "cuda_shim.h"
// after the shim
#include "cuda/kernels.cu"

int main() {
  using namespace neftune_kernels;
  neftune_shim_numbering(512, 256);
  for (int trial = 0; trial < 8; ++trial) {
    const int64_t rows = 1 + std::rand() % 4, columns = 1 + std::rand() % 700,
                  tokens = rows * columns, pieces = pieces_of(columns);
    std::vector<int64_t> mask(tokens);
    for (int64_t& value : mask) value = std::rand() % 3;
    std::vector<RowWords> words(rows + 1);
    std::vector<Entry> table(tokens);
    std::vector<int32_t> record(tokens);
    std::vector<Span> summary(rows * pieces);
    DocumentArguments arguments{};
    arguments.words = words.data();
    arguments.table = table.data();
    arguments.record = record.data();
    arguments.summary = summary.data();
    arguments.mask = {mask.data(), columns, 8, true, -1, INT64_MAX};
    arguments.position_ids = arguments.mask;
    arguments.numbered = UINT32_MAX;
    arguments.rows = rows;
    arguments.columns = columns;
    arguments.pieces = pieces;
    if (launch_number_documents(arguments, nullptr)) return 1;
  }
}
