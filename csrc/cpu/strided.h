// What the CPU's operators read of tensors of any strides.
#pragma once

#include <cstdint>
#include <vector>

#include "../tensors.h"

namespace neftune_kernels {
namespace {

// Elements per thread below which waking another thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

void check_cpu(const Tensor& tensor, const char* name) {
  if (!tensor.is_cpu()) fail<std::runtime_error>(name, " must be on the CPU");
}

// Element offsets of a tensor's first `axes` axes in row-major order; axes that step evenly are
// merged, which leaves one in most tensors.
class ElementOffsets {
 public:
  ElementOffsets(const Tensor& tensor, int64_t axes) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    for (int64_t axis = 0; axis < axes; ++axis) {
      if (sizes[axis] == 1) continue;
      if (!axes_.empty() && axes_.back().stride == strides[axis] * sizes[axis]) {
        axes_.back() = {axes_.back().size * sizes[axis], strides[axis]};
      } else {
        axes_.push_back({sizes[axis], strides[axis]});
      }
    }
    if (axes_.empty()) axes_.push_back({1, 0});
  }

  int64_t operator()(int64_t index) const {
    if (axes_.size() == 1) return index * axes_[0].stride;
    int64_t offset = 0;
    for (size_t axis = axes_.size(); axis-- > 0;) {
      offset += index % axes_[axis].size * axes_[axis].stride;
      index /= axes_[axis].size;
    }
    return offset;
  }

 private:
  struct Axis {
    int64_t size, stride;
  };
  std::vector<Axis> axes_;
};

// int32 or int64 tensor of any shape and strides, read in row-major order.
class StridedIntegers {
 public:
  StridedIntegers(const Tensor& tensor, const char* name)
      : offsets_(tensor, tensor.dim()), size_(tensor.numel()) {
    check_cpu(tensor, name);
    const ScalarType dtype = tensor.scalar_type();
    if (dtype != ScalarType::Long && dtype != ScalarType::Int) {
      fail<std::runtime_error>(name, " must be int32 or int64, got ",
                               torch::headeronly::toString(dtype));
    }
    wide_ = dtype == ScalarType::Long;
    data_ = tensor.const_data_ptr();
  }

  int64_t size() const { return size_; }
  int64_t operator[](int64_t index) const {
    const int64_t offset = offsets_(index);
    return wide_ ? static_cast<const int64_t*>(data_)[offset]
                 : static_cast<const int32_t*>(data_)[offset];
  }

 private:
  ElementOffsets offsets_;
  int64_t size_;
  const void* data_;
  bool wide_;
};

}  // namespace
}  // namespace neftune_kernels
