// torch.ops.lemma_fast.winograd_cpu: checks, and the three passes over groups of images.

#include <algorithm>
#include <array>
#include <vector>

#include "tensors.h"
#include "winograd/transforms.h"

namespace lemma_fast {
namespace {

// Half of a level-2 cache of 2 MB.
constexpr int64_t kCachedFloats = 1 << 18;
constexpr int64_t kTilesPerTask = 8;

Tensor bmm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void check(const Tensor& features, const Tensor& weight, const Tensor& bias,
           const std::optional<Tensor>& residual, int64_t activation) {
  STD_TORCH_CHECK(
      is_fp32_on_cpu(features) && is_fp32_on_cpu(weight) && is_fp32_on_cpu(bias) &&
          (!residual || is_fp32_on_cpu(*residual)),
      "winograd_cpu computes in fp32 on the CPU: every tensor must be float32 and there");
  STD_TORCH_CHECK(features.dim() == 4, "features must be [N, C, H, W], they have ", features.dim(),
                  " dimensions");
  const int64_t C = features.size(1);
  STD_TORCH_CHECK(weight.dim() == 3 && weight.is_contiguous() &&
                      (weight.size(0) == 16 || weight.size(0) == 36) && weight.size(1) == C,
                  "weights must be transformed ones, [16 or 36, ", C, ", D] and contiguous");
  const int64_t D = weight.size(2);
  STD_TORCH_CHECK(C >= 16 && D >= 16, "there must be 16 channels or more, there are ", C, " and ",
                  D);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == D && bias.is_contiguous(),
                  "the bias must be [", D, "]");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation is ", activation,
                  "; 0 none, 1 ReLU, 2 mish");
  if (!residual) return;
  const int64_t N = features.size(0), H = features.size(2), W = features.size(3);
  STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == N && residual->size(1) == D &&
                      residual->size(2) == H && residual->size(3) == W,
                  "the residual must be of the result's shape, [", N, ", ", D, ", ", H, ", ", W,
                  "]");
}

Tensor winograd_cpu(Tensor features, Tensor weight, Tensor bias, std::optional<Tensor> residual,
                    int64_t activation) {
  check(features, weight, bias, residual, activation);
  const int64_t N = features.size(0), C = features.size(1), H = features.size(2),
                W = features.size(3), D = weight.size(2);
  const int64_t T = weight.size(0) == 16 ? 4 : 6, S = T - 2;
  const int64_t tiles = ((H + S - 1) / S) * ((W + S - 1) / S);
  const WinogradKernels& kernels = SIMD_CHOOSE(winograd_kernels);
  const WinogradTransforms run = S == 2 ? kernels.two : kernels.four;
  const Tensor map = torch::stable::contiguous(features, MemoryFormat::ChannelsLast);
  if (residual) residual = torch::stable::contiguous(*residual, MemoryFormat::ChannelsLast);
  const Tensor out = empty_channels_last({N, D, H, W});
  const float* const from = map.const_data_ptr<float>();
  const float* const addend = residual ? residual->const_data_ptr<float>() : nullptr;
  const float* const offset = bias.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  const std::vector<float> zeros(C, 0.0f);

  // As many images at a time as stay in the cache, or as weights take in any case.
  const int64_t weights = T * T * C * D, image = std::max<int64_t>(1, T * T * tiles * (C + D));
  const int64_t group = std::max<int64_t>(1, std::max(kCachedFloats, weights) / image);
  for (int64_t first = 0; first < N && tiles > 0; first += group) {
    const int64_t all = std::min(group, N - first) * tiles;
    const Tensor transformed = torch::stable::empty({T * T, all, C}, ScalarType::Float);
    float* const inputs = transformed.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, all, kTilesPerTask, [&](int64_t begin, int64_t end) {
      run.input({H, W, C, all}, from + first * H * W * C, zeros.data(), inputs, begin, end);
    });
    const Tensor products = bmm(transformed, weight);
    const float* const product = products.const_data_ptr<float>();
    torch::stable::parallel_for(0, all, kTilesPerTask, [&](int64_t begin, int64_t end) {
      const int64_t skipped = first * H * W * D;
      run.output({H, W, D, all}, product, offset, addend ? addend + skipped : nullptr,
                 static_cast<Activation>(activation), to + skipped, begin, end);
    });
  }
  return out;
}

}  // namespace
}  // namespace lemma_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lemma_fast, m) {
  m.def(
      "winograd_cpu(Tensor features, Tensor weight, Tensor bias, Tensor? residual=None,"
      " int activation=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lemma_fast, CPU, m) {
  m.impl("winograd_cpu", TORCH_BOX(&lemma_fast::winograd_cpu));
}
