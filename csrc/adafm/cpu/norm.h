// Batch norms with the PReLU behind them, forward and backward. A row is a position.

#pragma once

#include "adafm/cpu/tiles.h"

namespace lemma_fast::SIMD_LEVEL {

// x = PReLU(x * scale + shift), or without a norm where `scale` is null, in place or from `from`.
template <class T>
void activate(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t width,
              const T* scale, const T* shift, T slope) {
  constexpr int W = kLanes<T>;
  const Vector<T> zero = {};
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
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < width; c += W) {
    Vector<T> sum = {}, square = {};
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

// From the sums over `count` positions of g and of g * (x - mean) for one channel: the gradients of
// weight and bias, and [3, padded(C)] `factors` with which
// g * factors[0] + (x - mean) * factors[1] + factors[2] is the gradient of x.
template <class T>
void norm_gradients(const Norm<const T>& norm, T inverse_deviation, int64_t c, double sum,
                    double moment, int64_t count, bool training, const Norm<T>& grads, T* factors,
                    int64_t width) {
  const double inverse = inverse_deviation, scale = norm.weight[c] * inverse;
  grads.weight[c] = static_cast<T>(moment * inverse);
  grads.bias[c] = static_cast<T>(sum);
  factors[c] = static_cast<T>(scale);
  if (training) {
    factors[width + c] = static_cast<T>(-scale * inverse * inverse * moment / count);
    factors[2 * width + c] = static_cast<T>(-scale * sum / count);
  }
}

// What a norm's gradients need: the sums over all positions of g and of g * (x - mean).
template <class T>
class NormSums {
 public:
  NormSums(int64_t shares, int64_t width)
      : shares_(shares), width_(width), sums_(shares * 2 * width) {
    fill<double>(sums_, shares * 2 * width, 0);
  }

  // Add a tile of `rows` to one share; `space` is for 2 * width numbers.
  void add(int64_t share, const T* g, int64_t g_row, const T* x, int64_t x_row, const T* mean,
           int64_t rows, T* space) const {
    constexpr int W = kLanes<T>;
    for (int64_t c = 0; c < width_; c += W) {
      Vector<T> sum = {}, moment = {};
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

  void finish(const Norm<const T>& norm, const T* statistics, int64_t C, int64_t count,
              bool training, const Norm<T>& grads, T* factors) const {
    fill(factors, 3 * width_, T(0));
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0, moment = 0;
      for (int64_t s = 0; s < shares_; ++s) {
        sum += sums_[s * 2 * width_ + c];
        moment += sums_[s * 2 * width_ + width_ + c];
      }
      norm_gradients(norm, statistics[width_ + c], c, sum, moment, count, training, grads, factors,
                     width_);
    }
  }

 private:
  int64_t shares_, width_;
  Buffer<double> sums_;
};

template <class T>
void norm_backward(const T* g, int64_t g_row, const T* x, int64_t x_row, const T* mean,
                   const T* factors, int64_t rows, int64_t width, T* d_x, int64_t d_x_row) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += W) {
      const auto distance = load(x + r * x_row + c) - load(mean + c);
      const auto shift = distance * load(factors + width + c) + load(factors + 2 * width + c);
      store(d_x + r * d_x_row + c, load(g + r * g_row + c) * load(factors + c) + shift);
    }
  }
}

// From the gradient of u = PReLU(x * scale + shift) to that of PReLU's argument; returns the
// slope's.
template <class T>
T activate_backward(const T* d_u, const T* x, int64_t x_row, const T* scale, const T* shift,
                    T slope, int64_t rows, int64_t width, T* g, int64_t g_row) {
  constexpr int W = kLanes<T>;
  const Vector<T> zero = {};
  Vector<T> sums = {};
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

}  // namespace lemma_fast::SIMD_LEVEL
