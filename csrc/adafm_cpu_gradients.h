// AdaFM's backward pass, in its order. Included after adafm_cpu_backward.h, which has the parts.

namespace lemma_fast {
namespace LEMMA_FAST_LEVEL {

// Add up the shares' gradients of parameters and hand them out.
template <class T>
void write_gradients(const Gradients& at, int64_t C, int64_t width, int64_t shares, T* sums,
                     const T* guidance_norm, const Weights<T>& to) {
  for (int64_t s = 1; s < shares; ++s) {
    for (int64_t i = 0; i < at.size; ++i) sums[i] += sums[s * at.size + i];
  }
  const auto copy = [&](int64_t from, int64_t from_row, T* target, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_memcpy(target + r * row, sums + from + r * from_row, C * sizeof(T));
    }
  };
  const auto matrix = [&](int64_t from, T* target) { copy(from, width, target, C, C); };
  const auto vector = [&](int64_t from, T* target) { copy(from, width, target, C, 1); };
  for (int i = 0; i < kBranches; ++i) {
    const Branch<T>& branch = to.branches[i];
    const int64_t from = at.reduce + i * 2 * width * width;
    const T* d_bias = sums + at.reduce_bias + i * width;
    copy(from, 2 * width, branch.reduce_weight, 2 * C, C);
    // This half was multiplied with guidance that its norm had not seen.
    for (int64_t o = 0; o < C; ++o) {
      for (int64_t k = 0; k < C; ++k) {
        branch.reduce_weight[o * 2 * C + C + k] =
            sums[from + o * 2 * width + width + k] * guidance_norm[k] +
            d_bias[o] * guidance_norm[width + k];
      }
    }
    vector(at.reduce_bias + i * width, branch.reduce_bias);
    *branch.slope = sums[at.slopes + i];
  }
  matrix(at.pool, to.branches[0].project_weight);
  vector(at.pool_bias, to.branches[0].project_bias);
  matrix(at.project, to.branches[1].project_weight);
  vector(at.project_bias, to.branches[1].project_bias);
  matrix(at.last[0], to.branches[2].project_weight);
  vector(at.last_bias, to.branches[2].project_bias);
  matrix(at.aggregate, to.aggregate.reduce_weight);
  vector(at.aggregate_bias, to.aggregate.reduce_bias);
  *to.aggregate.slope = sums[at.slopes + kBranches];
  matrix(at.last[1], to.aggregate.project_weight);
  vector(at.last_bias, to.aggregate.project_bias);
  T* gates[] = {to.gate_weight1, to.gate_weight2, to.gate_weight3};
  T* gate_biases[] = {to.gate_bias1, to.gate_bias2, to.gate_bias3};
  for (int layer = 0; layer < 3; ++layer) {
    matrix(at.gate[layer], gates[layer]);
    vector(at.gate_bias[layer], gate_biases[layer]);
  }
  vector(at.global_bias, to.global_bias);
}

template <class T>
void backward(const Shape& shape, bool training, const Map<const T>& grad_out,
              const Map<const T>& features, const Map<const T>& guidance,
              const Weights<const T>& weights, const T* saved, const Map<T>& grad_features,
              const Map<T>& grad_guidance, const Weights<T>& grads, const Workers& workers) {
  const int64_t C = shape.channels, width = padded(C), N = shape.images, P = shape.positions;
  const int64_t square = (width + 1) * width, count = N * P;
  const Saved in = saved_layout(shape);
  const Prepared at = prepared_layout(C, P);
  const Gradients to(width);
  const Tiles tiles(shape, workers.threads);
  const Shares work(tiles.count(), workers.threads);
  Buffer<T> norms(kNorms * 2 * width), prepared(at.size), sums(workers.threads * to.size);
  const auto norm = [&](int index) { return norms + 2 * index * width; };
  const auto mean = [&](int index) { return saved + 2 * index * width; };
  affine<T>(weights.guidance_norm, C, mean(kGuidanceNorm), norm(kGuidanceNorm));
  for (int i = kBranchNorm; i < kNorms; ++i) {
    fill(norm(i), width, T(1));
    fill(norm(i) + width, width, T(0));
  }
  prepare<T>(shape, weights, norms, prepared);
  for (int i = kBranchNorm; i < kNorms; ++i) affine<T>(norm_of(weights, i), C, mean(i), norm(i));
  const Natural<T> natural(weights, C, width, norm(kGuidanceNorm));
  fill<T>(sums, workers.threads * to.size, 0);
  Buffer<T> factors(kNorms * 3 * width);
  // Gradients of the four inner norms' results; the first three lie side by side as h_1 to h_3 do.
  Buffer<T> inner(count * 3 * width), fourth(count * width);

  const auto each_tile = [&](const auto& task) {
    run_tasks(workers, work.count, [&](int64_t share) {
      Buffer<T> space((tiles.rows * 7 + 2) * width);
      for (int64_t t = work.start(share); t < work.start(share + 1); ++t) task(share, t, space);
    });
  };
  struct Rows {
    const T* x;
    T* g;
    int64_t row;
  };
  // A branch's hidden values and their gradients, from row `first` of the batch on.
  const auto rows_of = [&](int branch, int64_t first) {
    if (branch == kBranches) {
      return Rows{saved + in.aggregate + first * width, fourth + first * width, width};
    }
    const int64_t offset = first * 3 * width + branch * width;
    return Rows{saved + in.hidden + offset, inner + offset, 3 * width};
  };
  const auto activated = [&](int branch, int64_t first, int64_t rows, T* u) {
    const Rows from = rows_of(branch, first);
    const T* scale = norm(kBranchNorm + branch);
    activate<T>(from.x, from.row, u, width, rows, width, scale, scale + width,
                prepared[at.slopes + branch]);
  };
  const auto through_activation = [&](int branch, int64_t share, int64_t first, int64_t rows,
                                      const T* d_u, const NormSums<T>& norm_sums, T* space) {
    const Rows rest = rows_of(branch, first);
    const int index = kBranchNorm + branch;
    sums[share * to.size + to.slopes + branch] += activate_backward<T>(
        d_u, rest.x, rest.row, norm(index), norm(index) + width, prepared[at.slopes + branch], rows,
        width, rest.g, rest.row);
    norm_sums.add(share, rest.g, rest.row, rest.x, rest.row, mean(index), rows, space);
  };
  const auto through_norm = [&](int branch, int64_t first, int64_t rows, T* d_x, int64_t d_x_row) {
    const Rows rest = rows_of(branch, first);
    const int index = kBranchNorm + branch;
    norm_backward<T>(rest.g, rest.row, rest.x, rest.row, mean(index), factors + index * 3 * width,
                     rows, width, d_x, d_x_row);
  };
  const auto finish = [&](const NormSums<T>& norm_sums, int index) {
    norm_sums.finish(norm_of(weights, index), mean(index), C, count, training,
                     norm_of(grads, index), factors + index * 3 * width);
  };

  const NormSums<T> out_sums(workers.threads, width), fourth_sums(workers.threads, width);
  const NormSums<T> inner_sums[kBranches] = {{workers.threads, width},
                                             {workers.threads, width},
                                             {workers.threads, width}};
  each_tile([&](int64_t share, int64_t t, T* space) {
    const int64_t rows = tiles.size(t);
    load_rows(grad_out, tiles.image(t), tiles.first(t), rows, C, space, width);
    out_sums.add(share, space, width, saved + in.sum + tiles.row(t) * width, width, mean(kOutNorm),
                 rows, space + rows * width);
  });
  finish(out_sums, kOutNorm);

  each_tile([&](int64_t share, int64_t t, T* space) {
    const int64_t rows = tiles.size(t), first = tiles.row(t);
    T *d_sum = space, *u = space + rows * width, *d_u = space + 2 * rows * width;
    T* mine = sums + share * to.size;
    load_rows(grad_out, tiles.image(t), tiles.first(t), rows, C, d_sum, width);
    norm_backward<T>(d_sum, width, saved + in.sum + first * width, width, mean(kOutNorm),
                     factors + kOutNorm * 3 * width, rows, width, d_sum, width);
    add_columns<T>(d_sum, rows, width, mine + to.last_bias);
    for (int half = 0; half < 2; ++half) {
      activated(2 + half, first, rows, u);
      product<T>({d_sum, 1, width}, width, u, width, mine + to.last[half], width, width, rows,
                 nullptr, true);
      product<T>({d_sum, width, 1}, rows, natural.last + half * width * width, width, d_u, width,
                 width, width);
      through_activation(2 + half, share, first, rows, d_u, half ? fourth_sums : inner_sums[2],
                         d_u + rows * width);
    }
  });
  finish(fourth_sums, kAggregateNorm);

  // Each image has a matrix from u_2 to h_4. Its gradient is summed by share; the first and the
  // last image of a share may be another's as well, and wait in `borders`.
  Buffer<T> layers(N * 3 * width), matrices(N * square), d_matrices(N * square);
  Buffer<T> borders(work.count * 2 * square);
  fill<T>(d_matrices, N * square, 0);
  fill<T>(borders, work.count * 2 * square, 0);
  const Shares by_image(N, workers.threads);
  run_tasks(workers, by_image.count, [&](int64_t share) {
    Buffer<T> gated(width * width);
    for (int64_t n = by_image.start(share); n < by_image.start(share + 1); ++n) {
      T* layer = layers + n * 3 * width;
      make_gate<T>(at, prepared, width, saved + in.pooled + n * width, layer);
      for (int64_t c = 0; c < width; ++c) {
        for (int64_t k = 0; k < width; ++k) {
          gated[c * width + k] = prepared[at.project + c * width + k] * layer[2 * width + c];
        }
      }
      product<T>({natural.aggregate, width, 1}, width, gated, width, matrices + n * square, width,
                 width, width);
    }
  });
  each_tile([&](int64_t share, int64_t t, T* space) {
    const int64_t rows = tiles.size(t), first = tiles.row(t), n = tiles.image(t);
    T *d_hidden = space, *u = space + rows * width, *d_u = space + 2 * rows * width;
    const int64_t start = work.start(share), end = work.start(share + 1);
    T* target = d_matrices + n * square;
    if (n * tiles.per_image < start) target = borders + 2 * share * square;
    else if ((n + 1) * tiles.per_image > end) target = borders + (2 * share + 1) * square;
    through_norm(kBranches, first, rows, d_hidden, width);
    activated(1, first, rows, u);
    product<T>({d_hidden, 1, width}, width, u, width, target, width, width, rows, nullptr, true);
    add_columns<T>(d_hidden, rows, width, target + width * width);
    product<T>({d_hidden, width, 1}, rows, matrices + n * square, width, d_u, width, width, width);
    through_activation(1, share, first, rows, d_u, inner_sums[1], d_u + rows * width);
  });
  finish(inner_sums[1], kBranchNorm + 1);
  for (int64_t s = 0; s < work.count; ++s) {
    for (int last = 0; last < 2; ++last) {
      const int64_t n = tiles.image(last ? work.start(s + 1) - 1 : work.start(s));
      for (int64_t i = 0; i < square; ++i) {
        d_matrices[n * square + i] += borders[(2 * s + last) * square + i];
      }
    }
  }
  Buffer<T> d_pooled(N * width);
  run_tasks(workers, by_image.count, [&](int64_t share) {
    Buffer<T> space((width + 6) * width);
    for (int64_t n = by_image.start(share); n < by_image.start(share + 1); ++n) {
      gate_backward<T>(to, natural, at, prepared, width, saved + in.pooled + n * width,
                       layers + n * 3 * width, d_matrices + n * square, space,
                       sums + share * to.size, d_pooled + n * width);
    }
  });

  // The global convolution: a thread owns positions and walks the images, so that it alone adds to
  // their weights' gradients.
  const Tiles places(Shape{1, C, P}, workers.threads);
  const Shares by_place(places.count(), workers.threads);
  run_tasks(workers, by_place.count, [&](int64_t share) {
    Buffer<T> space((places.rows * 4 + 2) * width);
    for (int64_t t = by_place.start(share); t < by_place.start(share + 1); ++t) {
      const int64_t start = places.first(t), rows = places.size(t);
      T *u = space, *x = u + rows * width, *d_u = x + rows * width, *d_global = d_u + rows * width;
      const T* kernel = prepared + at.global + start * width;
      T* mine = sums + share * to.size;
      fill(d_global, rows * width, T(0));
      for (int64_t n = 0; n < N; ++n) {
        const T* d = d_pooled + n * width;
        activated(0, n * P + start, rows, u);
        product<T>({u, width, 1}, rows, prepared + at.pool, width, x, width, width, width,
                   prepared + at.pool_bias);
        for (int64_t i = 0, r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < width; ++c, ++i) {
            d_global[i] += d[c] * x[i];
            x[i] = d[c] * kernel[i];
          }
        }
        add_columns<T>(x, rows, width, mine + to.pool_bias);
        product<T>({x, 1, width}, width, u, width, mine + to.pool, width, width, rows, nullptr,
                   true);
        product<T>({x, width, 1}, rows, natural.pool, width, d_u, width, width, width);
        through_activation(0, share, n * P + start, rows, d_u, inner_sums[0],
                           d_global + rows * width);
      }
      transpose<T>(d_global, width, rows, C, grads.global_weight + start, P);
    }
  });
  finish(inner_sums[0], kBranchNorm);
  finish(inner_sums[2], kBranchNorm + 2);

