// Parts that forward and backward share: tiles of rows, batch norms, prepared parameters, the gate.
// Included once for each set of instructions, after vector_cpu.h.

namespace lemma_fast {
namespace LEMMA_FAST_LEVEL {

using namespace lemma_fast::adafm;

constexpr int64_t kTileRows = 128;

// The positions of a batch in pieces of one image each: what is handed to a thread.
struct Tiles {
  int64_t images, positions, rows, per_image;

  // `threads` asks for enough pieces to keep them busy with a small batch.
  Tiles(const Shape& shape, int64_t threads) : images(shape.images), positions(shape.positions) {
    const int64_t wanted = images > 0 && threads > 1 ? (2 * threads + images - 1) / images : 1;
    const int64_t most = (positions + 15) / 16, least = (positions + kTileRows - 1) / kTileRows;
    per_image = wanted > most ? most : wanted;
    per_image = per_image < least ? least : per_image;
    rows = (positions + per_image - 1) / per_image;
    per_image = (positions + rows - 1) / rows;
  }
  int64_t count() const { return images * per_image; }
  int64_t image(int64_t tile) const { return tile / per_image; }
  int64_t first(int64_t tile) const { return tile % per_image * rows; }
  int64_t size(int64_t tile) const {
    const int64_t left = positions - first(tile);
    return left < rows ? left : rows;
  }
  // The first of its rows in the whole batch.
  int64_t row(int64_t tile) const { return image(tile) * positions + first(tile); }
};

template <class Function>
void run_tasks(const Workers& workers, int64_t count, const Function& function) {
  if (count <= 1 || workers.threads <= 1) {
    for (int64_t i = 0; i < count; ++i) function(i);
    return;
  }
  const auto task = [](void* context, int64_t i) { (*static_cast<const Function*>(context))(i); };
  workers.run(count, task, const_cast<void*>(static_cast<const void*>(&function)));
}

// How `count` things are divided into `shares`: share s has those from start(s) to start(s + 1).
struct Shares {
  int64_t things, count;

  Shares(int64_t things, int64_t threads) : things(things), count(things < threads ? things : threads) {}
  int64_t start(int64_t share) const { return things * share / count; }
};

template <class T>
void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Rows [rows, padded(C)] of one image's map, from either layout in memory, and back.
template <class T>
void load_rows(const Map<const T>& map, int64_t image, int64_t first, int64_t rows, int64_t C,
               T* to, int64_t to_row) {
  const T* from = map.data + image * map.image + first * map.position;
  if (map.channel == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_memcpy(to + r * to_row, from + r * map.position, C * sizeof(T));
    }
  } else {
    transpose(from, map.channel, C, rows, to, to_row);
  }
  for (int64_t r = 0; r < rows && C < padded(C); ++r) {
    fill(to + r * to_row + C, padded(C) - C, T(0));
  }
}

template <class T>
void store_rows(const T* from, int64_t from_row, const Map<T>& map, int64_t image, int64_t first,
                int64_t rows, int64_t C) {
  T* to = map.data + image * map.image + first * map.position;
  if (map.channel == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_memcpy(to + r * map.position, from + r * from_row, C * sizeof(T));
    }
  } else {
    transpose(from, from_row, rows, C, to, map.channel);
  }
}

// x = PReLU(x * scale + shift), or without a norm where `scale` is null, in place or from `from`.
template <class T>
void activate(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t width,
              const T* scale, const T* shift, T slope) {
  constexpr int W = Simd<T>::lanes;
  const typename Simd<T>::Vector zero = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += W) {
      auto x = load(from + r * from_row + c);
      if (scale) x = x * load(scale + c) + load(shift + c);
      store(to + r * to_row + c, x > zero ? x : slope * x);
    }
  }
}

// Mean and sum of squared distances from it, column by column.
template <class T>
void moments(const T* x, int64_t x_row, int64_t rows, int64_t width, T* mean, T* squares) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t c = 0; c < width; c += W) {
    typename Simd<T>::Vector sum = {}, square = {};
    for (int64_t r = 0; r < rows; ++r) sum += load(x + r * x_row + c);
    sum /= static_cast<T>(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const auto distance = load(x + r * x_row + c) - sum;
      square += distance * distance;
    }
    store(mean + c, sum);
    store(squares + c, square);
  }
}

