// AdaFM in inference: two launches for any number of images, on the parameters that fold.cu made.
//
//   pool_kernel   u_1 = PReLU(reduce_1 [features; guidance]); for every channel the sum of
//                 x_1 = project_1 u_1, weighted by GDW, over each block's positions
//   fuse_kernel   the gate from those sums; u_2, x_2 and u_4, then u_3;
//                 out = project_4 u_4 + project_3 u_3
//
// math.h has the formulas, their names and the order of the folded matrices; tiles.cuh draws which
// thread holds which numbers of a product. In code branch i has the index i - 1, and `Full` is fp32
// without tf32 (see mma_k16).
//
// A block keeps 256 positions (128 in fp32) of all channels in registers through the whole chain;
// the matrices come through shared memory, the next one on its way while one is used.
//
// The maps are [N, C, P] or, with `Last`, [N, P, C]: then a thread moves pairs of channels, position
// by position, and the other half of a sector comes from the L1 cache with the next chunk.
//
// Floor at N = 64, C = 64, 16 x 64, 16 bits: two maps read and one written, 25 MB, 8 us at 3 TB/s.
// Here the two maps are read twice: the second time they come from the L2 cache where it holds them
// (17 MB of an H100's 50 MB), else 42 MB move. Arithmetic 5.9 GFLOP: 3 matrices of C x C in the
// first launch and 8 in the second. The gate could be taken into a matrix of its own for each image
// (reduce_4 diag(gate) project_2), but with 256 positions a block that saves one of eight products
// and costs a quarter of one, a barrier and a rounding: it stays a scaling.

#include "adafm/cuda/folded.cuh"

namespace lemma_fast::adafm {
namespace {

// The folded matrices lie in the order of their use: 0 to 2 in the first launch, 3 to 10 in the
// second.
constexpr int kPoolMatrices = reduce_matrix(1);
constexpr int kFuseMatrices = kGateMatrix - kPoolMatrices;

// What both kernels take. `blocks` are those of one image. (As a __grid_constant__ it costs
// fuse_kernel up to 70 registers more.)
template <class T>
struct Arguments {
  const T *features, *guidance;
  FoldedPointers<const T> folded;
  int channels;
  int64_t positions;
  int blocks;
  // Of the maps: whether rows (with `Last`, pairs of channels) move in one access; then of GDW.
  bool aligned, global_aligned;
};

// A thread's own part of the two maps of its image.
template <class T>
struct Inputs {
  int64_t image;
  // Where the image's maps begin.
  int64_t offset;
  const T *features, *guidance;
  View<T, Tile<T>::kRows> view;

  __device__ explicit Inputs(const Arguments<T>& given)
      : image(blockIdx.x / given.blocks),
        offset(image * given.channels * given.positions),
        features(given.features + offset),
        guidance(given.guidance + offset),
        view{thread_position<T>(blockIdx.x % given.blocks), given.positions, given.channels,
             given.aligned} {}
};

// Matrices in turn, through two buffers in shared memory: one is used, one is filled.
template <class T>
struct Matrices {
  const T* source;
  T (*buffers)[kMatrix];
  int count;
  int current = 0;

  __device__ Matrices(const T* source, T (&buffers)[2][kMatrix], int count)
      : source(source), buffers(buffers), count(count) {
    fill(0);
  }

  __device__ void fill(int matrix) {
    constexpr int kNumbers = 16 / sizeof(T);
    for (int i = threadIdx.x * kNumbers; i < kMatrix; i += kThreads * kNumbers) {
      copy_async(&buffers[matrix % 2][i], source + static_cast<int64_t>(matrix) * kMatrix + i);
    }
  }