  each_tile([&](int64_t share, int64_t t, T* space) {
    const int64_t image = tiles.image(t), start = tiles.first(t), rows = tiles.size(t);
    T *d_hidden = space, *both = space + rows * 3 * width, *d_both = both + rows * 2 * width;
    T* mine = sums + share * to.size;
    for (int i = 0; i < kBranches; ++i) {
      through_norm(i, tiles.row(t), rows, d_hidden + i * width, 3 * width);
    }
    add_columns<T>(d_hidden, rows, 3 * width, mine + to.reduce_bias);
    load_rows(features, image, start, rows, C, both, 2 * width);
    load_rows(guidance, image, start, rows, C, both + width, 2 * width);
    product<T>({d_hidden, 1, 3 * width}, 3 * width, both, 2 * width, mine + to.reduce, 2 * width,
               2 * width, rows, nullptr, true);
    product<T>({d_hidden, 3 * width, 1}, rows, natural.reduce, 2 * width, d_both, 2 * width,
               2 * width, 3 * width);
    store_rows<T>(d_both, 2 * width, grad_features, image, start, rows, C);
    store_rows<T>(d_both + width, 2 * width, grad_guidance, image, start, rows, C);
  });
  write_gradients<T>(to, C, width, workers.threads, sums, norm(kGuidanceNorm), grads);

