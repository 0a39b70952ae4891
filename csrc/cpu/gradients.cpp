// The weight's gradient of a lookup: the rows of the output's gradient, grouped by id and added in
// the order of their tokens. No atomics: a thread owns what it writes, so threads change no bit.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "strided.h"

namespace neftune_kernels {
namespace {

constexpr int kDigitBits = 11;  // counts of a digit fit the first-level cache

struct Token {
  int64_t id, offset;  // elements from the gradient's first to the token's row
};

// Stable, by id: least significant digit first.
void sort_by_id(std::vector<Token>& tokens, int64_t num_embeddings) {
  std::vector<Token> sorted(tokens.size());
  for (int shift = 0; shift < 63 && (num_embeddings - 1) >> shift > 0; shift += kDigitBits) {
    constexpr int64_t kDigits = int64_t{1} << kDigitBits;
    const auto digit = [&](const Token& token) { return token.id >> shift & (kDigits - 1); };
    std::vector<int64_t> places(kDigits + 1);
    for (const Token& token : tokens) ++places[digit(token) + 1];
    for (int64_t i = 0; i < kDigits; ++i) places[i + 1] += places[i];
    for (const Token& token : tokens) sorted[places[digit(token)]++] = token;
    std::swap(tokens, sorted);
  }
}

// The tokens that count, as groups of one id.
struct Groups {
  std::vector<int64_t> offsets;  // of all tokens, sorted
  std::vector<int64_t> ids;      // of the groups
  std::vector<int64_t> starts;   // (groups + 1,) into the offsets
};

Groups group_by_id(const Tensor& grad, const Tensor& input_ids, int64_t num_embeddings,
                   int64_t padding_idx) {
  const StridedIntegers ids(input_ids, "input_ids");
  const ElementOffsets offset_of(grad, grad.dim() - 1);
  std::vector<Token> tokens;
  tokens.reserve(ids.size());
  for (int64_t token = 0; token < ids.size(); ++token) {
    const int64_t id = ids[token];
    if (id < 0 || id >= num_embeddings) {
      fail<std::out_of_range>("input_ids must lie in [0, num_embeddings = ", num_embeddings,
                              "), got ", id);
    }
    if (id != padding_idx) tokens.push_back({id, offset_of(token)});
  }
  sort_by_id(tokens, num_embeddings);
  Groups groups;
  groups.offsets.reserve(tokens.size());
  for (const Token& token : tokens) {
    if (groups.ids.empty() || groups.ids.back() != token.id) {
      groups.ids.push_back(token.id);
      groups.starts.push_back(static_cast<int64_t>(groups.offsets.size()));
    }
    groups.offsets.push_back(token.offset);
  }
  groups.starts.push_back(static_cast<int64_t>(groups.offsets.size()));
  return groups;
}

void check(const Tensor& grad, const Tensor& input_ids, const Tensor& out) {
  check_cpu(grad, "grad");
  check_cpu(out, "out");
  std::vector<int64_t> shape = shape_of(input_ids);
  if (out.dim() != 2)
    fail<std::runtime_error>("out must have shape (num_embeddings, embedding_dim), got ", out.dim(),
                             " axes");
  shape.push_back(out.size(1));
  if (shape_of(grad) != shape)
    fail<std::runtime_error>("grad must have the shape of input_ids and then out's embedding_dim");
  if (out.scalar_type() != grad.scalar_type()) {
    fail<std::runtime_error>("out must have the dtype of grad, ",
                             torch::headeronly::toString(grad.scalar_type()), ", got ",
                             torch::headeronly::toString(out.scalar_type()));
  }
  if (!out.is_contiguous()) fail<std::runtime_error>("out must be contiguous");
  if (grad.size(grad.dim() - 1) > 1 && grad.stride(grad.dim() - 1) != 1)
    fail<std::runtime_error>("grad must have consecutive columns");
  check_apart(out, grad, "grad");
  check_apart(out, input_ids, "input_ids");
}

// Writes the rows whose ids occur, but for padding_idx; the others keep what they hold.
void embedding_gradient_out(Tensor grad, Tensor input_ids, int64_t padding_idx, double embed_scale,
                            bool scale_grad_by_freq, Tensor out) {
  check(grad, input_ids, out);
  const ElementType type = element_type(grad, "grad", "C++ kernel");
  const SumFunction sum = current_kernels().sums[type];
  const int64_t embedding_dim = out.size(1), size = grad.element_size();
  const Groups groups = group_by_id(grad, input_ids, out.size(0), padding_idx);
  const int64_t tokens = static_cast<int64_t>(groups.offsets.size());
  if (tokens == 0 || embedding_dim == 0) return;
  // A hot id is shared by threads, as strips of its columns: a group's strips lie one behind the
  // other on a line on which each is as long as the tokens that it adds.
  const int64_t strips = (embedding_dim + kSumColumns - 1) / kSumColumns;
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / std::min<int64_t>(embedding_dim, kSumColumns));
  const char* source = static_cast<const char*>(grad.const_data_ptr());
  char* rows = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, tokens * strips, grain, [&](int64_t begin, int64_t end) {
    const auto first =
        std::upper_bound(groups.starts.begin(), groups.starts.end(), begin / strips) - 1;
    for (int64_t group = first - groups.starts.begin();
         group < static_cast<int64_t>(groups.ids.size()); ++group) {
      const int64_t start = groups.starts[group], count = groups.starts[group + 1] - start;
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t place = start * strips + strip * count, column = strip * kSumColumns;
        if (place < begin) continue;  // another thread's
        if (place >= end) return;
        sum({source + column * size, groups.offsets.data() + start, count,
             std::min(kSumColumns, embedding_dim - column), embed_scale,
             scale_grad_by_freq ? static_cast<double>(count) : 1.0,
             rows + (groups.ids[group] * embedding_dim + column) * size});
      }
    }
  });
}

}  // namespace
}  // namespace neftune_kernels

STABLE_TORCH_LIBRARY_IMPL(neftune_kernels, CPU, m) {
  m.impl("embedding_gradient.out", TORCH_BOX(&neftune_kernels::embedding_gradient_out));
}