  // Waits for the next matrix and starts to copy the one after it, over the one before it: behind
  // the barrier no thread reads that any more.
  __device__ const T* next() {
    wait_for_copies();
    __syncthreads();
    if (current + 1 < count) fill(current + 1);
    return buffers[current++ % 2];
  }
};

// A thread's numbers of two neighbouring channels in a channels-last map, [m][4] as one chunk has
// them. `view.aligned` says that pairs may be moved in one access.
template <class T>
__device__ void load_pairs(const View<T, Tile<T>::kRows>& view, const T* map, int channel,
                           float (&values)[Tile<T>::kCount][4]) {
#pragma unroll
  for (int j = 0; j < Tile<T>::kRows; ++j) {
    const bool inside = view.first + j < view.positions;
    const T* from = map + (view.first + j) * view.channels + channel;
    Row<T, 2> pair{{narrow<T>(0.0f), narrow<T>(0.0f)}};
    if (view.aligned) {
      if (inside && channel < view.channels) move_row<T, 2>(&pair, from);
    } else {
      for (int i = 0; i < 2; ++i) {
        if (inside && channel + i < view.channels) pair.values[i] = from[i];
      }
    }
    values[j / 2][2 * (j % 2)] = widen(pair.values[0]);
    values[j / 2][2 * (j % 2) + 1] = widen(pair.values[1]);
  }
}

// And back: writes chunk `n` of an accumulator.
template <class T>
__device__ void store_pairs(const View<T, Tile<T>::kRows>& view, T* map, int n,
                            const typename Tile<T>::Accumulator& accumulator) {
  const int channel = chunk_channel(n);
#pragma unroll
  for (int j = 0; j < Tile<T>::kRows; ++j) {
    if (view.first + j >= view.positions) continue;
    const float (&values)[4] = accumulator[j / 2][n];
    const Row<T, 2> pair{{narrow<T>(values[2 * (j % 2)]), narrow<T>(values[2 * (j % 2) + 1])}};
    T* to = map + (view.first + j) * view.channels + channel;
    if (view.aligned) {
      if (channel < view.channels) move_row<T, 2>(to, &pair);
    } else {
      for (int i = 0; i < 2; ++i) {
        if (channel + i < view.channels) to[i] = pair.values[i];
      }
    }
  }
}

// Starts a convolution with its bias.
template <class T>
__device__ void start_with_bias(typename Tile<T>::Accumulator& accumulator, const float* bias) {
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    const auto pair = reinterpret_cast<const Row<float, 2>*>(bias)[chunk_channel(n) / 2];
#pragma unroll
    for (int m = 0; m < Tile<T>::kCount; ++m) {
      accumulator[m][n][0] = accumulator[m][n][2] = pair.values[0];
      accumulator[m][n][1] = accumulator[m][n][3] = pair.values[1];
    }
  }
}

// accumulator += a reducing convolution of both maps, which are read from memory while its matrices
// are on their way.
template <class T, bool Full, bool Last>
__device__ void convolve_maps(typename Tile<T>::Accumulator& accumulator, const Inputs<T>& inputs,
                              Matrices<T>& matrices) {
  using Shape = Tile<T>;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const T* map = half == 0 ? inputs.features : inputs.guidance;
    FragmentA<T> fragments[kChunks][Shape::kCount];
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      const int channel = chunk_channel(n);
      float values[Shape::kCount][4];
      if constexpr (Last) {
        load_pairs<T>(inputs.view, map, channel, values);
      } else {
        widen_rows(inputs.view.load(map, channel), inputs.view.load(map, channel + 1), values);
      }
#pragma unroll
      for (int m = 0; m < Shape::kCount; ++m) fragments[n][m] = to_fragment<T>(values[m]);
    }
    multiply<T, Full>(accumulator, fragments, matrices.next());
  }
}

// Accumulators to the next product's A fragments, each number through `change(value, channel)`.
template <class T, class Change>
__device__ void to_fragments(FragmentA<T> (&fragments)[kChunks][Tile<T>::kCount],
                             const typename Tile<T>::Accumulator& accumulator,
                             const Change& change) {
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int m = 0; m < Tile<T>::kCount; ++m) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i] = change(accumulator[m][n][i], chunk_channel(n) + i % 2);
      }
      fragments[n][m] = to_fragment<T>(values);
    }
  }
}

template <class T>
struct PoolShared {
  T matrices[2][kMatrix];
  float sums[kWarps][kChannels];
};

