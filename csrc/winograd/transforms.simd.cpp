// Lanes are channels: the last vector ends with the last channel and may repeat some of its
// neighbour's. The interpolation points are 0, 1, -1 and, with S = 4, 2 and -2.

#include "winograd/transforms.h"

#include "simd/vector.h"

namespace lemma_fast::SIMD_LEVEL {
namespace {

using Floats = Vector<float>;
constexpr int kWidth = kLanes<float>;

// B^T of T values, each a step apart, in place.
template <int S>
SIMD_INLINE void input_transform(Floats* x, int step) {
  const Floats a = x[0], b = x[step], c = x[2 * step], d = x[3 * step];
  if constexpr (S == 2) {
    x[0] = a - c;
    x[step] = b + c;
    x[2 * step] = c - b;
    x[3 * step] = b - d;
  } else {
    const Floats e = x[4 * step], f = x[5 * step];
    const Floats even = e - 4.0f * c, odd = d - 4.0f * b;
    const Floats even_half = e - c, odd_half = 2.0f * (d - b);
    x[0] = 4.0f * a - 5.0f * c + e;
    x[step] = even + odd;
    x[2 * step] = even - odd;
    x[3 * step] = even_half + odd_half;
    x[4 * step] = even_half - odd_half;
    x[5 * step] = 4.0f * b - 5.0f * d + f;
  }
}

// A^T: T products, `from_step` apart, to S results, `to_step` apart.
template <int S>
SIMD_INLINE void output_transform(const Floats* from, int from_step, Floats* to, int to_step) {
  const Floats a = from[0], d = from[3 * from_step];
  const Floats sum = from[from_step] + from[2 * from_step];
  const Floats difference = from[from_step] - from[2 * from_step];
  if constexpr (S == 2) {
    to[0] = a + sum;
    to[to_step] = difference - d;
  } else {
    const Floats e = from[4 * from_step], f = from[5 * from_step];
    to[0] = a + sum + (d + e);
    to[to_step] = difference + 2.0f * (d - e);
    to[2 * to_step] = sum + 4.0f * (d + e);
    to[3 * to_step] = difference + 8.0f * (d - e) + f;
  }
}

// Where tile number `tile` of a stack of images begins.
struct Corner {
  int64_t image, y, x;
};

template <int S>
SIMD_INLINE Corner corner(const WinogradMap& map, int64_t tile) {
  const int64_t columns = (map.width + S - 1) / S, rows = (map.height + S - 1) / S;
  return {tile / (rows * columns), tile / columns % rows * S, tile % columns * S};
}

template <int S>
void transform_inputs(const WinogradMap& map, const float* images, const float* zeros,
                      float* transformed, int64_t begin, int64_t end) {
  constexpr int T = S + 2;
  const int64_t C = map.channels;
  for (int64_t tile_number = begin; tile_number < end; ++tile_number) {
    const Corner from = corner<S>(map, tile_number);
    const float* at[T * T];
    for (int i = 0; i < T * T; ++i) {
      const int64_t y = from.y + i / T - 1, x = from.x + i % T - 1;
      const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
      at[i] = inside ? images + ((from.image * map.height + y) * map.width + x) * C : zeros;
    }
    for (int64_t next = 0; next < C; next += kWidth) {
      const int64_t c = next + kWidth <= C ? next : C - kWidth;
      Floats tile[T * T];
#pragma GCC unroll 36
      for (int i = 0; i < T * T; ++i) tile[i] = load(at[i] + c);
#pragma GCC unroll 6
      for (int i = 0; i < T; ++i) input_transform<S>(tile + i, T);
#pragma GCC unroll 6
      for (int i = 0; i < T; ++i) input_transform<S>(tile + i * T, 1);
#pragma GCC unroll 36
      for (int i = 0; i < T * T; ++i) {
        store(transformed + (i * map.tiles + tile_number) * C + c, tile[i]);
      }
    }
  }
}

template <int S>
void transform_outputs(const WinogradMap& map, const float* products, const float* bias,
                       const float* residual, Activation activation, float* images, int64_t begin,
                       int64_t end) {
  constexpr int T = S + 2;
  const int64_t D = map.channels;
  for (int64_t tile_number = begin; tile_number < end; ++tile_number) {
    const Corner to = corner<S>(map, tile_number);
    for (int64_t next = 0; next < D; next += kWidth) {
      const int64_t d = next + kWidth <= D ? next : D - kWidth;
      Floats tile[T * T], half[S * T], result[S * S];
#pragma GCC unroll 36
      for (int i = 0; i < T * T; ++i) {
        tile[i] = load(products + (i * map.tiles + tile_number) * D + d);
      }
#pragma GCC unroll 6
      for (int i = 0; i < T; ++i) output_transform<S>(tile + i, T, half + i, T);
#pragma GCC unroll 4
      for (int i = 0; i < S; ++i) output_transform<S>(half + i * T, 1, result + i * S, 1);
      const Floats offset = load(bias + d);
#pragma GCC unroll 16
      for (int i = 0; i < S * S; ++i) {
        const int64_t y = to.y + i / S, x = to.x + i % S;
        if (y < map.height && x < map.width) {
          const int64_t at = ((to.image * map.height + y) * map.width + x) * D + d;
          Floats value = result[i] + offset;
          value = residual ? value + load(residual + at) : value;
          value = activation == Activation::kRelu   ? at_least(value, 0.0f)
                  : activation == Activation::kMish ? mish(value)
                                                    : value;
          store(images + at, value);
        }
      }
    }
  }
}

}  // namespace

extern const WinogradKernels winograd_kernels{{transform_inputs<2>, transform_outputs<2>},
                                              {transform_inputs<4>, transform_outputs<4>}};

}  // namespace lemma_fast::SIMD_LEVEL
