// Helpers of the layers for inference, and of projections.cpp: rows packed as tiles, activations, and work divided among the threads.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <exception>

#include "products.h"

namespace products {

constexpr int64_t pad = 32;  // inputs of products are padded with zeros to a multiple of it: whole vectors and whole panels
constexpr int64_t block_tiles = 5;  // tiles that share one pass over the weights; their hidden rows fit the second-level cache

// Packs `count` consecutive rows of `width` floats as one tile, with zeros from `width` up to `padded`.
inline void pack_tile(const float* rows, int64_t width, int64_t padded, int count, float* tile) {
  for (int64_t c = 0; c < padded; c += W)
    for (int r = 0; r < count; r++) store(tile + c * count + r * W, load_some(rows + r * width + c, width - c));
}

// What a norm subtracts from a row, and the factor that follows.
struct Moments {
  float mean, scale;
};

// (x - mean) scale has mean 0 and variance 1 (a layer norm), or with `centred` false the root mean square 1 (an RMS norm).
inline Moments moments(const float* x, int64_t width, float eps, bool centred) {
  Float sum{}, squares{};
  for (int64_t c = 0; centred && c < width; c += W) sum += load_some(x + c, width - c);
  const float mean = simd::sum_lanes(sum) / width;
  const int64_t whole = width / W * W;
  for (int64_t c = 0; c < whole; c += W) {
    const Float off = load(x + c) - mean;
    squares += off * off;
  }
  if (whole < width) {
    Float off = load_some(x + whole, width - whole) - mean;
    for (int64_t l = width - whole; l < W; l++) off[l] = 0;
    squares += off * off;
  }
  return {mean, 1 / std::sqrt(simd::sum_lanes(squares) / width + eps)};
}

enum Act { none, relu, silu, sigmoid };

// The lower bound of a sum: 0 for relu, none for the other activations. at_least passes a NaN on.
inline float least_of(int64_t act) { return act == relu ? 0.0f : -INFINITY; }

// Applies silu or sigmoid to finished rows. This is a separate loop, because inside the products it would spill the sums.
inline void activate(float* rows, int64_t stride, int count, int64_t width, int64_t act) {
  if (act <= relu) return;
  for (int r = 0; r < count; r++)
    for (int64_t c = 0; c < width; c += W) {
      const Float x = load_some(rows + r * stride + c, width - c), y = simd::sigmoid(x);
      store_some(rows + r * stride + c, act == silu ? x * y : y, width - c);
    }
}

// The number of threads that a call may use: all, or one where the caller is already one of several threads.
inline int64_t free_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Calls alone(thread, first image, images) in each thread, with as many images as in the others, and then together(first image, images)
// with those that are left.
template <class Alone, class Together>
void by_images(int64_t batch, Alone&& alone, Together&& together) {
  const int64_t threads = free_threads(), own = batch / threads, rest = batch % threads;
  if (own)
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; thread++) alone(thread, thread * own, own);
    });
  if (rest) together(own * threads, rest);
}

// Divides the tiles of a cut among the threads, in even blocks of at most `tiles`. Calls f(first tile, one past the last).
template <class F>
void in_blocks(const Cut& cut, int64_t tiles, F&& f) {
  at::parallel_for(0, cut.tiles, 1, [&](int64_t begin, int64_t end) {
    const int64_t blocks = up(end - begin, tiles) / tiles;
    for (int64_t i = 0; i < blocks; i++)
      f(begin + i * (end - begin) / blocks, begin + (i + 1) * (end - begin) / blocks);
  });
}

// Multiplies packed rows with panels of weights, a block of rows and panels for each thread in turn.
//
// `pack(first row, count, tile)` writes a tile of rows with `in` inputs, a multiple of `pad`. `put(row, column, sum)` takes each
// vector of W sums of the `out` columns. `done(first row, count, first column, columns)` is called after each tile and panel.
template <class Pack, class Put, class Done>
void product(int64_t rows, int64_t in, int64_t out, const float* weight, Pack&& pack, Put&& put, Done&& done) {
  const int64_t threads = free_threads();
  const Cut cut(rows, threads);
  // With two tiles or more for each thread, every thread has as many blocks of rows as the others. With fewer the columns are
  // divided as well, and every part of them packs the rows anew.
  const bool by_rows = cut.tiles >= 2 * threads;
  const int64_t whole = up(cut.tiles, block_tiles) / block_tiles, panels = up(out, panel) / panel;
  const int64_t blocks = by_rows ? up(whole, threads) : whole;
  const int64_t columns = by_rows ? 1 : std::clamp<int64_t>(4 * threads / blocks, 1, panels);
  at::parallel_for(0, blocks * columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t t0 = unit / columns * cut.tiles / blocks, t1 = (unit / columns + 1) * cut.tiles / blocks;
      const int64_t n0 = unit % columns * panels / columns * panel, n1 = (unit % columns + 1) * panels / columns * panel;
      float* x = Scratch::begin((t1 - t0) * tile_rows * in).take((t1 - t0) * tile_rows * in);
      for (int64_t t = t0; t < t1; t++) pack(cut.first(t), cut.height(t), x + (t - t0) * tile_rows * in);
      for (int64_t n = n0; n < n1; n += panel)
        for (int64_t t = t0; t < t1; t++) {
          const int64_t first = cut.first(t);
          with_sizes(cut.height(t), out - n, [&]<int R, int V>() {
            multiply<R, V>(x + (t - t0) * tile_rows * in, weight + n * in, panel, in / W,
                           [&](int r, int v, Float sum) { put(first + r, n + v * W, sum); });
            done(first, R, n, std::min<int64_t>(panel, out - n));
          });
        }
    }
  });
}

// Calls f and returns 0, or 1 if memory ran out, because no exception may reach Python.
template <class F>
int64_t guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception&) {  // bad_alloc, or a length that a vector cannot have
    return 1;
  }
}

}  // namespace products
