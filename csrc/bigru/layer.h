// Bidirectional GRU along the height or the width of a map, for inference on the CPU in fp32:
//
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr),   z likewise
//   n = tanh(W_in x + b_in + r (W_hn h + b_hn)),   h' = n + z (h - n)
//
// A task is one direction of a tile of sequences. A step gathers the sequences' inputs from the map
// where they lie, and takes both products and the gates in registers: lanes are hidden units, a row
// of weights is read once for all sequences of the tile. Memory moved: the map twice (once for each
// direction), the result once; the weights, 37 kB a direction for 64 channels and 32 units, stay in
// the cache.

#pragma once

#include <cstdint>

#include "simd/dispatch.h"

namespace lemma_fast {

// One direction of a layer over maps whose steps lie a stride apart.
struct GruLayer {
  // As `lemma_fast.ops.native.pack_bigru` lays them out: in blocks of 16 hidden units, whatever the
  // width of a vector. A block holds 4 rows of biases (r, z, n of the input, n of the state), then
  // for each input channel and each hidden unit a row for r, z and n.
  const float* weights;
  int64_t block;                     // floats in a block
  int64_t channels, hidden, padded;  // padded: hidden units to a multiple of 16
  int64_t steps, input_stride, output_stride;
  bool backward;
};

// Runs a layer over so many sequences; `input` and `output` point at each one's first step.
// `scratch` holds sequences * (channels + 2 * padded) floats.
struct GruTile {
  int sequences;
  void (*run)(const GruLayer& layer, const float* const* input, float* const* output,
              float* scratch);
};

constexpr int kMostSequences = 8;

// The tile whose gates fill the registers, and half of it for when threads lack work.
struct GruTiles {
  GruTile wide, narrow;
};
SIMD_DECLARE(GruTiles, gru_tiles)

}  // namespace lemma_fast
