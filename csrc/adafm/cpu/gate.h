// The gate of one image, forward and backward. With it known, project_2, the gate and reduce_4 are
// one matrix from u_2 to h_4.

#pragma once

#include "adafm/cpu/fold.h"

namespace lemma_fast::SIMD_LEVEL {

// What the global convolution gives in one image, from `parts` [tiles, padded(C)] of its sum.
template <class T>
void add_pooled(const Parameters<const T>& folded, const T* parts, int64_t tiles, T* pooled) {
  const int64_t width = folded.at.width;
  __builtin_memcpy(pooled, folded.vector(kGlobalBias), width * sizeof(T));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t c = 0; c < width; ++c) pooled[c] += parts[tile * width + c];
  }
}

// The gate's MLP: `layers` [3, padded(C)] are both hidden layers and the gate.
template <class T>
void make_gate(const Parameters<const T>& folded, const T* pooled, T* layers) {
  const int64_t width = folded.at.width;
  for (int layer = 0; layer < kGateLayers; ++layer) {
    T* out = layers + layer * width;
    product<T>({layer ? out - width : pooled, width, 1}, 1, folded.matrix(kGateMatrix + layer),
               width, out, width, width, width, folded.vector(kGateBias + layer));
    for (int64_t c = 0; c < width; ++c) out[c] = layer < 2 ? relu(out[c]) : sigmoid(out[c]);
  }
}

// What takes u_2 to h_4: the matrix [inputs, outputs] and, behind it, its bias; `gated` is space of
// the matrix's size.
template <class T>
void fold_gate(const Parameters<const T>& folded, const T* gate, T* gated, T* matrix) {
  const int64_t width = folded.at.width;
  __builtin_memcpy(gated, folded.matrix(reduce_matrix(kBranches)), width * width * sizeof(T));
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t o = 0; o < width; ++o) gated[c * width + o] *= gate[c];
  }
  product<T>({folded.matrix(project_matrix(1)), width, 1}, width, gated, width, matrix, width,
             width, width);
  product<T>({folded.vector(kProjectBias + 1), width, 1}, 1, gated, width, matrix + width * width,
             width, width, width, folded.vector(kAggregateBias));
}

// From the gradient `d_matrix` [outputs, inputs] of that matrix and, behind it, that of its bias:
// adds to the parameters' gradients `to`, and writes the gradient of `pooled`. `raw` has the
// matrices as [outputs, inputs]; `space` is for C * (C + 6).
template <class T>
void gate_backward(const Parameters<const T>& folded, const Parameters<const T>& raw,
                   const T* pooled, const T* layers, const T* d_matrix, T* space,
                   const Parameters<T>& to, T* d_pooled) {
  const int64_t width = folded.at.width;
  const T *gate = layers + 2 * width, *d_bias = d_matrix + width * width;
  const T *project = raw.matrix(project_matrix(1)), *bias = folded.vector(kProjectBias + 1);
  const T *project_turned = folded.matrix(project_matrix(1)),
          *aggregate = raw.matrix(reduce_matrix(kBranches));
  T *back = space, *back_bias = space + width * width, *d = back_bias + width;
  T *to_project = to.matrix(project_matrix(1)), *to_bias = to.vector(kProjectBias + 1);
  T *to_aggregate = to.matrix(reduce_matrix(kBranches)),
    *to_aggregate_bias = to.vector(kAggregateBias);
  // Through reduce_4, to the gradients of gate * (project_2 u_2 + bias).
  product<T>({aggregate, 1, width}, width, d_matrix, width, back, width, width, width);
  product<T>({d_bias, width, 1}, 1, aggregate, width, back_bias, width, width, width);
  for (int64_t c = 0; c < width; ++c) {
    T sum = back_bias[c] * bias[c];
    for (int64_t k = 0; k < width; ++k) {
      sum += back[c * width + k] * project[c * width + k];
      to_project[c * width + k] += gate[c] * back[c * width + k];
    }
    to_bias[c] += gate[c] * back_bias[c];
    d[c] = sum * gate[c] * (1 - gate[c]);
  }
  for (int64_t k = 0; k < width; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      back[k * width + c] = project_turned[k * width + c] * gate[c];
    }
  }
  product<T>({d_matrix, width, 1}, width, back, width, to_aggregate, width, width, width, nullptr,
             true);
  for (int64_t o = 0; o < width; ++o) {
    for (int64_t c = 0; c < width; ++c)
      to_aggregate[o * width + c] += d_bias[o] * gate[c] * bias[c];
    to_aggregate_bias[o] += d_bias[o];
  }
  for (int layer = 2; layer >= 0; --layer) {
    const T* input = layer ? layers + (layer - 1) * width : pooled;
    T* d_input = layer ? back_bias + (layer % 2 ? 2 : 3) * width : d_pooled;
    T *to_matrix = to.matrix(kGateMatrix + layer), *to_gate_bias = to.vector(kGateBias + layer);
    for (int64_t o = 0; o < width; ++o) {
      for (int64_t k = 0; k < width; ++k) to_matrix[o * width + k] += d[o] * input[k];
      to_gate_bias[o] += d[o];
    }
    product<T>({d, width, 1}, 1, raw.matrix(kGateMatrix + layer), width, d_input, width, width,
               width);
    // ReLU lets a gradient pass where its result is not zero, which is also where it is NaN.
    for (int64_t k = 0; layer && k < width; ++k) d_input[k] = input[k] <= 0 ? 0 : d_input[k];
    d = d_input;
  }
  for (int64_t c = 0; c < width; ++c) to.vector(kGlobalBias)[c] += d_pooled[c];
}

}  // namespace lemma_fast::SIMD_LEVEL
