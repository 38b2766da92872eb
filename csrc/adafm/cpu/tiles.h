// How work is divided between threads, and rows of positions read from maps and written back.

#pragma once

#include "adafm/cpu/passes.h"
#include "simd/matrix.h"

namespace lemma_fast::SIMD_LEVEL {

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

  Shares(int64_t things, int64_t threads)
      : things(things), count(things < threads ? things : threads) {}
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

// Sums over rows, added to `sums`: of x * y, and of x alone.
template <class T>
void add_products(const T* x, const T* y, int64_t rows, int64_t width, T* sums) {
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    auto sum = load(sums + c);
    for (int64_t r = 0; r < rows; ++r) sum += load(x + r * width + c) * load(y + r * width + c);
    store(sums + c, sum);
  }
}

template <class T>
void add_rows(const T* x, int64_t rows, int64_t width, T* sums) {
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    auto sum = load(sums + c);
    for (int64_t r = 0; r < rows; ++r) sum += load(x + r * width + c);
    store(sums + c, sum);
  }
}

}  // namespace lemma_fast::SIMD_LEVEL
