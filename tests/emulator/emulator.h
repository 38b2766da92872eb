// An emulator of a CUDA device: the names of csrc/adafm/cuda/device.cuh, so that the kernels' own
// source runs on the CPU.
//
// A block's threads are fibers of one system thread. Each runs until it waits for others (a
// barrier, or an instruction of its whole warp), then the next one runs, in an order chosen to
// expose what is not synchronised: always the lowest thread that can run, or always the highest. So
// one thread gets as far ahead of the rest as the barriers let it. Shared memory starts as NaN in
// every block, and asynchronous copies land only when their thread waits for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

namespace lemma_fast {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// The scheduler: emulator.cpp.
namespace emulator {
// Runs `body` as every thread of every block; nullptr, or what was wrong.
const char* run(dim3 blocks, int threads, void (*body)(void*), void* context);
// What all lanes of a warp do together: `combine` sees what each of the 32 brought.
using Combine = void (*)(void* const lanes[32]);
void with_warp(void* mine, Combine combine);
void barrier();
void* block_memory(size_t bytes);
void copy_later(void* to, const void* from);
void land_copies();
void run_highest_first(bool highest);
}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }
inline void copy_async(void* shared, const void* global) { emulator::copy_later(shared, global); }
inline void wait_for_copies() { emulator::land_copies(); }

template <class S>
S& shared_memory() {
  return *static_cast<S*>(emulator::block_memory(sizeof(S)));
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 blocks, int threads, void*,
                   const Arguments&... arguments) {
  auto body = [&] { kernel(arguments...); };
  return emulator::run(
      blocks, threads, [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // Shifted up, its exponent is short of fp32's by 112; that also makes subnormals right.
  const float magnitude = from_bits(rest << 13) * 0x1p112f;
  return from_bits(sign | (rest >= 0x7c00u ? 0x7f800000u | rest << 13 : bits_of(magnitude)));
}

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline float16 narrow<float16>(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (x != x) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Subnormal: adding one half rounds to multiples of 2^-24, to even.
    const uint32_t rounded = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  return {static_cast<uint16_t>(sign | (rounded - (112u << 10)))};
}

template <class T>
uint32_t pack(T low, T high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

inline float round_tf32(float x) {
  // To nearest, ties away from zero, as cvt.rna does.
  const uint32_t bits = bits_of(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? x : from_bits((bits + 0x1000u) & ~0x1fffu);
}

template <class Number>
Number exchange_with_lane(Number value, int mask) {
  struct Lane {
    Number value, received;
    int mask;
  } mine{value, value, mask};
  emulator::with_warp(&mine, [](void* const lanes[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Lane*>(lanes[lane]);
      to->received = static_cast<const Lane*>(lanes[lane ^ to->mask])->value;
    }
  });
  return mine.received;
}
inline float exchange(float value, int mask) { return exchange_with_lane(value, mask); }
inline double exchange(double value, int mask) { return exchange_with_lane(value, mask); }

// One lane's share of accumulator [16, 8] += a [16, K] b [K, 8], already widened: mma.m16n8kK
// spreads chunks of K / 8 neighbours over the four lanes of a row, in K / 2 registers' worth of
// numbers.
template <int K>
struct Mma {
  float* accumulator;
  // [register][neighbour]
  float a[4][K / 8], b[2][K / 8];

  static void combine(void* const lanes[32]) {
    constexpr int kNeighbours = K / 8;
    float a[16][K], b[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& from = *static_cast<const Mma*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < kNeighbours; ++i) {
        const int k = kNeighbours * t + i;
        a[g][k] = from.a[0][i];
        a[g + 8][k] = from.a[1][i];
        a[g][k + K / 2] = from.a[2][i];
        a[g + 8][k + K / 2] = from.a[3][i];
        b[k][g] = from.b[0][i];
        b[k + K / 2][g] = from.b[1][i];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* accumulator = static_cast<const Mma*>(lanes[lane])->accumulator;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < K; ++k) accumulator[i] += a[row][k] * b[k][column];
      }
    }
  }
};

template <class T>
void mma(float (&accumulator)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma<16> mine{accumulator, {}, {}};
  const auto half = [](uint32_t pair, int i) {
    return widen(T{static_cast<uint16_t>(pair >> 16 * i)});
  };
  for (int i = 0; i < 2; ++i) {
    for (int r = 0; r < 4; ++r) mine.a[r][i] = half(a[r], i);
    for (int r = 0; r < 2; ++r) mine.b[r][i] = half(b[r], i);
  }
  emulator::with_warp(&mine, Mma<16>::combine);
}

inline void mma_tf32(float (&accumulator)[4], const float (&a)[4], const float (&b)[2]) {
  Mma<8> mine{accumulator, {}, {}};
  // The tensor cores do not look at the lower 13 bits.
  const auto cut = [](float x) { return x != x ? x : from_bits(bits_of(x) & ~0x1fffu); };
  for (int r = 0; r < 4; ++r) mine.a[r][0] = cut(a[r]);
  for (int r = 0; r < 2; ++r) mine.b[r][0] = cut(b[r]);
  emulator::with_warp(&mine, Mma<8>::combine);
}

}  // namespace lemma_fast
