// torch.ops.lemma_fast.adafm* on CUDA tensors: the binding of cuda/passes.h. Not run on a GPU
// yet.

#ifdef LEMMA_FAST_CUDA

#include "adafm/cuda/passes.h"

#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "adafm/binding.h"

// torch's CUDA half has it; weak, so that the library loads where there is none.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace lemma_fast::adafm {
namespace {

Dtype dtype_of(ScalarType dtype) {
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "AdaFM on CUDA takes fp32, fp16 and bf16");
  return dtype == ScalarType::Float  ? Dtype::float32
         : dtype == ScalarType::Half ? Dtype::float16
                                     : Dtype::bfloat16;
}

CudaShape shape_of(const Tensor& map, bool tf32) {
  return {map.size(0), map.size(1), map.size(2) * map.size(3), dtype_of(map.scalar_type()), tf32};
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, error); }

// The device that a call runs on, and its stream.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Place(const Tensor& on) : guard(on.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  }
};

Tensor bytes(size_t count, const Tensor& like) {
  return torch::stable::empty({static_cast<int64_t>(count)}, ScalarType::Byte, std::nullopt,
                              like.device());
}

// A contiguous result in the layout that `like` has.
Tensor laid_out(const Tensor& map, const Tensor& like) {
  return is_channels_last(like) ? torch::stable::contiguous(map, MemoryFormat::ChannelsLast) : map;
}

Tensor empty_contiguous(const Tensor& like) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device());
}

Tensor fold(const std::vector<Tensor>& weights, ScalarType dtype) {
  const auto [C, positions] = weight_shape(weights);
  const CudaShape shape{0, C, positions, dtype_of(dtype), false};
  const ParameterList list(weights, ScalarType::Float);
  const Place place(weights[0]);
  const Tensor folded = bytes(folded_bytes(shape), weights[0]);
  check(fold_cuda(shape, list.pointers<const float>(), folded.data_ptr(), place.stream));
  return folded;
}

Tensor inference(const Tensor& features, const Tensor& guidance, const Tensor& folded, bool tf32) {
  check_maps(features, guidance);
  const CudaShape shape = shape_of(features, tf32);
  STD_TORCH_CHECK(folded.scalar_type() == ScalarType::Byte && folded.is_contiguous() &&
                      folded.device() == features.device() &&
                      folded.numel() == static_cast<int64_t>(folded_bytes(shape)),
                  "AdaFM's folded parameters are for other maps");
  // The result lies as the features do, and a guidance that lies otherwise is copied.
  const bool last = is_channels_last(features);
  const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const Tensor out = torch::stable::empty(features.sizes(), features.scalar_type(), std::nullopt,
                                          features.device(), std::nullopt, format);
  if (features.numel() > 0) {
    const Place place(features);
    const Tensor r = torch::stable::contiguous(features, format),
                 g = torch::stable::contiguous(guidance, format);
    const Tensor space = bytes(inference_workspace_bytes(shape), features);
    check(inference_cuda(shape, last, r.data_ptr(), g.data_ptr(), folded.data_ptr(), out.data_ptr(),
                         space.data_ptr(), place.stream));
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& features, const Tensor& guidance,
                                           const std::vector<Tensor>& weights, bool training,
                                           bool tf32) {
  check_maps(features, guidance);
  check_weights_fit(weights, features);
  const CudaShape shape = shape_of(features, tf32);
  const ParameterList list(weights, ScalarType::Float);
  const Place place(features);
  const Tensor out = empty_contiguous(features), saved = bytes(saved_bytes(shape), features);
  // The kernels add a share of the batch's statistics to the running ones. They are given zeros
  // instead, so that they write into no input.
  Tensor shares = torch::stable::empty({training ? kNorms : 0, 2, shape.channels},
                                       ScalarType::Float, std::nullopt, features.device());
  torch::stable::zero_(shares);
  Weights<float> pointers = list.pointers<float>();
  if (training) {
    Norm<float>* const norms[] = {&pointers.guidance_norm,    &pointers.branches[0].norm,
                                  &pointers.branches[1].norm, &pointers.branches[2].norm,
                                  &pointers.aggregate.norm,   &pointers.out_norm};
    float* next = static_cast<float*>(shares.data_ptr());
    for (Norm<float>* norm : norms) {
      norm->mean = next;
      norm->variance = next + shape.channels;
      next += 2 * shape.channels;
    }
  }
  if (features.numel() > 0) {
    const Tensor r = torch::stable::contiguous(features), g = torch::stable::contiguous(guidance);
    const Tensor space = bytes(forward_workspace_bytes(shape), features);
    check(forward_cuda(shape, training, r.data_ptr(), g.data_ptr(), pointers, out.data_ptr(),
                       saved.data_ptr(), space.data_ptr(), place.stream));
  }
  return {laid_out(out, features), saved, shares};
}

std::vector<Tensor> backward(const Tensor& grad_out, const Tensor& features, const Tensor& guidance,
                             const std::vector<Tensor>& weights, const Tensor& saved, bool training,
                             bool tf32) {
  check_maps(features, guidance);
  check_maps(features, grad_out);
  check_weights_fit(weights, features);
  const CudaShape shape = shape_of(features, tf32);
  STD_TORCH_CHECK(saved.numel() == static_cast<int64_t>(saved_bytes(shape)) &&
                      saved.is_contiguous() && saved.device() == features.device(),
                  "AdaFM's backward pass is for other maps than its forward pass was");
  const ParameterList list(weights, ScalarType::Float);
  const Place place(features);
  std::vector<Tensor> grads{empty_contiguous(features), empty_contiguous(guidance)};
  const Weights<float> gradients = list.gradients<float>(grads);
  if (features.numel() > 0) {
    const Tensor d = torch::stable::contiguous(grad_out), r = torch::stable::contiguous(features),
                 g = torch::stable::contiguous(guidance);
    const Tensor space = bytes(backward_workspace_bytes(shape), features);
    check(backward_cuda(shape, training, d.data_ptr(), r.data_ptr(), g.data_ptr(),
                        list.pointers<const float>(), saved.data_ptr(), grads[0].data_ptr(),
                        grads[1].data_ptr(), gradients, space.data_ptr(), place.stream));
  } else {
    for (Tensor& grad : grads) torch::stable::zero_(grad);
  }
  grads[0] = laid_out(grads[0], features);
  grads[1] = laid_out(grads[1], guidance);
  return grads;
}

}  // namespace
}  // namespace lemma_fast::adafm

extern "C" __attribute__((visibility("default"))) void lemma_fast_adafm_cuda_bytes(
    int64_t images, int64_t channels, int64_t positions, int64_t number, int64_t* folded,
    int64_t* saved) {
  using namespace lemma_fast::adafm;
  const Dtype dtype = number == 4 ? Dtype::float32 : Dtype::float16;
  const CudaShape shape{images, channels, positions, dtype, false};
  *folded = static_cast<int64_t>(folded_bytes(shape));
  *saved = static_cast<int64_t>(saved_bytes(shape));
}

STABLE_TORCH_LIBRARY_IMPL(lemma_fast, CUDA, m) {
  m.impl("adafm_fold", TORCH_BOX(&lemma_fast::adafm::fold));
  m.impl("adafm_inference", TORCH_BOX(&lemma_fast::adafm::inference));
  m.impl("adafm", TORCH_BOX(&lemma_fast::adafm::forward));
  m.impl("adafm_backward", TORCH_BOX(&lemma_fast::adafm::backward));
}

#endif  // LEMMA_FAST_CUDA