// The moments [tiles, 2, width] of all tiles as one mean and biased variance, in double.
template <class T>
void merge_moments(const Tiles& tiles, const T* parts, int64_t width, double* mean,
                   double* variance) {
  fill(mean, width, 0.0);
  fill(variance, width, 0.0);
  double seen = 0;
  for (int64_t t = 0; t < tiles.count(); ++t) {
    const double rows = static_cast<double>(tiles.size(t)), share = rows / (seen + rows);
    const T* part = parts + t * 2 * width;
    for (int64_t c = 0; c < width; ++c) {
      const double distance = part[c] - mean[c];
      mean[c] += distance * share;
      variance[c] += part[width + c] + distance * distance * seen * share;
    }
    seen += rows;
  }
  for (int64_t c = 0; c < width; ++c) variance[c] /= seen;
}

// Where each norm has its parameters, in the order of NormIndex.
template <class T>
const Norm<T>& norm_of(const Weights<T>& weights, int index) {
  if (index == kGuidanceNorm) return weights.guidance_norm;
  if (index == kAggregateNorm) return weights.aggregate.norm;
  if (index == kOutNorm) return weights.out_norm;
  return weights.branches[index - kBranchNorm].norm;
}

// Mean and 1 / standard deviation [2, padded(C)] of a norm as scale and shift [2, padded(C)].
template <class T>
void affine(const Norm<const T>& norm, int64_t C, const T* statistics, T* scale_shift) {
  const int64_t width = padded(C);
  fill(scale_shift, 2 * width, T(0));
  for (int64_t c = 0; c < C; ++c) {
    scale_shift[c] = norm.weight[c] * statistics[width + c];
    scale_shift[width + c] = norm_shift(norm.bias[c], statistics[c], scale_shift[c]);
  }
}

// The running statistics of a norm in that form.
template <class T>
void running(const Norm<const T>& norm, int64_t C, T* statistics) {
  const int64_t width = padded(C);
  fill(statistics, 2 * width, T(0));
  for (int64_t c = 0; c < C; ++c) {
    statistics[c] = norm.mean[c];
    statistics[width + c] = norm_scale(T(1), norm.variance[c]);
  }
}

template <class T>
void scale_rows(T* matrix, int64_t row, int64_t rows, int64_t width, const T* by_row,
                const T* by_column) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t r = 0; r < rows; ++r) {
    const T factor = by_row ? by_row[r] : T(1);
    for (int64_t c = 0; c < width; c += W) {
      store(matrix + r * row + c, load(matrix + r * row + c) * (factor * load(by_column + c)));
    }
  }
}

