// 1x1 convolutions of training, forward and backward: sums of matrices times sources.
#include "adafm_training.cuh"

namespace lemma_fast {
namespace adafm {
namespace {

// Adds up over the lanes that hold other positions of the same channels.
__device__ float sum_positions(float value) {
  for (int mask = 4; mask < 32; mask *= 2) value += exchange(value, mask);
  return value;
}

template <class T>
struct Warp {
  Place<T, Tile<T>::kRows> place;
  int64_t image, part, parts;

  __device__ bool live(int row) const { return place.first + row < place.positions; }

  __device__ void write(Partial *partials, int channel, Partial value) const {
    if (threadIdx.x % 32 < 4 && channel < place.channels) {
      partials[channel * parts + part] = value;
    }
  }
};

// Number i of a chunk of tile m is that of row 2m + i / 2.
template <class T>
__device__ void write_moments(const Warp<T> &warp, const typename Tile<T>::Sums &sums,
                              Partial *partials) {
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
        if (warp.live(row)) sum += sums[row / 2][n][row % 2 * 2 + parity];
      }
      const float mean = sum_positions(sum) / (count > 0 ? count : 1);
#pragma unroll
      for (int row = 0; row < 2 * kCount; ++row) {
        const float difference = sums[row / 2][n][row % 2 * 2 + parity] - mean;
        if (warp.live(row)) squares += difference * difference;
      }
      warp.write(partials, chunk_channel(n) + parity, {mean, sum_positions(squares), count});
    }
  }
}

template <class T>
__device__ void gradients_back(const Warp<T> &warp, typename Tile<T>::Sums &sums,
                               const Mix &mix) {
  constexpr int kCount = Tile<T>::kCount;
  const T *hidden = static_cast<const T *>(mix.hidden) +
                    warp.image * warp.place.channels * warp.place.positions;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int channel = chunk_channel(n) + parity;
      const bool inside = channel < warp.place.channels;
      const float mean = inside ? mix.norm.mean[channel] : 0.0f;
      const float inverse = inside ? mix.norm.inverse_deviation[channel] : 0.0f;
      const float scale = inside && mix.slope ? mix.norm.scale[channel] : 0.0f;
      const float shift = inside && mix.slope ? mix.norm.shift[channel] : 0.0f;
      const auto h = warp.place.load(hidden, channel);
      Partial part = {0, 0, 0};
#pragma unroll
      for (int row = 0; row < 2 * kCount; ++row) {
        float &gradient = sums[row / 2][n][row % 2 * 2 + parity];
        if (!warp.live(row)) continue;
        const float value = widen(h.values[row]);
        if (mix.slope) {
          const float v = value * scale + shift;
          if (!(v > 0)) {
            part.third += gradient * v;
            gradient *= *mix.slope;
          }
        }
        part.first += gradient;
        part.second += gradient * ((value - mean) * inverse);
      }
      part = {sum_positions(part.first), sum_positions(part.second), sum_positions(part.third)};
      warp.write(mix.partials, channel, part);
    }
  }
}

// Blocks: (images times blocks an image, mixes of the group).
template <class T, bool Full>
__global__ void __launch_bounds__(kThreads, Full ? 1 : 2)
    mix_kernel(const __grid_constant__ MixGroup group, int channels, int64_t positions, int blocks,
               bool vectors) {
  using Shape = Tile<T>;
  auto &matrix = shared_memory<T[kMatrix]>();
  const Mix &mix = group.mixes[blockIdx.y];
  const int64_t image = blockIdx.x / blocks;
  const Warp<T> warp = {
      {thread_position<T>(blockIdx.x % blocks), positions, channels, vectors},
      image,
      static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32,
      static_cast<int64_t>(gridDim.x) * kWarps};

  typename Shape::Sums sums;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = chunk_channel(n) + i % 2;
      float bias = 0;
      if (mix.bias && channel < channels) bias += mix.bias[channel];
      if (mix.second_bias && channel < channels) bias += mix.second_bias[channel];
      for (int m = 0; m < Shape::kCount; ++m) sums[m][n][i] = bias;
    }
  }

#pragma unroll 1
  for (int i = 0; i < mix.count; ++i) {
    const Term &term = mix.terms[i];
    // The last matrix has been used.
    __syncthreads();
    for (int place = threadIdx.x; place < kMatrix; place += kThreads) {
      const Entry entry = panel_entry(place);
      const bool inside = entry.output < channels && entry.input < channels;
      const int at = entry.output * term.output_stride + entry.input * term.input_stride;
      matrix[place] = narrow<T>(inside ? term.matrix[at] : 0.0f);
    }
    __syncthreads();
    // Stays a loop: reading a source is long, and its numbers would fill the registers.
#pragma unroll 1
    for (int k = 0; k < kChunks / 2; ++k) {
      Operand<T> operands[2][Shape::kCount];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = chunk_channel(2 * k + half);
        float even[Shape::kRows], odd[Shape::kRows];
        read_source(term.source, warp.place, image, channel, even);
        read_source(term.source, warp.place, image, channel + 1, odd);
#pragma unroll
        for (int m = 0; m < Shape::kCount; ++m) {
          const float values[4] = {even[2 * m], odd[2 * m], even[2 * m + 1], odd[2 * m + 1]};
          operands[half][m] = to_operand<T>(values);
        }
      }
      multiply_step<T, Full>(sums, operands[0], operands[1], matrix, k);
    }
  }

  if (mix.after == After::kMoments) write_moments<T>(warp, sums, mix.partials);
  if (mix.after == After::kGradients) gradients_back<T>(warp, sums, mix);
  T *out = static_cast<T *>(mix.out) + image * channels * positions;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) store_chunk<T>(warp.place, out, n, sums);
}

}  // namespace

int64_t mix_parts(const CudaShape &shape) {
  return dispatch(shape, [&](auto variant) {
    using V = decltype(variant);
    return shape.images * blocks_an_image<typename V::T>(shape) * kWarps;
  });
}

const char *launch_mix(const CudaShape &shape, const MixGroup &group, void *stream) {
  return dispatch(shape, [&](auto variant) -> const char * {
    using V = decltype(variant);
    using T = typename V::T;
    const int64_t blocks = blocks_an_image<T>(shape);
    bool vectors = true;
    for (int i = 0; i < group.count; ++i) {
      const Mix &mix = group.mixes[i];
      vectors = vectors && rows_are_aligned<T>(shape, {mix.out, mix.hidden});
      for (int j = 0; j < mix.count; ++j) {
        const Source &source = mix.terms[j].source;
        vectors = vectors && rows_are_aligned<T>(shape, {source.x, source.z});
      }
    }
    dim3 grid = grid_of(shape.images * blocks);
    grid.y = static_cast<unsigned>(group.count);
    return launch(mix_kernel<T, V::Full>, grid, kThreads, stream, group,
                  static_cast<int>(shape.channels), shape.positions, static_cast<int>(blocks),
                  vectors);
  });
}

}  // namespace adafm
}  // namespace lemma_fast
