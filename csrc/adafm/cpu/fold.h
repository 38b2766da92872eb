// The folded parameters on the CPU.

#pragma once

#include "adafm/cpu/norm.h"

namespace lemma_fast::SIMD_LEVEL {

// Parameters, or their gradients, that lie as Folded says.
template <class T>
struct Parameters {
  T* data;
  Folded at;

  T* matrix(int index) const { return data + at.matrix(index); }
  T* vector(int index) const { return data + at.vector(index); }
  // The global convolution's weights from one position on.
  T* global(int64_t position) const { return data + at.global() + position * at.width; }
  T slope(int branch) const { return vector(kSlopes)[branch]; }
};

template <class T>
void scale_rows(T* matrix, int64_t width, const T* by_row, const T* by_column) {
  for (int64_t r = 0; r < width; ++r) {
    const T factor = by_row ? by_row[r] : T(1);
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      T* at = matrix + r * width + c;
      store(at, load(at) * (factor * load(by_column + c)));
    }
  }
}

// Fold norms in the form scale, shift: [kNorms, 2, padded(C)]. Matrices become [inputs, outputs].
template <class T>
void fold_norms(const Shape& shape, const Weights<const T>& weights, const T* norms, T* folded) {
  const int64_t C = shape.channels, width = padded(C), P = shape.positions;
  const Parameters<T> to{folded, folded_layout(shape)};
  const auto scale_of = [&](int norm) {
    return norm == kNorms ? nullptr : norms + 2 * norm * width;
  };
  if (width != C) fill(folded, to.at.size(), T(0));
  for (int m = 0; m < kMatrices; ++m) {
    const auto from = matrix_source(weights, C, m);
    transpose(from.data, from.row, C, C, to.matrix(m), width);
  }
  transpose(weights.global_weight, P, C, P, to.global(0), width);
  for (int v = 0; v < kSlopes; ++v) {
    const auto from = vector_source(weights, v);
    const T* scale = scale_of(from.norm);
    T* vector = to.vector(v);
    __builtin_memcpy(vector, from.data, C * sizeof(T));
    for (int64_t c = 0; from.second && c < C; ++c) vector[c] += from.second[c];
    if (v - kReduceBias < kBranches) {
      // The shift of the guidance's norm goes through its half of the matrix.
      product<T>({scale_of(kGuidanceNorm) + width, width, 1}, 1,
                 to.matrix(reduce_matrix(v - kReduceBias) + 1), width, vector, width, width, width,
                 nullptr, true);
    }
    for (int64_t c = 0; scale && c < width; ++c)
      vector[c] = vector[c] * scale[c] + scale[width + c];
  }
  for (int m = 0; m < kMatrices; ++m) {
    const auto from = matrix_source(weights, C, m);
    if (from.output_norm == kNorms) continue;
    scale_rows(to.matrix(m), width, scale_of(from.input_norm), scale_of(from.output_norm));
  }
  for (int i = 0; i <= kBranches; ++i) to.vector(kSlopes)[i] = *branch_of(weights, i).slope;
}

template <class T>
void fold(const Shape& shape, const Weights<const T>& weights, T* folded) {
  const int64_t width = padded(shape.channels);
  Buffer<T> statistics(2 * width), norms(kNorms * 2 * width);
  for (int index = 0; index < kNorms; ++index) {
    const Norm<const T>& norm = norm_of(weights, index);
    running<T>(norm, shape.channels, statistics);
    affine<T>(norm, shape.channels, statistics, norms + 2 * index * width);
  }
  fold_norms<T>(shape, weights, norms, folded);
}

// In training all norms but the guidance's are unknown before the passes: they are folded in as 1,
// 0.
template <class T>
void fold_guidance(const Shape& shape, const Weights<const T>& weights, const T* scale_shift,
                   T* folded) {
  const int64_t width = padded(shape.channels);
  Buffer<T> norms(kNorms * 2 * width);
  __builtin_memcpy(norms, scale_shift, 2 * width * sizeof(T));
  for (int i = kBranchNorm; i < kNorms; ++i) {
    fill<T>(norms + 2 * i * width, width, 1);
    fill<T>(norms + (2 * i + 1) * width, width, 0);
  }
  fold_norms<T>(shape, weights, norms, folded);
}

}  // namespace lemma_fast::SIMD_LEVEL
