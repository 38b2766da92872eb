// AdaFM, the adaptive fusion module (LEMMA, eq. 7; lemma_fast.ops.reference.adafm is the
// specification): formulas and parameters, for the CPU and for CUDA. No torch here.
//
//   c = [features; BN(guidance)]
//   h_i = reduce_i c,   u_i = PReLU(BN(h_i)),   x_i = project_i u_i          i = 1, 2, 3
//   gate = sigmoid(W_3 relu(W_2 relu(W_1 GDW(x_1))))                         one number a channel
//   h_4 = reduce_4 (gate * x_2),   u_4 = PReLU(BN(h_4)),   x_4 = project_4 u_4
//   out = BN(f),   f = x_3 + x_4
//
// In code branch i has the index i - 1. Every matrix is a 1x1 convolution [outputs, inputs] with a
// bias, C x C (reduce_1 to reduce_3 take 2 C inputs); GDW is a depth-wise convolution as large as
// the map. Passes: inference folds every norm into a neighbouring matrix, so it is one pass up to
// the gate and one behind it. In training a norm needs the whole batch before anything goes on:
// cpu/forward.h, cpu/backward.h, cuda/forward.cu and cuda/backward.cu list the passes.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LEMMA_FAST_BOTH __host__ __device__ __forceinline__
#else
#define LEMMA_FAST_BOTH inline __attribute__((always_inline))
#endif

namespace lemma_fast::adafm {

constexpr double kEpsilon = 1e-5, kMomentum = 0.1;
constexpr int kBranches = 3;

// The batch norms in the order of their statistics.
enum NormIndex {
  kGuidanceNorm,
  kBranchNorm,
  kAggregateNorm = kBranchNorm + kBranches,
  kOutNorm,
  kNorms
};

// Pointers into one norm, one branch, all parameters; T is const for reading, plain for gradients.
// The members follow lemma_fast/ops/weights.py, so the whole is an array of kWeights pointers.
template <typename T>
struct Norm {
  T *weight, *bias, *mean, *variance;
};

template <typename T>
struct Branch {
  T *reduce_weight, *reduce_bias;
  Norm<T> norm;
  T* slope;
  T *project_weight, *project_bias;
};

template <typename T>
struct Weights {
  Norm<T> guidance_norm;
  Branch<T> branches[kBranches];
  T *global_weight, *global_bias;
  T *gate_weight1, *gate_bias1, *gate_weight2, *gate_bias2, *gate_weight3, *gate_bias3;
  Branch<T> aggregate;
  Norm<T> out_norm;
};

constexpr int kWeights = 52;
static_assert(sizeof(Weights<float>) == kWeights * sizeof(float*), "AdaFMWeights has 52 tensors");

// Index 3 is the aggregation, which has reduce_4 and project_4.
template <typename T>
LEMMA_FAST_BOTH const Branch<T>& branch_of(const Weights<T>& weights, int branch) {
  return branch < kBranches ? weights.branches[branch] : weights.aggregate;
}

template <typename T>
LEMMA_FAST_BOTH const Norm<T>& norm_of(const Weights<T>& weights, int index) {
  return index == kGuidanceNorm ? weights.guidance_norm
         : index == kOutNorm    ? weights.out_norm
                                : branch_of(weights, index - kBranchNorm).norm;
}

// NaN passes, as in PyTorch.
template <typename T>
LEMMA_FAST_BOTH T relu(T x) {
  return x < T(0) ? T(0) : x;
}

template <typename T>
LEMMA_FAST_BOTH T prelu(T x, T slope) {
  return x > T(0) ? x : slope * x;
}

template <typename T>
LEMMA_FAST_BOTH T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

// A norm is one product and one sum: x * scale + shift.
template <typename T>
LEMMA_FAST_BOTH T norm_scale(T weight, T variance) {
  return weight / std::sqrt(variance + T(kEpsilon));
}

template <typename T>
LEMMA_FAST_BOTH T norm_shift(T bias, T mean, T scale) {
  return bias - mean * scale;
}

// The folded parameters: the norms go into the matrices and biases around them, so that
//
//   u_i = PReLU(reduce_i [features; guidance] + bias),  x_i = project_i u_i + bias
//   out = project_3 u_3 + project_4 u_4 + bias
//
// One array for the CPU and for CUDA: matrices C x C in the order in which inference uses them,
// then the global convolution, then vectors [C]. Channels are padded with zeros to `width`. Inside,
// a matrix and the global weight lie as the machine wants them: [inputs, outputs] and [P, width] on
// the CPU, in the order of mma fragments (the gate's [inputs, outputs]) and [C, P] on CUDA.
//
//   0 1 reduce_1   2 project_1   |  3 4 reduce_2   5 project_2   6 reduce_4   7 project_4
//   8 9 reduce_3   10 project_3  |  11 12 13 the gate's
//
// Two matrices for the halves of c: features, then guidance.
LEMMA_FAST_BOTH constexpr int reduce_matrix(int branch) {
  return branch == 0 ? 0 : branch == 1 ? 3 : branch == 2 ? 8 : 6;
}
LEMMA_FAST_BOTH constexpr int project_matrix(int branch) {
  return branch == 0 ? 2 : branch == 1 ? 5 : branch == 2 ? 10 : 7;
}
constexpr int kGateMatrix = 11, kGateLayers = 3, kMatrices = kGateMatrix + kGateLayers;

// Biases of reduce_1 to reduce_3, of project_1 and project_2, of reduce_4, of f (project_3,
// project_4 and the last norm), of the global convolution and of the gate's layers; and PReLU's
// slopes.
enum VectorIndex {
  kReduceBias,
  kProjectBias = kReduceBias + kBranches,
  kAggregateBias = kProjectBias + 2,
  kLastBias,
  kGlobalBias,
  kGateBias,
  kSlopes = kGateBias + kGateLayers,
  kVectors
};

// Offsets are counted in numbers.
struct Folded {
  int64_t width, positions;

