// The backward pass, from what `forward` left. `d_x` is the gradient of x; `g` is that of a norm's
// result. A pass over the tiles ends where sums over all positions are needed, by a batch norm or
// by the gate of an image:
//
//   last_norm            sums of the last norm
//   last_projections     f to h_3 and h_4
//   gate                 h_4 to u_2, and the gate of each image
//   global_convolution   GDW, x_1 to h_1
//   both_maps            h_1, h_2, h_3 to both maps
//   guidance_norm        the guidance's map once more, in training
//
// Each thread adds the parameters' gradients up by itself, in the layout of Folded with matrices as
// [outputs, inputs]; at the end they are added and handed out.

#pragma once

#include "adafm/cpu/gate.h"

namespace lemma_fast::SIMD_LEVEL {

template <class T>
struct Backward {
  const BackwardArguments<T>& arguments;
  const Shape& shape = arguments.shape;
  const bool training = arguments.training;
  const Map<const T>&features = arguments.features, &guidance = arguments.guidance;
  const Map<T>& grad_guidance = arguments.grad_guidance;
  const Weights<const T>& weights = arguments.weights;
  const Weights<T>& grads = arguments.grads;
  const T* saved = arguments.saved;
  const Workers& workers = arguments.workers;

  const int64_t C = shape.channels, width = padded(C), N = shape.images, P = shape.positions;
  // A matrix and, behind it, its bias.
  const int64_t square = (width + 1) * width, count = N * P;
  const Saved in = saved_layout(shape);
  const Folded sums_at{width, 0};
  const Tiles tiles{shape, workers.threads};
  const Shares work{tiles.count(), workers.threads}, by_image{N, workers.threads};

  // Norms as scale, shift: [kNorms, 2, C]; and `finish`'s factors: [kNorms, 3, C].
  Buffer<T> norms{kNorms * 2 * width}, factors{kNorms * 3 * width};
  Buffer<T> folded_data{folded_layout(shape).size()}, raw_data{sums_at.size()};
  Buffer<T> sums_data{workers.threads * sums_at.size()};
  const Parameters<const T> folded{folded_data, folded_layout(shape)};
  // The matrices as [outputs, inputs], with the guidance's norm.
  const Parameters<const T> raw{raw_data, sums_at};
  // Gradients of the four inner norms' results; the first three lie side by side as h_1 to h_3 do.
  Buffer<T> inner{count * 3 * width}, fourth{count * width};
  const NormSums<T> out_sums{workers.threads, width};
  const NormSums<T> inner_sums[kBranches + 1] = {{workers.threads, width},
                                                 {workers.threads, width},
                                                 {workers.threads, width},
                                                 {workers.threads, width}};
  // The gate's layers, [N, 3, C], and the gradient of what it takes, [N, C].
  Buffer<T> layers{N * kGateLayers * width}, d_pooled{N * width};

  T* norm(int index) const { return norms + 2 * index * width; }
  const T* mean(int index) const { return saved + 2 * index * width; }
  Parameters<T> sums(int64_t share) const { return {sums_data + share * sums_at.size(), sums_at}; }

  void start() {
    affine<T>(weights.guidance_norm, C, mean(kGuidanceNorm), norm(kGuidanceNorm));
    fold_guidance<T>(shape, weights, norm(kGuidanceNorm), folded_data);
    for (int i = kBranchNorm; i < kNorms; ++i) affine<T>(norm_of(weights, i), C, mean(i), norm(i));
    fill<T>(raw_data, sums_at.size(), 0);
    for (int m = 0; m < kMatrices; ++m) {
      const auto from = matrix_source(weights, C, m);
      T* to = raw_data + sums_at.matrix(m);
      for (int64_t r = 0; r < C; ++r) {
        __builtin_memcpy(to + r * width, from.data + r * from.row, C * sizeof(T));
      }
      if (from.input_norm == kGuidanceNorm) {
        scale_rows<T>(to, width, nullptr, norm(kGuidanceNorm));
      }
    }
    fill<T>(sums_data, workers.threads * sums_at.size(), 0);
  }

  // task(share, tile, space) for every tile, with space for 7 C numbers a row and 2 C more.
  template <class Task>
  void each_tile(const Task& task) const {
    run_tasks(workers, work.count, [&](int64_t share) {
      Buffer<T> space((tiles.rows * 7 + 2) * width);
      for (int64_t t = work.start(share); t < work.start(share + 1); ++t) task(share, t, space);
    });
  }

