// Compiles SIMD_KERNEL, a header written in terms of simd.h, for each instruction set that the
// compiler knows, in the namespaces lemma_fast::plain, ::avx2 and ::avx512; `simd_lanes` chooses one
// at run time. Library headers must have been included before this one.

#define SIMD_NAMESPACE plain
#define SIMD_LANES 4
#include "simd.h"
#include SIMD_KERNEL
#undef SIMD_NAMESPACE
#undef SIMD_LANES

#if defined(__x86_64__)
#define LEMMA_FAST_X86 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define SIMD_NAMESPACE avx2
#define SIMD_LANES 8
#include "simd.h"
#include SIMD_KERNEL
#undef SIMD_NAMESPACE
#undef SIMD_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define SIMD_NAMESPACE avx512
#define SIMD_LANES 16
#include "simd.h"
#include SIMD_KERNEL
#undef SIMD_NAMESPACE
#undef SIMD_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

namespace lemma_fast {

// Floats in the widest vector that this machine has kernels for: 16, 8 or 4.
inline int simd_lanes() {
#ifdef LEMMA_FAST_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return 16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return 8;
  }
#endif
  return 4;
}

}  // namespace lemma_fast
