// Helpers of the layers for inference: rows packed as tiles, activations, and work divided among the threads.
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

enum Act { none, relu, silu, sigmoid };

// The lower bound of a sum: 0 for relu, none for the other activations. at_least passes a NaN on.
inline float least_of(int64_t act) { return act == relu ? 0.0f : -INFINITY; }
inline __attribute__((always_inline)) Float at_least(Float x, float least) { return x < least ? splat(least) : x; }

// Applies silu or sigmoid to finished rows. This is a separate loop, because inside the products it would spill the sums.
inline void activate(float* rows, int64_t stride, int count, int64_t width, int64_t act) {
  if (act <= relu) return;
  for (int r = 0; r < count; r++)
    for (int64_t c = 0; c < width; c += W) {
      const Float x = load_some(rows + r * stride + c, width - c), y = simd::sigmoid(x);
      store_some(rows + r * stride + c, act == silu ? x * y : y, width - c);
    }
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
