// What Python asks of the library itself, by ctypes: lemma_fast/ops/extension.py.

#include <cstdint>

#include "adafm/cuda/passes.h"
#include "simd/dispatch.h"

#ifndef LEMMA_FAST_BUILD_INFO
#define LEMMA_FAST_BUILD_INFO "{}"
#endif
#define LEMMA_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// What was compiled, as JSON; setup.py fills it in.
LEMMA_FAST_EXPORT const char* lemma_fast_build_info() { return LEMMA_FAST_BUILD_INFO; }

// The instructions that the operations on the CPU take; null where LEMMA_FAST_CPU names none.
LEMMA_FAST_EXPORT const char* lemma_fast_cpu_level() { return lemma_fast::cpu_level_name(); }

// The most channels that AdaFM takes on CUDA.
LEMMA_FAST_EXPORT int64_t lemma_fast_adafm_max_cuda_channels() {
  return lemma_fast::adafm::kMaxCudaChannels;
}
