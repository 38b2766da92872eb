// Transforms of Winograd's minimal 3x3 convolution; written in terms of simd.h, see there.
//
// Lanes are channels, at least as many as a vector has: the last vector ends with the last channel and
// may repeat some of its neighbour's. A tile of S x S results takes T x T inputs, T = S + 2, to T x T products for
// each pair of channels in place of 9 S x S: 16 for 36 with S = 2, 36 for 144 with S = 4. The
// interpolation points are 0, 1, -1 and, with S = 4, 2 and -2.

namespace lemma_fast {
namespace SIMD_NAMESPACE {

// B^T of T values, each a step apart.
template <int S>
static inline void spread(const Vector* from, Vector* to, int step) {
  const Vector a = from[0], b = from[step], c = from[2 * step], d = from[3 * step];
  if constexpr (S == 2) {
    to[0] = a - c;
    to[step] = b + c;
    to[2 * step] = c - b;
    to[3 * step] = b - d;
  } else {
    const Vector e = from[4 * step], f = from[5 * step];
    const Vector even = e - 4.0f * c, odd = d - 4.0f * b;
    const Vector even_half = e - c, odd_half = 2.0f * (d - b);
    to[0] = 4.0f * a - 5.0f * c + e;
    to[step] = even + odd;
    to[2 * step] = even - odd;
    to[3 * step] = even_half + odd_half;
    to[4 * step] = even_half - odd_half;
    to[5 * step] = 4.0f * b - 5.0f * d + f;
  }
}

// A^T: T products, `from_step` apart, to S results, `to_step` apart.
template <int S>
static inline void gather(const Vector* from, int from_step, Vector* to, int to_step) {
  const Vector a = from[0], d = from[3 * from_step];
  const Vector sum = from[from_step] + from[2 * from_step];
  const Vector difference = from[from_step] - from[2 * from_step];
  if constexpr (S == 2) {
    to[0] = a + sum;
    to[to_step] = difference - d;
  } else {
    const Vector e = from[4 * from_step], f = from[5 * from_step];
    to[0] = a + sum + (d + e);
    to[to_step] = difference + 2.0f * (d - e);
    to[2 * to_step] = sum + 4.0f * (d + e);
    to[3 * to_step] = difference + 8.0f * (d - e) + f;
  }
}

// Where tile number `tile` of a stack of images begins.
struct Corner {
  long image, y, x;
};

template <int S>
static inline Corner corner(const WinogradMap& map, long tile) {
  const long columns = (map.width + S - 1) / S, rows = (map.height + S - 1) / S;
  return {tile / (rows * columns), tile / columns % rows * S, tile % columns * S};
}

// The inputs of tiles `begin` to `end`: `images` [N, H, W, C] to `spreads` [T * T, tiles, C]. `zeros`
// holds C of them.
template <int S>
static void spread_tiles(
    const WinogradMap& map, const float* images, const float* zeros, float* spreads, long begin,
    long end) {
  constexpr int T = S + 2;
  const long C = map.channels;
  for (long tile_number = begin; tile_number < end; ++tile_number) {
    const Corner from = corner<S>(map, tile_number);
    const float* at[T * T];
    for (int i = 0; i < T * T; ++i) {
      const long y = from.y + i / T - 1, x = from.x + i % T - 1;
      const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
      at[i] = inside ? images + ((from.image * map.height + y) * map.width + x) * C : zeros;
    }
    for (long next = 0; next < C; next += kLanes) {
      const long c = next + kLanes <= C ? next : C - kLanes;
      Vector tile[T * T];
#pragma GCC unroll 36
      for (int i = 0; i < T * T; ++i) {
        tile[i] = load(at[i] + c);
      }
#pragma GCC unroll 6
      for (int i = 0; i < T; ++i) {
        spread<S>(tile + i, tile + i, T);
      }
#pragma GCC unroll 6
      for (int i = 0; i < T; ++i) {
        spread<S>(tile + i * T, tile + i * T, 1);
      }
#pragma GCC unroll 36
      for (int i = 0; i < T * T; ++i) {
        store(spreads + (i * map.tiles + tile_number) * C + c, tile[i]);
      }
    }
  }
}

// The results of tiles `begin` to `end`: `products` [T * T, tiles, D] to `images` [N, H, W, D], with
// the bias, `residual` [N, H, W, D] (or null) and the activation.
template <int S>
static void gather_tiles(
    const WinogradMap& map, const float* products, const float* bias, const float* residual,
    Activation activation, float* images, long begin, long end) {
  constexpr int T = S + 2;
  const long D = map.channels;
  for (long tile_number = begin; tile_number < end; ++tile_number) {
    const Corner to = corner<S>(map, tile_number);
    for (long next = 0; next < D; next += kLanes) {
      const long d = next + kLanes <= D ? next : D - kLanes;
      Vector tile[T * T], half[S * T], result[S * S];
#pragma GCC unroll 36
      for (int i = 0; i < T * T; ++i) {
        tile[i] = load(products + (i * map.tiles + tile_number) * D + d);
      }
#pragma GCC unroll 6
      for (int i = 0; i < T; ++i) {
        gather<S>(tile + i, T, half + i, T);
      }
#pragma GCC unroll 4
      for (int i = 0; i < S; ++i) {
        gather<S>(half + i * T, 1, result + i * S, 1);
      }
      const Vector offset = load(bias + d);
#pragma GCC unroll 16
      for (int i = 0; i < S * S; ++i) {
        const long y = to.y + i / S, x = to.x + i % S;
        if (y < map.height && x < map.width) {
          const long at = ((to.image * map.height + y) * map.width + x) * D + d;
          Vector value = result[i] + offset;
          value = residual ? value + load(residual + at) : value;
          value = activation == Activation::kRelu ? at_least(value, 0.0f)
              : activation == Activation::kMish   ? mish(value)
                                                  : value;
          store(images + at, value);
        }
      }
    }
  }
}

}  // namespace SIMD_NAMESPACE
}  // namespace lemma_fast
