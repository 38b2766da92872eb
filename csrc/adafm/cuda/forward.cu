// The forward pass that backward can follow, in 11 launches:
//
//   1, 2      statistics of the guidance (in training); its norm
//   3, 4      h_1, h_2, h_3; their norms
//   5, 6      x_1 and x_2; the gate
//   7, 8      h_4; its norm
//   9 - 11    f; its norm; the result
//
// Batch statistics need all images between a convolution and its norm: h_1 to h_3, h_4 and f must
// each be complete before the next step. These five maps are written, and x_1 and x_2, which
// backward would else compute again. Maps moved (of N C P numbers), if within one launch each comes
// from memory once: 10 read and 8 written. At N = 64, C = 64, 16 x 64 in 16 bits a map is 8.4 MB:
// 151 MB. The floor, inputs read once and results written once, is 3 maps.

#include <cstring>

#include "adafm/cuda/buffers.cuh"

namespace lemma_fast::adafm {
namespace {

Weights<const float> read_only(const Weights<float>& weights) {
  static_assert(sizeof(Weights<const float>) == sizeof(Weights<float>), "one pointer a tensor");
  Weights<const float> same;
  std::memcpy(&same, &weights, sizeof(same));
  return same;
}

}  // namespace

size_t saved_bytes(const CudaShape& shape) { return Saved(shape, nullptr).bytes; }

size_t forward_workspace_bytes(const CudaShape& shape) {
  Pieces pieces(nullptr);
  const Partials partials(shape, pieces);
  return pieces.used();
}

const char* forward_cuda(const CudaShape& shape, bool training, const void* features,
                         const void* guidance, const Weights<float>& weights, void* out,
                         void* saved, void* workspace, void* stream) {
  if (const char* error = refuse(shape)) return error;
  if (shape.images == 0) return nullptr;
  if (training && shape.images * shape.positions < 2) {
    return "AdaFM in training needs more than one value a channel";
  }
  const int C = static_cast<int>(shape.channels);
  const Saved keep(shape, saved);
  Pieces pieces(workspace);
  const Partials partials(shape, pieces);
  Sequence sequence{shape, stream};

  // A convolution whose statistics, in training, go to the partials of that number.
  const auto measure = [&](Conv1x1& conv, int number) {
    if (training) conv.after = After::kMoments;
    conv.partials = partials.of[number];
  };
  // Statistics of norms from partials in turn.
  const auto norms = [&](std::initializer_list<int> which, int64_t parts) {
    NormForwards work;
    for (int norm : which) {
      Partial* const part = training ? partials.of[work.count] : nullptr;
      work.add() = {norm_of(weights, norm), part, parts, keep.norms[norm]};
    }
    sequence.run(launch_norm_forward, work);
  };
  const auto activated = [&](int i) { return keep.activated(i, branch_of(weights, i).slope); };

  if (training) {
    Moments moments;
    moments.x = guidance;
    moments.partials = partials.of[0];
    sequence.run(launch_moments, moments);
  }
  norms({kGuidanceNorm}, shape.images);

  Conv1x1Group reduce;
  for (int i = 0; i < kBranches; ++i) {
    const Branch<float>& branch = weights.branches[i];
    Conv1x1& conv = reduce.add();
    conv.add(plain(features), branch.reduce_weight, 2 * C);
    conv.add(keep.guidance(guidance), branch.reduce_weight + C, 2 * C);
    conv.bias = branch.reduce_bias;
    conv.out = keep.h[i];
    measure(conv, i);
  }
  sequence.run(launch_conv1x1, reduce);
  norms({kBranchNorm, kBranchNorm + 1, kBranchNorm + 2}, partials.parts);

  Conv1x1Group project;
  for (int i = 0; i < 2; ++i) {
    Conv1x1& conv = project.add();
    conv.add(activated(i), weights.branches[i].project_weight, C);
    conv.bias = weights.branches[i].project_bias;
    conv.out = i == 0 ? keep.x1 : keep.x2;
  }
  sequence.run(launch_conv1x1, project);
  sequence.run(launch_gate_forward, keep.x1, read_only(weights), keep.gate);

  Conv1x1Group aggregate;
  Conv1x1& fourth = aggregate.add();
  fourth.add(keep.gated(), weights.aggregate.reduce_weight, C);
  fourth.bias = weights.aggregate.reduce_bias;
  fourth.out = keep.h[kBranches];
  measure(fourth, 0);
  sequence.run(launch_conv1x1, aggregate);
  norms({kAggregateNorm}, partials.parts);

  Conv1x1Group last;
  Conv1x1& sum = last.add();
  for (int i = 2; i <= kBranches; ++i) {
    sum.add(activated(i), branch_of(weights, i).project_weight, C);
  }
  sum.bias = weights.branches[2].project_bias;
  sum.second_bias = weights.aggregate.project_bias;
  sum.out = keep.f;
  measure(sum, 0);
  sequence.run(launch_conv1x1, last);
  norms({kOutNorm}, partials.parts);
  sequence.run(launch_write, keep.normalised(keep.f, kOutNorm), out);
  return sequence.error;
}

}  // namespace lemma_fast::adafm
