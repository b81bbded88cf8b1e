// Conversion of strided tensors to tiles of [step][W channels] floats and back. Only this file knows layouts and dtypes.
//
// A tensor (batch, group, channel, step) is a pointer and four strides in elements. For a reversed direction the caller
// passes a pointer to the last step and a negative step stride, so no kernel knows about reversal.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

// The number of pieces of `size` that hold n.
inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

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

// A block of tiles: the float of channel c and step t is at[c / W * tile + t * row + c % W].
struct Tiles {
  float* at;
  int64_t tile, row;
};

namespace tiles {

using simd::Float;
using simd::W;

// The address of the W channels and `count` steps at channel c and step t, in a tensor whose steps are neighbours (stride 1 or -1).
template <class T>
T* corner(const Strided& s, int64_t c, int64_t t, int64_t count) {
  return static_cast<T*>(s.data) + c * s.channel + (s.step == 1 ? t : -t - (count - 1));
}

// A block with less than W steps. It is a function of its own, because an array whose index is variable cannot be in registers.
template <class T>
__attribute__((noinline)) void load_short(float* tile, int64_t row, const Strided& s, int64_t c, int64_t t, int64_t count) {
  Float rows[W];
  const T* from = corner<const T>(s, c, t, count);
  for (int i = 0; i < W; i++) rows[i] = simd::load_first(from + i * s.channel, count);
  simd::transpose(rows);
  for (int i = 0; i < count; i++) simd::store(tile + (s.step == 1 ? i : count - 1 - i) * row, rows[i]);
}

template <class T, bool dense>  // dense: to.row is W, which spares the compiler the computation of addresses
void load_as(const Tiles& to, const Strided& s, int64_t channels, int64_t steps) {
  const T* p = static_cast<const T*>(s.data);
  const int64_t whole = channels / W * W, blocks = steps / W * W, row = dense ? W : to.row;
  int64_t loaded = 0;  // steps of the whole tiles that the fast paths load
  if (s.channel == 1) {
    loaded = steps;
    for (int64_t t = 0; t < steps; t++)  // long runs, which the processor prefetches well
      for (int64_t c = 0; c < whole; c += W) simd::store(to.at + c / W * to.tile + t * row, simd::load(p + t * s.step + c));
  } else if (s.step == 1 || s.step == -1) {
    loaded = steps;
    for (int64_t c = 0; c < whole; c += W) {
      float* tile = to.at + c / W * to.tile;
      for (int64_t t = 0; t < blocks; t += W) {
        Float rows[W];
        const T* from = corner<const T>(s, c, t, W);
        for (int i = 0; i < W; i++) rows[i] = simd::load(from + i * s.channel);
        simd::transpose(rows);
        for (int i = 0; i < W; i++) simd::store(tile + (t + (s.step == 1 ? i : W - 1 - i)) * row, rows[i]);
      }
      if (blocks < steps) load_short<T>(tile + blocks * row, row, s, c, blocks, steps - blocks);
    }
  }
  for (int64_t c = 0; c < (channels + W - 1) / W * W; c++)
    for (int64_t t = c < whole ? loaded : 0; t < steps; t++)
      to.at[c / W * to.tile + t * row + c % W] = c < channels ? simd::widen(p[c * s.channel + t * s.step]) : 0.0f;
}

// Reads `steps` steps of `channels` channels. Lanes of the last tile without a channel become zero.
inline void load(Tiles to, const Strided& s, int64_t channels, int64_t steps) {
  const auto load = to.row == W ? (s.bf16 ? load_as<uint16_t, true> : load_as<float, true>)
                                : (s.bf16 ? load_as<uint16_t, false> : load_as<float, false>);
  load(to, s, channels, steps);
}

// Reads `steps` steps of fewer channels than W as rows of `width` floats, whose other floats stay as they are.
template <class T>
void load_narrow_as(float* to, int64_t width, const Strided& s, int64_t channels, int64_t steps) {
  const T* p = static_cast<const T*>(s.data);
  for (int64_t t = 0; t < steps; t++)
    for (int64_t c = 0; c < channels; c++) to[t * width + c] = simd::widen(p[c * s.channel + t * s.step]);
}
inline void load_narrow(float* to, int64_t width, const Strided& s, int64_t channels, int64_t steps) {
  s.bf16 ? load_narrow_as<uint16_t>(to, width, s, channels, steps) : load_narrow_as<float>(to, width, s, channels, steps);
}

// Prefetches slice `slice` of `slices` of a block of channels and steps. A scan computes for microseconds on one chunk,
// and the memory would be idle meanwhile. always_inline is needed, because GCC considers a function that only prefetches
// to have no effect and removes its calls.
__attribute__((always_inline)) inline void prefetch(const Strided& s, int64_t channels, int64_t steps, int64_t slice,
                                                    int64_t slices) {
  const int64_t size = s.bf16 ? 2 : 4, count = s.channel == 1 ? steps : channels;
  const int64_t run = (s.channel == 1 ? channels : steps) * size, stride = (s.channel == 1 ? s.step : s.channel) * size;
  const char* p = static_cast<const char*>(s.data) - (s.channel != 1 && s.step < 0 ? run - size : 0);
  for (int64_t i = count * slice / slices; i < count * (slice + 1) / slices; i++)
    for (int64_t at = 0; at < run + 63; at += 64) __builtin_prefetch(p + i * stride + std::min(at, run - 1), 0, 2);
}

template <class T>
__attribute__((noinline)) void store_short(const Strided& s, int64_t c, int64_t t, int64_t count, const float* tile, bool add) {
  Float rows[W] = {};
  for (int i = 0; i < count; i++) rows[i] = simd::load(tile + (s.step == 1 ? i : count - 1 - i) * W);
  simd::transpose(rows);
  T* to = corner<T>(s, c, t, count);
  for (int i = 0; i < W; i++, to += s.channel) simd::store_first(to, add ? simd::load_first(to, count) + rows[i] : rows[i], count);
}

template <class T, bool add>
void store_as(const Strided& s, const Tiles& from, int64_t channels, int64_t steps) {
  T* p = static_cast<T*>(s.data);
  const int64_t whole = channels / W * W, blocks = steps / W * W;
  int64_t stored = 0;
  auto put = [](T* q, Float v) { simd::store(q, add ? simd::load(q) + v : v); };
  if (s.channel == 1) {
    stored = steps;
    for (int64_t t = 0; t < steps; t++)
      for (int64_t c = 0; c < whole; c += W) put(p + t * s.step + c, simd::load(from.at + c / W * from.tile + t * W));
  } else if (s.step == 1 || s.step == -1) {
    stored = steps;
    for (int64_t c = 0; c < whole; c += W) {
      const float* tile = from.at + c / W * from.tile;
      for (int64_t t = 0; t < blocks; t += W) {
        Float rows[W];
        for (int i = 0; i < W; i++) rows[i] = simd::load(tile + (t + (s.step == 1 ? i : W - 1 - i)) * W);
        simd::transpose(rows);
        T* to = corner<T>(s, c, t, W);
        for (int i = 0; i < W; i++) put(to + i * s.channel, rows[i]);
      }
      if (blocks < steps) store_short<T>(s, c, blocks, steps - blocks, tile + blocks * W, add);
    }
  }
  for (int64_t c = 0; c < channels; c++)
    for (int64_t t = c < whole ? stored : 0; t < steps; t++) {
      T* q = p + c * s.channel + t * s.step;
      simd::narrow(q, from.at[c / W * from.tile + t * W + c % W] + (add ? simd::widen(*q) : 0.0f));
    }
}

// Writes `steps` steps of `channels` channels, or adds to them with `add`. The rows are W floats.
inline void store(const Strided& s, Tiles from, int64_t channels, int64_t steps, bool add = false) {
  const auto store = add ? (s.bf16 ? store_as<uint16_t, true> : store_as<float, true>)
                         : (s.bf16 ? store_as<uint16_t, false> : store_as<float, false>);
  store(s, from, channels, steps);
}

}  // namespace tiles
