// AdaFM in training: the order of the launches, 11 forward and 14 backward.
//
// Names as in adafm_math.h: h_i are what the reducing convolutions make (h_4 the aggregation's), u_i
// the activated norms of them, x_i what the branches return, f the sum that the last norm takes.
// Batch statistics need all images between a convolution and its norm: h_1..h_3, h_4 and f must each
// be complete before the next step. Forward writes these five maps, and x_1 and x_2, which backward
// would else compute again.
//
// Maps moved (of N C P numbers), if within one launch each comes from memory once: forward 10 read
// and 8 written, backward 37 and 8; of the 37, 14 are the matrices' gradients', whose 11 products
// read 30 where no cache helps. At N = 64, C = 64, 16 x 64 in 16 bits a map is 8.4 MB: 151 and 377 MB.
// The floor, inputs read once and results written once, is 3 maps forward and 5 backward.
#include <cstring>

#include "adafm_training.cuh"

namespace lemma_fast {
namespace adafm {
namespace {

// Cuts one buffer into aligned pieces; from null it only counts.
class Pieces {
 public:
  explicit Pieces(const void *start) : start_(static_cast<char *>(const_cast<void *>(start))) {}

  void *bytes(size_t size) {
    void *piece = start_ ? start_ + used_ : nullptr;
    used_ += (size + 15) / 16 * 16;
    return piece;
  }
  void *map(const CudaShape &shape) {
    const size_t number = shape.dtype == Dtype::float32 ? 4 : 2;
    return bytes(static_cast<size_t>(shape.images * shape.channels * shape.positions) * number);
  }
  float *numbers(int64_t count) {
    return static_cast<float *>(bytes(static_cast<size_t>(count) * sizeof(float)));
  }
  size_t used() const { return used_; }

 private:
  char *start_;
  size_t used_ = 0;
};

struct Saved {
  void *h[kBranches + 1], *x1, *x2, *f;
  NormState norms[kNorms];
  GateState gate;
  size_t bytes;

  Saved(const CudaShape &shape, const void *start) {
    Pieces pieces(start);
    const int64_t C = shape.channels, NC = shape.images * C;
    for (void *&map : h) map = pieces.map(shape);
    x1 = pieces.map(shape);
    x2 = pieces.map(shape);
    f = pieces.map(shape);
    for (NormState &norm : norms) {
      norm = {pieces.numbers(C), pieces.numbers(C), pieces.numbers(C), pieces.numbers(C)};
    }
    gate = {pieces.numbers(NC), pieces.numbers(NC), pieces.numbers(NC), pieces.numbers(NC)};
    bytes = pieces.used();
  }

  // BN(X_G), u_i and gate * x_2 as they are read.
  Source guidance(const void *map) const { return normalised(map, kGuidanceNorm); }
  Source activated(int branch, const float *slope) const {
    Source source = normalised(h[branch], kBranchNorm + branch);
    source.slope = slope;
    return source;
  }
  Source gated() const {
    Source source;
    source.x = x2;
    source.gate = gate.gate;
    return source;
  }
  Source normalised(const void *map, int norm) const {
    Source source;
    source.x = map;
    source.scale = norms[norm].scale;
    source.shift = norms[norm].shift;
    return source;
  }
};

// Partials of as many as three norms at a time.
struct Partials {
  Partial *of[kBranches];
  int64_t parts;

  Partials(const CudaShape &shape, Pieces &pieces) : parts(mix_parts(shape)) {
    const size_t bytes = static_cast<size_t>(parts * shape.channels) * sizeof(Partial);
    for (Partial *&each : of) each = static_cast<Partial *>(pieces.bytes(bytes));
  }
};

struct BackwardSpace {
  // Gradients of the norms' outputs below PReLU, and of gate * x_2.
  void *v[kBranches + 1], *product;
  // What takes a norm's gradient to its input's.
  float *scale[kNorms], *second[kNorms], *shift[kNorms];
  float *slope_parts;
  GateGradients gate;
  Partials partials;
  void *contractions;
  size_t bytes;

  BackwardSpace(const CudaShape &shape, void *start) : BackwardSpace(shape, Pieces(start)) {}

  // The gradient of a norm's input.
  Source through(int norm, const void *gradient, const void *input) const {
    Source source;
    source.x = gradient;
    source.z = input;
    source.scale = scale[norm];
    source.second = second[norm];
    source.shift = shift[norm];
    return source;
  }

