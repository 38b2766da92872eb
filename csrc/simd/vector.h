// Vectors of floats or doubles for one level (see dispatch.h), and functions of them.

#pragma once

#include <cstdint>

#ifndef SIMD_LEVEL
#error "a *.simd.cpp is compiled with -DSIMD_LEVEL=baseline, avx2 or avx512: see setup.py"
#endif
#define SIMD_INLINE inline __attribute__((always_inline))

namespace lemma_fast::SIMD_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  // As many integers of the same size.
  using Index = decltype(Vector{} < Vector{});
  // The same in memory, where it may lie anywhere.
  typedef T Loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};

template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
SIMD_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Loose*>(from);
}

template <class T>
SIMD_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename Simd<T>::Loose*>(to) = value;
}

// Comparisons with NaN are false: it comes out of both as it went in.
SIMD_INLINE Vector<float> at_least(Vector<float> x, float bound) {
  return x < bound ? Vector<float>{} + bound : x;
}

SIMD_INLINE Vector<float> at_most(Vector<float> x, float bound) {
  return x > bound ? Vector<float>{} + bound : x;
}

// e^x to 2 ulp for x in [-87, 88], which the caller sees to; NaN for NaN.
SIMD_INLINE Vector<float> exponential(Vector<float> x) {
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  const float round = 12582912.0f;
  const Vector<float> shifted = x * 1.44269504f + round;
  const Vector<float> whole = shifted - round;
  const Vector<float> rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector<float> series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * (rest * rest) + rest + 1.0f;
  return series * (Vector<float>)(((Simd<float>::Index)shifted << 23) + 0x3f800000);
}

// tanh to a few ulp, odd by construction; NaN for NaN. The rational function is Eigen's.
SIMD_INLINE Vector<float> hyperbolic_tangent(Vector<float> x) {
  x = at_most(at_least(x, -7.90531110763549805f), 7.90531110763549805f);
  const Vector<float> square = x * x;
  Vector<float> above = square * -2.76076847742355e-16f + 2.00018790482477e-13f;
  above = above * square + -8.60467152213735e-11f;
  above = above * square + 5.12229709037114e-08f;
  above = above * square + 1.48572235717979e-05f;
  above = above * square + 6.37261928875436e-04f;
  above = (above * square + 4.89352455891786e-03f) * x;
  Vector<float> below = square * 1.19825839466702e-06f + 1.18534705686654e-04f;
  below = below * square + 2.26843463243900e-03f;
  below = below * square + 4.89352518554385e-03f;
  return above / below;
}

// x tanh(log(1 + e^x)), which is x (e^2x + 2 e^x) / (e^2x + 2 e^x + 2); NaN for NaN.
SIMD_INLINE Vector<float> mish(Vector<float> x) {
  const Vector<float> power = exponential(at_most(at_least(x, -87.0f), 20.0f));
  const Vector<float> product = power * (power + 2.0f);
  return x * (product / (product + 2.0f));
}

}  // namespace lemma_fast::SIMD_LEVEL
