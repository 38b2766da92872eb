// AdaFM in inference: fold once, then two launches for any number of images.
//
//   pool_kernel   u_1 = PReLU(A_1 [r; X_G] + a_1), and of pool u_1 + pool_bias, weighted by the
//                 global convolution, the sum over each block's positions, for every channel
//   fuse_kernel   gate from those sums; u_2, u_4 and u_3; out = last [u_3; u_4] + last_bias
//
// in the names of adafm_math.h. Floor at N = 64, C = 64, 16 x 64, 16 bits: two maps read and one
// written, 25 MB, 8 us at 3 TB/s. Here the two maps are read twice: the second time they come from
// the L2 cache where it holds them (17 MB of an H100's 50 MB), else 42 MB move. Arithmetic 5.9 GFLOP:
// 3 matrices of C x C in the first launch and 8 in the second. The gate could be taken into a matrix
// of its own for each image (aggregate diag(gate) project), but with 256 positions a block that saves
// one of eight products and costs a quarter of one, a barrier and a rounding: it stays a scaling.
#include "adafm.cuh"

namespace lemma_fast {
namespace adafm {
namespace {

// What the two kernels read, in one buffer: fp32 folded as adafm_math.h has it, then packed for
// kChannels channels. Byte offsets, each a multiple of 16.
struct Packed {
  // A panel's numbers in turn: [A_1 r][A_1 X_G][pool], then [A_2 r][A_2 X_G][project][aggregate]
  // [last u_4][A_3 r][A_3 X_G][last u_3], kMatrix numbers each.
  size_t panels;
  // The gate's three matrices transposed, [inputs, outputs].
  size_t gate;
  // The global convolution's weight [channels, P].
  size_t global;
  // fp32: kVectors of kChannels.
  size_t vectors;
  size_t bytes;
};

enum Vector {
  kReduceBias,
  kPoolBias = kReduceBias + kBranches,
  kGlobalBias,
  kGateBias,
  kProjectBias = kGateBias + 3,
  kAggregateBias,
  kLastBias,
  kSlopes,
  kVectors
};

constexpr int kPoolMatrices = 3;
constexpr int kFuseMatrices = 8;
constexpr int kMatrices = kPoolMatrices + kFuseMatrices;

size_t round_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

Packed packed_layout(const CudaShape &shape) {
  const size_t number = shape.dtype == Dtype::float32 ? 4 : 2;
  Packed at{};
  at.panels = round_up(folded_layout(shape.channels).size * sizeof(float));
  at.gate = at.panels + kMatrices * kMatrix * number;
  at.global = at.gate + 3 * kMatrix * number;
  at.vectors = at.global + round_up(shape.channels * shape.positions * number);
  at.bytes = at.vectors + kVectors * kChannels * sizeof(float);
  return at;
}

template <class T>
struct PackedPointers {
  const T *panels, *gate, *global;
  const float *vectors;
};

template <class T>
PackedPointers<T> pointers(const Packed &at, const void *folded) {
  const char *start = static_cast<const char *>(folded);
  return {reinterpret_cast<const T *>(start + at.panels),
          reinterpret_cast<const T *>(start + at.gate),
          reinterpret_cast<const T *>(start + at.global),
          reinterpret_cast<const float *>(start + at.vectors)};
}

__global__ void fold_kernel(Weights<const float> weights, int64_t C, float *folded) {
  fold_channel(weights, C, static_cast<int64_t>(blockIdx.x), static_cast<int>(threadIdx.x),
               static_cast<int>(blockDim.x), folded);
}

// The packed matrix `matrix` at [output, input].
__device__ float packed_matrix(const float *folded, const Folded &at, int matrix, int channels,
                               Entry entry) {
  const int64_t C = channels, o = entry.output, k = entry.input;
  if (o >= C || k >= C) return 0.0f;
  const auto reduce = [&](int branch, int half) {
    return folded[at.reduce + (branch * C + o) * 2 * C + half * C + k];
  };
  switch (matrix) {
    case 0: return reduce(0, 0);
    case 1: return reduce(0, 1);
    case 2: return folded[at.pool + o * C + k];
    case 3: return reduce(1, 0);
    case 4: return reduce(1, 1);
    case 5: return folded[at.project + o * C + k];
    case 6: return folded[at.aggregate + o * C + k];
    case 7: return folded[at.last + o * 2 * C + C + k];
    case 8: return reduce(2, 0);
    case 9: return reduce(2, 1);
    default: return folded[at.last + o * 2 * C + k];
  }
}

__device__ float packed_vector(const float *folded, const Folded &at, int vector, int channels,
                               int c) {
  if (vector == kSlopes) return c < 4 ? folded[at.slopes + c] : 0.0f;
  if (c >= channels) return 0.0f;
  if (vector < kPoolBias) return folded[at.reduce_bias + vector * channels + c];
  switch (vector) {
    case kPoolBias: return folded[at.pool_bias + c];
    case kGlobalBias: return folded[at.global_bias + c];
    case kProjectBias: return folded[at.project_bias + c];
    case kAggregateBias: return folded[at.aggregate_bias + c];
    case kLastBias: return folded[at.last_bias + c];
    default: {
      const int layer = vector - kGateBias;
      return folded[at.gate_bias[0] + layer * (at.gate_bias[1] - at.gate_bias[0]) + c];
    }
  }
}

template <class T>
__global__ void pack_kernel(const float *folded, const float *global_weight, int channels,
                            int64_t positions, T *panels, T *gate, T *global, float *vectors) {
  const Folded at = folded_layout(channels);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < kMatrices * kMatrix; i += step) {
    const int matrix = static_cast<int>(i / kMatrix);
    const Entry entry = panel_entry(static_cast<int>(i % kMatrix));
    panels[i] = narrow<T>(packed_matrix(folded, at, matrix, channels, entry));
  }
  for (int64_t i = first; i < 3 * kMatrix; i += step) {
    const int64_t k = i / kChannels % kChannels, o = i % kChannels;
    const bool inside = k < channels && o < channels;
    const int64_t matrix = at.gate[0] + i / kMatrix * (at.gate[1] - at.gate[0]);
    gate[i] = narrow<T>(inside ? folded[matrix + o * channels + k] : 0.0f);
  }
  for (int64_t i = first; i < channels * positions; i += step) {
    global[i] = narrow<T>(global_weight[i]);
  }
  for (int64_t i = first; i < kVectors * kChannels; i += step) {
    vectors[i] = packed_vector(folded, at, static_cast<int>(i / kChannels), channels,
                               static_cast<int>(i % kChannels));
  }
}

// Panels of weights in turn, through two places in shared memory: one is used, one is filled.
template <class T>
struct Panels {
  const T *source;
  T (*places)[kMatrix];
  int count;
  int current = 0;

