// A CUDA driver without a device: Triton's launcher runs against it. It refuses what a device of the
// compute capability in FAKE_CUDA_CAPABILITY refuses, and keeps the last launch for the test to read.
//   cc -shared -fPIC -I<triton>/backends/nvidia/include -o libcuda.so.1 driver.c
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

// Addresses of the stand-ins for CUDA tensors (fake_device.py); all others are the host's.
#define FIRST_ADDRESS (1ULL << 44)
#define LAST_ADDRESS (1ULL << 46)
// What a block may have without asking for more.
#define DEFAULT_SHARED (48 * 1024)

typedef struct {
  int dynamic_shared;
} Function;

typedef struct {
  long count;
  unsigned grid[3];
  unsigned threads;
  unsigned shared;
} Launch;

static Launch last;

static int capability(void) {
  const char *text = getenv("FAKE_CUDA_CAPABILITY");
  return text == NULL ? 0 : atoi(text);
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
static int shared_limit(void) {
  switch (capability()) {
    case 80: return 163 * 1024;
    case 90: return 227 * 1024;
    case 120: return 99 * 1024;
    default: return 0;
  }
}

const Launch *fake_last_launch(void) { return &last; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  const Function *f = (const Function *)function;
  const int empty = config->gridDimX == 0 || config->gridDimY == 0 || config->gridDimZ == 0;
  const int large =
      config->gridDimX > 0x7fffffff || config->gridDimY > 65535 || config->gridDimZ > 65535;
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (empty || large || threads == 0 || threads > 1024 || parameters == NULL ||
      config->sharedMemBytes > (unsigned)f->dynamic_shared) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  last.count += 1;
  last.grid[0] = config->gridDimX;
  last.grid[1] = config->gridDimY;
  last.grid[2] = config->gridDimZ;
  last.threads = threads;
  last.shared = config->sharedMemBytes;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (pointer < FIRST_ADDRESS || pointer >= LAST_ADDRESS) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)malloc(1);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *f = malloc(sizeof(Function));
  f->dynamic_shared = DEFAULT_SHARED;
  *function = (CUfunction)f;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > shared_limit()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  ((Function *)function)->dynamic_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability() / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability() % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit(); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = shared_limit() + 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "the fake driver refuses this";
  return CUDA_SUCCESS;
}

// One device, one context, no stream that captures.
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)&last, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return cuCtxGetCurrent(context);
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

// Triton's helper module names these; the kernels here use none of them.
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data,
                                CUdeviceptr pointer) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