// Fill `to` as Prepared says from norms in the form scale, shift: [kNorms, 2, padded(C)]. In
// training all but the guidance's are still unknown and given as 1, 0.
template <class T>
void prepare(const Shape& shape, const Weights<const T>& weights, const T* norms, T* to) {
  const int64_t C = shape.channels, width = padded(C), P = shape.positions;
  const Prepared at = prepared_layout(C, P);
  if (width != C) fill(to, at.size, T(0));
  const auto norm = [&](int index) { return norms + 2 * index * width; };
  const auto copy = [C](const T* from, T* target) { __builtin_memcpy(target, from, C * sizeof(T)); };
  const auto turn = [C](const T* from, int64_t from_row, T* target, int64_t target_row) {
    transpose(from, from_row, C, C, target, target_row);
  };
  T* reduce = to + at.reduce;
  T* guided = reduce + width * 3 * width;
  for (int i = 0; i < kBranches; ++i) {
    turn(weights.branches[i].reduce_weight, 2 * C, reduce + i * width, 3 * width);
    turn(weights.branches[i].reduce_weight + C, 2 * C, guided + i * width, 3 * width);
    copy(weights.branches[i].reduce_bias, to + at.reduce_bias + i * width);
    to[at.slopes + i] = *weights.branches[i].slope;
  }
  to[at.slopes + kBranches] = *weights.aggregate.slope;
  // The shift of the guidance's norm goes through its half of the matrices into their biases.
  T* bias = to + at.reduce_bias;
  product({norm(kGuidanceNorm) + width, width, 1}, 1, guided, 3 * width, bias, 3 * width,
          3 * width, width, static_cast<const T*>(nullptr), true);
  for (int i = 0; i < kBranches; ++i) {
    const T* inner = norm(kBranchNorm + i);
    T* part = reduce + i * width;
    scale_rows(part, 3 * width, width, width, static_cast<const T*>(nullptr), inner);
    scale_rows(part + width * 3 * width, 3 * width, width, width, norm(kGuidanceNorm), inner);
    for (int64_t c = 0; c < width; ++c) {
      bias[i * width + c] = bias[i * width + c] * inner[c] + inner[width + c];
    }
  }
  turn(weights.branches[0].project_weight, C, to + at.pool, width);
  copy(weights.branches[0].project_bias, to + at.pool_bias);
  transpose(weights.global_weight, P, C, P, to + at.global, width);
  copy(weights.global_bias, to + at.global_bias);
  const T* gates[] = {weights.gate_weight1, weights.gate_weight2, weights.gate_weight3};
  const T* gate_biases[] = {weights.gate_bias1, weights.gate_bias2, weights.gate_bias3};
  for (int layer = 0; layer < 3; ++layer) {
    turn(gates[layer], C, to + at.gate[layer], width);
    copy(gate_biases[layer], to + at.gate_bias[layer]);
  }
  for (int64_t c = 0; c < C; ++c) {
    copy(weights.branches[1].project_weight + c * C, to + at.project + c * width);
  }
  copy(weights.branches[1].project_bias, to + at.project_bias);
  const T *inner = norm(kAggregateNorm), *outer = norm(kOutNorm);
  turn(weights.aggregate.reduce_weight, C, to + at.aggregate, width);
  turn(weights.branches[2].project_weight, C, to + at.last, width);
  turn(weights.aggregate.project_weight, C, to + at.last + width * width, width);
  const T* none = nullptr;
  scale_rows(to + at.aggregate, width, width, width, none, inner);
  scale_rows(to + at.last, width, 2 * width, width, none, outer);
  for (int64_t c = 0; c < C; ++c) {
    to[at.aggregate_bias + c] = weights.aggregate.reduce_bias[c] * inner[c] + inner[width + c];
    const T both = weights.branches[2].project_bias[c] + weights.aggregate.project_bias[c];
    to[at.last_bias + c] = both * outer[c] + outer[width + c];
  }
}

// The gate's MLP for one image: `layers` [3, padded(C)] are both hidden layers and the gate.
template <class T>
void make_gate(const Prepared& at, const T* prepared, int64_t width, const T* pooled, T* layers) {
  for (int layer = 0; layer < 3; ++layer) {
    T* out = layers + layer * width;
    product({layer ? out - width : pooled, width, 1}, 1, prepared + at.gate[layer], width, out,
            width, width, width, prepared + at.gate_bias[layer]);
    for (int64_t c = 0; c < width; ++c) out[c] = layer < 2 ? relu(out[c]) : sigmoid(out[c]);
  }
}

// What takes u_2 to h_4 in one image: the matrix [inputs, outputs] and, behind it, its bias, from
// project, the gate and aggregate in one; `gated` is space of the matrix's size.
template <class T>
void fold_gate(const Prepared& at, const T* prepared, int64_t width, const T* gate, T* gated,
               T* matrix) {
  __builtin_memcpy(gated, prepared + at.aggregate, width * width * sizeof(T));
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t o = 0; o < width; ++o) gated[c * width + o] *= gate[c];
  }
  product({prepared + at.project, 1, width}, width, gated, width, matrix, width, width, width);
  product({prepared + at.project_bias, width, 1}, 1, gated, width, matrix + width * width, width,
          width, width, prepared + at.aggregate_bias);
}

// Sum over rows of x * y, added to `sums`.
template <class T>
void add_products(const T* x, const T* y, int64_t rows, int64_t width, T* sums) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t c = 0; c < width; c += W) {
    auto sum = load(sums + c);
    for (int64_t r = 0; r < rows; ++r) sum += load(x + r * width + c) * load(y + r * width + c);
    store(sums + c, sum);
  }
}

}  // namespace LEMMA_FAST_LEVEL
}  // namespace lemma_fast