  __device__ Panels(const T *source, T (&places)[2][kMatrix], int count)
      : source(source), places(places), count(count) {
    fill(0);
  }

  __device__ void fill(int panel) {
    constexpr int kNumbers = 16 / sizeof(T);
    for (int i = threadIdx.x * kNumbers; i < kMatrix; i += kThreads * kNumbers) {
      copy_async(&places[panel % 2][i], source + static_cast<int64_t>(panel) * kMatrix + i);
    }
  }

  // The next panel. All threads are done with the last but one, whose place it fills.
  __device__ const T *next() {
    wait_for_copies();
    __syncthreads();
    if (current + 1 < count) fill(current + 1);
    return places[current++ % 2];
  }
};

// One image's arguments for a thread.
template <class T>
struct Inputs {
  const T *features, *guidance;
  Place<T, Tile<T>::kRows> place;
};

template <class T>
__device__ void start(typename Tile<T>::Sums &sums, const float *bias) {
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    const auto pair = reinterpret_cast<const Row<float, 2> *>(bias)[chunk_channel(n) / 2];
#pragma unroll
    for (int m = 0; m < Tile<T>::kCount; ++m) {
      sums[m][n][0] = sums[m][n][2] = pair.values[0];
      sums[m][n][1] = sums[m][n][3] = pair.values[1];
    }
  }
}

// sums += the two matrices of [r; X_G], which are read from memory while the matrices are on their
// way.
template <class T, bool Full>
__device__ void reduce(typename Tile<T>::Sums &sums, const Inputs<T> &inputs, Panels<T> &panels) {
  using Shape = Tile<T>;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const T *map = half == 0 ? inputs.features : inputs.guidance;
    Operand<T> operands[kChunks][Shape::kCount];
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      const int channel = chunk_channel(n);
      float values[Shape::kCount][4];
      widen_rows(inputs.place.load(map, channel), inputs.place.load(map, channel + 1), values);
#pragma unroll
      for (int m = 0; m < Shape::kCount; ++m) operands[n][m] = to_operand<T>(values[m]);
    }
    multiply<T, Full>(sums, operands, panels.next());
  }
}