  // The guidance's norm needs no pass of its own for its sums: they follow from the gradients of
  // the matrices behind it.
  const T* statistics = mean(kGuidanceNorm);
  T* last = factors + kGuidanceNorm * 3 * width;
  fill(last, 3 * width, T(0));
  for (int64_t k = 0; k < C; ++k) {
    double sum = 0, moment = 0;
    for (int64_t o = 0; o < 3 * width; ++o) {
      if (o % width >= C) continue;
      const double weight = weights.branches[o / width].reduce_weight[o % width * 2 * C + C + k];
      sum += weight * sums[to.reduce_bias + o];
      moment += weight * sums[to.reduce + o * 2 * width + width + k];
    }
    moment -= statistics[k] * sum;
    const double inverse = statistics[width + k];
    grads.guidance_norm.weight[k] = static_cast<T>(moment * inverse);
    grads.guidance_norm.bias[k] = static_cast<T>(sum);
    // The scale is in the gradient already.
    const double scale = weights.guidance_norm.weight[k] * inverse;
    last[k] = 1;
    last[width + k] = static_cast<T>(-scale * inverse * inverse * moment / count);
    last[2 * width + k] = static_cast<T>(-scale * sum / count);
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

}  // namespace LEMMA_FAST_LEVEL
}  // namespace lemma_fast
