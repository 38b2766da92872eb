// Batch norms in training: statistics, their backward pass, and maps that are only written.

#include "adafm/cuda/training.cuh"

namespace lemma_fast::adafm {
namespace {

constexpr int kRow = 4;

// Sum over a block, in an order that is always the same; every thread gets it.
__device__ double sum_block(double value, double (&shared)[kWarps]) {
  for (int mask = 1; mask < 32; mask *= 2) value += exchange(value, mask);
  // Nobody still reads the last sum.
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

__device__ float sum_warp(float value) {
  for (int mask = 1; mask < 32; mask *= 2) value += exchange(value, mask);
  return value;
}

// A warp for each channel of each image.
template <class T>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(Moments moments, int64_t images, int channels, int64_t positions) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= images * channels) return;
  const int channel = static_cast<int>(row % channels);
  const T* x = static_cast<const T*>(moments.x) + row * positions;
  Partial part = {0, 0, static_cast<float>(positions)};
  if (moments.gradient) {
    const T* gradient = static_cast<const T*>(moments.gradient) + row * positions;
    const float mean = moments.norm.mean[channel],
                inverse = moments.norm.inverse_deviation[channel];
    for (int64_t p = lane; p < positions; p += 32) {
      part.first += widen(gradient[p]);
      part.second += widen(gradient[p]) * ((widen(x[p]) - mean) * inverse);
    }
    part = {sum_warp(part.first), sum_warp(part.second), 0};
  } else {
    float sum = 0, squares = 0;
    for (int64_t p = lane; p < positions; p += 32) sum += widen(x[p]);
    part.first = sum_warp(sum) / static_cast<float>(positions);
    for (int64_t p = lane; p < positions; p += 32) {
      const float difference = widen(x[p]) - part.first;
      squares += difference * difference;
    }
    part.second = sum_warp(squares);
  }
  if (lane == 0) moments.partials[channel * images + row / channels] = part;
}

// A block for each channel of each norm. Parts' means and squared deviations are put together in
// double, as by Chan et al., so a mean that is large beside the deviation does no harm.
__global__ void __launch_bounds__(kThreads)
    norm_forward_kernel(const __grid_constant__ NormForwards norms) {
  auto& shared = shared_memory<double[kWarps]>();
  const NormForward& work = norms.items[blockIdx.y];
  const int channel = blockIdx.x;
  float mean, variance;
  if (work.partials) {
    const Partial* partials = work.partials + channel * work.parts;
    double count = 0, total = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < work.parts; i += kThreads) {
      count += partials[i].third;
      total += static_cast<double>(partials[i].third) * partials[i].first;
    }
    count = sum_block(count, shared);
    const double exact = sum_block(total, shared) / count;
    for (int64_t i = threadIdx.x; i < work.parts; i += kThreads) {
      const double difference = partials[i].first - exact;
      squares += partials[i].second + partials[i].third * difference * difference;
    }
    squares = sum_block(squares, shared);
    mean = static_cast<float>(exact);
    variance = static_cast<float>(squares / count);
    if (threadIdx.x == 0) {
      float &running_mean = work.norm.mean[channel],
            &running_variance = work.norm.variance[channel];
      const float unbiased = static_cast<float>(squares / (count - 1));
      running_mean = 0.9f * running_mean + 0.1f * mean;
      running_variance = 0.9f * running_variance + 0.1f * unbiased;
    }
  } else {
    mean = work.norm.mean[channel];
    variance = work.norm.variance[channel];
  }
  if (threadIdx.x != 0) return;
  const float scale = norm_scale(work.norm.weight[channel], variance);
  work.state.mean[channel] = mean;
  work.state.inverse_deviation[channel] = norm_scale(1.0f, variance);
  work.state.scale[channel] = scale;
  work.state.shift[channel] = norm_shift(work.norm.bias[channel], mean, scale);
}