// Sums to the next product's left operand, each number through `change(value, channel)`.
template <class T, class Change>
__device__ void operands_of(Operand<T> (&operands)[kChunks][Tile<T>::kCount],
                            const typename Tile<T>::Sums &sums, const Change &change) {
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int m = 0; m < Tile<T>::kCount; ++m) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i] = change(sums[m][n][i], chunk_channel(n) + i % 2);
      }
      operands[n][m] = to_operand<T>(values);
    }
  }
}

template <class T>
struct PoolShared {
  T panels[2][kMatrix];
  float sums[kWarps][kChannels];
};

// Blocks: images times blocks an image. `pooled` [blocks, kChannels].
template <class T, bool Full>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const T *features, const T *guidance, PackedPointers<T> packed, int channels,
                int64_t positions, int blocks, bool vectors, float *pooled) {
  using Shape = Tile<T>;
  auto &shared = shared_memory<PoolShared<T>>();
  const int64_t image = blockIdx.x / blocks;
  const int64_t map = image * channels * positions;
  const Inputs<T> inputs = {
      features + map, guidance + map,
      {thread_position<T>(blockIdx.x % blocks), positions, channels, vectors}};
  Panels<T> panels(packed.panels, shared.panels, kPoolMatrices);

  typename Shape::Sums sums;
  Operand<T> hidden[kChunks][Shape::kCount];
  start<T>(sums, packed.vectors + kReduceBias * kChannels);
  reduce<T, Full>(sums, inputs, panels);
  const float slope = packed.vectors[kSlopes * kChannels];
  operands_of<T>(hidden, sums, [&](float v, int) { return prelu(v, slope); });
  start<T>(sums, packed.vectors + kPoolBias * kChannels);
  multiply<T, Full>(sums, hidden, panels.next());

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    const int channel = chunk_channel(n);
    float weights[Shape::kCount][4];
    // Zero outside the map, so that what lies there does not count.
    widen_rows(inputs.place.load(packed.global, channel),
               inputs.place.load(packed.global, channel + 1), weights);
    float even = 0, odd = 0;
#pragma unroll
    for (int m = 0; m < Shape::kCount; ++m) {
      even += weights[m][0] * sums[m][n][0] + weights[m][2] * sums[m][n][2];
      odd += weights[m][1] * sums[m][n][1] + weights[m][3] * sums[m][n][3];
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
  T panels[2][kMatrix];
  // Sums of a part of the inputs each, of one layer of the gate and of the next.
  float parts[2][kThreads / kChannels][kChannels];
  float gate[kChannels];
};

// The gate of one image: in every layer a thread sums a part of the inputs of one output.
template <class T>
__device__ void find_gate(FuseShared<T> &shared, const PackedPointers<T> &packed,
                          const float *pooled, int blocks) {
  constexpr int kParts = kThreads / kChannels, kShare = kChannels / kParts;
  const int o = threadIdx.x % kChannels, part = threadIdx.x / kChannels;
  float sum = 0;
  for (int block = part; block < blocks; block += kParts) sum += pooled[block * kChannels + o];
  shared.parts[0][part][o] = sum;
#pragma unroll 1
  for (int layer = 0; layer < 3; ++layer) {
    __syncthreads();
    const float *bias = packed.vectors + (kGlobalBias + layer) * kChannels;
    const T *matrix = packed.gate + layer * kMatrix;
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
    float logit = packed.vectors[(kGateBias + 2) * kChannels + o];
    for (int q = 0; q < kParts; ++q) logit += shared.parts[1][q][o];
    shared.gate[o] = sigmoid(logit);
  }
  // Whoever reads the gate has waited for a panel before.
}

template <class T, bool Full>
__global__ void __launch_bounds__(kThreads)
    fuse_kernel(const T *features, const T *guidance, PackedPointers<T> packed, int channels,
                int64_t positions, int blocks, bool vectors, const float *pooled,
                T *out) {
  using Shape = Tile<T>;
  auto &shared = shared_memory<FuseShared<T>>();
  const int64_t image = blockIdx.x / blocks;
  const int64_t map = image * channels * positions;
  const Inputs<T> inputs = {
      features + map, guidance + map,
      {thread_position<T>(blockIdx.x % blocks), positions, channels, vectors}};
  Panels<T> panels(packed.panels + kPoolMatrices * kMatrix, shared.panels, kFuseMatrices);
  find_gate<T>(shared, packed, pooled + image * blocks * kChannels, blocks);

  const float *slopes = packed.vectors + kSlopes * kChannels;
  typename Shape::Sums sums, result;
  Operand<T> hidden[kChunks][Shape::kCount];
  start<T>(result, packed.vectors + kLastBias * kChannels);
  // First u_2 to u_4, then u_3; loops that stay loops, because their bodies are long.
#pragma unroll 1
  for (int branch = 1; branch < kBranches; ++branch) {
    start<T>(sums, packed.vectors + (kReduceBias + branch) * kChannels);
    reduce<T, Full>(sums, inputs, panels);
    float slope = slopes[branch];
    operands_of<T>(hidden, sums, [&](float v, int) { return prelu(v, slope); });
#pragma unroll 1
    for (int layer = 0; branch == 1 && layer < 2; ++layer) {
      start<T>(sums, packed.vectors + (kProjectBias + layer) * kChannels);
      multiply<T, Full>(sums, hidden, panels.next());
      slope = slopes[kBranches];
      operands_of<T>(hidden, sums, [&](float v, int c) {
        return layer == 0 ? v * shared.gate[c] : prelu(v, slope);
      });
    }
    multiply<T, Full>(result, hidden, panels.next());
  }
#pragma unroll
  for (int n = 0; n < kChunks; ++n) store_chunk<T>(inputs.place, out + map, n, result);
}

}  // namespace

