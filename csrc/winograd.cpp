// 3x3 convolution, stride 1, padding 1, of channels-last maps by Winograd's algorithm, on the CPU for
// inference: transforms of our own around one batched matrix product of PyTorch's.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace lemma_fast {

struct WinogradMap {
  long height, width, channels;
  long tiles;  // of all images
};

enum class Activation : int64_t { kNone, kRelu, kMish };

}  // namespace lemma_fast

#define SIMD_KERNEL "winograd_kernel.h"
#include "simd_targets.h"

namespace lemma_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Half of a level-2 cache of 2 MB.
constexpr int64_t kCachedFloats = 1 << 18;
constexpr int64_t kTilesPerTask = 8;

struct Transforms {
  decltype(&plain::spread_tiles<2>) spread;
  decltype(&plain::gather_tiles<2>) gather;
};

template <int S>
Transforms choose_transforms(int64_t lanes) {
#ifdef LEMMA_FAST_X86
  if (lanes == 16) {
    return {avx512::spread_tiles<S>, avx512::gather_tiles<S>};
  }
  if (lanes == 8) {
    return {avx2::spread_tiles<S>, avx2::gather_tiles<S>};
  }
#endif
  return {plain::spread_tiles<S>, plain::gather_tiles<S>};
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

bool is_fp32(const Tensor& x) {
  return x.is_cpu() && x.scalar_type() == ScalarType::Float;
}

Tensor winograd_cpu(
    Tensor features, Tensor weight, Tensor bias, std::optional<Tensor> residual,
    int64_t activation, int64_t lanes) {
  lanes = lanes == 0 ? simd_lanes() : lanes;
  STD_TORCH_CHECK(
      lanes == 4 || ((lanes == 8 || lanes == 16) && lanes <= simd_lanes()),
      "this machine has no vectors of ", lanes, " floats");
  STD_TORCH_CHECK(
      is_fp32(features) && is_fp32(weight) && is_fp32(bias) && (!residual || is_fp32(*residual)),
      "winograd_cpu computes in fp32 on the CPU: every tensor must be float32 and there");
  STD_TORCH_CHECK(
      features.dim() == 4, "features must be [N, C, H, W], they have ", features.dim(), " dimensions");
  const int64_t N = features.size(0), C = features.size(1), H = features.size(2),
                W = features.size(3);
  STD_TORCH_CHECK(
      weight.dim() == 3 && weight.is_contiguous() && (weight.size(0) == 16 || weight.size(0) == 36) &&
          weight.size(1) == C,
      "weights must be transformed ones, [16 or 36, ", C, ", D] and contiguous");
  const int64_t D = weight.size(2);
  STD_TORCH_CHECK(
      C >= 16 && D >= 16, "there must be 16 channels or more, there are ", C, " and ", D);
  STD_TORCH_CHECK(
      bias.dim() == 1 && bias.size(0) == D && bias.is_contiguous(), "the bias must be [", D, "]");
  if (residual) {
    STD_TORCH_CHECK(
        residual->dim() == 4 && residual->size(0) == N && residual->size(1) == D &&
            residual->size(2) == H && residual->size(3) == W,
        "the residual must be of the result's shape, [", N, ", ", D, ", ", H, ", ", W, "]");
  }

  STD_TORCH_CHECK(
      activation >= 0 && activation <= 2, "activation is ", activation, "; 0 none, 1 ReLU, 2 mish");
  const int64_t T = weight.size(0) == 16 ? 4 : 6, S = T - 2;
  const int64_t tiles = ((H + S - 1) / S) * ((W + S - 1) / S);
  const Transforms run = S == 2 ? choose_transforms<2>(lanes) : choose_transforms<4>(lanes);
  const Tensor map = torch::stable::contiguous(features, MemoryFormat::ChannelsLast);
  const std::optional<Tensor> added =
      residual ? std::optional(torch::stable::contiguous(*residual, MemoryFormat::ChannelsLast))
               : std::nullopt;
  Tensor out = torch::stable::empty(
      {N, D, H, W}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
      MemoryFormat::ChannelsLast);
  const float* const from = map.const_data_ptr<float>();
  const float* const addend = added ? added->const_data_ptr<float>() : nullptr;
  const float* const offset = bias.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  const std::vector<float> zeros(C, 0.0f);

  // As many images at a time as stay in the cache, or as weights take in any case.
  const int64_t weights = T * T * C * D, image = std::max<int64_t>(1, T * T * tiles * (C + D));
  const int64_t group = std::max<int64_t>(1, std::max(kCachedFloats, weights) / image);
  for (int64_t first = 0; first < N && tiles > 0; first += group) {
    const int64_t all = std::min(group, N - first) * tiles;
    Tensor spreads = torch::stable::empty({T * T, all, C}, ScalarType::Float);
    float* const spread = spreads.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, all, kTilesPerTask, [&](int64_t begin, int64_t end) {
      run.spread({H, W, C, all}, from + first * H * W * C, zeros.data(), spread, begin, end);
    });
    const Tensor products = bmm(spreads, weight);
    const float* const product = products.const_data_ptr<float>();
    torch::stable::parallel_for(0, all, kTilesPerTask, [&](int64_t begin, int64_t end) {
      const int64_t skipped = first * H * W * D;
      run.gather(
          {H, W, D, all}, product, offset, addend ? addend + skipped : nullptr,
          static_cast<Activation>(activation), to + skipped, begin, end);
    });
  }
  return out;
}

}  // namespace
}  // namespace lemma_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lemma_fast, m) {
  m.def(
      "winograd_cpu(Tensor features, Tensor weight, Tensor bias, Tensor? residual=None, "
      "int activation=0, int lanes=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lemma_fast, CPU, m) {
  m.impl("winograd_cpu", TORCH_BOX(&lemma_fast::winograd_cpu));
}
