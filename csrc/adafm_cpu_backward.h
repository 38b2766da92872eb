// AdaFM backwards, from what `forward` left. Included after adafm_cpu_forward.h.
//
// A pass over the tiles ends where sums over all positions are needed: by a batch norm, or by the
// gate of an image. `d_x` is the gradient of x; `g` is that of a norm's result.

namespace lemma_fast {
namespace LEMMA_FAST_LEVEL {

// What a norm's gradients need: the sums over all positions of g and of g * (x - mean).
template <class T>
class NormSums {
 public:
  NormSums(int64_t shares, int64_t width) : shares_(shares), width_(width), sums_(shares * 2 * width) {
    fill<double>(sums_, shares * 2 * width, 0);
  }

  // Add a tile of `rows` to one share; `space` is for 2 * width numbers.
  void add(int64_t share, const T* g, int64_t g_row, const T* x, int64_t x_row, const T* mean,
           int64_t rows, T* space) const {
    constexpr int W = Simd<T>::lanes;
    for (int64_t c = 0; c < width_; c += W) {
      typename Simd<T>::Vector sum = {}, moment = {};
      const auto middle = load(mean + c);
      for (int64_t r = 0; r < rows; ++r) {
        const auto value = load(g + r * g_row + c);
        sum += value;
        moment += value * (load(x + r * x_row + c) - middle);
      }
      store(space + c, sum);
      store(space + width_ + c, moment);
    }
    double* sums = sums_ + share * 2 * width_;
    for (int64_t c = 0; c < 2 * width_; ++c) sums[c] += space[c];
  }

  // Write the gradients of weight and bias, and [3, width] `factors` with which
  // g * factors[0] + (x - mean) * factors[1] + factors[2] is the gradient of x.
  void finish(const Norm<const T>& norm, const T* statistics, int64_t C, int64_t count,
              bool training, const Norm<T>& grads, T* factors) const {
    fill(factors, 3 * width_, T(0));
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0, moment = 0;
      for (int64_t s = 0; s < shares_; ++s) {
        sum += sums_[s * 2 * width_ + c];
        moment += sums_[s * 2 * width_ + width_ + c];
      }
      const double inverse = statistics[width_ + c], scale = norm.weight[c] * inverse;
      grads.weight[c] = static_cast<T>(moment * inverse);
      grads.bias[c] = static_cast<T>(sum);
      factors[c] = static_cast<T>(scale);
      if (training) {
        factors[width_ + c] = static_cast<T>(-scale * inverse * inverse * moment / count);
        factors[2 * width_ + c] = static_cast<T>(-scale * sum / count);
      }
    }
  }

 private:
  int64_t shares_, width_;
  Buffer<double> sums_;
};

template <class T>
void norm_backward(const T* g, int64_t g_row, const T* x, int64_t x_row, const T* mean,
                   const T* factors, int64_t rows, int64_t width, T* d_x, int64_t d_x_row) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += W) {
      const auto distance = load(x + r * x_row + c) - load(mean + c);
      const auto shift = distance * load(factors + width + c) + load(factors + 2 * width + c);
      store(d_x + r * d_x_row + c, load(g + r * g_row + c) * load(factors + c) + shift);
    }
  }
}

// From the gradient of u = PReLU(x * scale + shift) to that of PReLU's argument; returns the slope's.
template <class T>
T activate_backward(const T* d_u, const T* x, int64_t x_row, const T* scale, const T* shift,
                    T slope, int64_t rows, int64_t width, T* g, int64_t g_row) {
  constexpr int W = Simd<T>::lanes;
  const typename Simd<T>::Vector zero = {};
  typename Simd<T>::Vector sums = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += W) {
      const auto v = load(x + r * x_row + c) * load(scale + c) + load(shift + c);
      const auto d = load(d_u + r * width + c);
      store(g + r * g_row + c, v > zero ? d : slope * d);
      sums += v > zero ? zero : v * d;
    }
  }
  T sum = 0;
  for (int i = 0; i < W; ++i) sum += sums[i];
  return sum;
}

template <class T>
void add_columns(const T* x, int64_t rows, int64_t width, T* sums) {
  constexpr int W = Simd<T>::lanes;
  for (int64_t c = 0; c < width; c += W) {
    auto sum = load(sums + c);
    for (int64_t r = 0; r < rows; ++r) sum += load(x + r * width + c);
    store(sums + c, sum);
  }
}

// Gradients of parameters as [outputs, inputs] with padded sides, one such array for each share.
struct Gradients {
  int64_t reduce, reduce_bias;  // [3 C, 2 C]
  int64_t pool, pool_bias, project, project_bias, aggregate, aggregate_bias;
  int64_t last[2], last_bias;
  int64_t gate[3], gate_bias[3], global_bias, slopes, size;

  explicit Gradients(int64_t C) {
    int64_t end = 0;
    const auto take = [&end](int64_t count) {
      end += count;
      return end - count;
    };
    reduce = take(6 * C * C), reduce_bias = take(3 * C);
    pool = take(C * C), pool_bias = take(C);
    project = take(C * C), project_bias = take(C);
    aggregate = take(C * C), aggregate_bias = take(C);
    last[0] = take(C * C), last[1] = take(C * C), last_bias = take(C);
    for (int layer = 0; layer < 3; ++layer) gate[layer] = take(C * C), gate_bias[layer] = take(C);
    global_bias = take(C), slopes = take(16), size = end;
  }
};

