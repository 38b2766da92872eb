// The backward pass, in 14 launches. v_i, the argument of PReLU, is the norm of h_i:
//
//   1, 2     sums of the last norm; that norm
//   3, 4     f to v_3 and v_4; their norms
//   5, 6     h_4 to gate * x_2; the gate
//   7, 8     x_1 and x_2 to v_1 and v_2; their norms
//   9 - 11   h_1, h_2, h_3 to both maps; the guidance's norm; its map
//   12, 13   the matrices' gradients
//   14       the gate's, the global convolution's and the slopes'
//
// No gradient of an h or x is a map of its own: a Source computes it from that of v_i where it is
// read. Maps moved (of N C P numbers), if within one launch each comes from memory once: 37 read
// and 8 written, 377 MB at N = 64, C = 64, 16 x 64 in 16 bits. Of the 37, 14 are the matrices'
// gradients', whose 11 products read 30 where no cache helps. The floor, inputs read once and
// results written once, is 5 maps.

#include "adafm/cuda/buffers.cuh"

namespace lemma_fast::adafm {
namespace {

struct BackwardSpace {
  // Gradients of v_1 to v_4, and of gate * x_2.
  void *v[kBranches + 1], *product;
  // What takes a norm's gradient to its input's.
  float *scale[kNorms], *second[kNorms], *shift[kNorms];
  float* slope_parts;
  GateGradients gate;
  Partials partials;
  void* weight_gradients;
  size_t bytes;

  BackwardSpace(const CudaShape& shape, void* start) : BackwardSpace(shape, Pieces(start)) {}

  // The gradient of a norm's input.
  Source through(int norm, const void* gradient, const void* input) const {
    Source source = plain(gradient);
    source.z = input;
    source.scale = scale[norm];
    source.second = second[norm];
    source.shift = shift[norm];
    return source;
  }

