// The recurrence of the selective scan for one tile of W channels: shared by training (scan.cpp) and inference (mamba.cpp).
#pragma once

#include <cstdint>

#include "simd.h"

// Computes h_t = 2^(dt rate) h_{t-1} + dtu B_t and y += C_t h_t for S states, where dtu = dt u. A step of dt, dtu and y is W
// floats, and one of B and C is `width` floats further. With `keep` it stores all a_t = 2^(dt rate), and all h_t beginning
// with h_{-1}.
template <int S, bool keep>
inline void advance(const float* dt, const float* dtu, float* y, float* state, const float* rates, const float* B,
                    const float* C, int64_t width, int64_t steps, float* kept_h, float* kept_a) {
  using namespace simd;
  Float h[S];
#pragma GCC unroll 16
  for (int n = 0; n < S; n++) {
    h[n] = load(state + n * W);
    if (keep) store(kept_h + n * W, h[n]);
  }
  for (int64_t t = 0; t < steps; t++) {
    const Float dt_t = load(dt + t * W), dtu_t = load(dtu + t * W);
    Float sum[2] = {load(y + t * W), Float{}};
#pragma GCC unroll 16
    for (int n = 0; n < S; n++) {
      const Float a = simd::exp2(dt_t * load(rates + n * W));
      h[n] = a * h[n] + dtu_t * B[t * width + n];
      sum[n % 2] += h[n] * C[t * width + n];
      if (keep) {
        store(kept_a + (t * S + n) * W, a);
        store(kept_h + ((t + 1) * S + n) * W, h[n]);
      }
    }
    store(y + t * W, sum[0] + sum[1]);
  }
#pragma GCC unroll 16
  for (int n = 0; n < S; n++) store(state + n * W, h[n]);
}
