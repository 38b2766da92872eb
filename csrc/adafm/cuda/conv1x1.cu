// 1x1 convolutions of training, forward and backward: sums of matrices times sources, and what a
// norm wants to know of the result. A block takes the matrices in turn through shared memory.

#include "adafm/cuda/training.cuh"

namespace lemma_fast::adafm {
namespace {

// Adds up over the lanes that hold other positions of the same channels.
__device__ float sum_positions(float value) {
  for (int mask = 4; mask < 32; mask *= 2) value += exchange(value, mask);
  return value;
}

template <class T>
struct Warp {
  View<T, Tile<T>::kRows> view;
  int64_t image, part, parts;

  __device__ bool live(int row) const { return view.first + row < view.positions; }

  __device__ void write(Partial* partials, int channel, Partial value) const {
    if (threadIdx.x % 32 < 4 && channel < view.channels) {
      partials[channel * parts + part] = value;
    }
  }
};

// Number i of a chunk of tile m is that of row 2m + i / 2.
template <class T>
__device__ void write_moments(const Warp<T>& warp, const typename Tile<T>::Accumulator& accumulator,
                              Partial* partials) {
  constexpr int kCount = Tile<T>::kCount;
  float live = 0;
  for (int row = 0; row < 2 * kCount; ++row) live += warp.live(row) ? 1.0f : 0.0f;
  const float count = sum_positions(live);
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int row = 0; row < 2 * kCount; ++row) {
        if (warp.live(row)) sum += accumulator[row / 2][n][row % 2 * 2 + parity];
      }
      const float mean = sum_positions(sum) / (count > 0 ? count : 1);
#pragma unroll
      for (int row = 0; row < 2 * kCount; ++row) {
        const float difference = accumulator[row / 2][n][row % 2 * 2 + parity] - mean;
        if (warp.live(row)) squares += difference * difference;
      }
      warp.write(partials, chunk_channel(n) + parity, {mean, sum_positions(squares), count});
    }
  }
}

template <class T>
__device__ void gradients_back(const Warp<T>& warp, typename Tile<T>::Accumulator& accumulator,
                               const Conv1x1& conv) {
  constexpr int kCount = Tile<T>::kCount;
  const T* hidden =
      static_cast<const T*>(conv.hidden) + warp.image * warp.view.channels * warp.view.positions;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int channel = chunk_channel(n) + parity;
      const bool inside = channel < warp.view.channels;
      const float mean = inside ? conv.norm.mean[channel] : 0.0f;
      const float inverse = inside ? conv.norm.inverse_deviation[channel] : 0.0f;
      const float scale = inside && conv.slope ? conv.norm.scale[channel] : 0.0f;
      const float shift = inside && conv.slope ? conv.norm.shift[channel] : 0.0f;
      const auto h = warp.view.load(hidden, channel);
      Partial part = {0, 0, 0};
#pragma unroll
      for (int row = 0; row < 2 * kCount; ++row) {
        float& gradient = accumulator[row / 2][n][row % 2 * 2 + parity];
        if (!warp.live(row)) continue;
        const float value = widen(h.values[row]);
        if (conv.slope) {
          const float v = value * scale + shift;
          if (!(v > 0)) {
            part.third += gradient * v;
            gradient *= *conv.slope;
          }
        }
        part.first += gradient;
        part.second += gradient * ((value - mean) * inverse);
      }
      part = {sum_positions(part.first), sum_positions(part.second), sum_positions(part.third)};
      warp.write(conv.partials, channel, part);
    }
  }
}

// Blocks: (images times blocks an image, convolutions of the group).
template <class T, bool Full>
__global__ void __launch_bounds__(kThreads, Full ? 1 : 2)
    conv_kernel(const __grid_constant__ Conv1x1Group group, int channels, int64_t positions,
                int blocks, bool aligned) {
  using Shape = Tile<T>;
  auto& matrix = shared_memory<T[kMatrix]>();
  const Conv1x1& conv = group.items[blockIdx.y];
  const int64_t image = blockIdx.x / blocks;
  const Warp<T> warp = {{thread_position<T>(blockIdx.x % blocks), positions, channels, aligned},
                        image,
                        static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32,
                        static_cast<int64_t>(gridDim.x) * kWarps};

  typename Shape::Accumulator accumulator;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = chunk_channel(n) + i % 2;
      float bias = 0;
      if (conv.bias && channel < channels) bias += conv.bias[channel];
      if (conv.second_bias && channel < channels) bias += conv.second_bias[channel];
      for (int m = 0; m < Shape::kCount; ++m) accumulator[m][n][i] = bias;
    }
  }

#pragma unroll 1
  for (int i = 0; i < conv.count; ++i) {
    const Term& term = conv.terms[i];
    // The last matrix has been used.
    __syncthreads();
    for (int place = threadIdx.x; place < kMatrix; place += kThreads) {
      const Entry entry = fragment_entry(place);
      const bool inside = entry.output < channels && entry.input < channels;
      const int at = entry.output * term.output_stride + entry.input * term.input_stride;
      matrix[place] = narrow<T>(inside ? term.matrix[at] : 0.0f);
    }
    __syncthreads();
    // Stays a loop: reading a source is long, and its numbers would fill the registers.
#pragma unroll 1
    for (int k = 0; k < kChunks / 2; ++k) {
      FragmentA<T> fragments[2][Shape::kCount];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = chunk_channel(2 * k + half);
        float even[Shape::kRows], odd[Shape::kRows];
        read_source(term.source, warp.view, image, channel, even);
        read_source(term.source, warp.view, image, channel + 1, odd);
#pragma unroll
        for (int m = 0; m < Shape::kCount; ++m) {
          const float values[4] = {even[2 * m], odd[2 * m], even[2 * m + 1], odd[2 * m + 1]};
          fragments[half][m] = to_fragment<T>(values);
        }
      }
      multiply_k16<T, Full>(accumulator, fragments[0], fragments[1], matrix, k);
    }
  }

  if (conv.after == After::kMoments) write_moments<T>(warp, accumulator, conv.partials);
  if (conv.after == After::kGradients) gradients_back<T>(warp, accumulator, conv);
  T* out = static_cast<T*>(conv.out) + image * channels * positions;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) store_chunk<T>(warp.view, out, n, accumulator);
}

}  // namespace

int64_t conv1x1_parts(const CudaShape& shape) {
  return dispatch(shape, [&](auto variant) {
    using V = decltype(variant);
    return shape.images * blocks_an_image<typename V::T>(shape) * kWarps;
  });
}

const char* launch_conv1x1(const CudaShape& shape, const Conv1x1Group& group, void* stream) {
  return dispatch(shape, [&](auto variant) -> const char* {
    using V = decltype(variant);
    using T = typename V::T;
    const int64_t blocks = blocks_an_image<T>(shape);
    bool aligned = true;
    for (int i = 0; i < group.count; ++i) {
      const Conv1x1& conv = group.items[i];
      aligned = aligned && rows_can_move<T>(shape, {conv.out, conv.hidden});
      for (int j = 0; j < conv.count; ++j) {
        const Source& source = conv.terms[j].source;
        aligned = aligned && rows_can_move<T>(shape, {source.x, source.z});
      }
    }
    dim3 grid = grid_of(shape.images * blocks);
    grid.y = static_cast<unsigned>(group.count);
    return launch(conv_kernel<T, V::Full>, grid, kThreads, stream, group,
                  static_cast<int>(shape.channels), shape.positions, static_cast<int>(blocks),
                  aligned);
  });
}

}  // namespace lemma_fast::adafm