size_t folded_bytes(const CudaShape &shape) { return packed_layout(shape).bytes; }

const char *fold_cuda(const CudaShape &shape, const Weights<const float> &weights, void *folded,
                      void *stream) {
  if (const char *error = refuse(shape)) return error;
  float *plain = static_cast<float *>(folded);
  const dim3 blocks(static_cast<unsigned>(shape.channels));
  if (const char *error = launch(fold_kernel, blocks, 64, stream, weights, shape.channels, plain)) {
    return error;
  }
  return dispatch(shape, [&](auto variant) {
    using T = typename decltype(variant)::T;
    const auto to = pointers<T>(packed_layout(shape), folded);
    return launch(pack_kernel<T>, dim3(64), kThreads, stream, plain,
                  weights.global_weight, static_cast<int>(shape.channels), shape.positions,
                  const_cast<T *>(to.panels), const_cast<T *>(to.gate), const_cast<T *>(to.global),
                  const_cast<float *>(to.vectors));
  });
}

size_t inference_workspace_bytes(const CudaShape &shape) {
  return dispatch(shape, [&](auto variant) {
    using V = decltype(variant);
    const int64_t blocks = shape.images * blocks_an_image<typename V::T>(shape);
    return static_cast<size_t>(blocks) * kChannels * sizeof(float);
  });
}

const char *inference_cuda(const CudaShape &shape, const void *features, const void *guidance,
                           const void *folded, void *out, void *workspace, void *stream) {
  if (const char *error = refuse(shape)) return error;
  if (shape.images == 0) return nullptr;
  return dispatch(shape, [&](auto variant) -> const char * {
    using T = typename decltype(variant)::T;
    constexpr bool Full = decltype(variant)::Full;
    const int64_t blocks = blocks_an_image<T>(shape);
    const auto packed = pointers<T>(packed_layout(shape), folded);
    const bool vectors = rows_are_aligned<T>(shape, {features, guidance, out});
    const dim3 grid = grid_of(shape.images * blocks);
    if (grid.x == 0) return "AdaFM: too many positions for one launch";
    const T *r = static_cast<const T *>(features), *x = static_cast<const T *>(guidance);
    float *pooled = static_cast<float *>(workspace);
    const int channels = static_cast<int>(shape.channels), each = static_cast<int>(blocks);
    if (const char *error = launch(pool_kernel<T, Full>, grid, kThreads, stream, r, x, packed, channels,
                                   shape.positions, each, vectors, pooled)) {
      return error;
    }
    return launch(fuse_kernel<T, Full>, grid, kThreads, stream, r, x, packed, channels,
                  shape.positions, each, vectors, pooled, static_cast<T *>(out));
  });
}

}  // namespace adafm
}  // namespace lemma_fast
