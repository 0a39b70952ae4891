/* A CUDA driver that computes nothing and writes every launch down, in the place of libcuda.so.1.

   Compiled against the cuda.h of the triton wheel; see tests/launcher_calls.py. It does what
   Triton's own driver.c and launcher ask of a driver: two devices of compute capability 9.0, a
   context for each, one function per loaded module. The number and the sizes of a kernel's
   parameters come from its cubin, as a real driver's do: section .nv.info.<kernel>, records of
   attribute 0x17. */
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <string.h>

#define MOST_FUNCTIONS 4096
#define MOST_LAUNCHES 4096
#define MOST_PARAMETERS 64

typedef struct {
  int count;
  int sizes[MOST_PARAMETERS];
} Parameters;

typedef struct { /* Launch of launcher_calls.py */
  uint64_t function, stream;
  int32_t device;
  uint32_t grid[3], block[3], shared_bytes, attributes;
  int32_t count;
  int32_t sizes[MOST_PARAMETERS];
  uint8_t bytes[MOST_PARAMETERS][8];
} Launch;

Launch launches[MOST_LAUNCHES];
int launched;

static Parameters functions[MOST_FUNCTIONS];
static int loaded;
static uintptr_t current = 1; /* context: device + 1 */

static CUresult record(CUfunction f, const CUlaunchConfig* config, void** values) {
  uintptr_t handle = (uintptr_t)f;
  if (handle == 0 || handle > (uintptr_t)loaded) return CUDA_ERROR_INVALID_HANDLE;
  if (launched == MOST_LAUNCHES) return CUDA_ERROR_OUT_OF_MEMORY;
  const Parameters* parameters = &functions[handle - 1];
  Launch* launch = &launches[launched++];
  memset(launch, 0, sizeof *launch);
  launch->function = handle;
  launch->stream = (uint64_t)(uintptr_t)config->hStream;
  launch->device = (int32_t)current - 1;
  launch->grid[0] = config->gridDimX, launch->grid[1] = config->gridDimY,
  launch->grid[2] = config->gridDimZ;
  launch->block[0] = config->blockDimX, launch->block[1] = config->blockDimY,
  launch->block[2] = config->blockDimZ;
  launch->shared_bytes = config->sharedMemBytes;
  launch->attributes = config->numAttrs;
  launch->count = parameters->count;
  for (int i = 0; i < parameters->count; i++) {
    launch->sizes[i] = parameters->sizes[i];
    memcpy(launch->bytes[i], values[i], (size_t)parameters->sizes[i]);
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** values, void** extra) {
  return extra ? CUDA_ERROR_INVALID_VALUE : record(f, config, values);
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream stream, void** values,
                        void** extra) {
  CUlaunchConfig config = {gx, gy, gz, bx, by, bz, shared, stream, NULL, 0};
  return extra ? CUDA_ERROR_INVALID_VALUE : record(f, &config, values);
}

static CUresult read_parameters(const uint8_t* at, const uint8_t* end, Parameters* parameters) {
  while (at < end) {
    uint16_t size = 0;
    if (at[0] == 4) memcpy(&size, at + 2, 2); /* the only format whose value follows the record */
    if (at[0] == 4 && at[1] == 0x17) {
      uint16_t ordinal;
      uint32_t flags;
      memcpy(&ordinal, at + 8, 2);
      memcpy(&flags, at + 12, 4);
      if (ordinal >= MOST_PARAMETERS || flags >> 18 > 8) return CUDA_ERROR_INVALID_IMAGE;
      parameters->sizes[ordinal] = (int)(flags >> 18);
      if (ordinal >= parameters->count) parameters->count = ordinal + 1;
    }
    at += 4 + size;
  }
  return parameters->count ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  const uint8_t* image = (const uint8_t*)module;
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* section = (const Elf64_Shdr*)(image + header->e_shoff);
  const char* names = (const char*)image + section[header->e_shstrndx].sh_offset;
  if (loaded == MOST_FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  for (int i = 0; i < header->e_shnum; i++) {
    const char* section_name = names + section[i].sh_name;
    if (strncmp(section_name, ".nv.info.", 9) == 0 && strcmp(section_name + 9, name) == 0) {
      const uint8_t* info = image + section[i].sh_offset;
      *f = (CUfunction)(uintptr_t)(loaded + 1);
      return read_parameters(info, info + section[i].sh_size, &functions[loaded++]);
    }
  }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = (uintptr_t)context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = (int)current - 1, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)(uintptr_t)(device + 1), CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 2, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  return (void)error, *text = "refused by tests/fake_libcuda.c", CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return (void)attribute, memcpy(value, &pointer, sizeof pointer), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  return (void)f, *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0,
                  CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR            ? 9
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR          ? 0
           : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                         ? 32
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
                                                                                : 1;
  return CUDA_SUCCESS;
}