// The matrices as [outputs, inputs] with padded sides.
template <class T>
struct Natural {
  Buffer<T> reduce, pool, last, aggregate, gates, project_turned;

  Natural(const Weights<const T>& weights, int64_t C, int64_t width, const T* guidance_scale)
      : reduce(6 * width * width),
        pool(width * width),
        last(2 * width * width),
        aggregate(width * width),
        gates(3 * width * width),
        project_turned(width * width) {
    const auto copy = [&](const T* from, int64_t from_row, T* to, int64_t to_row) {
      for (int64_t r = 0; r < width; ++r) {
        if (r < C) __builtin_memcpy(to + r * to_row, from + r * from_row, C * sizeof(T));
        const int64_t known = r < C ? C : 0;
        fill(to + r * to_row + known, width - known, T(0));
      }
    };
    for (int i = 0; i < kBranches; ++i) {
      T* to = reduce + i * 2 * width * width;
      copy(weights.branches[i].reduce_weight, 2 * C, to, 2 * width);
      copy(weights.branches[i].reduce_weight + C, 2 * C, to + width, 2 * width);
      scale_rows(to + width, 2 * width, width, width, static_cast<const T*>(nullptr), guidance_scale);
    }
    copy(weights.branches[0].project_weight, C, pool, width);
    copy(weights.branches[2].project_weight, C, last, width);
    copy(weights.aggregate.project_weight, C, last + width * width, width);
    copy(weights.aggregate.reduce_weight, C, aggregate, width);
    copy(weights.gate_weight1, C, gates, width);
    copy(weights.gate_weight2, C, gates + width * width, width);
    copy(weights.gate_weight3, C, gates + 2 * width * width, width);
    if (width != C) fill<T>(project_turned, width * width, 0);
    transpose<T>(weights.branches[1].project_weight, C, C, C, project_turned, width);
  }
};

// The gate of one image backwards, from the gradient `d_matrix` [outputs, inputs] of what takes u_2
// to h_4 and, behind it, that of its bias: adds to the parameters' gradients `to`, and writes the
// gradient of `pooled`. `space` is for C * (C + 6).
template <class T>
void gate_backward(const Gradients& at, const Natural<T>& natural, const Prepared& in,
                   const T* prepared, int64_t width, const T* pooled, const T* layers,
                   const T* d_matrix, T* space, T* to, T* d_pooled) {
  const T *gate = layers + 2 * width, *d_bias = d_matrix + width * width;
  const T *project = prepared + in.project, *project_bias = prepared + in.project_bias;
  T *back = space, *back_bias = space + width * width, *d = back_bias + width;
  // Through `aggregate`, to the gradients of gate * (project u_2 + project_bias).
  product<T>({natural.aggregate, 1, width}, width, d_matrix, width, back, width, width, width);
  product<T>({d_bias, width, 1}, 1, natural.aggregate, width, back_bias, width, width, width);
  for (int64_t c = 0; c < width; ++c) {
    T sum = back_bias[c] * project_bias[c];
    for (int64_t k = 0; k < width; ++k) {
      sum += back[c * width + k] * project[c * width + k];
      to[at.project + c * width + k] += gate[c] * back[c * width + k];
    }
    to[at.project_bias + c] += gate[c] * back_bias[c];
    d[c] = sum * gate[c] * (1 - gate[c]);
  }
  for (int64_t k = 0; k < width; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      back[k * width + c] = natural.project_turned[k * width + c] * gate[c];
    }
  }
  product<T>({d_matrix, width, 1}, width, back, width, to + at.aggregate, width, width, width,
             nullptr, true);
  for (int64_t o = 0; o < width; ++o) {
    for (int64_t c = 0; c < width; ++c) {
      to[at.aggregate + o * width + c] += d_bias[o] * gate[c] * project_bias[c];
    }
    to[at.aggregate_bias + o] += d_bias[o];
  }
  for (int layer = 2; layer >= 0; --layer) {
    const T* input = layer ? layers + (layer - 1) * width : pooled;
    T* d_input = layer ? back_bias + (layer % 2 ? 2 : 3) * width : d_pooled;
    for (int64_t o = 0; o < width; ++o) {
      for (int64_t k = 0; k < width; ++k) {
        to[at.gate[layer] + o * width + k] += d[o] * input[k];
      }
      to[at.gate_bias[layer] + o] += d[o];
    }
    product<T>({d, width, 1}, 1, natural.gates + layer * width * width, width, d_input, width,
               width, width);
    // ReLU lets a gradient pass where its result is not zero, which is also where it is NaN.
    for (int64_t k = 0; layer && k < width; ++k) d_input[k] = input[k] <= 0 ? 0 : d_input[k];
    d = d_input;
  }
  for (int64_t c = 0; c < width; ++c) to[at.global_bias + c] += d_pooled[c];
}

}  // namespace LEMMA_FAST_LEVEL
}  // namespace lemma_fast
