// What the kernels ask of the device: number types, warp instructions, shared memory, launches.
// tests/emulator/emulator.h has the same names for a run on the CPU, so the kernels keep to them.

#pragma once

#ifdef LEMMA_FAST_EMULATED
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lemma_fast {

using Stream = cudaStream_t;
using float16 = __half;
using bfloat16 = __nv_bfloat16;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(float16 x) { return __half2float(x); }
__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline float16 narrow<float16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two numbers in one register, `low` in the lower half.
__device__ inline uint32_t pack(float16 low, float16 high) {
  return __half_as_ushort(low) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
}
__device__ inline uint32_t pack(bfloat16 low, bfloat16 high) {
  return __bfloat16_as_ushort(low) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}

// `x` with the ten bits of mantissa that tf32 keeps.
__device__ inline float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// accumulator [16, 8] += a [16, k] b [k, 8], spread over a warp: PTX's mma.m16n8k16, and m16n8k8
// for tf32. tiles.cuh draws who holds what.
template <class T>
__device__ void mma(float (&accumulator)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void mma<float16>(float (&accumulator)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma<bfloat16>(float (&accumulator)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_tf32(float (&accumulator)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// Of all 32 lanes: the value of the lane whose number differs in the bits of `mask`.
__device__ inline float exchange(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline double exchange(double value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 16 bytes to shared memory, under way until this thread waits; a barrier shows them to others.
__device__ inline void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The block's one piece of shared memory.
template <class S>
__device__ S& shared_memory() {
  __shared__ __align__(16) unsigned char storage[sizeof(S)];
  return *reinterpret_cast<S*>(storage);
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 blocks, int threads, void* stream,
                   const Arguments&... arguments) {
  kernel<<<blocks, threads, 0, static_cast<Stream>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lemma_fast
#endif
