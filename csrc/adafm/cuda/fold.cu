// Fold the norms' running statistics into the matrices and biases around them, once for given
// parameters: one launch.

#include "adafm/cuda/folded.cuh"

namespace lemma_fast::adafm {
namespace {

// A norm of one channel: x * scale + shift.
struct Affine {
  float scale, shift;
};

__device__ Affine affine(const Weights<const float>& weights, int index, int c) {
  if (index == kNorms) return {1.0f, 0.0f};
  const Norm<const float>& norm = norm_of(weights, index);
  const float scale = norm_scale(norm.weight[c], norm.variance[c]);
  return {scale, norm_shift(norm.bias[c], norm.mean[c], scale)};
}

__device__ float folded_number(const Weights<const float>& weights, int channels, int matrix,
                               Entry entry) {
  const int o = entry.output, k = entry.input;
  if (o >= channels || k >= channels) return 0.0f;
  const auto from = matrix_source(weights, channels, matrix);
  return affine(weights, from.output_norm, o).scale * from.data[o * from.row + k] *
         affine(weights, from.input_norm, k).scale;
}

__device__ float folded_vector(const Weights<const float>& weights, int channels, int vector,
                               int c) {
  if (vector == kSlopes) return c <= kBranches ? *branch_of(weights, c).slope : 0.0f;
  if (c >= channels) return 0.0f;
  const auto from = vector_source(weights, vector);
  float sum = from.data[c];
  if (from.second) sum += from.second[c];
  if (vector - kReduceBias < kBranches) {
    // The shift of the guidance's norm goes through its half of the matrix.
    const auto half = matrix_source(weights, channels, reduce_matrix(vector - kReduceBias) + 1);
    for (int k = 0; k < channels; ++k) {
      sum += half.data[c * half.row + k] * affine(weights, kGuidanceNorm, k).shift;
    }
  }
  const Affine norm = affine(weights, from.norm, c);
  return norm.scale * sum + norm.shift;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const __grid_constant__ Weights<const float> weights, int channels,
                int64_t positions, FoldedPointers<T> to) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < kMatrices * kMatrix; i += step) {
    const int matrix = static_cast<int>(i / kMatrix), place = static_cast<int>(i % kMatrix);
    const Entry turned = {place % kChannels, place / kChannels};
    const Entry entry = matrix < kGateMatrix ? fragment_entry(place) : turned;
    to.matrices[i] = narrow<T>(folded_number(weights, channels, matrix, entry));
  }
  for (int64_t i = first; i < channels * positions; i += step) {
    to.global[i] = narrow<T>(weights.global_weight[i]);
  }
  for (int64_t i = first; i < kVectors * kChannels; i += step) {
    to.vectors[i] = folded_vector(weights, channels, static_cast<int>(i / kChannels),
                                  static_cast<int>(i % kChannels));
  }
}

}  // namespace

size_t folded_bytes(const CudaShape& shape) {
  const size_t number = shape.dtype == Dtype::float32 ? 4 : 2;
  return folded_layout(shape).vectors() * number + kVectors * kChannels * sizeof(float);
}

const char* fold_cuda(const CudaShape& shape, const Weights<const float>& weights, void* folded,
                      void* stream) {
  if (const char* error = refuse(shape)) return error;
  return dispatch_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    return launch(fold_kernel<T>, dim3(64), kThreads, stream, weights,
                  static_cast<int>(shape.channels), shape.positions,
                  folded_pointers<T>(shape, folded));
  });
}

}  // namespace lemma_fast::adafm
