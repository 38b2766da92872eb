// What the bindings ask of tensors.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace lemma_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Are the channels innermost, as Tensor.is_contiguous says it of torch.channels_last, and is the
// map not contiguous as well? Then its result has that layout, else the ordinary one.
inline bool is_channels_last(const Tensor& map) {
  int64_t expected = 1;
  for (const int axis : {1, 3, 2, 0}) {
    if (map.size(axis) != 1 && map.stride(axis) != expected) return false;
    expected *= map.size(axis);
  }
  return !map.is_contiguous();
}

inline Tensor empty_channels_last(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
                              MemoryFormat::ChannelsLast);
}

inline bool is_fp32_on_cpu(const Tensor& x) {
  return x.is_cpu() && x.scalar_type() == ScalarType::Float;
}

}  // namespace lemma_fast