 private:
  BackwardSpace(const CudaShape& shape, Pieces pieces) : partials(shape, pieces) {
    for (void*& map : v) map = pieces.map(shape);
    product = pieces.map(shape);
    for (int norm = 0; norm < kNorms; ++norm) {
      scale[norm] = pieces.channels(shape);
      second[norm] = pieces.channels(shape);
      shift[norm] = pieces.channels(shape);
    }
    slope_parts = pieces.channels(shape, kBranches + 1);
    gate = {pieces.image_channels(shape), pieces.image_channels(shape),
            pieces.image_channels(shape), pieces.image_channels(shape)};
    weight_gradients = pieces.bytes(static_cast<int64_t>(weight_gradient_bytes(shape)));
    bytes = pieces.used();
  }
};

}  // namespace

size_t backward_workspace_bytes(const CudaShape& shape) {
  return BackwardSpace(shape, nullptr).bytes;
}

const char* backward_cuda(const CudaShape& shape, bool training, const void* out_gradient,
                          const void* features, const void* guidance,
                          const Weights<const float>& weights, const void* saved,
                          void* features_gradient, void* guidance_gradient,
                          const Weights<float>& gradients, void* workspace, void* stream) {
  if (const char* error = refuse(shape)) return error;
  if (shape.images == 0) return nullptr;
  const int C = static_cast<int>(shape.channels);
  const Saved keep(shape, saved);
  const BackwardSpace space(shape, workspace);
  Sequence sequence{shape, stream};

  const auto norms = [&](std::initializer_list<int> which, int64_t parts) {
    NormBackwards work;
    for (int norm : which) {
      const bool outside = norm == kGuidanceNorm || norm == kOutNorm;
      const Norm<float>& targets = norm_of(gradients, norm);
      float* const slopes = outside ? nullptr : space.slope_parts + (norm - kBranchNorm) * C;
      const Partial* const part = space.partials.of[work.count];
      work.add() = {norm_of(weights, norm).weight,
                    keep.norms[norm],
                    part,
                    parts,
                    space.scale[norm],
                    space.second[norm],
                    space.shift[norm],
                    targets.weight,
                    targets.bias,
                    slopes};
    }
    sequence.run(launch_norm_backward, training, work);
  };
  // From the gradient of x_i (or f) to that of v_i, through the projection and PReLU.
  const auto to_hidden = [&](Conv1x1Group& group, int i, const Source& source) {
    const Branch<const float>& branch = branch_of(weights, i);
    Partial* partials = space.partials.of[group.count];
    Conv1x1& conv = group.add();
    conv.add_transposed(source, branch.project_weight, C);
    conv.out = space.v[i];
    conv.after = After::kGradients;
    conv.partials = partials;
    conv.hidden = keep.h[i];
    conv.slope = branch.slope;
    conv.norm = keep.norms[kBranchNorm + i];
  };
  const auto hidden_gradient = [&](int i) {
    return space.through(kBranchNorm + i, space.v[i], keep.h[i]);
  };
  const Source f_gradient = space.through(kOutNorm, out_gradient, keep.f);
  Source x1_gradient = plain(weights.global_weight), x2_gradient = plain(space.product);
  x1_gradient.shared = true;
  x1_gradient.gate = space.gate.pooled;
  x2_gradient.gate = keep.gate.gate;

  sequence.run(launch_moments,
               Moments{keep.f, out_gradient, keep.norms[kOutNorm], space.partials.of[0]});
  norms({kOutNorm}, shape.images);

  Conv1x1Group last;
  to_hidden(last, 2, f_gradient);
  to_hidden(last, kBranches, f_gradient);
  sequence.run(launch_conv1x1, last);
  norms({kBranchNorm + 2, kAggregateNorm}, space.partials.parts);

  Conv1x1Group aggregate;
  Conv1x1& product = aggregate.add();
  product.add_transposed(hidden_gradient(kBranches), weights.aggregate.reduce_weight, C);
  product.out = space.product;
  sequence.run(launch_conv1x1, aggregate);
  sequence.run(launch_gate_backward, space.product, keep.x2, weights, keep.gate, space.gate);

  Conv1x1Group project;
  to_hidden(project, 0, x1_gradient);
  to_hidden(project, 1, x2_gradient);
  sequence.run(launch_conv1x1, project);
  norms({kBranchNorm, kBranchNorm + 1}, space.partials.parts);

  Conv1x1Group reduce;
  for (int half = 0; half < 2; ++half) {
    Conv1x1& conv = reduce.add();
    for (int i = 0; i < kBranches; ++i) {
      conv.add_transposed(hidden_gradient(i), weights.branches[i].reduce_weight + half * C, 2 * C);
    }
    conv.out = half == 0 ? features_gradient : guidance_gradient;
  }
  Conv1x1& to_guidance = reduce.items[1];
  to_guidance.after = After::kGradients;
  to_guidance.partials = space.partials.of[0];
  to_guidance.hidden = guidance;
  to_guidance.norm = keep.norms[kGuidanceNorm];
  sequence.run(launch_conv1x1, reduce);
  norms({kGuidanceNorm}, space.partials.parts);
  sequence.run(launch_write, space.through(kGuidanceNorm, guidance_gradient, guidance),
               guidance_gradient);

  WeightGradients work;
  const auto product_of = [&](int matrix, const Source& left, const Source& right, float* bias) {
    const auto to = matrix_source(gradients, C, matrix);
    work.products[matrix] = {left, right, to.data, static_cast<int>(to.row), bias};
  };
  const Source x_gradients[] = {x1_gradient, x2_gradient, f_gradient, f_gradient};
  for (int i = 0; i <= kBranches; ++i) {
    const Branch<float>& branch = branch_of(gradients, i);
    const Source inputs = i < kBranches ? plain(features) : keep.gated();
    product_of(reduce_matrix(i), hidden_gradient(i), inputs, branch.reduce_bias);
    product_of(project_matrix(i), x_gradients[i], keep.activated(i, branch_of(weights, i).slope),
               branch.project_bias);
    if (i == kBranches) continue;
    product_of(reduce_matrix(i) + 1, hidden_gradient(i), keep.guidance(guidance), nullptr);
  }
  sequence.run(launch_weight_gradients, work, space.weight_gradients);
  sequence.run(launch_small_gradients, keep.x1, keep.gate, space.gate, space.slope_parts,
               gradients);
  return sequence.error;
}

}  // namespace lemma_fast::adafm