  // A branch's hidden values and their gradients, from row `first` of the batch on.
  struct Hidden {
    const T* x;
    T* g;
    int64_t row;
  };
  Hidden hidden(int branch, int64_t first) const {
    if (branch == kBranches) {
      return {saved + in.aggregate + first * width, fourth + first * width, width};
    }
    const int64_t offset = first * 3 * width + branch * width;
    return {saved + in.hidden + offset, inner + offset, 3 * width};
  }

  void activated(int branch, int64_t first, int64_t rows, T* u) const {
    const Hidden from = hidden(branch, first);
    const T* scale = norm(kBranchNorm + branch);
    activate<T>(from.x, from.row, u, width, rows, width, scale, scale + width,
                folded.slope(branch));
  }

  void through_activation(int branch, int64_t share, int64_t first, int64_t rows, const T* d_u,
                          T* space) const {
    const Hidden to = hidden(branch, first);
    const int index = kBranchNorm + branch;
    sums(share).vector(kSlopes)[branch] +=
        activate_backward<T>(d_u, to.x, to.row, norm(index), norm(index) + width,
                             folded.slope(branch), rows, width, to.g, to.row);
    inner_sums[branch].add(share, to.g, to.row, to.x, to.row, mean(index), rows, space);
  }

  void through_norm(int branch, int64_t first, int64_t rows, T* d_x, int64_t d_x_row) const {
    const Hidden from = hidden(branch, first);
    const int index = kBranchNorm + branch;
    norm_backward<T>(from.g, from.row, from.x, from.row, mean(index), factors + index * 3 * width,
                     rows, width, d_x, d_x_row);
  }

  void finish(const NormSums<T>& norm_sums, int index) const {
    norm_sums.finish(norm_of(weights, index), mean(index), C, count, training,
                     norm_of(grads, index), factors + index * 3 * width);
  }
  void finish_branch(int branch) const { finish(inner_sums[branch], kBranchNorm + branch); }

  void last_norm() const {
    each_tile([&](int64_t share, int64_t t, T* space) {
      const int64_t rows = tiles.size(t);
      load_rows(arguments.grad_out, tiles.image(t), tiles.first(t), rows, C, space, width);
      out_sums.add(share, space, width, saved + in.sum + tiles.row(t) * width, width,
                   mean(kOutNorm), rows, space + rows * width);
    });
    finish(out_sums, kOutNorm);
  }

  void last_projections() const {
    each_tile([&](int64_t share, int64_t t, T* space) {
      const int64_t rows = tiles.size(t), first = tiles.row(t);
      T *d_sum = space, *u = space + rows * width, *d_u = space + 2 * rows * width;
      const Parameters<T> mine = sums(share);
      load_rows(arguments.grad_out, tiles.image(t), tiles.first(t), rows, C, d_sum, width);
      norm_backward<T>(d_sum, width, saved + in.sum + first * width, width, mean(kOutNorm),
                       factors + kOutNorm * 3 * width, rows, width, d_sum, width);
      add_rows<T>(d_sum, rows, width, mine.vector(kLastBias));
      for (int branch = 2; branch <= kBranches; ++branch) {
        const int matrix = project_matrix(branch);
        activated(branch, first, rows, u);
        product<T>({d_sum, 1, width}, width, u, width, mine.matrix(matrix), width, width, rows,
                   nullptr, true);
        product<T>({d_sum, width, 1}, rows, raw.matrix(matrix), width, d_u, width, width, width);
        through_activation(branch, share, first, rows, d_u, d_u + rows * width);
      }
    });
    finish_branch(kBranches);
  }

