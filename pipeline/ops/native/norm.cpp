// RMS norm of rows, y = x s w with s = 1 / sqrt(mean(x^2) + eps), and its gradients, each in one pass over the rows.
//
// The gradient of a weight is summed row by row in blocks of rows. The caller adds the blocks in their order, so no result depends
// on the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "products.h"

using products::load_some;
using products::store_some;
using simd::Float;
using simd::W;

namespace {
constexpr int64_t block = 32;  // rows that one thread takes at a time

// Calls f(column, how many), for whole vectors and then for what is left of the row.
template <class F>
inline void for_vectors(int64_t width, F f) {
  int64_t c = 0;
  for (; c + W <= width; c += W) f(c, W);
  if (c < width) f(c, width - c);
}

inline float total(Float v) {
  float sum = 0;
  for (int l = 0; l < W; l++) sum += v[l];
  return sum;
}

// Calls f(block, first row, one past the last) for each block of rows, in some order.
template <class F>
void for_blocks(int64_t rows, F f) {
  at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) f(k, k * block, std::min(rows, (k + 1) * block));
  });
}
}  // namespace

extern "C" {
int64_t rms_norm_blocks(int64_t rows) { return (rows + block - 1) / block; }

// x and y are (rows, width), weight is (width), scale receives s of each row.
void rms_norm_forward(const float* x, const float* weight, float* y, float* scale, int64_t rows, int64_t width, float eps) {
  for_blocks(rows, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float* in = x + r * width;
      float* out = y + r * width;
      Float squares{};
      for_vectors(width, [&](int64_t c, int64_t n) {
        const Float v = load_some(in + c, n);
        squares += v * v;
      });
      const float s = 1 / std::sqrt(total(squares) / width + eps);
      scale[r] = s;
      for_vectors(width, [&](int64_t c, int64_t n) { store_some(out + c, load_some(in + c, n) * s * load_some(weight + c, n), n); });
    }
  });
}

// g is the gradient of y. g_x = s (g w) - x s^3 mean(g w x); partial_weight (blocks, width) receives the sums of g x s.
void rms_norm_backward(const float* g, const float* x, const float* weight, const float* scale, float* g_x, float* partial_weight,
                       int64_t rows, int64_t width) {
  for_blocks(rows, [&](int64_t k, int64_t first, int64_t last) {
    float* sums = partial_weight + k * width;
    std::fill(sums, sums + width, 0.0f);
    for (int64_t r = first; r < last; r++) {
      const float *in = x + r * width, *of_y = g + r * width, s = scale[r];
      float* out = g_x + r * width;
      Float products{};
      for_vectors(width, [&](int64_t c, int64_t n) {
        const Float v = load_some(in + c, n), d = load_some(of_y + c, n);
        products += d * load_some(weight + c, n) * v;
        store_some(sums + c, load_some(sums + c, n) + d * v * s, n);
      });
      const float pull = s * s * s * (total(products) / width);
      for_vectors(width, [&](int64_t c, int64_t n) {
        store_some(out + c, load_some(of_y + c, n) * load_some(weight + c, n) * s - load_some(in + c, n) * pull, n);
      });
    }
  });
}
}