 private:
  BackwardSpace(const CudaShape &shape, Pieces pieces) : partials(shape, pieces) {
    const int64_t C = shape.channels, NC = shape.images * C;
    for (void *&map : v) map = pieces.map(shape);
    product = pieces.map(shape);
    for (int norm = 0; norm < kNorms; ++norm) {
      scale[norm] = pieces.numbers(C);
      second[norm] = pieces.numbers(C);
      shift[norm] = pieces.numbers(C);
    }
    slope_parts = pieces.numbers((kBranches + 1) * C);
    gate = {pieces.numbers(NC), pieces.numbers(NC), pieces.numbers(NC), pieces.numbers(NC)};
    contractions = pieces.bytes(contraction_bytes(shape));
    bytes = pieces.used();
  }
};

// The first launch that fails ends the pass.
class Sequence {
 public:
  const char *error = nullptr;

  template <class Launch>
  Sequence &then(const Launch &launch) {
    if (error == nullptr) error = launch();
    return *this;
  }
};

Source plain(const void *map) {
  Source source;
  source.x = map;
  return source;
}

template <class T>
const Branch<T> &branch_of(const Weights<T> &weights, int branch) {
  return branch < kBranches ? weights.branches[branch] : weights.aggregate;
}

Weights<const float> read_only(const Weights<float> &weights) {
  static_assert(sizeof(Weights<const float>) == sizeof(Weights<float>), "one pointer a tensor");
  Weights<const float> same;
  std::memcpy(&same, &weights, sizeof(same));
  return same;
}

}  // namespace

size_t saved_bytes(const CudaShape &shape) { return Saved(shape, nullptr).bytes; }

size_t forward_workspace_bytes(const CudaShape &shape) {
  Pieces pieces(nullptr);
  const Partials partials(shape, pieces);
  return pieces.used();
}

const char *forward_cuda(const CudaShape &shape, bool training, const void *features,
                         const void *guidance, const Weights<float> &weights, void *out,
                         void *saved, void *workspace, void *stream) {
  if (const char *error = refuse(shape)) return error;
  if (shape.images == 0) return nullptr;
  if (training && shape.images * shape.positions < 2) {
    return "AdaFM in training needs more than one value a channel";
  }
  const int C = static_cast<int>(shape.channels);
  const Saved keep(shape, saved);
  Pieces pieces(workspace);
  const Partials partials(shape, pieces);
  const After after = training ? After::kMoments : After::kNothing;
  Sequence sequence;

  // Statistics of `count` norms from partials in turn.
  const auto norms = [&](std::initializer_list<int> which, int64_t parts) {
    NormForwards work;
    for (int norm : which) {
      const Norm<float> &parameters = norm == kGuidanceNorm ? weights.guidance_norm
                                      : norm == kOutNorm
                                          ? weights.out_norm
                                          : branch_of(weights, norm - kBranchNorm).norm;
      work.norms[work.count] = {parameters, training ? partials.of[work.count] : nullptr, parts,
                                keep.norms[norm]};
      ++work.count;
    }
    return launch_norm_forward(shape, work, stream);
  };
  const auto row_major = [](const Source &source, const float *matrix, int stride) {
    return Term{source, matrix, stride, 1};
  };

  if (training) {
    sequence.then([&] {
      Rows rows;
      rows.x = guidance;
      rows.partials = partials.of[0];
      return launch_rows(shape, rows, stream);
    });
  }
  sequence.then([&] { return norms({kGuidanceNorm}, shape.images); });
  sequence.then([&] {
    MixGroup group;
    for (int i = 0; i < kBranches; ++i) {
      const Branch<float> &branch = weights.branches[i];
      Mix &mix = group.mixes[group.count++];
      mix.terms[mix.count++] = row_major(plain(features), branch.reduce_weight, 2 * C);
      mix.terms[mix.count++] = row_major(keep.guidance(guidance), branch.reduce_weight + C, 2 * C);
      mix.bias = branch.reduce_bias;
      mix.out = keep.h[i];
      mix.after = after;
      mix.partials = partials.of[i];
    }
    return launch_mix(shape, group, stream);
  });
  sequence.then([&] {
    return norms({kBranchNorm, kBranchNorm + 1, kBranchNorm + 2}, partials.parts);
  });
  sequence.then([&] {
    MixGroup group;
    for (int i = 0; i < 2; ++i) {
      const Branch<float> &branch = weights.branches[i];
      Mix &mix = group.mixes[group.count++];
      mix.terms[mix.count++] = row_major(keep.activated(i, branch.slope), branch.project_weight, C);
      mix.bias = branch.project_bias;
      mix.out = i == 0 ? keep.x1 : keep.x2;
    }
    return launch_mix(shape, group, stream);
  });
  sequence.then([&] {
    return launch_gate_forward(shape, keep.x1, read_only(weights), keep.gate, stream);
  });
  sequence.then([&] {
    MixGroup group;
    Mix &mix = group.mixes[group.count++];
    mix.terms[mix.count++] = row_major(keep.gated(), weights.aggregate.reduce_weight, C);
    mix.bias = weights.aggregate.reduce_bias;
    mix.out = keep.h[kBranches];
    mix.after = after;
    mix.partials = partials.of[0];
    return launch_mix(shape, group, stream);
  });
  sequence.then([&] { return norms({kAggregateNorm}, partials.parts); });
  sequence.then([&] {
    MixGroup group;
    Mix &mix = group.mixes[group.count++];
    for (int i = 2; i <= kBranches; ++i) {
      const Branch<float> &branch = branch_of(weights, i);
      mix.terms[mix.count++] = row_major(keep.activated(i, branch.slope), branch.project_weight, C);
    }
    mix.bias = weights.branches[2].project_bias;
    mix.second_bias = weights.aggregate.project_bias;
    mix.out = keep.f;
    mix.after = after;
    mix.partials = partials.of[0];
    return launch_mix(shape, group, stream);
  });
  sequence.then([&] { return norms({kOutNorm}, partials.parts); });
  sequence.then([&] { return launch_write(shape, keep.normalised(keep.f, kOutNorm), out, stream); });
  return sequence.error;
}

size_t backward_workspace_bytes(const CudaShape &shape) {
  return BackwardSpace(shape, nullptr).bytes;
}

const char *backward_cuda(const CudaShape &shape, bool training, const void *out_gradient,
                          const void *features, const void *guidance,
                          const Weights<const float> &weights, const void *saved,
                          void *features_gradient, void *guidance_gradient,
                          const Weights<float> &gradients, void *workspace, void *stream) {
  if (const char *error = refuse(shape)) return error;
  if (shape.images == 0) return nullptr;
  const int C = static_cast<int>(shape.channels);
  const Saved keep(shape, saved);
  const BackwardSpace space(shape, workspace);
  Sequence sequence;

  const auto norms = [&](std::initializer_list<int> which, int64_t parts) {
    NormBackwards work;
    for (int norm : which) {
      const bool outside = norm == kGuidanceNorm || norm == kOutNorm;
      const int branch = norm - kBranchNorm;
      const auto &parameters = norm == kGuidanceNorm ? weights.guidance_norm
                               : norm == kOutNorm    ? weights.out_norm
                                                     : branch_of(weights, branch).norm;
      const auto &targets = norm == kGuidanceNorm ? gradients.guidance_norm
                            : norm == kOutNorm    ? gradients.out_norm
                                                  : branch_of(gradients, branch).norm;
      work.norms[work.count] = {parameters.weight,
                                keep.norms[norm],
                                space.partials.of[work.count],
                                parts,
                                space.scale[norm],
                                space.second[norm],
                                space.shift[norm],
                                targets.weight,
                                targets.bias,
                                outside ? nullptr : space.slope_parts + branch * C};
      ++work.count;
    }
    return launch_norm_backward(shape, training, work, stream);
  };
  // A term of a matrix transposed: from the gradient of its outputs to that of its inputs.
  const auto transposed = [](const Source &source, const float *matrix, int stride) {
    return Term{source, matrix, 1, stride};
  };
  // From the gradient of x_i (or f) to that of v_i, through the projection and PReLU.
  const auto to_hidden = [&](MixGroup &group, int i, const Source &source) {
    const Branch<const float> &branch = branch_of(weights, i);
    Mix &mix = group.mixes[group.count];
    mix.terms[mix.count++] = transposed(source, branch.project_weight, C);
    mix.out = space.v[i];
    mix.after = After::kGradients;
    mix.partials = space.partials.of[group.count++];
    mix.hidden = keep.h[i];
    mix.slope = branch.slope;
    mix.norm = keep.norms[kBranchNorm + i];
  };
  const auto hidden_gradient = [&](int i) {
    return space.through(kBranchNorm + i, space.v[i], keep.h[i]);
  };
  const Source f_gradient = space.through(kOutNorm, out_gradient, keep.f);
  Source x1_gradient, x2_gradient = plain(space.product);
  x1_gradient.x = weights.global_weight;
  x1_gradient.shared = true;
  x1_gradient.gate = space.gate.pooled;
  x2_gradient.gate = keep.gate.gate;

  sequence.then([&] {
    return launch_rows(shape, {keep.f, out_gradient, keep.norms[kOutNorm], space.partials.of[0]},
                       stream);
  });
  sequence.then([&] { return norms({kOutNorm}, shape.images); });
  sequence.then([&] {
    MixGroup group;
    to_hidden(group, 2, f_gradient);
    to_hidden(group, kBranches, f_gradient);
    return launch_mix(shape, group, stream);
  });
  sequence.then([&] { return norms({kBranchNorm + 2, kAggregateNorm}, space.partials.parts); });
  sequence.then([&] {
    MixGroup group;
    Mix &mix = group.mixes[group.count++];
    mix.terms[mix.count++] =
        transposed(hidden_gradient(kBranches), weights.aggregate.reduce_weight, C);
    mix.out = space.product;
    return launch_mix(shape, group, stream);
  });
  sequence.then([&] {
    return launch_gate_backward(shape, space.product, keep.x2, weights, keep.gate, space.gate,
                                stream);
  });
  sequence.then([&] {
    MixGroup group;
    to_hidden(group, 0, x1_gradient);
    to_hidden(group, 1, x2_gradient);
    return launch_mix(shape, group, stream);
  });
  sequence.then([&] { return norms({kBranchNorm, kBranchNorm + 1}, space.partials.parts); });
  sequence.then([&] {
    MixGroup group;
    for (int half = 0; half < 2; ++half) {
      Mix &mix = group.mixes[group.count++];
      for (int i = 0; i < kBranches; ++i) {
        mix.terms[mix.count++] = transposed(
            hidden_gradient(i), weights.branches[i].reduce_weight + half * C, 2 * C);
      }
      mix.out = half == 0 ? features_gradient : guidance_gradient;
    }
    Mix &mix = group.mixes[1];
    mix.after = After::kGradients;
    mix.partials = space.partials.of[0];
    mix.hidden = guidance;
    mix.norm = keep.norms[kGuidanceNorm];
    return launch_mix(shape, group, stream);
  });
  sequence.then([&] { return norms({kGuidanceNorm}, space.partials.parts); });
  sequence.then([&] {
    return launch_write(shape, space.through(kGuidanceNorm, guidance_gradient, guidance),
                        guidance_gradient, stream);
  });
  sequence.then([&] {
    Contractions work;
    int count = 0;
    for (int i = 0; i < kBranches; ++i) {
      const Branch<float> &branch = gradients.branches[i];
      const Source h = hidden_gradient(i);
      work.products[count++] = {h, plain(features), branch.reduce_weight, 2 * C,
                                branch.reduce_bias};
      work.products[count++] = {h, keep.guidance(guidance), branch.reduce_weight + C, 2 * C};
    }
    const Branch<float> &last = gradients.aggregate;
    const auto u = [&](int i) { return keep.activated(i, branch_of(weights, i).slope); };
    const auto projection = [&](int i, const Source &gradient) {
      const Branch<float> &branch = branch_of(gradients, i);
      work.products[count++] = {gradient, u(i), branch.project_weight, C, branch.project_bias};
    };
    projection(0, x1_gradient);
    projection(1, x2_gradient);
    projection(2, f_gradient);
    projection(kBranches, f_gradient);
    work.products[count++] = {hidden_gradient(kBranches), keep.gated(), last.reduce_weight, C,
                              last.reduce_bias};
    return launch_contractions(shape, work, space.contractions, stream);
  });
  sequence.then([&] {
    return launch_small_gradients(shape, keep.x1, keep.gate, space.gate, space.slope_parts,
                                  gradients, stream);
  });
  return sequence.error;
}

}  // namespace adafm
}  // namespace lemma_fast