  // Each image has a matrix from u_2 to h_4, [outputs, inputs] here. Its gradient is summed by
  // share; the first and the last image of a share may be another's as well, and wait in `borders`.
  void gate() const {
    Buffer<T> matrices(N * square), d_matrices(N * square), borders(work.count * 2 * square);
    fill<T>(d_matrices, N * square, 0);
    fill<T>(borders, work.count * 2 * square, 0);
    run_tasks(workers, by_image.count, [&](int64_t share) {
      Buffer<T> gated(width * width);
      const T* project = raw.matrix(project_matrix(1));
      for (int64_t n = by_image.start(share); n < by_image.start(share + 1); ++n) {
        T* layer = layers + n * kGateLayers * width;
        make_gate<T>(folded, saved + in.pooled + n * width, layer);
        for (int64_t c = 0; c < width; ++c) {
          for (int64_t k = 0; k < width; ++k) {
            gated[c * width + k] = project[c * width + k] * layer[2 * width + c];
          }
        }
        product<T>({raw.matrix(reduce_matrix(kBranches)), width, 1}, width, gated, width,
                   matrices + n * square, width, width, width);
      }
    });
    each_tile([&](int64_t share, int64_t t, T* space) {
      const int64_t rows = tiles.size(t), first = tiles.row(t), n = tiles.image(t);
      T *d_hidden = space, *u = space + rows * width, *d_u = space + 2 * rows * width;
      const int64_t start = work.start(share), end = work.start(share + 1);
      T* target = d_matrices + n * square;
      if (n * tiles.per_image < start)
        target = borders + 2 * share * square;
      else if ((n + 1) * tiles.per_image > end)
        target = borders + (2 * share + 1) * square;
      through_norm(kBranches, first, rows, d_hidden, width);
      activated(1, first, rows, u);
      product<T>({d_hidden, 1, width}, width, u, width, target, width, width, rows, nullptr, true);
      add_rows<T>(d_hidden, rows, width, target + width * width);
      product<T>({d_hidden, width, 1}, rows, matrices + n * square, width, d_u, width, width,
                 width);
      through_activation(1, share, first, rows, d_u, d_u + rows * width);
    });
    finish_branch(1);
    for (int64_t s = 0; s < work.count; ++s) {
      for (int last = 0; last < 2; ++last) {
        const int64_t n = tiles.image(last ? work.start(s + 1) - 1 : work.start(s));
        for (int64_t i = 0; i < square; ++i) {
          d_matrices[n * square + i] += borders[(2 * s + last) * square + i];
        }
      }
    }
    run_tasks(workers, by_image.count, [&](int64_t share) {
      Buffer<T> space((width + 6) * width);
      for (int64_t n = by_image.start(share); n < by_image.start(share + 1); ++n) {
        gate_backward<T>(folded, raw, saved + in.pooled + n * width,
                         layers + n * kGateLayers * width, d_matrices + n * square, space,
                         sums(share), d_pooled + n * width);
      }
    });
  }

  // The global convolution: a thread owns positions and walks the images, so that it alone adds to
  // their weights' gradients.
  void global_convolution() const {
    const Tiles places(Shape{1, C, P}, workers.threads);
    const Shares by_place(places.count(), workers.threads);
    const int matrix = project_matrix(0);
    run_tasks(workers, by_place.count, [&](int64_t share) {
      Buffer<T> space((places.rows * 4 + 2) * width);
      const Parameters<T> mine = sums(share);
      for (int64_t t = by_place.start(share); t < by_place.start(share + 1); ++t) {
        const int64_t start = places.first(t), rows = places.size(t);
        T *u = space, *x = u + rows * width, *d_u = x + rows * width;
        T* d_global = d_u + rows * width;
        const T* kernel = folded.global(start);
        fill(d_global, rows * width, T(0));
        for (int64_t n = 0; n < N; ++n) {
          const T* d = d_pooled + n * width;
          activated(0, n * P + start, rows, u);
          product<T>({u, width, 1}, rows, folded.matrix(matrix), width, x, width, width, width,
                     folded.vector(kProjectBias));
          for (int64_t i = 0, r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < width; ++c, ++i) {
              d_global[i] += d[c] * x[i];
              x[i] = d[c] * kernel[i];
            }
          }
          add_rows<T>(x, rows, width, mine.vector(kProjectBias));
          product<T>({x, 1, width}, width, u, width, mine.matrix(matrix), width, width, rows,
                     nullptr, true);
          product<T>({x, width, 1}, rows, raw.matrix(matrix), width, d_u, width, width, width);
          through_activation(0, share, n * P + start, rows, d_u, d_global + rows * width);
        }
        transpose<T>(d_global, width, rows, C, grads.global_weight + start, P);
      }
    });
    finish_branch(0);
    finish_branch(2);
  }

