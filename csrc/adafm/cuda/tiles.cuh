// What every AdaFM kernel shares: tiles of 1x1 convolutions that stay in registers.
//
// A warp owns positions and all channels of them. A 1x1 convolution is the product of its tile
// [positions, inputs] with a matrix [inputs, outputs], by mma instructions of 16 positions, 16
// inputs and 8 outputs: accumulator += A B. Of these three, lane 4 g + t holds
//
//                                                          output           g
//                                                    +------------------------+
//                                 inputs 2t, 2t + 1  |                b[0]    |
//                                    2t + 8, 2t + 9  |                b[1]    |  B
//                                                    +------------------------+
//             inputs  2t, 2t + 1   2t + 8, 2t + 9          outputs  2t   2t + 1
//           +-------------------------------------+  +------------------------+
//  position |                                     |  |                        |
//         g |           a[0]           a[2]       |  |             c[0]  c[1] |
//           |                                     |  |                        |
//     g + 8 |           a[1]           a[3]       |  |             c[2]  c[3] |
//           +-------------------------------------+  +------------------------+
//                            A                              accumulator
//
// An a[] or b[] is a register with two numbers of 16 bits, a c[] is in fp32. Lane 13, for
// one, has g = 3 and t = 1: positions 3 and 11, inputs 2, 3, 10 and 11, outputs 2 and 3 of the
// accumulator, and B's output 3.
//
// So two accumulators of neighbouring chunks of 8 outputs, narrowed to 16 bits, are A of the next
// product: c[0], c[1] of the first are a[0], its c[2], c[3] a[1], and the second's a[2] and a[3].
// Chains of convolutions need no shared memory except for the matrices. fp32 goes through tf32's
// mma of 8 inputs, two for these 16; its inputs t and t + 4 are 2t and 2t + 1, in A and B alike.
//
// Which position a row is, is free: a lane's rows of all its tiles are neighbours in memory, read
// in one access.

#pragma once

#include "adafm/cuda/device.cuh"
#include "adafm/cuda/passes.h"

namespace lemma_fast::adafm {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Channels are padded to this many.
constexpr int kChannels = kMaxCudaChannels;
constexpr int kChunks = kChannels / 8;
// Numbers in a matrix.
constexpr int kMatrix = kChannels * kChannels;

template <class T>
struct Tile {
  // Tiles of 16 positions a warp: two share each read of a matrix where registers allow it.
  static constexpr int kCount = sizeof(T) == 2 ? 2 : 1;
  // Positions a thread holds, neighbours in memory.
  static constexpr int kRows = 2 * kCount;
  static constexpr int kWarpPositions = 8 * kRows;
  static constexpr int kBlockPositions = kWarps * kWarpPositions;
  using Accumulator = float[kCount][kChunks][4];
};

// A chunk of 8 inputs: half of A.
template <class T>
struct FragmentA {
  uint32_t pairs[2];
};
template <>
struct FragmentA<float> {
  float values[4];
};

// B: inputs 2t, 2t + 1, 2t + 8, 2t + 9 for output g.
template <class T>
struct alignas(4 * sizeof(T)) FragmentB {
  T values[4];
};

template <class T>
__device__ FragmentA<T> to_fragment(const float (&v)[4]) {
  if constexpr (sizeof(T) == 4) {
    return {{v[0], v[1], v[2], v[3]}};
  } else {
    return {{pack(narrow<T>(v[0]), narrow<T>(v[1])), pack(narrow<T>(v[2]), narrow<T>(v[3]))}};
  }
}

// accumulator += A (two chunks) times B. fp32 goes through tf32: one product of rounded inputs, or
// with `Full` three of inputs split in two, which loses only about what fp32 would round away.
// There an infinite input gives NaN.
template <class T, bool Full>
__device__ void mma_k16(float (&accumulator)[4], const FragmentA<T>& low, const FragmentA<T>& high,
                        const FragmentB<T>& weight) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t a[4] = {low.pairs[0], low.pairs[1], high.pairs[0], high.pairs[1]};
    const uint32_t b[2] = {pack(weight.values[0], weight.values[1]),
                           pack(weight.values[2], weight.values[3])};
    mma<T>(accumulator, a, b);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float (&v)[4] = half ? high.values : low.values;
      const float w[2] = {weight.values[2 * half], weight.values[2 * half + 1]};
      // Inputs t and t + 4 of the product are channels 2t and 2t + 1, in a and b alike.
      const float a[4] = {round_tf32(v[0]), round_tf32(v[2]), round_tf32(v[1]), round_tf32(v[3])};
      const float b[2] = {round_tf32(w[0]), round_tf32(w[1])};
      if constexpr (Full) {
        const float a_rest[4] = {v[0] - a[0], v[2] - a[1], v[1] - a[2], v[3] - a[3]};
        const float b_rest[2] = {w[0] - b[0], w[1] - b[1]};
        mma_tf32(accumulator, a_rest, b);
        mma_tf32(accumulator, a, b_rest);
      }
      mma_tf32(accumulator, a, b);
    }
  }
}

