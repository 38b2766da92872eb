// Memory of the training passes.

#pragma once

#include "adafm/cuda/training.cuh"

namespace lemma_fast::adafm {

// Cuts one buffer into aligned pieces; from null it only counts.
class Pieces {
 public:
  explicit Pieces(const void* start) : start_(static_cast<char*>(const_cast<void*>(start))) {}

  void* bytes(int64_t size) {
    void* piece = start_ ? start_ + used_ : nullptr;
    used_ += (static_cast<size_t>(size) + 15) / 16 * 16;
    return piece;
  }
  // Pieces for all images are so many times the piece of one, for sizes to be linear in N.
  void* map(const CudaShape& shape) {
    const int64_t number = shape.dtype == Dtype::float32 ? 4 : 2;
    return bytes(shape.images * ((shape.channels * shape.positions * number + 15) / 16 * 16));
  }
  float* channels(const CudaShape& shape, int64_t count = 1) {
    return static_cast<float*>(bytes(count * shape.channels * 4));
  }
  float* image_channels(const CudaShape& shape) {
    return static_cast<float*>(bytes(shape.images * ((shape.channels * 4 + 15) / 16 * 16)));
  }
  size_t used() const { return used_; }

 private:
  char* start_;
  size_t used_ = 0;
};

// What forward leaves for backward: h_1 to h_4, x_1, x_2 and f, the norms' states, the gate's
// values.
struct Saved {
  void *h[kBranches + 1], *x1, *x2, *f;
  NormState norms[kNorms];
  GateState gate;
  size_t bytes;

  Saved(const CudaShape& shape, const void* start) {
    Pieces pieces(start);
    for (void*& map : h) map = pieces.map(shape);
    x1 = pieces.map(shape);
    x2 = pieces.map(shape);
    f = pieces.map(shape);
    for (NormState& norm : norms) {
      norm = {pieces.channels(shape), pieces.channels(shape), pieces.channels(shape),
              pieces.channels(shape)};
    }
    gate = {pieces.image_channels(shape), pieces.image_channels(shape),
            pieces.image_channels(shape), pieces.image_channels(shape)};
    bytes = pieces.used();
  }

  // BN(X_G), u_i and gate * x_2 as they are read.
  Source guidance(const void* map) const { return normalised(map, kGuidanceNorm); }
  Source activated(int branch, const float* slope) const {
    Source source = normalised(h[branch], kBranchNorm + branch);
    source.slope = slope;
    return source;
  }
  Source gated() const {
    Source source = plain(x2);
    source.gate = gate.gate;
    return source;
  }
  Source normalised(const void* map, int norm) const {
    Source source = plain(map);
    source.scale = norms[norm].scale;
    source.shift = norms[norm].shift;
    return source;
  }
};

// Partials of as many as three norms at a time.
struct Partials {
  Partial* of[kBranches];
  int64_t parts;

  Partials(const CudaShape& shape, Pieces& pieces) : parts(conv1x1_parts(shape)) {
    const int64_t bytes = parts * shape.channels * static_cast<int64_t>(sizeof(Partial));
    for (Partial*& each : of) each = static_cast<Partial*>(pieces.bytes(bytes));
  }
};

}  // namespace lemma_fast::adafm
