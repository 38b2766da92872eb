// The gate in training: global depth-wise convolution and MLP of each image, and their gradients.

#include "adafm/cuda/training.cuh"

namespace lemma_fast::adafm {
namespace {

struct GateShared {
  float input[kChannels], output[kChannels];
};

// out[c] = bias[c] + sum over positions of left[c] right[c]: a warp for each channel.
template <class L, class R>
__device__ void dot_rows(const L* left, const R* right, const float* bias, int channels,
                         int64_t positions, float* out) {
  const int lane = threadIdx.x % 32;
  for (int c = threadIdx.x / 32; c < channels; c += kWarps) {
    float sum = 0;
    for (int64_t p = lane; p < positions; p += 32) {
      sum += widen(left[c * positions + p]) * widen(right[c * positions + p]);
    }
    for (int mask = 1; mask < 32; mask *= 2) sum += exchange(sum, mask);
    if (lane == 0) out[c] = sum + (bias ? bias[c] : 0.0f);
  }
}

// A block for each image.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_forward_kernel(const T* x1, const __grid_constant__ Weights<const float> weights,
                        int channels, int64_t positions, GateState state) {
  auto& shared = shared_memory<GateShared>();
  const int64_t image = blockIdx.x, at = image * channels;
  dot_rows(weights.global_weight, x1 + at * positions, weights.global_bias, channels, positions,
           shared.input);
  __syncthreads();
  const int o = threadIdx.x;
  if (o < channels) state.pooled[at + o] = shared.input[o];
  const float* matrices[] = {weights.gate_weight1, weights.gate_weight2, weights.gate_weight3};
  const float* biases[] = {weights.gate_bias1, weights.gate_bias2, weights.gate_bias3};
  float* values[] = {state.first, state.second, state.gate};
#pragma unroll
  for (int layer = 0; layer < 3; ++layer) {
    float* input = layer % 2 ? shared.output : shared.input;
    float* output = layer % 2 ? shared.input : shared.output;
    if (o < channels) {
      float sum = biases[layer][o];
      for (int k = 0; k < channels; ++k) sum += matrices[layer][o * channels + k] * input[k];
      sum = layer < 2 ? relu(sum) : sigmoid(sum);
      values[layer][at + o] = sum;
      output[o] = sum;
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_backward_kernel(const T* product_gradient, const T* x2,
                         const __grid_constant__ Weights<const float> weights, int channels,
                         int64_t positions, GateState state, GateGradients gradients) {
  auto& shared = shared_memory<GateShared>();
  const int64_t image = blockIdx.x, at = image * channels;
  dot_rows(product_gradient + at * positions, x2 + at * positions, nullptr, channels, positions,
           shared.output);
  __syncthreads();
  const int k = threadIdx.x;
  if (k < channels) {
    const float gate = state.gate[at + k];
    shared.input[k] = shared.output[k] * gate * (1 - gate);
    gradients.logits[at + k] = shared.input[k];
  }
  __syncthreads();
  const float* matrices[] = {weights.gate_weight3, weights.gate_weight2, weights.gate_weight1};
  const float* values[] = {state.second, state.first, nullptr};
  float* targets[] = {gradients.second, gradients.first, gradients.pooled};
#pragma unroll
  for (int layer = 0; layer < 3; ++layer) {
    float* input = layer % 2 ? shared.output : shared.input;
    float* output = layer % 2 ? shared.input : shared.output;
    if (k < channels) {
      float sum = 0;
      for (int o = 0; o < channels; ++o) sum += matrices[layer][o * channels + k] * input[o];
      if (values[layer] && !(values[layer][at + k] > 0)) sum = 0;
      targets[layer][at + k] = sum;
      output[k] = sum;
    }
    __syncthreads();
  }
}

// A thread for each number: all of these are sums over the images, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    small_gradients_kernel(const T* x1, GateState state, GateGradients gate,
                           const float* slope_parts,
                           const __grid_constant__ Weights<float> gradients, int64_t images,
                           int channels, int64_t positions) {
  const int64_t C = channels;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < C * positions) {
    const int64_t c = i / positions;
    float sum = 0;
    for (int64_t n = 0; n < images; ++n) {
      sum += gate.pooled[n * C + c] * widen(x1[n * C * positions + i]);
    }
    gradients.global_weight[i] = sum;
    return;
  }
  i -= C * positions;
  const float* outputs[] = {gate.pooled, gate.first, gate.second, gate.logits};
  const float* inputs[] = {nullptr, state.pooled, state.first, state.second};
  float* biases[] = {gradients.global_bias, gradients.gate_bias1, gradients.gate_bias2,
                     gradients.gate_bias3};
  float* matrices[] = {nullptr, gradients.gate_weight1, gradients.gate_weight2,
                       gradients.gate_weight3};
  float* slopes[] = {gradients.branches[0].slope, gradients.branches[1].slope,
                     gradients.branches[2].slope, gradients.aggregate.slope};
#pragma unroll
  for (int layer = 0; layer < 4; ++layer) {
    if (layer > 0 && i / (C * C) == layer - 1) {
      const int64_t o = i / C % C, k = i % C;
      float sum = 0;
      for (int64_t n = 0; n < images; ++n) {
        sum += outputs[layer][n * C + o] * inputs[layer][n * C + k];
      }
      matrices[layer][i % (C * C)] = sum;
    }
    const int64_t bias = i - 3 * C * C - layer * C;
    if (bias >= 0 && bias < C) {
      float sum = 0;
      for (int64_t n = 0; n < images; ++n) sum += outputs[layer][n * C + bias];
      biases[layer][bias] = sum;
    }
    if (i == 3 * C * C + 4 * C + layer) {
      double sum = 0;
      for (int c = 0; c < channels; ++c) sum += slope_parts[layer * C + c];
      slopes[layer][0] = static_cast<float>(sum);
    }
  }
}

}  // namespace

const char* launch_gate_forward(const CudaShape& shape, const void* x1,
                                const Weights<const float>& weights, const GateState& state,
                                void* stream) {
  return dispatch_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    return launch(gate_forward_kernel<T>, grid_of(shape.images), kThreads, stream,
                  static_cast<const T*>(x1), weights, static_cast<int>(shape.channels),
                  shape.positions, state);
  });
}

const char* launch_gate_backward(const CudaShape& shape, const void* product_gradient,
                                 const void* x2, const Weights<const float>& weights,
                                 const GateState& state, const GateGradients& gradients,
                                 void* stream) {
  return dispatch_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    return launch(gate_backward_kernel<T>, grid_of(shape.images), kThreads, stream,
                  static_cast<const T*>(product_gradient), static_cast<const T*>(x2), weights,
                  static_cast<int>(shape.channels), shape.positions, state, gradients);
  });
}

const char* launch_small_gradients(const CudaShape& shape, const void* x1, const GateState& state,
                                   const GateGradients& gate, const float* slope_parts,
                                   const Weights<float>& gradients, void* stream) {
  return dispatch_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    const int64_t C = shape.channels, work = C * shape.positions + 3 * C * C + 4 * C + 4;
    return launch(small_gradients_kernel<T>, grid_of((work + kThreads - 1) / kThreads), kThreads,
                  stream, static_cast<const T*>(x1), state, gate, slope_parts, gradients,
                  shape.images, static_cast<int>(C), shape.positions);
  });
}

}  // namespace lemma_fast::adafm
