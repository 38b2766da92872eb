// Arithmetic and parameters of AdaFM (SPEC.md section 5), for host and device; no torch here.
//
//   c = concat(features, BN(guidance));  h_i = reduce_i(c);  u_i = PReLU(BN(h_i))
//   x_i = project_i(u_i), i = 1, 2, 3
//   gate = sigmoid(MLP(GDW(x_1)));  h_4 = reduce_4(gate * x_2), u_4 = PReLU(BN(h_4))
//   out = BN(x_3 + project_4(u_4))

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LEMMA_FAST_BOTH __host__ __device__ __forceinline__
#else
#define LEMMA_FAST_BOTH inline __attribute__((always_inline))
#endif

namespace lemma_fast {
namespace adafm {

constexpr double kEpsilon = 1e-5, kMomentum = 0.1;
constexpr int kBranches = 3;

// The batch norms in the order of their statistics.
enum NormIndex { kGuidanceNorm, kBranchNorm, kAggregateNorm = kBranchNorm + kBranches, kOutNorm, kNorms };

// Pointers into one norm, one branch, all parameters; T is const for reading, plain for gradients.
// The members follow lemma_fast/ops/weights.py, so the whole is an array of kWeights pointers, and
// matrices are [outputs, inputs].
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

// Everything that inference needs but the global convolution's weight, with the norms folded in:
//
//   u = PReLU(reduce [features; guidance] + reduce_bias)   [3 C], slopes 0, 1, 2
//   pooled = GDW(pool u_1 + pool_bias) + global_bias; the gate's three layers are as they were
//   u_4 = PReLU(aggregate (gate * (project u_2 + project_bias)) + aggregate_bias), slope 3
//   out = last [u_3; u_4] + last_bias
//
// so that the matrix from u_2 to u_4's argument is aggregate diag(gate) project, one an image.
// Offsets count elements from the start of one array of `size` elements, each matrix before its
// bias; every offset is a multiple of 4 where C is.
struct Folded {
  int64_t reduce, reduce_bias;        // [3 C, 2 C], [3 C]
  int64_t pool, pool_bias;            // [C, C], [C]
  int64_t global_bias;                // [C]
  int64_t gate[3], gate_bias[3];      // [C, C], [C] each
  int64_t project, project_bias;      // [C, C], [C]
  int64_t aggregate, aggregate_bias;  // [C, C], [C]
  int64_t last, last_bias;            // [C, 2 C], [C]
  int64_t slopes;                     // [4]
  int64_t size;
};

LEMMA_FAST_BOTH Folded folded_layout(int64_t C) {
  Folded at{};
  int64_t end = 0;
  const auto take = [&end](int64_t count) {
    const int64_t start = end;
    end += count;
    return start;
  };
  at.reduce = take(6 * C * C);
  at.reduce_bias = take(3 * C);
  at.pool = take(C * C);
  at.pool_bias = take(C);
  at.global_bias = take(C);
  for (int layer = 0; layer < 3; ++layer) {
    at.gate[layer] = take(C * C);
    at.gate_bias[layer] = take(C);
  }
  at.project = take(C * C);
  at.project_bias = take(C);
  at.aggregate = take(C * C);
  at.aggregate_bias = take(C);
  at.last = take(2 * C * C);
  at.last_bias = take(C);
  at.slopes = take(4);
  at.size = end;
  return at;
}

// Folding is by output channel: `o` < C fills row o of every matrix and entry o of every bias. The
// columns are shared by `lanes` callers, of which this is `lane`; on the CPU 0 of 1. Lane 0 makes
// the biases, one of which sums over a whole row.
template <typename T>
LEMMA_FAST_BOTH void fold_channel(const Weights<const T>& weights, int64_t C, int64_t o,
                                  int lane, int lanes, T* folded) {
  const Folded at = folded_layout(C);
  const Norm<const T>& guidance = weights.guidance_norm;
  for (int i = 0; i < kBranches; ++i) {
    const Branch<const T>& branch = weights.branches[i];
    const T scale = norm_scale(branch.norm.weight[o], branch.norm.variance[o]);
    const T shift = norm_shift(branch.norm.bias[o], branch.norm.mean[o], scale);
    const T* row = branch.reduce_weight + o * 2 * C;
    T* target = folded + at.reduce + (i * C + o) * 2 * C;
    for (int64_t k = lane; k < C; k += lanes) {
      target[k] = scale * row[k];
      target[C + k] = scale * row[C + k] * norm_scale(guidance.weight[k], guidance.variance[k]);
    }
    if (lane == 0) {
      T sum = branch.reduce_bias[o];
      for (int64_t k = 0; k < C; ++k) {
        const T inner = norm_scale(guidance.weight[k], guidance.variance[k]);
        sum += row[C + k] * norm_shift(guidance.bias[k], guidance.mean[k], inner);
      }
      folded[at.reduce_bias + i * C + o] = scale * sum + shift;
    }
  }
  const Branch<const T>& aggregate = weights.aggregate;
  const T inner = norm_scale(aggregate.norm.weight[o], aggregate.norm.variance[o]);
  const T outer = norm_scale(weights.out_norm.weight[o], weights.out_norm.variance[o]);
  const T* gates[] = {weights.gate_weight1, weights.gate_weight2, weights.gate_weight3};
  for (int64_t k = lane; k < C; k += lanes) {
    folded[at.pool + o * C + k] = weights.branches[0].project_weight[o * C + k];
    for (int layer = 0; layer < 3; ++layer) {
      folded[at.gate[layer] + o * C + k] = gates[layer][o * C + k];
    }
    folded[at.project + o * C + k] = weights.branches[1].project_weight[o * C + k];
    folded[at.aggregate + o * C + k] = inner * aggregate.reduce_weight[o * C + k];
    folded[at.last + o * 2 * C + k] = outer * weights.branches[2].project_weight[o * C + k];
    folded[at.last + o * 2 * C + C + k] = outer * aggregate.project_weight[o * C + k];
  }
  if (lane == 0) {
    folded[at.pool_bias + o] = weights.branches[0].project_bias[o];
    folded[at.global_bias + o] = weights.global_bias[o];
    folded[at.gate_bias[0] + o] = weights.gate_bias1[o];
    folded[at.gate_bias[1] + o] = weights.gate_bias2[o];
    folded[at.gate_bias[2] + o] = weights.gate_bias3[o];
    folded[at.project_bias + o] = weights.branches[1].project_bias[o];
    folded[at.aggregate_bias + o] =
        inner * aggregate.reduce_bias[o] +
        norm_shift(aggregate.norm.bias[o], aggregate.norm.mean[o], inner);
    folded[at.last_bias + o] =
        outer * (weights.branches[2].project_bias[o] + aggregate.project_bias[o]) +
        norm_shift(weights.out_norm.bias[o], weights.out_norm.mean[o], outer);
    if (o == 0) {
      for (int i = 0; i < kBranches; ++i) folded[at.slopes + i] = *weights.branches[i].slope;
      folded[at.slopes + kBranches] = *aggregate.slope;
    }
  }
}

}  // namespace adafm
}  // namespace lemma_fast
