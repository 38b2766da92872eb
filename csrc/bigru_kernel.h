// One direction of a GRU for a handful of sequences at a time; written in terms of simd.h, see there.
//
// Lanes are hidden units, in blocks of 16 whatever the instruction set; a row of weights is read once
// for all sequences of a tile, whose three gates stay in registers over both products.

namespace lemma_fast {
namespace SIMD_NAMESPACE {

// Gates of a tile fill the registers: 3 x 8 of 32 with AVX-512, 3 x 4 of 16 otherwise.
constexpr int kTile = SIMD_LANES == 16 ? 8 : 4;

template <int S>
static void gru_step(const GruLayer& layer, const float* input, const float* state, float* next) {
  const long C = layer.channels, hidden = layer.hidden, padded = layer.padded;
  for (long unit = 0; unit < padded; unit += kLanes) {
    const float* bias = layer.weights + unit / 16 * layer.block + unit % 16;
    const float* weight = bias + 64;
    Vector r[S], z[S], n[S], from_input[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      r[s] = load(bias);
      z[s] = load(bias + 16);
      n[s] = load(bias + 32);
    }
    for (long c = 0; c < C; ++c, weight += 48) {
      const Vector to_r = load(weight), to_z = load(weight + 16), to_n = load(weight + 32);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        const float x = input[s * C + c];
        r[s] += to_r * x;
        z[s] += to_z * x;
        n[s] += to_n * x;
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      from_input[s] = n[s];
      n[s] = load(bias + 48);
    }
    for (long k = 0; k < hidden; ++k, weight += 48) {
      const Vector to_r = load(weight), to_z = load(weight + 16), to_n = load(weight + 32);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        const float h = state[s * padded + k];
        r[s] += to_r * h;
        z[s] += to_z * h;
        n[s] += to_n * h;
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      // Two sigmoids for one division: past 43 a sigmoid is 1 or 2e-19, and the product is finite.
      const Vector one_r = exponential(at_most(at_least(-r[s], -43.0f), 43.0f)) + 1.0f;
      const Vector one_z = exponential(at_most(at_least(-z[s], -43.0f), 43.0f)) + 1.0f;
      const Vector inverse = 1.0f / (one_r * one_z);
      const Vector candidate = hyperbolic_tangent(from_input[s] + one_z * inverse * n[s]);
      const Vector before = load(state + s * padded + unit);
      store(next + s * padded + unit, candidate + one_r * inverse * (before - candidate));
    }
  }
}

// Runs `layer` over S sequences: `input` and `output` point at each one's first step. `scratch` holds
// S * (channels + 2 * padded) floats.
template <int S>
static void gru_tile(
    const GruLayer& layer, const float* const* input, float* const* output, float* scratch) {
  const long C = layer.channels, padded = layer.padded;
  float* gathered = scratch;
  float* state = scratch + S * C;
  float* next = state + S * padded;
  for (long i = 0; i < S * padded; ++i) {
    state[i] = 0.0f;
  }
  for (long step = 0; step < layer.steps; ++step) {
    const long t = layer.backward ? layer.steps - 1 - step : step;
    for (int s = 0; s < S; ++s) {
      __builtin_memcpy(gathered + s * C, input[s] + t * layer.input_stride, C * sizeof(float));
    }
    gru_step<S>(layer, gathered, state, next);
    for (int s = 0; s < S; ++s) {
      __builtin_memcpy(
          output[s] + t * layer.output_stride, next + s * padded, layer.hidden * sizeof(float));
    }
    float* before = state;
    state = next;
    next = before;
  }
}

}  // namespace SIMD_NAMESPACE
}  // namespace lemma_fast
