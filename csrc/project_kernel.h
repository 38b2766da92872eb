// PixelShuffle(2) and a convolution to a few channels in one; written in terms of simd.h, see there.
//
// A library's convolution wastes most of a vector on four output channels. Here lanes are input
// channels, which lie side by side: pixels and outputs fill the registers with sums, and the lanes of
// a sum are added at the end.

namespace lemma_fast {
namespace SIMD_NAMESPACE {

// Sums fill the registers: 4 outputs of 6 pixels with AVX-512, of 3 otherwise.
constexpr int kPixels = SIMD_LANES == 16 ? 6 : 3;
constexpr int kOutputs = 4;

static inline float add_lanes(Vector x) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += x[lane];
  }
  return sum;
}

// Row `y` of one image's result: `image` [H, W, 2, 2, C] to rows of `result` [D, 2 H, 2 W]. `pixels`
// has room for kernel * (2 W + kernel - 1) pointers, `zeros` holds C.
static void project_row(
    const Projection& projection, const float* image, long y, const float* zeros,
    const float** pixels, float* result) {
  const long C = projection.channels, kernel = projection.kernel, reach = kernel / 2;
  const long rows = 2 * projection.height, columns = 2 * projection.width;
  const long line = columns + 2 * reach;
  const long above = y < reach ? reach - y : 0;
  const long below = y + reach >= rows ? rows - y + reach : kernel;
  for (long i = above; i < below; ++i) {
    const long row = y + i - reach;
    const float* from = image + (row / 2 * projection.width * 4 + row % 2 * 2) * C;
    for (long column = -reach; column < columns + reach; ++column) {
      const bool inside = column >= 0 && column < columns;
      pixels[i * line + column + reach] =
          inside ? from + (column / 2 * 4 + column % 2) * C : zeros;
    }
  }
  for (long d = 0; d < projection.outputs; d += kOutputs) {
    for (long first = 0; first < columns; first += kPixels) {
      // A group past the edge repeats the last pixel, and writes the same again.
      long column[kPixels];
#pragma GCC unroll 6
      for (int p = 0; p < kPixels; ++p) {
        column[p] = first + p < columns ? first + p : columns - 1;
      }
      Vector sum[kPixels][kOutputs] = {};
      for (long i = above; i < below; ++i) {
        for (long j = 0; j < kernel; ++j) {
          const float* at[kPixels];
#pragma GCC unroll 6
          for (int p = 0; p < kPixels; ++p) {
            at[p] = pixels[i * line + column[p] + j];
          }
          const float* weight =
              projection.weights + ((d / kOutputs * kernel + i) * kernel + j) * kOutputs * C;
          for (long c = 0; c < C; c += kLanes) {
            Vector to[kOutputs];
#pragma GCC unroll 4
            for (int o = 0; o < kOutputs; ++o) {
              to[o] = load(weight + o * C + c);
            }
#pragma GCC unroll 6
            for (int p = 0; p < kPixels; ++p) {
              const Vector x = load(at[p] + c);
#pragma GCC unroll 4
              for (int o = 0; o < kOutputs; ++o) {
                sum[p][o] += x * to[o];
              }
            }
          }
        }
      }
      for (int o = 0; o < kOutputs && d + o < projection.outputs; ++o) {
        float* const to = result + ((d + o) * rows + y) * columns;
        for (int p = 0; p < kPixels; ++p) {
          const float value = add_lanes(sum[p][o]) + projection.bias[d + o];
          to[column[p]] = projection.squash ? hyperbolic_tangent(broadcast(value))[0] : value;
        }
      }
    }
  }
}

}  // namespace SIMD_NAMESPACE
}  // namespace lemma_fast
