// Inference on folded parameters: two passes over the tiles of an image, the gate between them.

#pragma once

#include "adafm/cpu/gate.h"

namespace lemma_fast::SIMD_LEVEL {

// `kept` [P, 2 C] holds u_2 and u_3 from one pass to the other, `parts` [tiles, C] the tiles'
// shares of what the global convolution gives.
template <class T>
struct Inference {
  const Shape& shape;
  const Map<const T>&features, &guidance;
  const Parameters<const T> folded;
  const Map<T>& out;
  const Tiles& tiles;
  const int64_t width = folded.at.width;

  int64_t scratch() const { return tiles.rows * 3 * width; }

  void first(int64_t image, int64_t tile, T* kept, T* parts, T* space) const {
    const int64_t start = tiles.first(tile), rows = tiles.size(tile);
    T *both = space, *u1 = space + rows * 2 * width;
    load_rows(features, image, start, rows, shape.channels, both, 2 * width);
    load_rows(guidance, image, start, rows, shape.channels, both + width, 2 * width);
    for (int i = kBranches - 1; i >= 0; --i) {
      T* u = i ? kept + start * 2 * width + (i - 1) * width : u1;
      const int64_t u_row = i ? 2 * width : width;
      product<T>({both, 2 * width, 1}, rows, folded.matrix(reduce_matrix(i)), width, u, u_row,
                 width, 2 * width, folded.vector(kReduceBias + i));
      activate<T>(u, u_row, u, u_row, rows, width, nullptr, nullptr, folded.slope(i));
    }
    T* x1 = both;
    product<T>({u1, width, 1}, rows, folded.matrix(project_matrix(0)), width, x1, width, width,
               width, folded.vector(kProjectBias));
    fill(parts + tile * width, width, T(0));
    add_products(x1, folded.global(start), rows, width, parts + tile * width);
  }

  // `matrix` [C + 1, C] gets what fold_gate makes, `space` has room for as much and 4 C.
  void gate(const T* parts, T* matrix, T* space) const {
    T *pooled = space, *layers = space + width;
    add_pooled<T>(folded, parts, tiles.per_image, pooled);
    make_gate<T>(folded, pooled, layers);
    fold_gate<T>(folded, layers + 2 * width, space + 4 * width, matrix);
  }

  void second(int64_t image, int64_t tile, const T* kept, const T* matrix, T* space) const {
    const int64_t start = tiles.first(tile), rows = tiles.size(tile);
    T *u4 = space, *y = space + rows * width;
    const T* u2 = kept + start * 2 * width;
    product<T>({u2, 2 * width, 1}, rows, matrix, width, u4, width, width, width,
               matrix + width * width);
    activate<T>(u4, width, u4, width, rows, width, nullptr, nullptr, folded.slope(kBranches));
    product<T>({u2 + width, 2 * width, 1}, rows, folded.matrix(project_matrix(2)), width, y, width,
               width, width, folded.vector(kLastBias));
    product<T>({u4, width, 1}, rows, folded.matrix(project_matrix(kBranches)), width, y, width,
               width, width, nullptr, true);
    store_rows<T>(y, width, out, image, start, rows, shape.channels);
  }
};

template <class T>
void inference(const Shape& shape, const Map<const T>& features, const Map<const T>& guidance,
               const T* folded, const Map<T>& out, const Workers& workers) {
  // A thread has images of its own where there are enough; else all share the tiles of one.
  const bool whole = shape.images >= workers.threads;
  const Tiles tiles(Shape{1, shape.channels, shape.positions}, whole ? 1 : workers.threads);
  const Inference<T> pass{shape, features, guidance, {folded, folded_layout(shape)}, out, tiles};
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

}  // namespace lemma_fast::SIMD_LEVEL
