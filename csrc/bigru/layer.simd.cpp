#include "bigru/layer.h"

#include "simd/vector.h"

namespace lemma_fast::SIMD_LEVEL {
namespace {

constexpr int kWidth = kLanes<float>;
// Gates of a tile fill the registers: 3 x 8 of 32 with AVX-512, 3 x 4 of 16 otherwise.
constexpr int kTile = kWidth == 16 ? 8 : 4;

// accumulators += input [S, count] times rows of weights for r, z and n, which it moves past.
template <int S>
SIMD_INLINE void multiply(const float*& weight, const float* input, int64_t stride, int64_t count,
                          Vector<float> (&r)[S], Vector<float> (&z)[S], Vector<float> (&n)[S]) {
  for (int64_t k = 0; k < count; ++k, weight += 48) {
    const auto to_r = load(weight), to_z = load(weight + 16), to_n = load(weight + 32);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const float x = input[s * stride + k];
      r[s] += to_r * x;
      z[s] += to_z * x;
      n[s] += to_n * x;
    }
  }
}

template <int S>
void run_step(const GruLayer& layer, const float* input, const float* state, float* next) {
  const int64_t padded = layer.padded;
  for (int64_t unit = 0; unit < padded; unit += kWidth) {
    const float* bias = layer.weights + unit / 16 * layer.block + unit % 16;
    const float* weight = bias + 64;
    Vector<float> r[S], z[S], n[S], from_input[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      r[s] = load(bias);
      z[s] = load(bias + 16);
      n[s] = load(bias + 32);
    }
    multiply<S>(weight, input, layer.channels, layer.channels, r, z, n);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      from_input[s] = n[s];
      n[s] = load(bias + 48);
    }
    multiply<S>(weight, state, padded, layer.hidden, r, z, n);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      // Two sigmoids for one division: past 43 a sigmoid is 1 or 2e-19, and the product is finite.
      const auto one_r = exponential(at_most(at_least(-r[s], -43.0f), 43.0f)) + 1.0f;
      const auto one_z = exponential(at_most(at_least(-z[s], -43.0f), 43.0f)) + 1.0f;
      const auto inverse = 1.0f / (one_r * one_z);
      const auto candidate = hyperbolic_tangent(from_input[s] + one_z * inverse * n[s]);
      const auto before = load(state + s * padded + unit);
      store(next + s * padded + unit, candidate + one_r * inverse * (before - candidate));
    }
  }
}

template <int S>
void run_tile(const GruLayer& layer, const float* const* input, float* const* output,
              float* scratch) {
  const int64_t C = layer.channels, padded = layer.padded;
  float* gathered = scratch;
  float* state = scratch + S * C;
  float* next = state + S * padded;
  for (int64_t i = 0; i < S * padded; ++i) state[i] = 0.0f;
  for (int64_t step = 0; step < layer.steps; ++step) {
    const int64_t t = layer.backward ? layer.steps - 1 - step : step;
    for (int s = 0; s < S; ++s) {
      __builtin_memcpy(gathered + s * C, input[s] + t * layer.input_stride, C * sizeof(float));
    }
    run_step<S>(layer, gathered, state, next);
    for (int s = 0; s < S; ++s) {
      __builtin_memcpy(output[s] + t * layer.output_stride, next + s * padded,
                       layer.hidden * sizeof(float));
    }
    float* before = state;
    state = next;
    next = before;
  }
}

}  // namespace

extern const GruTiles gru_tiles{{kTile, run_tile<kTile>}, {kTile / 2, run_tile<kTile / 2>}};

}  // namespace lemma_fast::SIMD_LEVEL
