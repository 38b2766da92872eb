// AdaFM forwards: inference with everything folded, and the pass that backward can follow.
// Included once for each set of instructions, after adafm_cpu_common.h.

namespace lemma_fast {
namespace LEMMA_FAST_LEVEL {

template <class T>
void fold(const Shape& shape, const Weights<const T>& weights, T* folded) {
  const int64_t width = padded(shape.channels);
  Buffer<T> statistics(2 * width), norms(kNorms * 2 * width);
  for (int index = 0; index < kNorms; ++index) {
    const Norm<const T>& norm = norm_of(weights, index);
    running(norm, shape.channels, static_cast<T*>(statistics));
    affine(norm, shape.channels, static_cast<const T*>(statistics), norms + 2 * index * width);
  }
  prepare(shape, weights, static_cast<const T*>(norms), folded);
}

// One image's inference in two passes over its tiles, with the gate between them. `kept` [P, 2 C]
// holds u_2 and u_3 from one pass to the other, `parts` [tiles, C] the tiles' shares of `pooled`.
template <class T>
struct Inference {
  const Shape& shape;
  const Map<const T>&features, &guidance;
  const T* folded;
  const Map<T>& out;
  const Tiles& tiles;
  const Prepared at = prepared_layout(shape.channels, shape.positions);
  const int64_t width = padded(shape.channels);

  int64_t scratch() const { return tiles.rows * 3 * width; }

  void first(int64_t image, int64_t tile, T* kept, T* parts, T* space) const {
    const int64_t start = tiles.first(tile), rows = tiles.size(tile);
    T *both = space, *u1 = space + rows * 2 * width;
    load_rows(features, image, start, rows, shape.channels, both, 2 * width);
    load_rows(guidance, image, start, rows, shape.channels, both + width, 2 * width);
    for (int i = kBranches - 1; i >= 0; --i) {
      T* u = i ? kept + start * 2 * width + (i - 1) * width : u1;
      const int64_t u_row = i ? 2 * width : width;
      product<T>({both, 2 * width, 1}, rows, folded + at.reduce + i * width, 3 * width, u, u_row,
                 width, 2 * width, folded + at.reduce_bias + i * width);
      activate<T>(u, u_row, u, u_row, rows, width, nullptr, nullptr, folded[at.slopes + i]);
    }
    T* x1 = both;
    product<T>({u1, width, 1}, rows, folded + at.pool, width, x1, width, width, width,
               folded + at.pool_bias);
    fill(parts + tile * width, width, T(0));
    add_products(x1, folded + at.global + start * width, rows, width, parts + tile * width);
  }

  // `matrix` [C + 1, C] gets what fold_gate makes, `space` has room for as much and 4 C.
  void gate(const T* parts, T* matrix, T* space) const {
    T *pooled = space, *layers = space + width;
    __builtin_memcpy(pooled, folded + at.global_bias, width * sizeof(T));
    for (int64_t tile = 0; tile < tiles.per_image; ++tile) {
      for (int64_t c = 0; c < width; ++c) pooled[c] += parts[tile * width + c];
    }
    make_gate(at, folded, width, static_cast<const T*>(pooled), layers);
    fold_gate(at, folded, width, static_cast<const T*>(layers + 2 * width), space + 4 * width,
              matrix);
  }

