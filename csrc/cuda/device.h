// The GPU of a call and its current stream, by torch's stable ABI.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>

#include "../tensors.h"

#define NEFTUNE_CUDA_DISPATCH_KEY CUDA

namespace neftune_kernels {
namespace {

// Kernels run on the tensor's GPU while it lives.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(index_of(tensor)), guard_(index_) {}

  void check(const Tensor& tensor, const char* name) const {
    if (!tensor.is_cuda() || tensor.get_device_index() != index_) {
      fail<std::runtime_error>(name, " must be on the GPU that the embeddings are on, device ",
                               index_);
    }
  }

  // Else kernels read it, and a CUDA graph records its address.
  static bool is_on_host(const Tensor& noise_alpha) { return noise_alpha.is_cpu(); }

  // Of all versions from 2.10 on, the function is in torch's CUDA library: looked up, as there is
  // none to link to beside a torch for CPUs.
  void* stream() const {
    static const auto current_stream = [] {
      using Function = int32_t (*)(int32_t, void**);
      for (const char* name : {"libtorch_cuda.so", "libtorch_hip.so"}) {
        if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) {
          return reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
        }
      }
      return Function{nullptr};
    }();
    void* stream = nullptr;
    if (!current_stream || current_stream(index_, &stream) != 0)
      fail<std::runtime_error>("torch does not tell its current CUDA stream");
    return stream;
  }

 private:
  static int32_t index_of(const Tensor& tensor) {
    if (!tensor.is_cuda())
      fail<std::runtime_error>("the embeddings must be on a GPU, as the other tensors are");
    return tensor.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace
}  // namespace neftune_kernels