  void both_maps() const {
    each_tile([&](int64_t share, int64_t t, T* space) {
      const int64_t image = tiles.image(t), start = tiles.first(t), rows = tiles.size(t);
      T *d_hidden = space, *both = space + rows * 3 * width, *d_both = both + rows * 2 * width;
      const Parameters<T> mine = sums(share);
      for (int i = 0; i < kBranches; ++i) {
        through_norm(i, tiles.row(t), rows, d_hidden + i * width, 3 * width);
      }
      add_rows<T>(d_hidden, rows, 3 * width, mine.vector(kReduceBias));
      load_rows(features, image, start, rows, C, both, 2 * width);
      load_rows(guidance, image, start, rows, C, both + width, 2 * width);
      for (int i = 0; i < kBranches; ++i) {
        for (int half = 0; half < 2; ++half) {
          const int matrix = reduce_matrix(i) + half;
          product<T>({d_hidden + i * width, 1, 3 * width}, width, both + half * width, 2 * width,
                     mine.matrix(matrix), width, width, rows, nullptr, true);
          product<T>({d_hidden + i * width, 3 * width, 1}, rows, raw.matrix(matrix), width,
                     d_both + half * width, 2 * width, width, width, nullptr, i > 0);
        }
      }
      store_rows<T>(d_both, 2 * width, arguments.grad_features, image, start, rows, C);
      store_rows<T>(d_both + width, 2 * width, grad_guidance, image, start, rows, C);
    });
  }

  // Add up the threads' gradients of parameters and hand them out.
  void write_gradients() const {
    const Parameters<T> all = sums(0);
    for (int64_t share = 1; share < workers.threads; ++share) {
      const T* from = sums(share).data;
      for (int64_t i = 0; i < sums_at.size(); ++i) all.data[i] += from[i];
    }
    for (int m = 0; m < kMatrices; ++m) {
      const auto to = matrix_source(grads, C, m);
      for (int64_t o = 0; o < C; ++o) {
        T* row = to.data + o * to.row;
        const T* from = all.matrix(m) + o * width;
        __builtin_memcpy(row, from, C * sizeof(T));
        if (to.input_norm != kGuidanceNorm) continue;
        // This half was multiplied with guidance that its norm had not seen.
        const T *scale = norm(kGuidanceNorm), *shift = scale + width;
        const T d_bias = all.vector(kReduceBias + to.output_norm - kBranchNorm)[o];
        for (int64_t k = 0; k < C; ++k) row[k] = from[k] * scale[k] + d_bias * shift[k];
      }
    }
    for (int v = 0; v < kSlopes; ++v) {
      const auto to = vector_source(grads, v);
      __builtin_memcpy(to.data, all.vector(v), C * sizeof(T));
      if (to.second) __builtin_memcpy(to.second, all.vector(v), C * sizeof(T));
    }
    for (int i = 0; i <= kBranches; ++i) *branch_of(grads, i).slope = all.slope(i);
  }

  // The guidance's norm needs no pass of its own for its sums: they follow from the gradients of
  // the matrices behind it.
  void guidance_norm() const {
    const Parameters<T> all = sums(0);
    const T* statistics = mean(kGuidanceNorm);
    T* last = factors + kGuidanceNorm * 3 * width;
    fill(last, 3 * width, T(0));
    for (int64_t k = 0; k < C; ++k) {
      double sum = 0, moment = 0;
      for (int i = 0; i < kBranches; ++i) {
        const T *d_matrix = all.matrix(reduce_matrix(i) + 1), *d_bias = all.vector(kReduceBias + i);
        for (int64_t o = 0; o < C; ++o) {
          const double weight = weights.branches[i].reduce_weight[o * 2 * C + C + k];
          sum += weight * d_bias[o];
          moment += weight * d_matrix[o * width + k];
        }
      }
      moment -= statistics[k] * sum;
      norm_gradients(weights.guidance_norm, statistics[width + k], k, sum, moment, count, training,
                     grads.guidance_norm, last, width);
      // The scale is in the gradient already.
      last[k] = 1;
    }
    if (!training) return;
    const Map<const T> unfinished{grad_guidance.data, grad_guidance.image, grad_guidance.channel,
                                  grad_guidance.position};
    each_tile([&](int64_t, int64_t t, T* space) {
      const int64_t image = tiles.image(t), start = tiles.first(t), rows = tiles.size(t);
      T* g = space + rows * width;
      load_rows(guidance, image, start, rows, C, space, width);
      load_rows(unfinished, image, start, rows, C, g, width);
      norm_backward<T>(g, width, space, width, statistics, last, rows, width, g, width);
      store_rows<T>(g, width, grad_guidance, image, start, rows, C);
    });
  }
};

template <class T>
void backward(const BackwardArguments<T>& arguments) {
  Backward<T> pass{arguments};
  pass.start();
  pass.last_norm();
  pass.last_projections();
  pass.gate();
  pass.global_convolution();
  pass.both_maps();
  pass.write_gradients();
  pass.guidance_norm();
}

}  // namespace lemma_fast::SIMD_LEVEL
