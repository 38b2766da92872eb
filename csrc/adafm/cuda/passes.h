// AdaFM on a CUDA device: what the binding calls, and the emulator of the tests.
//
// No torch here: plain pointers to contiguous memory on the current device, and a stream. Feature
// maps are [N, C, P] with P = height * width; parameters, running statistics and their gradients
// are fp32. Every launcher returns nullptr, or a sentence that says what failed. Nothing waits for
// the device and nothing is allocated: ask for the size of each buffer, and align it to 16 bytes;
// what it holds does not matter.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adafm/math.h"

namespace lemma_fast::adafm {

enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// A thread's registers hold its share of this many channels.
constexpr int kMaxCudaChannels = 64;

struct CudaShape {
  int64_t images;
  // 1 to kMaxCudaChannels. Fewer cost as much time as that many.
  int64_t channels;
  int64_t positions;
  // Of the feature maps and of their gradients.
  Dtype dtype;
  // With dtype float32: products of tf32 inputs; without, fp32 accuracy from three such products.
  bool tf32;
};

// Inference. `fold_cuda` takes the norms' running statistics into the convolutions, once for given
// parameters: Folded of math.h. `folded` then serves any number of images; it depends on channels,
// positions and dtype of the shape.
size_t folded_bytes(const CudaShape& shape);
const char* fold_cuda(const CudaShape& shape, const Weights<const float>& weights, void* folded,
                      void* stream);

// Two launches: branch 1 with its global reduction; then all the rest. With `channels_last` all
// three maps are [N, P, C].
size_t inference_workspace_bytes(const CudaShape& shape);
const char* inference_cuda(const CudaShape& shape, bool channels_last, const void* features,
                           const void* guidance, const void* folded, void* out, void* workspace,
                           void* stream);

// A forward pass that backward can follow. With `training`, batch statistics, and the running ones
// in `weights` are updated (momentum 0.1, unbiased variance); N * P must be above 1. Without, the
// running ones. Nothing else in `weights` is written. `saved` is for backward alone; its size is
// linear in N.
size_t saved_bytes(const CudaShape& shape);
size_t forward_workspace_bytes(const CudaShape& shape);
const char* forward_cuda(const CudaShape& shape, bool training, const void* features,
                         const void* guidance, const Weights<float>& weights, void* out,
                         void* saved, void* workspace, void* stream);

// Gradients of both inputs and all parameters: each is written, none added to; `mean` and
// `variance` in `gradients` are left alone. N = 0 writes nothing. No atomics on floats: a second
// run gives the same bits.
size_t backward_workspace_bytes(const CudaShape& shape);
const char* backward_cuda(const CudaShape& shape, bool training, const void* out_gradient,
                          const void* features, const void* guidance,
                          const Weights<const float>& weights, const void* saved,
                          void* features_gradient, void* guidance_gradient,
                          const Weights<float>& gradients, void* workspace, void* stream);

}  // namespace lemma_fast::adafm
