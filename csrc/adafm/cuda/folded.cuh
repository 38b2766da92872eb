// The folded parameters as the kernels read them: Folded of math.h for kChannels channels. The
// eleven matrices of 1x1 convolutions lie in fragment order, the gate's three as [inputs, outputs],
// and the global convolution as [channels, P], all in the maps' type; the vectors are fp32.

#pragma once

#include <type_traits>

#include "adafm/cuda/launch.cuh"

namespace lemma_fast::adafm {

inline Folded folded_layout(const CudaShape& shape) { return {kChannels, shape.positions}; }

template <class T>
struct FoldedPointers {
  T *matrices, *gate, *global;
  float* vectors;
};

template <class T>
FoldedPointers<T> folded_pointers(const CudaShape& shape, const void* folded) {
  const Folded at = folded_layout(shape);
  T* start = static_cast<T*>(const_cast<void*>(folded));
  return {start, start + at.matrix(kGateMatrix), start + at.global(),
          reinterpret_cast<float*>(const_cast<std::remove_const_t<T>*>(start + at.vectors()))};
}

}  // namespace lemma_fast::adafm
