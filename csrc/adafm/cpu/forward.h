// The forward pass that backward can follow: passes over the tiles, one after another because a
// norm's statistics need the whole batch:
//
//   1  statistics of the guidance, in training
//   2  h_1, h_2, h_3 with statistics
//   3  x_1 into GDW; then the gate of each image and its matrix
//   4  h_4 with statistics
//   5  f with statistics
//   6  the result

#pragma once

#include "adafm/cpu/gate.h"

namespace lemma_fast::SIMD_LEVEL {

// Turn the moments of tiles [tiles, 2, norms * C] into the statistics of `norms` norms in a row,
// and into what they add to the running ones.
template <class T>
void batch_statistics(const Tiles& tiles, int64_t C, const T* parts, int norms, T* statistics,
                      T* shares) {
  const int64_t width = padded(C), count = tiles.images * tiles.positions;
  Buffer<double> mean(norms * width), variance(norms * width);
  merge_moments<T>(tiles, parts, norms * width, mean, variance);
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  for (int i = 0; i < norms; ++i) {
    for (int64_t c = 0; c < width; ++c) {
      const double m = mean[i * width + c], v = variance[i * width + c];
      statistics[2 * i * width + c] = static_cast<T>(m);
      statistics[(2 * i + 1) * width + c] = static_cast<T>(1 / __builtin_sqrt(v + kEpsilon));
      if (c < C) {
        shares[2 * i * C + c] = static_cast<T>(kMomentum * m);
        shares[(2 * i + 1) * C + c] = static_cast<T>(kMomentum * v * unbiased);
      }
    }
  }
}

template <class T>
void forward(const ForwardArguments<T>& arguments) {
  const auto& [shape, features, guidance, weights, out, saved, shares, workers] = arguments;
  const int64_t C = shape.channels, width = padded(C), N = shape.images;
  const Saved in = saved_layout(shape);
  const Tiles tiles(shape, workers.threads);
  const bool training = shares != nullptr;
  T* statistics = saved;
  T* pooled = saved + in.pooled;
  Buffer<T> parts(tiles.count() * 6 * width), norms(kNorms * 2 * width);
  Buffer<T> folded_data(folded_layout(shape).size());
  const Parameters<const T> folded{folded_data, folded_layout(shape)};
  const auto norm = [&](int index) { return norms + 2 * index * width; };
  const Shares work(tiles.count(), workers.threads);
  // Every pass gets its tile and space for 5 C numbers a row; some measure one or three norms.
  const auto each_tile = [&](const auto& task) {
    run_tasks(workers, work.count, [&](int64_t share) {
      Buffer<T> space(tiles.rows * 5 * width);
      for (int64_t t = work.start(share); t < work.start(share + 1); ++t) task(t, space);
    });
  };
  const auto measure = [&](int64_t tile, const T* x, int count) {
    T* part = parts + tile * 2 * count * width;
    if (training)
      moments(x, count * width, tiles.size(tile), count * width, part, part + count * width);
  };
  const auto settle = [&](int index, int count) {
    if (training) {
      batch_statistics<T>(tiles, C, parts, count, statistics + 2 * index * width,
                          shares + 2 * index * C);
    }
    for (int i = index; i < index + count; ++i) {
      if (!training) running(norm_of(weights, i), C, statistics + 2 * i * width);
      affine<T>(norm_of(weights, i), C, statistics + 2 * i * width, norm(i));
    }
  };

  if (training) {
    each_tile([&](int64_t t, T* space) {
      load_rows(guidance, tiles.image(t), tiles.first(t), tiles.size(t), C, space, width);
      measure(t, space, 1);
    });
  }
  settle(kGuidanceNorm, 1);
  fold_guidance<T>(shape, weights, norm(kGuidanceNorm), folded_data);

  each_tile([&](int64_t t, T* space) {
    const int64_t image = tiles.image(t), first = tiles.first(t), rows = tiles.size(t);
    load_rows(features, image, first, rows, C, space, 2 * width);
    load_rows(guidance, image, first, rows, C, space + width, 2 * width);
    T* hidden = saved + in.hidden + tiles.row(t) * 3 * width;
    for (int i = 0; i < kBranches; ++i) {
      product<T>({space, 2 * width, 1}, rows, folded.matrix(reduce_matrix(i)), width,
                 hidden + i * width, 3 * width, width, 2 * width, folded.vector(kReduceBias + i));
    }
    measure(t, hidden, kBranches);
  });
  settle(kBranchNorm, kBranches);

  const auto activated = [&](int64_t t, int branch, T* to) {
    const T* h = branch < kBranches ? saved + in.hidden + tiles.row(t) * 3 * width + branch * width
                                    : saved + in.aggregate + tiles.row(t) * width;
    const T* scale = norm(kBranchNorm + branch);
    activate<T>(h, branch < kBranches ? 3 * width : width, to, width, tiles.size(t), width, scale,
                scale + width, folded.slope(branch));
  };
  each_tile([&](int64_t t, T* space) {
    const int64_t rows = tiles.size(t);
    T *u1 = space, *x1 = space + rows * width;
    activated(t, 0, u1);
    product<T>({u1, width, 1}, rows, folded.matrix(project_matrix(0)), width, x1, width, width,
               width, folded.vector(kProjectBias));
    fill(parts + t * width, width, T(0));
    add_products<T>(x1, folded.global(tiles.first(t)), rows, width, parts + t * width);
  });
  const int64_t square = (width + 1) * width;
  Buffer<T> matrices(N * square);
  const Shares by_image(N, workers.threads);
  run_tasks(workers, by_image.count, [&](int64_t share) {
    Buffer<T> space(square + 3 * width);
    for (int64_t n = by_image.start(share); n < by_image.start(share + 1); ++n) {
      add_pooled<T>(folded, parts + n * tiles.per_image * width, tiles.per_image,
                    pooled + n * width);
      make_gate<T>(folded, pooled + n * width, space);
      fold_gate<T>(folded, space + 2 * width, space + 3 * width, matrices + n * square);
    }
  });

  each_tile([&](int64_t t, T* space) {
    const T* matrix = matrices + tiles.image(t) * square;
    T* hidden = saved + in.aggregate + tiles.row(t) * width;
    activated(t, 1, space);
    product<T>({space, width, 1}, tiles.size(t), matrix, width, hidden, width, width, width,
               matrix + width * width);
    measure(t, hidden, 1);
  });
  settle(kAggregateNorm, 1);

  each_tile([&](int64_t t, T* space) {
    const int64_t rows = tiles.size(t);
    T* sum = saved + in.sum + tiles.row(t) * width;
    for (int branch = 2; branch <= kBranches; ++branch) {
      const bool add = branch == kBranches;
      activated(t, branch, space);
      product<T>({space, width, 1}, rows, folded.matrix(project_matrix(branch)), width, sum, width,
                 width, width, add ? nullptr : folded.vector(kLastBias), add);
    }
    measure(t, sum, 1);
  });
  settle(kOutNorm, 1);

  each_tile([&](int64_t t, T* space) {
    const int64_t rows = tiles.size(t);
    const T* scale = norm(kOutNorm);
    activate<T>(saved + in.sum + tiles.row(t) * width, width, space, width, rows, width, scale,
                scale + width, T(1));
    store_rows<T>(space, width, out, tiles.image(t), tiles.first(t), rows, C);
  });
}

}  // namespace lemma_fast::SIMD_LEVEL
