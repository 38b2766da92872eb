// torch.ops.lemma_fast.bigru_cpu: checks, and tiles of sequences for the threads.

#include <algorithm>
#include <array>
#include <memory>

#include "bigru/layer.h"
#include "tensors.h"

namespace lemma_fast {
namespace {

void check(const Tensor& features, const Tensor& packed, int64_t hidden, int64_t axis) {
  STD_TORCH_CHECK(features.is_cpu() && packed.is_cpu(), "bigru_cpu takes tensors on the CPU");
  STD_TORCH_CHECK(is_fp32_on_cpu(features) && is_fp32_on_cpu(packed),
                  "bigru_cpu computes in fp32: features and weights must be float32");
  STD_TORCH_CHECK(features.dim() == 4, "features must be [N, C, H, W], they have ", features.dim(),
                  " dimensions");
  STD_TORCH_CHECK(axis == 2 || axis == 3, "axis is ", axis,
                  "; 2 runs along the height, 3 along the width");
  STD_TORCH_CHECK(hidden >= 1, "hidden is ", hidden, ": there must be a unit");
  const int64_t blocks = (hidden + 15) / 16, rows = features.size(1) + hidden;
  STD_TORCH_CHECK(packed.is_contiguous() && packed.numel() == 2 * blocks * (64 + 48 * rows),
                  "packed weights hold ", packed.numel(), " floats, which is not what ",
                  features.size(1), " channels and ", hidden, " hidden units need");
}

Tensor bigru_cpu(Tensor features, Tensor packed, int64_t hidden, int64_t axis) {
  check(features, packed, hidden, axis);
  const int64_t N = features.size(0), C = features.size(1), H = features.size(2),
                W = features.size(3);
  const Tensor map = torch::stable::contiguous(features, MemoryFormat::ChannelsLast);
  const Tensor out = empty_channels_last({N, 2 * hidden, H, W});

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
  const auto tiles_of = [&](const GruTile& tile) {
    return (sequences + tile.sequences - 1) / tile.sequences;
  };
  const GruTiles& tiles = SIMD_CHOOSE(gru_tiles);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const GruTile tile = 2 * tiles_of(tiles.wide) < threads ? tiles.narrow : tiles.wide;
  const int64_t tasks = steps == 0 ? 0 : 2 * tiles_of(tile);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<float[]>(tile.sequences * (C + 2 * padded));
    std::array<const float*, kMostSequences> from;
    std::array<float*, kMostSequences> to;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t direction = task % 2;
      for (int s = 0; s < tile.sequences; ++s) {
        // A tile that is not full repeats its last sequence, and writes the same again.
        const int64_t at = position(std::min(task / 2 * tile.sequences + s, sequences - 1));
        from[s] = source + at * C;
        to[s] = target + at * 2 * hidden + direction * hidden;
      }
      const GruLayer layer{weights + direction * (padded / 16) * block,
                           block,
                           C,
                           hidden,
                           padded,
                           steps,
                           step_stride * C,
                           step_stride * 2 * hidden,
                           direction == 1};
      tile.run(layer, from.data(), to.data(), scratch.get());
    }
  });
  return is_channels_last(features) ? out : torch::stable::contiguous(out);
}

}  // namespace
}  // namespace lemma_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lemma_fast, m) {
  m.def("bigru_cpu(Tensor features, Tensor packed, int hidden, int axis) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lemma_fast, CPU, m) {
  m.impl("bigru_cpu", TORCH_BOX(&lemma_fast::bigru_cpu));
}
