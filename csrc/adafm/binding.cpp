// torch.ops.lemma_fast.adafm*: the schemas, and the binding of cpu/passes.h. CUDA's is
// binding_cuda.cpp; fake and autograd are in lemma_fast/ops/adafm.py.

#include <tuple>
#include <vector>

#include "adafm/binding.h"
#include "adafm/cpu/passes.h"

namespace lemma_fast::adafm {
namespace {

// fp64 stays fp64; half types are computed in fp32.
ScalarType computing(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Shape shape_of(const Tensor& map) { return {map.size(0), map.size(1), map.size(2) * map.size(3)}; }

// A map as the kernels can read it: of the type that is computed in, in one of two layouts.
Tensor readable(const Tensor& map) {
  const ScalarType dtype = computing(map.scalar_type());
  const Tensor typed = map.scalar_type() == dtype ? map : torch::stable::to(map, dtype);
  const int64_t H = typed.size(2), W = typed.size(3);
  const bool raster = H == 1 || W == 1 || typed.stride(2) == W * typed.stride(3);
  const int64_t position = W == 1 ? typed.stride(2) : typed.stride(3);
  const bool fits = raster && (typed.stride(1) == 1 || position == 1);
  return fits ? typed : torch::stable::contiguous(typed);
}

template <class T>
Map<T> map_of(const Tensor& map) {
  const bool plain = map.is_contiguous();
  const int64_t P = map.size(2) * map.size(3);
  const int64_t position = map.size(3) == 1 ? map.stride(2) : map.stride(3);
  T* data = static_cast<T*>(map.data_ptr());
  return plain ? Map<T>{data, map.size(1) * P, P, 1}
               : Map<T>{data, map.stride(0), map.stride(1), position};
}

Workers workers() {
  const auto run = [](int64_t count, void (*task)(void*, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(context, i);
    });
  };
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run};
}

Tensor bytes(int64_t count) { return torch::stable::empty({count}, ScalarType::Byte); }

// The passes for this processor.
template <class T>
const Passes<T>& passes() {
  if constexpr (sizeof(T) == 8)
    return SIMD_CHOOSE(adafm_fp64);
  else
    return SIMD_CHOOSE(adafm_fp32);
}

Tensor empty_map(const Tensor& like) {
  return torch::stable::empty(
      like.sizes(), computing(like.scalar_type()), std::nullopt, like.device(), std::nullopt,
      is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

template <class Function>
auto with_type(ScalarType dtype, const Function& function) {
  return computing(dtype) == ScalarType::Double ? function(double()) : function(float());
}

Tensor fold(const std::vector<Tensor>& weights, ScalarType dtype) {
  const auto [C, positions] = weight_shape(weights);
  const Shape shape{0, C, positions};
  const ParameterList list(weights, computing(dtype));
  return with_type(dtype, [&](auto number) {
    using T = decltype(number);
    const Tensor folded = bytes(folded_layout(shape).size() * sizeof(T));
    passes<T>().fold(shape, list.pointers<const T>(), static_cast<T*>(folded.data_ptr()));
    return folded;
  });
}

Tensor inference(const Tensor& features, const Tensor& guidance, const Tensor& folded, bool) {
  check_maps(features, guidance);
  const Shape shape = shape_of(features);
  const ScalarType dtype = features.scalar_type();
  const Tensor out = empty_map(features);
  with_type(dtype, [&](auto number) {
    using T = decltype(number);
    const int64_t size = folded_layout(shape).size() * sizeof(T);
    STD_TORCH_CHECK(folded.scalar_type() == ScalarType::Byte && folded.is_contiguous() &&
                        folded.is_cpu() && folded.numel() == size,
                    "AdaFM's folded parameters are for other maps");
    if (features.numel() == 0) return;
    passes<T>().inference(shape, map_of<const T>(readable(features)),
                          map_of<const T>(readable(guidance)),
                          static_cast<const T*>(folded.data_ptr()), map_of<T>(out), workers());
  });
  return torch::stable::to(out, dtype);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& features, const Tensor& guidance,
                                           const std::vector<Tensor>& weights, bool training,
                                           bool) {
  check_maps(features, guidance);
  check_weights_fit(weights, features);
  const Shape shape = shape_of(features);
  const ScalarType dtype = features.scalar_type();
  STD_TORCH_CHECK(!training || shape.images * shape.positions > 1,
                  "AdaFM needs more than one position for batch statistics");
  const ParameterList list(weights, computing(dtype));
  const Tensor out = empty_map(features);
  const Tensor shares =
      torch::stable::empty({training ? kNorms : 0, 2, shape.channels}, computing(dtype));
  const Tensor saved = with_type(dtype, [&](auto number) {
    using T = decltype(number);
    const Tensor kept = bytes(saved_layout(shape).size * sizeof(T));
    if (features.numel() > 0) {
      const Tensor f = readable(features), g = readable(guidance);
      passes<T>().forward({shape, map_of<const T>(f), map_of<const T>(g), list.pointers<const T>(),
                           map_of<T>(out), static_cast<T*>(kept.data_ptr()),
                           training ? static_cast<T*>(shares.data_ptr()) : nullptr, workers()});
    }
    return kept;
  });
  return {torch::stable::to(out, dtype), saved, shares};
}

std::vector<Tensor> backward(const Tensor& grad_out, const Tensor& features, const Tensor& guidance,
                             const std::vector<Tensor>& weights, const Tensor& saved, bool training,
                             bool) {
  check_maps(features, guidance);
  check_maps(features, grad_out);
  check_weights_fit(weights, features);
  const Shape shape = shape_of(features);
  const ScalarType dtype = features.scalar_type();
  const ParameterList list(weights, computing(dtype));
  std::vector<Tensor> grads{empty_map(features), empty_map(guidance)};
  with_type(dtype, [&](auto number) {
    using T = decltype(number);
    STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Byte && saved.is_contiguous() &&
                        saved.is_cpu() &&
                        saved.numel() == static_cast<int64_t>(saved_layout(shape).size * sizeof(T)),
                    "AdaFM's backward pass is for other maps than its forward pass was");
    const Weights<T> pointers = list.gradients<T>(grads);
    if (features.numel() == 0) return;
    const Tensor d = readable(grad_out), f = readable(features), g = readable(guidance);
    passes<T>().backward({shape, training, map_of<const T>(d), map_of<const T>(f),
                          map_of<const T>(g), list.pointers<const T>(),
                          static_cast<const T*>(saved.data_ptr()), map_of<T>(grads[0]),
                          map_of<T>(grads[1]), pointers, workers()});
  });
  for (Tensor& grad : grads) {
    if (features.numel() == 0) torch::stable::zero_(grad);
  }
  for (int i = 0; i < 2; ++i) grads[i] = torch::stable::to(grads[i], dtype);
  return grads;
}

}  // namespace
}  // namespace lemma_fast::adafm

