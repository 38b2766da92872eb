// Vectors of floats for one instruction set: simd_targets.h includes this file, and the kernels that
// use it, once for each. So it has no include guard, and no library header is included here: their
// inline functions would be compiled for an instruction set that the machine may lack.
//
// SIMD_NAMESPACE names the instruction set, SIMD_LANES is the number of floats in a vector.

namespace lemma_fast {
namespace SIMD_NAMESPACE {

constexpr int kLanes = SIMD_LANES;

typedef float Vector __attribute__((vector_size(4 * SIMD_LANES)));
typedef int IntVector __attribute__((vector_size(4 * SIMD_LANES)));
typedef float LooseVector __attribute__((vector_size(4 * SIMD_LANES), aligned(4), may_alias));

static inline Vector load(const float* at) {
  return *reinterpret_cast<const LooseVector*>(at);
}

static inline void store(float* at, Vector value) {
  *reinterpret_cast<LooseVector*>(at) = value;
}

static inline Vector broadcast(float value) {
  return Vector{} + value;
}

// Comparisons with NaN are false: it comes out of both as it went in.
static inline Vector at_least(Vector x, float bound) {
  return x < bound ? broadcast(bound) : x;
}

static inline Vector at_most(Vector x, float bound) {
  return x > bound ? broadcast(bound) : x;
}

// e^x to 2 ulp for x in [-87, 88], which the caller sees to; NaN for NaN.
static inline Vector exponential(Vector x) {
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  const float round = 12582912.0f;
  const Vector shifted = x * 1.44269504f + round;
  const Vector whole = shifted - round;
  const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * (rest * rest) + rest + 1.0f;
  return series * (Vector)(((IntVector)shifted << 23) + 0x3f800000);
}

// tanh to a few ulp, odd by construction; NaN for NaN. The rational function is Eigen's.
static inline Vector hyperbolic_tangent(Vector x) {
  x = at_most(at_least(x, -7.90531110763549805f), 7.90531110763549805f);
  const Vector square = x * x;
  Vector above = square * -2.76076847742355e-16f + 2.00018790482477e-13f;
  above = above * square + -8.60467152213735e-11f;
  above = above * square + 5.12229709037114e-08f;
  above = above * square + 1.48572235717979e-05f;
  above = above * square + 6.37261928875436e-04f;
  above = (above * square + 4.89352455891786e-03f) * x;
  Vector below = square * 1.19825839466702e-06f + 1.18534705686654e-04f;
  below = below * square + 2.26843463243900e-03f;
  below = below * square + 4.89352518554385e-03f;
  return above / below;
}

// x tanh(log(1 + e^x)), which is x (e^2x + 2 e^x) / (e^2x + 2 e^x + 2); NaN for NaN.
static inline Vector mish(Vector x) {
  const Vector power = exponential(at_most(at_least(x, -87.0f), 20.0f));
  const Vector product = power * (power + 2.0f);
  return x * (product / (product + 2.0f));
}

}  // namespace SIMD_NAMESPACE
}  // namespace lemma_fast