// `pooled` [images * blocks, kChannels]: each block writes its own sums.
template <class T, bool Full, bool Last>
__global__ void __launch_bounds__(kThreads) pool_kernel(Arguments<T> given, float* pooled) {
  using Shape = Tile<T>;
  auto& shared = shared_memory<PoolShared<T>>();
  const FoldedPointers<const T>& folded = given.folded;
  const Inputs<T> inputs(given);
  Matrices<T> matrices(folded.matrices, shared.matrices, kPoolMatrices);

  typename Shape::Accumulator accumulator;
  FragmentA<T> hidden[kChunks][Shape::kCount];
  start_with_bias<T>(accumulator, folded.vectors + kReduceBias * kChannels);
  convolve_maps<T, Full, Last>(accumulator, inputs, matrices);
  const float slope = folded.vectors[kSlopes * kChannels];
  to_fragments<T>(hidden, accumulator, [&](float v, int) { return prelu(v, slope); });
  start_with_bias<T>(accumulator, folded.vectors + kProjectBias * kChannels);
  multiply<T, Full>(accumulator, hidden, matrices.next());

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  View<T, Shape::kRows> view = inputs.view;
  view.aligned = given.global_aligned;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    const int channel = chunk_channel(n);
    float weights[Shape::kCount][4];
    // Zero outside the map, so that what lies there does not count.
    widen_rows(view.load(folded.global, channel), view.load(folded.global, channel + 1), weights);
    float even = 0, odd = 0;
#pragma unroll
    for (int m = 0; m < Shape::kCount; ++m) {
      even += weights[m][0] * accumulator[m][n][0] + weights[m][2] * accumulator[m][n][2];
      odd += weights[m][1] * accumulator[m][n][1] + weights[m][3] * accumulator[m][n][3];
    }
    for (int mask = 4; mask < 32; mask *= 2) {
      even += exchange(even, mask);
      odd += exchange(odd, mask);
    }
    if (lane < 4) {
      shared.sums[warp][channel] = even;
      shared.sums[warp][channel + 1] = odd;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < kChannels; c += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][c];
    pooled[static_cast<int64_t>(blockIdx.x) * kChannels + c] = sum;
  }
}

template <class T>
struct FuseShared {
  T matrices[2][kMatrix];
  // Layer by layer of the gate: [part of the inputs][output]. One layer reads the sums of the last
  // while it writes its own.
  float parts[2][kThreads / kChannels][kChannels];
  float gate[kChannels];
};

// The gate of one image: in every layer a thread sums a part of the inputs of one output.
template <class T>
__device__ void find_gate(FuseShared<T>& shared, const FoldedPointers<const T>& folded,
                          const float* pooled, int blocks) {
  constexpr int kParts = kThreads / kChannels, kShare = kChannels / kParts;
  const int o = threadIdx.x % kChannels, part = threadIdx.x / kChannels;
  float sum = 0;
  for (int block = part; block < blocks; block += kParts) sum += pooled[block * kChannels + o];
  shared.parts[0][part][o] = sum;
#pragma unroll 1
  for (int layer = 0; layer < 3; ++layer) {
    __syncthreads();
    // That of what comes in: of the global convolution, then of the layer before.
    const float* bias = folded.vectors + (kGlobalBias + layer) * kChannels;
    const T* matrix = folded.gate + layer * kMatrix;
    sum = 0;
    for (int k = part * kShare; k < (part + 1) * kShare; ++k) {
      float input = bias[k];
      for (int q = 0; q < kParts; ++q) input += shared.parts[layer % 2][q][k];
      if (layer > 0) input = relu(input);
      sum += input * widen(matrix[k * kChannels + o]);
    }
    shared.parts[(layer + 1) % 2][part][o] = sum;
  }
  __syncthreads();
  if (part == 0) {
    float logit = folded.vectors[(kGateBias + 2) * kChannels + o];
    for (int q = 0; q < kParts; ++q) logit += shared.parts[1][q][o];
    shared.gate[o] = sigmoid(logit);
  }
  // No barrier here: there is one in Matrices::next, before the gate is used.
}

