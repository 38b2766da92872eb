// AdaFM on the CPU: what the binding calls. No torch here.
//
// Inside, positions are rows and channels lie side by side, padded with zeros to a multiple of 16.
// A task is a tile of up to 128 positions of one image. Inference reads both maps and writes the
// result once; u_2 and u_3 of one image wait in the cache for its gate.

#pragma once

#include "adafm/math.h"
#include "simd/dispatch.h"

namespace lemma_fast::adafm {

// A map [N, C, P] in memory, with P positions in raster order: `channel` or `position` is 1.
template <class T>
struct Map {
  T* data;
  int64_t image, channel, position;
};

struct Shape {
  int64_t images, channels, positions;
};

// How to run task(context, 0) ... task(context, count - 1), at most `threads` at a time.
struct Workers {
  int64_t threads;
  void (*run)(int64_t count, void (*task)(void* context, int64_t index), void* context);
};

LEMMA_FAST_BOTH int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }

LEMMA_FAST_BOTH Folded folded_layout(const Shape& shape) {
  return {padded(shape.channels), shape.positions};
}

// What a forward pass leaves for backward, counted in numbers: each norm's mean and 1 / standard
// deviation, the global convolution's results, and the arguments of the norms that no input holds.
struct Saved {
  int64_t statistics;  // [kNorms, 2, C]
  int64_t pooled;      // [N, C]
  int64_t hidden;      // [N, P, 3 C]: h_1, h_2, h_3
  int64_t aggregate;   // [N, P, C]: h_4
  int64_t sum;         // [N, P, C]: f
  int64_t size;        // linear in N
};

LEMMA_FAST_BOTH Saved saved_layout(const Shape& shape) {
  const int64_t C = padded(shape.channels), rows = shape.images * shape.positions;
  Saved at{};
  at.pooled = 2 * kNorms * C;
  at.hidden = at.pooled + shape.images * C;
  at.aggregate = at.hidden + rows * 3 * C;
  at.sum = at.aggregate + rows * C;
  at.size = at.sum + rows * C;
  return at;
}

template <class T>
struct ForwardArguments {
  Shape shape;
  Map<const T> features, guidance;
  Weights<const T> weights;
  Map<T> out;
  T* saved;
  // In training [kNorms, 2, channels] for what the batch adds to the running means and variances;
  // else null, and the running statistics are used.
  T* shares;
  Workers workers;
};

template <class T>
struct BackwardArguments {
  Shape shape;
  bool training;
  Map<const T> grad_out, features, guidance;
  Weights<const T> weights;
  const T* saved;
  Map<T> grad_features, grad_guidance;
  Weights<T> grads;
  Workers workers;
};

// Everything is fp32 or everything fp64.
template <class T>
struct Passes {
  // Fold the running statistics into the parameters: `folded` is as Folded says.
  void (*fold)(const Shape& shape, const Weights<const T>& weights, T* folded);
  void (*inference)(const Shape& shape, const Map<const T>& features, const Map<const T>& guidance,
                    const T* folded, const Map<T>& out, const Workers& workers);
  void (*forward)(const ForwardArguments<T>& arguments);
  // Writes every gradient but those of running statistics, whose pointers may be null.
  void (*backward)(const BackwardArguments<T>& arguments);
};

}  // namespace lemma_fast::adafm

namespace lemma_fast {

SIMD_DECLARE(adafm::Passes<float>, adafm_fp32)
SIMD_DECLARE(adafm::Passes<double>, adafm_fp64)

}  // namespace lemma_fast
