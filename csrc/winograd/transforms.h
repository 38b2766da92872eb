// 3x3 convolution, stride 1, padding 1, of channels-last maps for inference on the CPU in fp32, by
// Winograd's algorithm F(S x S, 3 x 3). For each tile of S x S results
//
//   y = A^T [ sum over c of (G g_c G^T) * (B^T x_c B) ] A
//
// Three passes: the input transform B^T x B of all tiles, one batched matrix product of PyTorch's
// over the channels, and the output transform with bias, residual and activation;
// `lemma_fast.ops.native.pack_winograd` makes G g G^T. With T = S + 2 a tile takes T x T products
// for each pair of channels in place of 9 S x S: 16 for 36 with S = 2, 36 for 144 with S = 4.
// Transformed tiles are T x T / (S x S) times as large as the map (4 or 2.25); they are written and
// read once each way, for as many images at a time as stay in the cache.

#pragma once

#include <cstdint>

#include "simd/dispatch.h"

namespace lemma_fast {

struct WinogradMap {
  int64_t height, width, channels;
  int64_t tiles;  // of all images
};

enum class Activation : int64_t { kNone, kRelu, kMish };

// Tiles `begin` to `end`, for maps of at least as many channels as a vector has lanes.
struct WinogradTransforms {
  // `images` [N, H, W, C] to `transformed` [T * T, tiles, C]; `zeros` holds C of them.
  void (*input)(const WinogradMap& map, const float* images, const float* zeros, float* transformed,
                int64_t begin, int64_t end);
  // `products` [T * T, tiles, D] to `images` [N, H, W, D], with the bias, `residual` [N, H, W, D]
  // (or null) and the activation.
  void (*output)(const WinogradMap& map, const float* products, const float* bias,
                 const float* residual, Activation activation, float* images, int64_t begin,
                 int64_t end);
};

// For S = 2 and S = 4.
struct WinogradKernels {
  WinogradTransforms two, four;
};
SIMD_DECLARE(WinogradKernels, winograd_kernels)

}  // namespace lemma_fast