  LEMMA_FAST_BOTH int64_t matrix(int index) const { return index * width * width; }
  LEMMA_FAST_BOTH int64_t global() const { return matrix(kMatrices); }
  LEMMA_FAST_BOTH int64_t vectors() const { return global() + positions * width; }
  LEMMA_FAST_BOTH int64_t vector(int index) const { return vectors() + index * width; }
  LEMMA_FAST_BOTH int64_t size() const { return vector(kVectors); }
};

// Where a matrix lies among the parameters or their gradients, `row` from one output to the next,
// and which norms are folded into its outputs and inputs: kNorms for none.
template <typename T>
struct MatrixSource {
  T* data;
  int64_t row;
  int output_norm, input_norm;
};

template <typename T>
LEMMA_FAST_BOTH MatrixSource<T> matrix_source(const Weights<T>& weights, int64_t C, int matrix) {
  for (int i = 0; i <= kBranches; ++i) {
    const Branch<T>& branch = branch_of(weights, i);
    const int64_t inputs = i < kBranches ? 2 * C : C;
    if (matrix == reduce_matrix(i)) return {branch.reduce_weight, inputs, kBranchNorm + i, kNorms};
    if (i < kBranches && matrix == reduce_matrix(i) + 1) {
      return {branch.reduce_weight + C, inputs, kBranchNorm + i, kGuidanceNorm};
    }
    if (matrix == project_matrix(i)) {
      return {branch.project_weight, C, i < 2 ? kNorms : kOutNorm, kNorms};
    }
  }
  T* gate = matrix == kGateMatrix       ? weights.gate_weight1
            : matrix == kGateMatrix + 1 ? weights.gate_weight2
                                        : weights.gate_weight3;
  return {gate, C, kNorms, kNorms};
}

// The same of a vector: the sum of `data` and, where there is one, `second`.
template <typename T>
struct VectorSource {
  T *data, *second;
  int norm;
};

template <typename T>
LEMMA_FAST_BOTH VectorSource<T> vector_source(const Weights<T>& weights, int vector) {
  if (vector < kProjectBias) {
    const int branch = vector - kReduceBias;
    return {weights.branches[branch].reduce_bias, nullptr, kBranchNorm + branch};
  }
  if (vector < kAggregateBias) {
    return {weights.branches[vector - kProjectBias].project_bias, nullptr, kNorms};
  }
  if (vector == kAggregateBias) return {weights.aggregate.reduce_bias, nullptr, kAggregateNorm};
  if (vector == kLastBias) {
    return {weights.branches[2].project_bias, weights.aggregate.project_bias, kOutNorm};
  }
  T* data = vector == kGlobalBias     ? weights.global_bias
            : vector == kGateBias     ? weights.gate_bias1
            : vector == kGateBias + 1 ? weights.gate_bias2
                                      : weights.gate_bias3;
  return {data, nullptr, kNorms};
}

}  // namespace lemma_fast::adafm
