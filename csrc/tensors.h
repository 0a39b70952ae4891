// What the operators of every device ask of tensors. Only torch's stable ABI is used, so one
// library serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "element_type.h"

namespace neftune_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::invalid_argument becomes Python's ValueError, std::out_of_range IndexError,
// std::runtime_error RuntimeError.
template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

ElementType element_type(const Tensor& tensor, const char* name, const char* kernel) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      fail<std::runtime_error>(name, " must be float32, bfloat16 or float16 for the ", kernel,
                               ", got ", torch::headeronly::toString(tensor.scalar_type()),
                               "; the reference backend takes float64");
  }
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::vector<int64_t> embedded_shape(const Tensor& input_ids, const Tensor& weight) {
  if (weight.dim() != 2)
    fail<std::runtime_error>("weight must have shape (num_embeddings, embedding_dim), got ",
                             weight.dim(), " axes");
  std::vector<int64_t> shape = shape_of(input_ids);
  shape.push_back(weight.size(1));
  return shape;
}

// The bytes a tensor reaches: [first, second).
std::pair<uintptr_t, uintptr_t> extent(const Tensor& tensor) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis)
    last += (tensor.size(axis) - 1) * tensor.stride(axis);
  return {begin, begin + (last + 1) * tensor.element_size()};
}

bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto [a_begin, a_end] = extent(a);
  const auto [b_begin, b_end] = extent(b);
  return a_begin < b_end && b_begin < a_end;
}

// What is read for one row must not have been written with another.
void check_apart(const Tensor& out, const Tensor& read, const char* name) {
  if (overlap(out, read)) fail<std::runtime_error>("out must not overlap ", name);
}

inline void check_out(const Tensor& out, const Tensor& source, const char* source_name,
                      bool may_be_source, const std::vector<int64_t>& shape) {
  if (out.scalar_type() != source.scalar_type()) {
    fail<std::runtime_error>("out must have the dtype of ", source_name, ", ",
                             torch::headeronly::toString(source.scalar_type()), ", got ",
                             torch::headeronly::toString(out.scalar_type()));
  }
  if (shape_of(out) != shape) fail<std::runtime_error>("out must have the result's shape");
  if (!out.is_contiguous()) fail<std::runtime_error>("out must be contiguous");
  if (may_be_source && out.numel() > 0 && out.const_data_ptr() == source.const_data_ptr() &&
      source.is_contiguous())
    return;
  if (overlap(out, source)) {
    fail<std::runtime_error>("out must not overlap ", source_name,
                             may_be_source ? " unless it is the same tensor" : "");
  }
}

}  // namespace
}  // namespace neftune_kernels
