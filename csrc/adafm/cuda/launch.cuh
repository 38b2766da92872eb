// What the launchers have in common, on the host.

#pragma once

#include <initializer_list>

#include "adafm/cuda/tiles.cuh"

namespace lemma_fast::adafm {

inline const char* refuse(const CudaShape& shape) {
  static_assert(kMaxCudaChannels == 64, "the message below says 64");
  if (shape.channels < 1 || shape.channels > kMaxCudaChannels) {
    return "AdaFM on CUDA takes 1 to 64 channels";
  }
  if (shape.positions < 1) return "AdaFM needs at least one position";
  return nullptr;
}

// Whether a thread may move rows of these maps in one access; null maps do not matter.
template <class T, int Rows = Tile<T>::kRows>
bool rows_can_move(const CudaShape& shape, std::initializer_list<const void*> maps) {
  bool aligned = shape.positions % Rows == 0;
  for (const void* map : maps) {
    aligned = aligned && reinterpret_cast<uintptr_t>(map) % (Rows * sizeof(T)) == 0;
  }
  return aligned;
}

template <class T>
int64_t blocks_an_image(const CudaShape& shape) {
  constexpr int kPositions = Tile<T>::kBlockPositions;
  return (shape.positions + kPositions - 1) / kPositions;
}

// One dimension of blocks; none where a launch cannot hold so many.
inline dim3 grid_of(int64_t blocks) {
  return dim3(blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : 0u);
}

// Calls action(T()) with the number type.
template <class Action>
auto dispatch_type(Dtype dtype, const Action& action) {
  if (dtype == Dtype::float16) return action(float16());
  if (dtype == Dtype::bfloat16) return action(bfloat16());
  return action(float());
}

// What a kernel is compiled for: number type, and for fp32 the kind of product.
template <class T_, bool Full_ = false>
struct Variant {
  using T = T_;
  static constexpr bool Full = Full_;
};

// Calls action(Variant()) with the shape's.
template <class Action>
auto dispatch(const CudaShape& shape, const Action& action) {
  return dispatch_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    if constexpr (sizeof(T) == 4) {
      if (!shape.tf32) return action(Variant<T, true>());
    }
    return action(Variant<T>());
  });
}

// Launches in turn; the first that fails ends the pass.
struct Sequence {
  const CudaShape& shape;
  void* stream;
  const char* error = nullptr;

  template <class... Parameters, class... Arguments>
  void run(const char* (*launch)(const CudaShape&, Parameters...), const Arguments&... arguments) {
    if (error == nullptr) error = launch(shape, arguments..., stream);
  }
};

}  // namespace lemma_fast::adafm