__global__ void __launch_bounds__(kThreads)
    norm_backward_kernel(const __grid_constant__ NormBackwards norms, bool training, double count) {
  auto& shared = shared_memory<double[kWarps]>();
  const NormBackward& work = norms.items[blockIdx.y];
  const int channel = blockIdx.x;
  double first = 0, second = 0, third = 0;
  for (int64_t i = threadIdx.x; i < work.parts; i += kThreads) {
    const Partial part = work.partials[channel * work.parts + i];
    first += part.first;
    second += part.second;
    third += part.third;
  }
  first = sum_block(first, shared);
  second = sum_block(second, shared);
  third = sum_block(third, shared);
  if (threadIdx.x != 0) return;
  work.bias_gradient[channel] = static_cast<float>(first);
  work.weight_gradient[channel] = static_cast<float>(second);
  if (work.slope_parts) work.slope_parts[channel] = static_cast<float>(third);
  // dx = weight / deviation * (gradient - mean(gradient) - x^ mean(gradient x^)).
  const double inverse = work.state.inverse_deviation[channel];
  const double scale = work.weight[channel] * inverse;
  const double along = training ? scale * inverse * second / count : 0;
  const double constant = training ? scale * first / count : 0;
  work.scale[channel] = static_cast<float>(scale);
  work.second[channel] = static_cast<float>(-along);
  work.shift[channel] = static_cast<float>(along * work.state.mean[channel] - constant);
}

// A thread for each few positions of a channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    write_kernel(const __grid_constant__ Source source, int64_t images, int channels,
                 int64_t positions, bool aligned, T* out) {
  const int64_t each = (positions + kRow - 1) / kRow;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= images * channels * each) return;
  const View<T, kRow> view = {i % each * kRow, positions, channels, aligned};
  const int64_t image = i / each / channels;
  const int channel = static_cast<int>(i / each % channels);
  float values[kRow];
  read_source(source, view, image, channel, values);
  Row<T, kRow> row;
  for (int j = 0; j < kRow; ++j) row.values[j] = narrow<T>(values[j]);
  view.store(out + image * channels * positions, channel, row);
}

// One block for `each` numbers of work.
dim3 grid_for(int64_t work, int64_t each) { return grid_of((work + each - 1) / each); }

}  // namespace

const char* launch_moments(const CudaShape& shape, const Moments& moments, void* stream) {
  return dispatch_type(shape.dtype, [&](auto number) {
    const dim3 grid = grid_for(shape.images * shape.channels, kWarps);
    return launch(moments_kernel<decltype(number)>, grid, kThreads, stream, moments, shape.images,
                  static_cast<int>(shape.channels), shape.positions);
  });
}

const char* launch_norm_forward(const CudaShape& shape, const NormForwards& norms, void* stream) {
  const dim3 grid(static_cast<unsigned>(shape.channels), static_cast<unsigned>(norms.count));
  return launch(norm_forward_kernel, grid, kThreads, stream, norms);
}

const char* launch_norm_backward(const CudaShape& shape, bool training, const NormBackwards& norms,
                                 void* stream) {
  const dim3 grid(static_cast<unsigned>(shape.channels), static_cast<unsigned>(norms.count));
  const double count = static_cast<double>(shape.images) * static_cast<double>(shape.positions);
  return launch(norm_backward_kernel, grid, kThreads, stream, norms, training, count);
}

const char* launch_write(const CudaShape& shape, const Source& source, void* out, void* stream) {
  return dispatch_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    const int64_t each = (shape.positions + kRow - 1) / kRow;
    const bool aligned = rows_can_move<T, kRow>(shape, {source.x, source.z, out});
    return launch(write_kernel<T>, grid_for(shape.images * shape.channels * each, kThreads),
                  kThreads, stream, source, shape.images, static_cast<int>(shape.channels),
                  shape.positions, aligned, static_cast<T*>(out));
  });
}

}  // namespace lemma_fast::adafm
