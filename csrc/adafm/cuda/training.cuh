// What the training passes are made of. forward.cu and backward.cu put them in order; the kernels
// are in conv1x1.cu, norm.cu, gate.cu and weight_gradients.cu.
//
// A map that is cheap to compute from another is never written: a Source says how, and whoever
// reads it computes it. So batch norms, PReLU, the gate and the backward passes of the norms have
// no maps of their own.
#pragma once

#include "adafm/cuda/launch.cuh"

namespace lemma_fast::adafm {

// The map f(scale[c] x[n, c, p] + second[c] z[n, c, p] + shift[c]) * gate[n, c], where f is the
// identity or PReLU. What is null is left out.
struct Source {
  const void* x = nullptr;
  const void* z = nullptr;
  const float *scale = nullptr, *second = nullptr, *shift = nullptr;
  const float* slope = nullptr;
  const float* gate = nullptr;
  // x is one fp32 map for all images.
  bool shared = false;
};

inline Source plain(const void* map) {
  Source source;
  source.x = map;
  return source;
}

template <class T, int Rows>
__device__ void read_source(const Source& source, const View<T, Rows>& view, int64_t image,
                            int channel, float (&values)[Rows]) {
  const int64_t map = image * view.channels * view.positions;
  if (channel >= view.channels) {
    for (int j = 0; j < Rows; ++j) values[j] = 0;
    return;
  }
  if (source.shared) {
    const View<float, Rows> wide = {view.first, view.positions, view.channels, false};
    const auto row = wide.load(static_cast<const float*>(source.x), channel);
    for (int j = 0; j < Rows; ++j) values[j] = row.values[j];
  } else {
    const auto row = view.load(static_cast<const T*>(source.x) + map, channel);
    for (int j = 0; j < Rows; ++j) values[j] = widen(row.values[j]);
  }
  if (source.scale) {
    const float scale = source.scale[channel], shift = source.shift[channel];
    for (int j = 0; j < Rows; ++j) values[j] = values[j] * scale + shift;
  }
  if (source.z) {
    const float second = source.second[channel];
    const auto row = view.load(static_cast<const T*>(source.z) + map, channel);
    for (int j = 0; j < Rows; ++j) values[j] += second * widen(row.values[j]);
  }
  if (source.slope) {
    for (int j = 0; j < Rows; ++j) values[j] = prelu(values[j], *source.slope);
  }
  if (source.gate) {
    const float gate = source.gate[image * view.channels + channel];
    for (int j = 0; j < Rows; ++j) values[j] *= gate;
  }
}

// What runs side by side in one launch.
template <class Item>
struct Group {
  Item items[kBranches];
  int count = 0;

  Item& add() { return items[count++]; }
};

// Per channel, a norm's statistics of one pass and what they make of it: x * scale + shift.
struct NormState {
  float *mean, *inverse_deviation, *scale, *shift;
};

// Partial results of a reduction over images and positions: [channel][part] of these.
struct Partial {
  float first, second, third;
};

// A 1x1 convolution: the sum of terms, each a matrix [outputs, inputs] (with any strides) times a
// source, plus biases.
struct Term {
  Source source;
  const float* matrix = nullptr;
  int output_stride = 0, input_stride = 0;
};

// What becomes of it, besides being written:
enum class After {
  kNothing,
  // Partials: mean, sum of squared deviations, count.
  kMoments,
  // With v = scale h + shift and h^ the normalised h of `hidden`: the gradient is taken back
  // through PReLU(v) where there is a slope, then partials: sum of gradient, of gradient h^, of the
  // slope's gradient.
  kGradients,
};

struct Conv1x1 {
  Term terms[3];
  int count = 0;
  const float *bias = nullptr, *second_bias = nullptr;
  void* out = nullptr;
  After after = After::kNothing;
  Partial* partials = nullptr;
  const void* hidden = nullptr;
  const float* slope = nullptr;
  NormState norm{};

  // A term with the matrix [outputs, inputs] as it is, or transposed: from the gradient of its
  // outputs to that of its inputs.
  void add(const Source& source, const float* matrix, int row) {
    terms[count++] = {source, matrix, row, 1};
  }
  void add_transposed(const Source& source, const float* matrix, int row) {
    terms[count++] = {source, matrix, 1, row};
  }
};

using Conv1x1Group = Group<Conv1x1>;
const char* launch_conv1x1(const CudaShape& shape, const Conv1x1Group& group, void* stream);
// Parts that a convolution divides each channel into.
int64_t conv1x1_parts(const CudaShape& shape);

// One part for each image: moments of `x`, or with `gradient` its sum and that of gradient x^.
struct Moments {
  const void *x = nullptr, *gradient = nullptr;
  NormState norm{};
  Partial* partials = nullptr;
};
const char* launch_moments(const CudaShape& shape, const Moments& moments, void* stream);

// From partials to a norm's state; updates running statistics where there are partials.
struct NormForward {
  Norm<float> norm;
  const Partial* partials = nullptr;
  int64_t parts = 0;
  NormState state{};
};
using NormForwards = Group<NormForward>;
const char* launch_norm_forward(const CudaShape& shape, const NormForwards& norms, void* stream);

// From partials to parameter gradients, and to dx = scale * gradient + second * x + shift.
struct NormBackward {
  const float* weight = nullptr;
  NormState state{};
  const Partial* partials = nullptr;
  int64_t parts = 0;
  float *scale = nullptr, *second = nullptr, *shift = nullptr;
  float *weight_gradient = nullptr, *bias_gradient = nullptr;
  // One number a channel of the slope's gradient, where there is one.
  float* slope_parts = nullptr;
};
using NormBackwards = Group<NormBackward>;
const char* launch_norm_backward(const CudaShape& shape, bool training, const NormBackwards& norms,
                                 void* stream);

// Writes a source as a map; over one that it reads is fine.
const char* launch_write(const CudaShape& shape, const Source& source, void* out, void* stream);

// The gate's values, [N, C] each: before the three layers, after the first two, and the gate; and
// in backward the gradients of the logits, of the two hidden layers' sums and of the pooled values.
struct GateState {
  float *pooled, *first, *second, *gate;
};
struct GateGradients {
  float *pooled, *first, *second, *logits;
};
const char* launch_gate_forward(const CudaShape& shape, const void* x1,
                                const Weights<const float>& weights, const GateState& state,
                                void* stream);
const char* launch_gate_backward(const CudaShape& shape, const void* product_gradient,
                                 const void* x2, const Weights<const float>& weights,
                                 const GateState& state, const GateGradients& gradients,
                                 void* stream);
// Gradients of the global convolution, of the gate's layers, and of the slopes from their parts,
// [4, C].
const char* launch_small_gradients(const CudaShape& shape, const void* x1, const GateState& state,
                                   const GateGradients& gate, const float* slope_parts,
                                   const Weights<float>& gradients, void* stream);

// A matrix's gradient: sums over images and positions of left[o] right[k], and of left[o] for the
// bias, where one is asked for.
struct WeightGradient {
  Source left, right;
  float* matrix = nullptr;
  int output_stride = 0;
  float* bias = nullptr;
};
// All but the gate's.
constexpr int kWeightGradients = kGateMatrix;
struct WeightGradients {
  WeightGradient products[kWeightGradients];
};
size_t weight_gradient_bytes(const CudaShape& shape);
const char* launch_weight_gradients(const CudaShape& shape, const WeightGradients& gradients,
                                    void* workspace, void* stream);

}  // namespace lemma_fast::adafm
