// Products of a few rows with a panel of columns in registers: the building blocks of the layers for inference and of projections.cpp.
//
// Rows lie in tiles of R <= tile_rows, [k / U][R][U], so one pointer and constant offsets reach every element. With U = W a tile
// of results is stored in register order and serves as the rows of the next product. Weights lie in panels [k][panel].
// Each sum runs over k in order for every height of a tile, so the division of the work changes no bit of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "simd.h"

namespace products {

using simd::at_least;
using simd::Float;
using simd::load;
using simd::splat;
using simd::store;
using simd::W;

constexpr int panel_vectors = 2, panel = panel_vectors * W;
constexpr int tile_rows = W == 16 ? 14 : 6;  // two sums for each row, a panel's row and a broadcast fill x86's registers
constexpr int ahead = 16;  // rows of a panel to prefetch, because a panel exceeds the first-level cache

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if defined(__AVX512F__)
inline __mmask16 lanes(int64_t n) { return n >= W ? 0xffff : (1u << std::max<int64_t>(n, 0)) - 1; }
#elif defined(__AVX2__)
inline __m256i lanes(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
#endif

// Loads the first n lanes and sets the others to zero; n may be above W.
inline Float load_some(const float* p, int64_t n) {
  if (n >= W) return load(p);
#if defined(__AVX512F__)
  return (Float)_mm512_maskz_loadu_ps(lanes(n), p);
#elif defined(__AVX2__)
  return (Float)_mm256_maskload_ps(p, lanes(n));
#else
  Float v{};
  std::memcpy(&v, p, 4 * std::max<int64_t>(n, 0));
  return v;
#endif
}
inline void store_some(float* p, Float v, int64_t n) {
  if (n >= W) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, lanes(n), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, lanes(n), (__m256)v);
#else
  std::memcpy(p, &v, 4 * std::max<int64_t>(n, 0));
#endif
}

template <int R, int V>
struct Sums {
  Float of[R][V] = {};

  // Adds the products of R values, `step` apart, with a row of the panel.
  template <int step>
  inline __attribute__((always_inline)) void add(const float* values, const float* row, int64_t row_stride) {
    Float columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      __builtin_prefetch(row + ahead * row_stride + v * W);
      columns[v] = load(row + v * W);
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
      const Float x = splat(values[r * step]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) of[r][v] += x * columns[v];
    }
  }
  template <class End>
  inline __attribute__((always_inline)) void leave(End&& end) const {
#pragma GCC unroll 14
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) end(r, v, of[r][v]);
  }
};

// Multiplies the rows of a tile, with chunks * U inputs each, with a panel; `end(row, v, sum)` takes each vector of W columns.
template <int R, int V, int U = W, class End>
inline __attribute__((always_inline)) void multiply(
    const float* tile, const float* columns, int64_t column_stride, int64_t chunks, End&& end) {
  Sums<R, V> sums;
  for (int64_t c = 0; c < chunks; c++, tile += R * U)
#pragma GCC unroll 4
    for (int k = 0; k < U; k++, columns += column_stride) sums.template add<U>(tile + k, columns, column_stride);
  sums.leave(end);
}

// Does the same for rows that lie side by side: `values(k)` points to R neighbouring values.
template <int R, int V, class Values, class End>
inline __attribute__((always_inline)) void multiply_side_by_side(
    Values&& values, const float* columns, int64_t column_stride, int64_t count, End&& end) {
  Sums<R, V> sums;
  for (int64_t k = 0; k < count; k++, columns += column_stride) {
    const float* at = values(k);
    asm("" : "+r"(at));  // one pointer with constant offsets: the compiler would keep and spill an index for every row
    sums.template add<1>(at, columns, column_stride);
  }
  sums.leave(end);
}

// Calls f.template operator()<R, V>() with R rows, and with V = 1 if at most W columns of the panel are left.
template <class F, int... R>
inline void with_sizes(int rows, bool half, F&& f, std::integer_sequence<int, R...>) {
  ((rows != R + 1 ? void() : half ? f.template operator()<R + 1, 1>() : f.template operator()<R + 1, 2>()), ...);
}
template <class F>
inline void with_sizes(int rows, int64_t columns_left, F&& f) {
  with_sizes(rows, columns_left <= W, f, std::make_integer_sequence<int, tile_rows>{});
}

// A division of n rows into tiles whose heights differ by at most one. If there are enough rows, the number of tiles is a
// multiple of `shares`.
struct Cut {
  int64_t rows, tiles;
  Cut(int64_t n, int64_t shares) : rows(n), tiles(up(up(n, tile_rows) / tile_rows, std::clamp<int64_t>(n, 1, shares))) {}
  int64_t first(int64_t tile) const { return tile * rows / tiles; }
  int height(int64_t tile) const { return int(first(tile + 1) - first(tile)); }
};

// Scratch memory of a thread, aligned to cache lines; it only grows. take(n) returns n floats, valid until the next `begin` of this
// level. A layer uses level 0. A function that calls layers, or whose threads use level 0 meanwhile, uses level 1, so
// that its memory stays valid.
class Scratch {
 public:
  static Scratch& begin(int64_t floats, int level = 0) {
    thread_local Scratch levels[2];
    Scratch& scratch = levels[level];
    if (int64_t(scratch.memory_.size()) < floats + 1024) scratch.memory_ = std::vector<float>(floats + 1024);
    scratch.next_ = (float*)up((int64_t)scratch.memory_.data(), 64);
    return scratch;
  }
  float* take(int64_t floats) { return std::exchange(next_, next_ + up(floats, 16)); }

 private:
  std::vector<float> memory_;
  float* next_;
};

}  // namespace products