// accumulator += inputs (chunks 2k and 2k + 1 of all) times a matrix in fragment order.
template <class T, bool Full>
__device__ void multiply_k16(typename Tile<T>::Accumulator& accumulator,
                             const FragmentA<T> (&low)[Tile<T>::kCount],
                             const FragmentA<T> (&high)[Tile<T>::kCount], const T* matrix, int k) {
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    const auto weight =
        reinterpret_cast<const FragmentB<T>*>(matrix)[(k * kChunks + n) * 32 + threadIdx.x % 32];
#pragma unroll
    for (int m = 0; m < Tile<T>::kCount; ++m) {
      mma_k16<T, Full>(accumulator[m][n], low[m], high[m], weight);
    }
  }
}

// The same for all of the inputs, [chunk][tile].
template <class T, bool Full>
__device__ void multiply(typename Tile<T>::Accumulator& accumulator,
                         const FragmentA<T> (&inputs)[kChunks][Tile<T>::kCount], const T* matrix) {
#pragma unroll
  for (int k = 0; k < kChunks / 2; ++k) {
    multiply_k16<T, Full>(accumulator, inputs[2 * k], inputs[2 * k + 1], matrix, k);
  }
}

// Fragment order of a matrix: the B fragments of a warp lie together, lane after lane. Where in the
// matrix [outputs, inputs] the number at `place` comes from:
struct Entry {
  int output, input;
};
__device__ inline Entry fragment_entry(int place) {
  const int i = place % 4, lane = place / 4 % 32, n = place / 128 % kChunks,
            k = place / (16 * kChannels);
  return {8 * n + lane / 4, 16 * k + 8 * (i / 2) + 2 * (lane % 4) + i % 2};
}

template <class T, int Count>
struct alignas(Count * sizeof(T)) Row {
  T values[Count];
};

// Moves a row in one access. Class types like __half would go number by number.
template <class T, int Count>
__device__ void move_row(void* to, const void* from) {
  using Words = Row<uint32_t, Count * sizeof(T) / 4>;
  *static_cast<Words*>(to) = *static_cast<const Words*>(from);
}

// A thread's view of one image of maps [channels, positions]: `Rows` positions from `first`.
// Channels and positions outside read as zero and are not written. With `aligned`, every row lies
// inside the map or outside, and is moved in one access.
template <class T, int Rows>
struct View {
  int64_t first, positions;
  int channels;
  bool aligned;

  __device__ Row<T, Rows> load(const T* map, int channel) const {
    Row<T, Rows> row;
    const T* from = map + channel * positions + first;
    if (aligned && channel < channels && first < positions) {
      move_row<T, Rows>(&row, from);
    } else {
      for (int j = 0; j < Rows; ++j) {
        const bool inside = channel < channels && first + j < positions;
        row.values[j] = inside ? from[j] : narrow<T>(0.0f);
      }
    }
    return row;
  }

  __device__ void store(T* map, int channel, const Row<T, Rows>& row) const {
    T* to = map + channel * positions + first;
    if (aligned && channel < channels && first < positions) {
      move_row<T, Rows>(to, &row);
    } else {
      for (int j = 0; j < Rows; ++j) {
        if (channel < channels && first + j < positions) to[j] = row.values[j];
      }
    }
  }
};

// The channel of number 0 of a chunk.
__device__ inline int chunk_channel(int chunk) { return 8 * chunk + 2 * (threadIdx.x % 4); }

// Position of a thread's first row, among those of the whole image, for block `block` of it.
template <class T>
__device__ int64_t thread_position(int64_t block) {
  using Shape = Tile<T>;
  return block * Shape::kBlockPositions +
         static_cast<int>(threadIdx.x) / 32 * Shape::kWarpPositions +
         static_cast<int>(threadIdx.x) % 32 / 4 * Shape::kRows;
}

// A thread's rows of two neighbouring channels as the numbers [m][4] of one chunk.
template <class T, int Rows>
__device__ void widen_rows(const Row<T, Rows>& even, const Row<T, Rows>& odd,
                           float (&v)[Rows / 2][4]) {
#pragma unroll
  for (int m = 0; m < Rows / 2; ++m) {
    v[m][0] = widen(even.values[2 * m]);
    v[m][1] = widen(odd.values[2 * m]);
    v[m][2] = widen(even.values[2 * m + 1]);
    v[m][3] = widen(odd.values[2 * m + 1]);
  }
}

// And back: writes chunk `n` of an accumulator.
template <class T>
__device__ void store_chunk(const View<T, Tile<T>::kRows>& view, T* map, int n,
                            const typename Tile<T>::Accumulator& accumulator) {
#pragma unroll
  for (int parity = 0; parity < 2; ++parity) {
    Row<T, Tile<T>::kRows> row;
#pragma unroll
    for (int m = 0; m < Tile<T>::kCount; ++m) {
      row.values[2 * m] = narrow<T>(accumulator[m][n][parity]);
      row.values[2 * m + 1] = narrow<T>(accumulator[m][n][2 + parity]);
    }
    view.store(map, chunk_channel(n) + parity, row);
  }
}

}  // namespace lemma_fast::adafm
