// The end of the upsampler on the CPU, for inference: PixelShuffle(2), a convolution to a few
// channels and tanh. The channels come in the order (row, column, channel) in place of PixelShuffle's
// (channel, row, column), which the convolution before sees to: then there is nothing to shuffle.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace lemma_fast {

struct Projection {
  // [outputs / 4, kernel, kernel, 4, channels], zeros for what is past the outputs
  const float* weights;
  const float* bias;
  long channels, outputs, kernel;
  long height, width;  // before the shuffle
  bool squash;         // tanh at the end
};

}  // namespace lemma_fast

#define SIMD_KERNEL "project_kernel.h"
#include "simd_targets.h"

namespace lemma_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_fp32(const Tensor& x) {
  return x.is_cpu() && x.scalar_type() == ScalarType::Float;
}

decltype(&plain::project_row) choose_projection(int64_t lanes) {
#ifdef LEMMA_FAST_X86
  if (lanes == 16) {
    return avx512::project_row;
  }
  if (lanes == 8) {
    return avx2::project_row;
  }
#endif
  return plain::project_row;
}

Tensor shuffle_project_cpu(
    Tensor features, Tensor weight, Tensor bias, bool squash, int64_t lanes) {
  lanes = lanes == 0 ? simd_lanes() : lanes;
  STD_TORCH_CHECK(
      lanes == 4 || ((lanes == 8 || lanes == 16) && lanes <= simd_lanes()),
      "this machine has no vectors of ", lanes, " floats");
  STD_TORCH_CHECK(
      is_fp32(features) && is_fp32(weight) && is_fp32(bias),
      "shuffle_project_cpu computes in fp32 on the CPU: every tensor must be float32 and there");
  STD_TORCH_CHECK(
      features.dim() == 4, "features must be [N, 4 C, H, W], they have ", features.dim(),
      " dimensions");
  const int64_t N = features.size(0), C = features.size(1) / 4, H = features.size(2),
                W = features.size(3);
  STD_TORCH_CHECK(
      features.size(1) % 64 == 0, "features must have 64, 128, ... channels, they have ",
      features.size(1));
  STD_TORCH_CHECK(
      weight.dim() == 5 && weight.is_contiguous() && weight.size(1) == weight.size(2) &&
          weight.size(1) % 2 == 1 && weight.size(3) == 4 && weight.size(4) == C,
      "weights must be packed ones, [D / 4, kernel, kernel, 4, ", C, "], with an odd kernel");
  const int64_t D = bias.numel(), kernel = weight.size(1);
  STD_TORCH_CHECK(
      bias.dim() == 1 && bias.is_contiguous() && D >= 1 && (D + 3) / 4 == weight.size(0),
      "the bias holds ", D, " numbers, which is not what the weights need");

  const Tensor map = torch::stable::contiguous(features, MemoryFormat::ChannelsLast);
  Tensor out = torch::stable::empty({N, D, 2 * H, 2 * W}, ScalarType::Float);
  const Projection projection{
      weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), C, D, kernel, H, W, squash};
  const float* const from = map.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  const auto project_row = choose_projection(lanes);
  const std::vector<float> zeros(C, 0.0f);
  torch::stable::parallel_for(0, W == 0 ? 0 : N * 2 * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<const float*> pixels(kernel * (2 * W + kernel - 1));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / (2 * H);
      project_row(
          projection, from + n * H * W * 4 * C, row % (2 * H), zeros.data(), pixels.data(),
          to + n * D * 4 * H * W);
    }
  });
  return out;
}

}  // namespace
}  // namespace lemma_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lemma_fast, m) {
  m.def(
      "shuffle_project_cpu(Tensor features, Tensor weight, Tensor bias, bool squash=False, "
      "int lanes=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lemma_fast, CPU, m) {
  m.impl("shuffle_project_cpu", TORCH_BOX(&lemma_fast::shuffle_project_cpu));
}
