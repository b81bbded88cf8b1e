// What the layers for inference share: rows packed as tiles, activations, and the work cut among the threads.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <exception>

#include "products.h"

namespace products {

constexpr int64_t pad = 32;  // inputs of products are zero up to a multiple of it: whole vectors and whole panels
constexpr int64_t block_tiles = 5;  // tiles that share a pass over the weights: their hidden rows stay in the second-level cache

// `count` rows of `width` one after the other, as one tile; zero beyond the width, up to `padded`.
inline void pack_tile(const float* rows, int64_t width, int64_t padded, int count, float* tile) {
  for (int64_t c = 0; c < padded; c += W)
    for (int r = 0; r < count; r++) store(tile + c * count + r * W, load_some(rows + r * width + c, width - c));
}

enum Act { none, relu, silu, sigmoid };

// What a sum is raised to at least: relu as a bound that the others have too. A NaN passes.
inline float least_of(int64_t act) { return act == relu ? 0.0f : -INFINITY; }
inline __attribute__((always_inline)) Float at_least(Float x, float least) { return x < least ? splat(least) : x; }

// silu or sigmoid of finished rows: a loop of its own, since among the sums it would drive them out of the registers.
inline void activate(float* rows, int64_t stride, int count, int64_t width, int64_t act) {
  if (act <= relu) return;
  for (int r = 0; r < count; r++)
    for (int64_t c = 0; c < width; c += W) {
      const Float x = load_some(rows + r * stride + c, width - c), y = simd::sigmoid(x);
      store_some(rows + r * stride + c, act == silu ? x * y : y, width - c);
    }
}

// The tiles of a cut among the threads, in even blocks of at most `tiles`: f(first tile, last tile).
template <class F>
void in_blocks(const Cut& cut, int64_t tiles, F&& f) {
  at::parallel_for(0, cut.tiles, 1, [&](int64_t begin, int64_t end) {
    const int64_t blocks = up(end - begin, tiles) / tiles;
    for (int64_t i = 0; i < blocks; i++)
      f(begin + i * (end - begin) / blocks, begin + (i + 1) * (end - begin) / blocks);
  });
}

// An exception must not cross the border to Python: 1 where memory ran out.
template <class F>
int64_t guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception&) {  // bad_alloc, or a length that no vector has
    return 1;
  }
}

}  // namespace products
