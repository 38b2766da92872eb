// Bidirectional GRU along the height or the width of a map, for inference on the CPU.
//
// A task is one direction of a tile of sequences. A tile reads a step's inputs from the map where
// they lie, runs both matrix products and the gates in registers, and writes its states to the map.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <new>

namespace lemma_fast {

// One direction, its weights as `lemma_fast.ops.native.pack_bigru` lays them out: for each block of
// 16 hidden units 4 rows of biases (r, z, n of the input, n of the state), then for each input channel
// and each hidden unit a row for r, z and n.
struct GruLayer {
  const float* weights;
  long block;  // floats in a block
  long channels, hidden, padded;
  long steps, input_stride, output_stride;
  bool backward;
};

}  // namespace lemma_fast

#define SIMD_KERNEL "bigru_kernel.h"
#include "simd_targets.h"

namespace lemma_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLargestTile = 8;

using TileFunction =
    void (*)(const GruLayer&, const float* const*, float* const*, float*);

struct Tile {
  int size;
  TileFunction run;
};

// The widest tile of an instruction set, or half of it where that would leave threads without work.
Tile choose_tile(int lanes, int64_t sequences, int64_t threads) {
  const auto pick = [&](Tile wide, Tile narrow) {
    return 2 * ((sequences + wide.size - 1) / wide.size) < threads ? narrow : wide;
  };
#ifdef LEMMA_FAST_X86
  if (lanes == 16) {
    return pick({avx512::kTile, avx512::gru_tile<avx512::kTile>}, {4, avx512::gru_tile<4>});
  }
  if (lanes == 8) {
    return pick({avx2::kTile, avx2::gru_tile<avx2::kTile>}, {2, avx2::gru_tile<2>});
  }
#endif
  return pick({plain::kTile, plain::gru_tile<plain::kTile>}, {2, plain::gru_tile<2>});
}

bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) {
      return false;
    }
    expected *= x.size(dim);
  }
  return true;
}

void check(const Tensor& features, const Tensor& packed, int64_t hidden, int64_t axis, int64_t lanes) {
  STD_TORCH_CHECK(features.is_cpu() && packed.is_cpu(), "bigru_cpu takes tensors on the CPU");
  STD_TORCH_CHECK(
      features.scalar_type() == ScalarType::Float && packed.scalar_type() == ScalarType::Float,
      "bigru_cpu computes in fp32: features and weights must be float32");
  STD_TORCH_CHECK(
      features.dim() == 4, "features must be [N, C, H, W], they have ", features.dim(), " dimensions");
  STD_TORCH_CHECK(
      axis == 2 || axis == 3, "axis is ", axis, "; 2 runs along the height, 3 along the width");
  STD_TORCH_CHECK(hidden >= 1, "hidden is ", hidden, ": there must be a unit");
  const int64_t blocks = (hidden + 15) / 16, rows = features.size(1) + hidden;
  STD_TORCH_CHECK(
      packed.is_contiguous() && packed.numel() == 2 * blocks * (64 + 48 * rows),
      "packed weights hold ", packed.numel(), " floats, which is not what ", features.size(1),
      " channels and ", hidden, " hidden units need");
  STD_TORCH_CHECK(
      lanes == 4 || ((lanes == 8 || lanes == 16) && lanes <= simd_lanes()),
      "this machine has no vectors of ", lanes, " floats");
}

Tensor bigru_cpu(Tensor features, Tensor packed, int64_t hidden, int64_t axis, int64_t lanes) {
  lanes = lanes == 0 ? simd_lanes() : lanes;
  check(features, packed, hidden, axis, lanes);
  const int64_t N = features.size(0), C = features.size(1), H = features.size(2),
                W = features.size(3);
  const bool channels_last = !features.is_contiguous() && is_channels_last(features);
  const Tensor map = torch::stable::contiguous(features, MemoryFormat::ChannelsLast);
  Tensor out = torch::stable::empty(
      {N, 2 * hidden, H, W}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
      MemoryFormat::ChannelsLast);

  const int64_t lines = axis == 3 ? H : W, steps = axis == 3 ? W : H;
  const int64_t line_stride = axis == 3 ? W : 1, step_stride = axis == 3 ? 1 : W;
  const int64_t sequences = N * lines, padded = (hidden + 15) / 16 * 16;
  const int64_t block = 64 + 48 * (C + hidden);
  const float* const weights = packed.const_data_ptr<float>();
  const float* const source = map.const_data_ptr<float>();
  float* const target = out.mutable_data_ptr<float>();

  const auto position = [&](int64_t sequence) {
    return sequence / lines * (H * W) + sequence % lines * line_stride;
  };
  const Tile tile = choose_tile(
      static_cast<int>(lanes), sequences, static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t tiles = steps == 0 ? 0 : (sequences + tile.size - 1) / tile.size;
  torch::stable::parallel_for(0, 2 * tiles, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<float[]>(tile.size * (C + 2 * padded));
    std::array<const float*, kLargestTile> from;
    std::array<float*, kLargestTile> to;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t direction = task % 2;
      for (int s = 0; s < tile.size; ++s) {
        // A tile that is not full repeats its last sequence, and writes the same again.
        const int64_t at = position(std::min(task / 2 * tile.size + s, sequences - 1));
        from[s] = source + at * C;
        to[s] = target + at * 2 * hidden + direction * hidden;
      }
      const GruLayer layer{
          weights + direction * (padded / 16) * block,
          block, C, hidden, padded, steps, step_stride * C, step_stride * 2 * hidden,
          direction == 1};
      tile.run(layer, from.data(), to.data(), scratch.get());
    }
  });
  return channels_last ? out : torch::stable::contiguous(out);
}

}  // namespace
}  // namespace lemma_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lemma_fast, m) {
  m.def("bigru_cpu(Tensor features, Tensor packed, int hidden, int axis, int lanes=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lemma_fast, CPU, m) {
  m.impl("bigru_cpu", TORCH_BOX(&lemma_fast::bigru_cpu));
}
