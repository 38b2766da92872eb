// What the CPU's and CUDA's binding of AdaFM share: checks, layouts in memory, lists of parameters.
//
// lemma_fast/ops/adafm.py checks in the caller's words; here only what memory depends on is
// checked.

#pragma once

#include <utility>
#include <vector>

#include "adafm/math.h"
#include "tensors.h"

namespace lemma_fast::adafm {

inline void check_maps(const Tensor& features, const Tensor& guidance) {
  STD_TORCH_CHECK(features.dim() == 4 && guidance.dim() == 4, "AdaFM takes maps [N, C, H, W]");
  for (int axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(features.size(axis) == guidance.size(axis),
                    "AdaFM's features and guidance differ in size");
  }
  STD_TORCH_CHECK(
      features.scalar_type() == guidance.scalar_type() && features.device() == guidance.device(),
      "AdaFM's features and guidance differ in dtype or device");
}

// How many numbers the parameters have each, in order.
inline std::vector<int64_t> weight_sizes(int64_t C, int64_t positions) {
  std::vector<int64_t> sizes;
  const auto norm = [&] { sizes.insert(sizes.end(), 4, C); };
  const auto branch = [&](int64_t inputs) {
    sizes.insert(sizes.end(), {C * inputs, C});
    norm();
    sizes.insert(sizes.end(), {1, C * C, C});
  };
  norm();
  for (int i = 0; i < kBranches; ++i) branch(2 * C);
  sizes.insert(sizes.end(), {C * positions, C});
  for (int layer = 0; layer < 3; ++layer) sizes.insert(sizes.end(), {C * C, C});
  branch(C);
  norm();
  return sizes;
}

constexpr int kTrained = kWeights - 2 * kNorms;

// Is parameter `i` a running mean or variance?
inline bool is_statistic(int i) {
  for (const int norm : {0, 6, 15, 24, 41, 48}) {
    if (i == norm + 2 || i == norm + 3) return true;
  }
  return false;
}

// The channels and positions that the parameters are for, from the global convolution's.
inline std::pair<int64_t, int64_t> weight_shape(const std::vector<Tensor>& weights) {
  const bool all = weights.size() == kWeights;
  STD_TORCH_CHECK(all || weights.size() == kTrained,
                  "AdaFM takes 52 parameters, or 40 of them, not ", weights.size());
  const Tensor& global_weight = weights[all ? 4 + 9 * kBranches : 2 + 7 * kBranches];
  STD_TORCH_CHECK(global_weight.dim() == 4, "AdaFM's global convolution has 4 axes");
  return {global_weight.size(0), global_weight.size(2) * global_weight.size(3)};
}

// The parameters, contiguous and of one type: they own the memory that the pointers go to.
// `weights` are all 52, or those without running statistics, whose pointers are then null.
class ParameterList {
 public:
  ParameterList(const std::vector<Tensor>& weights, ScalarType dtype) {
    const auto [C, positions] = weight_shape(weights);
    const std::vector<int64_t> sizes = weight_sizes(C, positions);
    const bool all = weights.size() == kWeights;
    auto next = weights.begin();
    for (int i = 0; i < kWeights; ++i) {
      tensors_.emplace_back(nullptr);
      if (!all && is_statistic(i)) continue;
      const Tensor& weight = *next++;
      STD_TORCH_CHECK(weight.scalar_type() == dtype, "AdaFM's parameter ", i,
                      " is of another dtype than it is computed in");
      STD_TORCH_CHECK(weight.numel() == sizes[i], "AdaFM's parameter ", i, " has ", weight.numel(),
                      " numbers, expected ", sizes[i], " for ", C, " channels");
      STD_TORCH_CHECK(weight.device() == weights[0].device(),
                      "AdaFM's parameters lie on several devices");
      tensors_.back() = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
    }
  }

  template <class T>
  Weights<T> pointers() const {
    Weights<T> out;
    T** slots = reinterpret_cast<T**>(&out);
    for (int i = 0; i < kWeights; ++i) {
      slots[i] = tensors_[i].get() ? static_cast<T*>(tensors_[i].data_ptr()) : nullptr;
    }
    return out;
  }

  // Memory for gradients, not filled, put behind what `to` holds: one tensor for each parameter,
  // none for running statistics, whose pointers are null.
  template <class T>
  Weights<T> gradients(std::vector<Tensor>& to) const {
    Weights<T> out;
    T** slots = reinterpret_cast<T**>(&out);
    for (int i = 0; i < kWeights; ++i) {
      slots[i] = nullptr;
      if (is_statistic(i)) continue;
      to.push_back(torch::stable::empty(tensors_[i].sizes(), tensors_[i].scalar_type(),
                                        std::nullopt, tensors_[i].device()));
      slots[i] = static_cast<T*>(to.back().data_ptr());
    }
    return out;
  }

 private:
  std::vector<Tensor> tensors_;
};

inline void check_weights_fit(const std::vector<Tensor>& weights, const Tensor& features) {
  const auto [C, positions] = weight_shape(weights);
  STD_TORCH_CHECK(features.size(1) == C && features.size(2) * features.size(3) == positions,
                  "AdaFM's parameters are for other maps");
  STD_TORCH_CHECK(weights[0].device() == features.device(),
                  "AdaFM's parameters and features lie on several devices");
}

}  // namespace lemma_fast::adafm
