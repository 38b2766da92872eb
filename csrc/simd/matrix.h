// Transposition and matrix products in memory, for one level.

#pragma once

#include <cstdint>
#include <new>
#include <utility>

#include "simd/vector.h"

namespace lemma_fast::SIMD_LEVEL {

// Rows and vectors of one step of a product: as many accumulators as the registers hold.
#if defined(__AVX512F__)
constexpr int kStepRows = 6, kStepVectors = 4;
#elif defined(__AVX2__)
constexpr int kStepRows = 6, kStepVectors = 2;
#else
constexpr int kStepRows = 4, kStepVectors = 2;
#endif

// Memory of its own, aligned to a cache line and not filled.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// A pair of rows of a block: swaps the numbers of `low` and `high` that lie S apart.
template <class T, int S, int... J>
SIMD_INLINE void swap_lanes(Vector<T>& low, Vector<T>& high, std::integer_sequence<int, J...>) {
  constexpr int W = kLanes<T>;
  const auto a = low, b = high;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (J & S ? W + J - S : J)...);
  high = __builtin_shufflevector(a, b, (J & S ? W + J : J + S)...);
#else
  using Index = typename Simd<T>::Index;
  low = __builtin_shuffle(a, b, Index{(J & S ? W + J - S : J)...});
  high = __builtin_shuffle(a, b, Index{(J & S ? W + J : J + S)...});
#endif
}

template <class T, int S>
SIMD_INLINE void swap_rows(Vector<T>* v) {
  constexpr int W = kLanes<T>;
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (!(i & S)) swap_lanes<T, S>(v[i], v[i + S], std::make_integer_sequence<int, W>());
    }
    swap_rows<T, 2 * S>(v);
  }
}

// One block of lanes x lanes numbers: to[c][r] = from[r][c].
template <class T>
SIMD_INLINE void transpose_block(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int W = kLanes<T>;
  Vector<T> v[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) v[i] = load(from + i * from_row);
  swap_rows<T, 1>(v);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * to_row, v[i]);
}

// to[c][r] = from[r][c] for any number of rows and columns.
template <class T>
inline void transpose(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to,
                      int64_t to_row) {
  constexpr int W = kLanes<T>;
  const int64_t whole_rows = rows - rows % W, whole_columns = columns - columns % W;
  for (int64_t r = 0; r < whole_rows; r += W) {
    for (int64_t c = 0; c < whole_columns; c += W) {
      transpose_block(from + r * from_row + c, from_row, to + c * to_row + r, to_row);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      to[c * to_row + r] = from[r * from_row + c];
    }
  }
}

// One step of a product, R rows by V vectors, whose accumulators stay in registers.
template <class T, int R, int V>
void product_step(const T* a, int64_t a_row, int64_t a_inner, const T* b, int64_t b_row, T* c,
                  int64_t c_row, int64_t inner, const T* bias, bool add) {
  constexpr int W = kLanes<T>;
  Vector<T> accumulators[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vector<T> zero = {};
      accumulators[r][v] = add ? load(c + r * c_row + v * W) : bias ? load(bias + v * W) : zero;
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    Vector<T> columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = load(b + k * b_row + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T factor = a[r * a_row + k * a_inner];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) accumulators[r][v] += factor * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * W, accumulators[r][v]);
  }
}

// A matrix whose elements lie `row` and `inner` apart; (1, n) reads one of width n transposed.
template <class T>
struct Left {
  const T* data;
  int64_t row, inner;
};

template <class T, int R, int V>
SIMD_INLINE void product_rows(const Left<T>& a, int64_t rows, const T* b, int64_t b_row, T* c,
                              int64_t c_row, int64_t inner, const T* bias, bool add) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    product_step<T, R, V>(a.data + r * a.row, a.row, a.inner, b, b_row, c + r * c_row, c_row, inner,
                          bias, add);
  }
  if constexpr (R > 1) {
    const Left<T> rest{a.data + r * a.row, a.row, a.inner};
    product_rows<T, (R + 1) / 2, V>(rest, rows - r, b, b_row, c + r * c_row, c_row, inner, bias,
                                    add);
  }
}

template <class T, int V>
SIMD_INLINE void product_columns(const Left<T>& a, int64_t rows, const T* b, int64_t b_row, T* c,
                                 int64_t c_row, int64_t columns, int64_t inner, const T* bias,
                                 bool add) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + V * W <= columns; j += V * W) {
    product_rows<T, kStepRows, V>(a, rows, b + j, b_row, c + j, c_row, inner,
                                  bias ? bias + j : nullptr, add);
  }
  if constexpr (V > 1) {
    product_columns<T, V / 2>(a, rows, b + j, b_row, c + j, c_row, columns - j, inner,
                              bias ? bias + j : nullptr, add);
  }
}

// c [rows, columns] = a [rows, inner] b [inner, columns], plus a row `bias` or, with `add`, plus c.
// `columns` is a multiple of 16; c overlaps neither a nor b.
template <class T>
void product(const Left<T>& a, int64_t rows, const T* b, int64_t b_row, T* c, int64_t c_row,
             int64_t columns, int64_t inner, const T* bias = nullptr, bool add = false) {
  product_columns<T, kStepVectors>(a, rows, b, b_row, c, c_row, columns, inner, bias, add);
}

}  // namespace lemma_fast::SIMD_LEVEL