extern "C" __attribute__((visibility("default"))) void lemma_fast_adafm_cpu_bytes(
    int64_t images, int64_t channels, int64_t positions, int64_t number, int64_t* folded,
    int64_t* saved) {
  const lemma_fast::adafm::Shape shape{images, channels, positions};
  const int64_t computed = number == 8 ? 8 : 4;
  *folded = folded_layout(shape).size() * computed;
  *saved = saved_layout(shape).size * computed;
}

STABLE_TORCH_LIBRARY_FRAGMENT(lemma_fast, m) {
  m.def("adafm_fold(Tensor[] weights, ScalarType dtype) -> Tensor");
  m.def("adafm_inference(Tensor features, Tensor guidance, Tensor folded, bool tf32) -> Tensor");
  m.def(
      "adafm(Tensor features, Tensor guidance, Tensor[] weights, bool training, bool tf32)"
      " -> (Tensor out, Tensor saved, Tensor shares)");
  // Without the running statistics, which have changed meanwhile.
  m.def(
      "adafm_backward(Tensor grad_out, Tensor features, Tensor guidance, Tensor[] weights,"
      " Tensor saved, bool training, bool tf32) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(lemma_fast, CPU, m) {
  m.impl("adafm_fold", TORCH_BOX(&lemma_fast::adafm::fold));
  m.impl("adafm_inference", TORCH_BOX(&lemma_fast::adafm::inference));
  m.impl("adafm", TORCH_BOX(&lemma_fast::adafm::forward));
  m.impl("adafm_backward", TORCH_BOX(&lemma_fast::adafm::backward));
}
