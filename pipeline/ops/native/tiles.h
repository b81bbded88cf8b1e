// Strided tensors in, tiles of [step][W channels] floats out: the only place that knows layouts and dtypes.
//
// A tensor (batch, group, channel, step) is a pointer and four strides in elements. The caller turns a direction round
// by pointing at the last step with a negative step stride, so no kernel knows about reversal.
#pragma once

#include <cstdint>

#include "simd.h"

struct Strided {
  void* data;  // null: absent
  int64_t batch, group, channel, step;
  int64_t bf16;  // else fp32

  Strided at(int64_t b, int64_t g, int64_t c) const { return moved(b * batch + g * group + c * channel); }
  Strided from_step(int64_t t) const { return moved(t * step); }
  explicit operator bool() const { return data != nullptr; }

 private:
  Strided moved(int64_t elements) const {
    Strided s = *this;
    s.data = static_cast<char*>(data) + elements * (bf16 ? 2 : 4);
    return s;
  }
};

namespace tiles {

using simd::Float;
using simd::W;

template <class T>
void load_as(float* tile, int64_t row, const Strided& s, int64_t channels, int64_t steps) {
  const T* p = static_cast<const T*>(s.data);
  int64_t t = 0;
  if (channels == W && s.channel == 1) {
    for (; t < steps; t++) simd::store(tile + t * row, simd::load(p + t * s.step));
  } else if (channels == W && (s.step == 1 || s.step == -1)) {
    for (; t + W <= steps; t += W) {
      Float rows[W];
      const T* first = s.step == 1 ? p + t : p - t - (W - 1);
      for (int c = 0; c < W; c++) rows[c] = simd::load(first + c * s.channel);
      simd::transpose(rows);
      for (int i = 0; i < W; i++) simd::store(tile + (t + (s.step == 1 ? i : W - 1 - i)) * row, rows[i]);
    }
  }
  for (; t < steps; t++)
    for (int64_t c = 0; c < W; c++)
      tile[t * row + c] = c < channels ? simd::widen(p[c * s.channel + t * s.step]) : 0.0f;
}

// tile[t * row + c] for `steps` steps and W channels, of which those from `channels` on are zero.
inline void load(float* tile, const Strided& s, int64_t channels, int64_t steps, int64_t row = W) {
  s.bf16 ? load_as<uint16_t>(tile, row, s, channels, steps) : load_as<float>(tile, row, s, channels, steps);
}

template <class T>
void store_as(const Strided& s, const float* tile, int64_t channels, int64_t steps, bool add) {
  T* p = static_cast<T*>(s.data);
  int64_t t = 0;
  if (channels == W && s.channel == 1) {
    for (; t < steps; t++) {
      T* q = p + t * s.step;
      Float v = simd::load(tile + t * W);
      simd::store(q, add ? simd::load(q) + v : v);
    }
  } else if (channels == W && (s.step == 1 || s.step == -1)) {
    for (; t + W <= steps; t += W) {
      Float rows[W];
      for (int i = 0; i < W; i++) rows[i] = simd::load(tile + (t + (s.step == 1 ? i : W - 1 - i)) * W);
      simd::transpose(rows);
      T* first = s.step == 1 ? p + t : p - t - (W - 1);
      for (int c = 0; c < W; c++) {
        T* q = first + c * s.channel;
        simd::store(q, add ? simd::load(q) + rows[c] : rows[c]);
      }
    }
  }
  for (; t < steps; t++)
    for (int64_t c = 0; c < channels; c++) {
      T* q = p + c * s.channel + t * s.step;
      simd::narrow(q, tile[t * W + c] + (add ? simd::widen(*q) : 0.0f));
    }
}

// Write, or with `add` add to, the first `channels` channels of a tile.
inline void store(const Strided& s, const float* tile, int64_t channels, int64_t steps, bool add = false) {
  s.bf16 ? store_as<uint16_t>(s, tile, channels, steps, add) : store_as<float>(s, tile, channels, steps, add);
}

}  // namespace tiles