template <class T, bool Full, bool Last>
__global__ void __launch_bounds__(kThreads)
    fuse_kernel(Arguments<T> given, const float* pooled, T* out) {
  using Shape = Tile<T>;
  auto& shared = shared_memory<FuseShared<T>>();
  const FoldedPointers<const T>& folded = given.folded;
  const Inputs<T> inputs(given);
  Matrices<T> matrices(folded.matrices + kPoolMatrices * kMatrix, shared.matrices, kFuseMatrices);
  find_gate<T>(shared, folded, pooled + inputs.image * given.blocks * kChannels, given.blocks);

  const float* slopes = folded.vectors + kSlopes * kChannels;
  typename Shape::Accumulator accumulator, result;
  FragmentA<T> hidden[kChunks][Shape::kCount];
  start_with_bias<T>(result, folded.vectors + kLastBias * kChannels);
  // Branch 2 up to u_4, then branch 3; loops that stay loops, because their bodies are long.
#pragma unroll 1
  for (int branch = 1; branch < kBranches; ++branch) {
    start_with_bias<T>(accumulator, folded.vectors + (kReduceBias + branch) * kChannels);
    convolve_maps<T, Full, Last>(accumulator, inputs, matrices);
    float slope = slopes[branch];
    to_fragments<T>(hidden, accumulator, [&](float v, int) { return prelu(v, slope); });
    // Of branch 2: gate * x_2 with x_2 = project_2 u_2, then u_4 = PReLU(reduce_4 (gate * x_2)).
#pragma unroll 1
    for (int layer = 0; branch == 1 && layer < 2; ++layer) {
      start_with_bias<T>(accumulator, folded.vectors + (kProjectBias + 1 + layer) * kChannels);
      multiply<T, Full>(accumulator, hidden, matrices.next());
      slope = slopes[kBranches];
      to_fragments<T>(hidden, accumulator, [&](float v, int c) {
        return layer == 0 ? v * shared.gate[c] : prelu(v, slope);
      });
    }
    multiply<T, Full>(result, hidden, matrices.next());
  }
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    if constexpr (Last) {
      store_pairs<T>(inputs.view, out + inputs.offset, n, result);
    } else {
      store_chunk<T>(inputs.view, out + inputs.offset, n, result);
    }
  }
}

// Whether pairs of channels may be moved in one access.
template <class T>
bool pairs_can_move(const CudaShape& shape, std::initializer_list<const void*> maps) {
  bool aligned = shape.channels % 2 == 0;
  for (const void* map : maps) {
    aligned = aligned && reinterpret_cast<uintptr_t>(map) % (2 * sizeof(T)) == 0;
  }
  return aligned;
}

template <class T, bool Full, bool Last>
const char* launch_both(const CudaShape& shape, const T* features, const T* guidance,
                        const FoldedPointers<const T>& folded, T* out, float* pooled,
                        void* stream) {
  const int64_t blocks = blocks_an_image<T>(shape);
  const dim3 grid = grid_of(shape.images * blocks);
  if (grid.x == 0) return "AdaFM: too many positions for one launch";
  const auto maps = {static_cast<const void*>(features), static_cast<const void*>(guidance),
                     static_cast<const void*>(out)};
  const Arguments<T> given = {features,
                              guidance,
                              folded,
                              static_cast<int>(shape.channels),
                              shape.positions,
                              static_cast<int>(blocks),
                              Last ? pairs_can_move<T>(shape, maps) : rows_can_move<T>(shape, maps),
                              rows_can_move<T>(shape, {folded.global})};
  const char* error = launch(pool_kernel<T, Full, Last>, grid, kThreads, stream, given, pooled);
  if (error != nullptr) return error;
  return launch(fuse_kernel<T, Full, Last>, grid, kThreads, stream, given, pooled, out);
}

}  // namespace

size_t inference_workspace_bytes(const CudaShape& shape) {
  return dispatch(shape, [&](auto variant) {
    using V = decltype(variant);
    const int64_t blocks = shape.images * blocks_an_image<typename V::T>(shape);
    return static_cast<size_t>(blocks) * kChannels * sizeof(float);
  });
}

const char* inference_cuda(const CudaShape& shape, bool channels_last, const void* features,
                           const void* guidance, const void* folded, void* out, void* workspace,
                           void* stream) {
  if (const char* error = refuse(shape)) return error;
  if (shape.images == 0) return nullptr;
  return dispatch(shape, [&](auto variant) -> const char* {
    using T = typename decltype(variant)::T;
    constexpr bool Full = decltype(variant)::Full;
    const auto both = channels_last ? launch_both<T, Full, true> : launch_both<T, Full, false>;
    return both(shape, static_cast<const T*>(features), static_cast<const T*>(guidance),
                folded_pointers<const T>(shape, folded), static_cast<T*>(out),
                static_cast<float*>(workspace), stream);
  });
}

}  // namespace lemma_fast::adafm