  void second(int64_t image, int64_t tile, const T* kept, const T* matrix, T* space) const {
    const int64_t start = tiles.first(tile), rows = tiles.size(tile);
    T *u4 = space, *y = space + rows * width;
    const T* u2 = kept + start * 2 * width;
    product<T>({u2, 2 * width, 1}, rows, matrix, width, u4, width, width, width,
               matrix + width * width);
    activate<T>(u4, width, u4, width, rows, width, nullptr, nullptr, folded[at.slopes + kBranches]);
    product<T>({u2 + width, 2 * width, 1}, rows, folded + at.last, width, y, width, width, width,
               folded + at.last_bias);
    product<T>({u4, width, 1}, rows, folded + at.last + width * width, width, y, width, width,
               width, nullptr, true);
    store_rows<T>(y, width, out, image, start, rows, shape.channels);
  }
};

template <class T>
void inference(const Shape& shape, const Map<const T>& features, const Map<const T>& guidance,
               const T* folded, const Map<T>& out, const Workers& workers) {
  // A thread has images of its own where there are enough; else all share the tiles of one.
  const bool whole = shape.images >= workers.threads;
  const Tiles tiles(Shape{1, shape.channels, shape.positions}, whole ? 1 : workers.threads);
  const Inference<T> pass{shape, features, guidance, folded, out, tiles};
  const int64_t width = pass.width, square = (width + 4) * width;
  const auto images = [&](int64_t first, int64_t last, const auto& each) {
    Buffer<T> kept(shape.positions * 2 * width), parts(tiles.per_image * width);
    Buffer<T> matrix(square), space(square);
    for (int64_t n = first; n < last; ++n) {
      each([&](int64_t tile, T* scratch) { pass.first(n, tile, kept, parts, scratch); });
      pass.gate(parts, matrix, space);
      each([&](int64_t tile, T* scratch) { pass.second(n, tile, kept, matrix, scratch); });
    }
  };
  if (whole) {
    const Shares shares(shape.images, workers.threads);
    run_tasks(workers, shares.count, [&](int64_t share) {
      Buffer<T> scratch(pass.scratch());
      images(shares.start(share), shares.start(share + 1), [&](const auto& tile_task) {
        for (int64_t tile = 0; tile < tiles.count(); ++tile) tile_task(tile, scratch);
      });
    });
    return;
  }
  const Shares shares(tiles.count(), workers.threads);
  images(0, shape.images, [&](const auto& tile_task) {
    run_tasks(workers, shares.count, [&](int64_t share) {
      Buffer<T> scratch(pass.scratch());
      for (int64_t tile = shares.start(share); tile < shares.start(share + 1); ++tile) {
        tile_task(tile, scratch);
      }
    });
  });
}

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
void forward(const Shape& shape, const Map<const T>& features, const Map<const T>& guidance,
             const Weights<const T>& weights, const Map<T>& out, T* saved, T* shares,
             const Workers& workers) {
  const int64_t C = shape.channels, width = padded(C), N = shape.images;
  const Saved in = saved_layout(shape);
  const Prepared at = prepared_layout(C, shape.positions);
  const Tiles tiles(shape, workers.threads);
  const bool training = shares != nullptr;
  T* statistics = saved;
  T* pooled = saved + in.pooled;
  Buffer<T> parts(tiles.count() * 6 * width), norms(kNorms * 2 * width), prepared(at.size);
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
    if (training) moments(x, count * width, tiles.size(tile), count * width, part, part + count * width);
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
  for (int i = kBranchNorm; i < kNorms; ++i) {
    fill(norm(i), width, T(1));
    fill(norm(i) + width, width, T(0));
  }
  prepare<T>(shape, weights, norms, prepared);

  each_tile([&](int64_t t, T* space) {
    const int64_t image = tiles.image(t), first = tiles.first(t), rows = tiles.size(t);
    load_rows(features, image, first, rows, C, space, 2 * width);
    load_rows(guidance, image, first, rows, C, space + width, 2 * width);
    T* hidden = saved + in.hidden + tiles.row(t) * 3 * width;
    product<T>({space, 2 * width, 1}, rows, prepared + at.reduce, 3 * width, hidden, 3 * width,
               3 * width, 2 * width, prepared + at.reduce_bias);
    measure(t, hidden, kBranches);
  });
  settle(kBranchNorm, kBranches);

  const auto activated = [&](int64_t t, int branch, T* to) {
    const T* h = branch < kBranches ? saved + in.hidden + tiles.row(t) * 3 * width + branch * width
                                    : saved + in.aggregate + tiles.row(t) * width;
    const T* scale = norm(kBranchNorm + branch);
    activate<T>(h, branch < kBranches ? 3 * width : width, to, width, tiles.size(t), width, scale,
                scale + width, prepared[at.slopes + branch]);
  };
  each_tile([&](int64_t t, T* space) {
    const int64_t rows = tiles.size(t);
    T *u1 = space, *x1 = space + rows * width;
    activated(t, 0, u1);
    product<T>({u1, width, 1}, rows, prepared + at.pool, width, x1, width, width, width,
               prepared + at.pool_bias);
    fill(parts + t * width, width, T(0));
    add_products<T>(x1, prepared + at.global + tiles.first(t) * width, rows, width,
                    parts + t * width);
  });
  const int64_t square = (width + 1) * width;
  Buffer<T> matrices(N * square);
  const Shares by_image(N, workers.threads);
  run_tasks(workers, by_image.count, [&](int64_t share) {
    Buffer<T> space(square + 3 * width);
    for (int64_t n = by_image.start(share); n < by_image.start(share + 1); ++n) {
      T* z = pooled + n * width;
      __builtin_memcpy(z, prepared + at.global_bias, width * sizeof(T));
      for (int64_t t = n * tiles.per_image; t < (n + 1) * tiles.per_image; ++t) {
        for (int64_t c = 0; c < width; ++c) z[c] += parts[t * width + c];
      }
      make_gate<T>(at, prepared, width, z, space);
      fold_gate<T>(at, prepared, width, space + 2 * width, space + 3 * width, matrices + n * square);
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
    for (int half = 0; half < 2; ++half) {
      activated(t, 2 + half, space);
      product<T>({space, width, 1}, rows, prepared + at.last + half * width * width, width, sum,
                 width, width, width, half ? nullptr : prepared + at.last_bias, half != 0);
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

}  // namespace LEMMA_FAST_LEVEL
}  // namespace lemma_fast
