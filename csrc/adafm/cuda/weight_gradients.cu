// Gradients of the 1x1 convolutions' matrices: products over all images and positions.
//
// The same mma as elsewhere, with positions as what is summed over: the rows of A are outputs,
// those of B inputs. Blocks take positions in turn and leave partial matrices, which a second
// launch adds up in their order.

#include <algorithm>

#include "adafm/cuda/training.cuh"

namespace lemma_fast::adafm {
namespace {

// Positions at a time, and a row of them in shared memory: padded, so that rows start in different
// banks.
constexpr int kDepth = 32;
constexpr int kStride = kDepth + 8;
constexpr int kRow = 4;
constexpr int kMostSplits = 32;
constexpr int kFewTiles = 4;
// A partial matrix and its sums of left.
constexpr int kPartialNumbers = kMatrix + kChannels;

int64_t tiles_an_image(const CudaShape& shape) { return (shape.positions + kDepth - 1) / kDepth; }

// Blocks that share the positions out: each takes a few tiles, to be worth its partial matrix.
int64_t splits(const CudaShape& shape) {
  const int64_t tiles = shape.images * tiles_an_image(shape);
  return std::min<int64_t>(kMostSplits, (tiles + kFewTiles - 1) / kFewTiles);
}

template <class T>
struct WeightGradientShared {
  T left[kChannels][kStride], right[kChannels][kStride];
};

// Writes a source's numbers at kDepth positions of one image, and zeros outside it.
template <class T>
__device__ void stage(const Source& source, int64_t image, int64_t first, int channels,
                      int64_t positions, bool aligned, T (&to)[kChannels][kStride]) {
  constexpr int kRows = kDepth / kRow;
  const int column = static_cast<int>(threadIdx.x) % kRows * kRow;
  const View<T, kRow> view = {first + column, positions, channels, aligned};
  for (int c = threadIdx.x / kRows; c < kChannels; c += kThreads / kRows) {
    float values[kRow];
    read_source(source, view, image, c, values);
    for (int j = 0; j < kRow; ++j) {
      to[c][column + j] = narrow<T>(view.first + j < positions ? values[j] : 0.0f);
    }
  }
}

// Fragments read two neighbours in one access.
template <class T>
__device__ FragmentA<T> left_fragment(const T* row) {
  const auto top = *reinterpret_cast<const Row<T, 2>*>(row);
  const auto bottom = *reinterpret_cast<const Row<T, 2>*>(row + 8 * kStride);
  if constexpr (sizeof(T) == 4) {
    return {{top.values[0], top.values[1], bottom.values[0], bottom.values[1]}};
  } else {
    return {{pack(top.values[0], top.values[1]), pack(bottom.values[0], bottom.values[1])}};
  }
}

template <class T>
__device__ FragmentB<T> right_fragment(const T* row) {
  const auto low = *reinterpret_cast<const Row<T, 2>*>(row);
  const auto high = *reinterpret_cast<const Row<T, 2>*>(row + 8);
  return {{low.values[0], low.values[1], high.values[0], high.values[1]}};
}

// Blocks: (splits, products). `partials` [products, splits, kPartialNumbers]: matrix, then sums of
// left.
template <class T, bool Full>
__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(const __grid_constant__ WeightGradients work, int64_t tiles, int each,
                           int channels, int64_t positions, bool aligned, float* partials) {
  // Warps share out 16 outputs each, and what is left of them the inputs.
  constexpr int kAcross = kChannels / 16;
  constexpr int kWidth = kChunks / (kWarps / kAcross);
  auto& shared = shared_memory<WeightGradientShared<T>>();
  const WeightGradient& product = work.products[blockIdx.y];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int output = warp % kAcross * 16 + g, input = warp / kAcross * kWidth * 8;

  float accumulator[kWidth][4] = {};
  float left_sum = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t image = tile / each, first = tile % each * kDepth;
    stage<T>(product.left, image, first, channels, positions, aligned, shared.left);
    stage<T>(product.right, image, first, channels, positions, aligned, shared.right);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      const T* row = &shared.left[output][k + 2 * t];
      const auto low = left_fragment(row), high = left_fragment(row + 8);
#pragma unroll
      for (int n = 0; n < kWidth; ++n) {
        const auto weight = right_fragment(&shared.right[input + 8 * n + g][k + 2 * t]);
        mma_k16<T, Full>(accumulator[n], low, high, weight);
      }
    }
    if (threadIdx.x < kChannels) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += widen(shared.left[threadIdx.x][k]);
      left_sum += sum;
    }
    // The next tile goes where this one was.
    __syncthreads();
  }

  float* out =
      partials + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kPartialNumbers;
#pragma unroll
  for (int n = 0; n < kWidth; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[(output + i / 2 * 8) * kChannels + input + 8 * n + 2 * t + i % 2] = accumulator[n][i];
    }
  }
  if (threadIdx.x < kChannels) out[kMatrix + threadIdx.x] = left_sum;
}

// A thread for each number of a matrix and its bias. Blocks: (enough for those, products).
__global__ void __launch_bounds__(kThreads)
    collect_kernel(const __grid_constant__ WeightGradients work, int parts, int channels,
                   const float* partials) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= kPartialNumbers) return;
  const float* from = partials + static_cast<int64_t>(blockIdx.y) * parts * kPartialNumbers + i;
  float sum = 0;
  for (int part = 0; part < parts; ++part)
    sum += from[static_cast<int64_t>(part) * kPartialNumbers];
  const WeightGradient& product = work.products[blockIdx.y];
  const int o = i / kChannels, k = i % kChannels;
  if (i < kMatrix) {
    if (o < channels && k < channels) product.matrix[o * product.output_stride + k] = sum;
  } else if (product.bias && k < channels) {
    product.bias[k] = sum;
  }
}

}  // namespace

size_t weight_gradient_bytes(const CudaShape& shape) {
  return kWeightGradients * static_cast<size_t>(splits(shape)) * kPartialNumbers * sizeof(float);
}

const char* launch_weight_gradients(const CudaShape& shape, const WeightGradients& gradients,
                                    void* workspace, void* stream) {
  float* partials = static_cast<float*>(workspace);
  const int channels = static_cast<int>(shape.channels);
  const int64_t each = tiles_an_image(shape);
  return dispatch(shape, [&](auto variant) -> const char* {
    using V = decltype(variant);
    using T = typename V::T;
    bool aligned = true;
    for (const WeightGradient& product : gradients.products) {
      aligned = aligned && rows_can_move<T, kRow>(shape, {product.left.x, product.left.z,
                                                          product.right.x, product.right.z});
    }
    const dim3 grid(static_cast<unsigned>(splits(shape)), kWeightGradients);
    const char* error = launch(weight_gradient_kernel<T, V::Full>, grid, kThreads, stream,
                               gradients, shape.images * each, static_cast<int>(each), channels,
                               shape.positions, aligned, partials);
    if (error != nullptr) return error;
    constexpr int kBlocks = (kPartialNumbers + kThreads - 1) / kThreads;
    return launch(collect_kernel, dim3(kBlocks, kWeightGradients), kThreads, stream, gradients,
                  static_cast<int>(grid.x), channels, partials);
  });
}

}  // namespace lemma_fast::adafm
