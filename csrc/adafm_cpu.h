// AdaFM on the CPU: what adafm.cpp calls. No torch here.
//
// Inside, positions are rows and channels lie side by side, padded with zeros to a multiple of 16.

#pragma once

#include <cstdint>

#include "adafm_math.h"

namespace lemma_fast {
namespace adafm {

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

// The parameters as the products want them, norms folded in as far as they are known: matrices with
// inputs as rows, [C, C] where nothing else is said, C standing for padded(C). Offsets are counted
// in numbers from the start of one array of `size`.
struct Prepared {
  int64_t reduce, reduce_bias;        // [2 C, 3 C]: from features and guidance to h_1, h_2, h_3
  int64_t pool, pool_bias;            // from u_1 to x_1
  int64_t global, global_bias;        // [P, C]
  int64_t gate[3], gate_bias[3];
  int64_t project, project_bias;      // from u_2 to x_2, outputs as rows
  int64_t aggregate, aggregate_bias;  // from gate * x_2 to h_4
  int64_t last, last_bias;            // [2 C, C]: from u_3 and u_4
  int64_t slopes;                     // [4]
  int64_t size;
};

LEMMA_FAST_BOTH Prepared prepared_layout(int64_t channels, int64_t positions) {
  const int64_t C = padded(channels);
  Prepared at{};
  int64_t end = 0;
  const auto take = [&end](int64_t count) {
    const int64_t start = end;
    end += count;
    return start;
  };
  at.reduce = take(6 * C * C);
  at.reduce_bias = take(3 * C);
  at.pool = take(C * C);
  at.pool_bias = take(C);
  at.global = take(positions * C);
  at.global_bias = take(C);
  for (int layer = 0; layer < 3; ++layer) {
    at.gate[layer] = take(C * C);
    at.gate_bias[layer] = take(C);
  }
  at.project = take(C * C);
  at.project_bias = take(C);
  at.aggregate = take(C * C);
  at.aggregate_bias = take(C);
  at.last = take(2 * C * C);
  at.last_bias = take(C);
  at.slopes = take(16);
  at.size = end;
  return at;
}

// What a forward pass leaves for backward, likewise: each norm's mean and 1 / standard deviation,
// the global convolution's results, and the arguments of the norms that no input holds.
struct Saved {
  int64_t statistics;  // [kNorms, 2, C]
  int64_t pooled;      // [N, C]
  int64_t hidden;      // [N, P, 3 C]: h_1, h_2, h_3
  int64_t aggregate;   // [N, P, C]: h_4
  int64_t sum;         // [N, P, C]: what the last norm takes
  int64_t size;
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

// The four functions, compiled for one set of instructions. Everything is fp32 or everything fp64.
template <class T>
struct Functions {
  // Fold the running statistics into the parameters: `folded` as Prepared says.
  void (*fold)(const Shape& shape, const Weights<const T>& weights, T* folded);
  void (*inference)(const Shape& shape, const Map<const T>& features, const Map<const T>& guidance,
                    const T* folded, const Map<T>& out, const Workers& workers);
  // In training `shares` [kNorms, 2, channels] gets what the batch adds to the running means and
  // variances; else it is null, and the running statistics are used.
  void (*forward)(const Shape& shape, const Map<const T>& features, const Map<const T>& guidance,
                  const Weights<const T>& weights, const Map<T>& out, T* saved, T* shares,
                  const Workers& workers);
  // Writes every gradient but those of running statistics, whose pointers may be null.
  void (*backward)(const Shape& shape, bool training, const Map<const T>& grad_out,
                   const Map<const T>& features, const Map<const T>& guidance,
                   const Weights<const T>& weights, const T* saved, const Map<T>& grad_features,
                   const Map<T>& grad_guidance, const Weights<T>& grads, const Workers& workers);
};

// Functions for this processor. LEMMA_FAST_CPU=baseline, avx2 or avx512 asks for less.
template <class T>
const Functions<T>& functions();

// The name of what `functions` chose.
const char* cpu_level();

}  // namespace adafm
}  // namespace lemma_fast
