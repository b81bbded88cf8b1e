// Depthwise causal convolution with SiLU, and its backward, for one or two directions of one input in one call.
//
// Units, tiles and reversal are as in scan.cpp. Output t sees inputs t-K+1..t. The second direction reads x from the
// cache. The backward recomputes the convolution instead of keeping it. It walks from the last chunk to the first, and adds
// the input gradient of the second direction to that of the first.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "tiles.h"

using simd::Float;
using simd::load;
using simd::store;
using simd::W;

// Mirrored field by field in library.py.
struct ConvDirection {
  Strided x, o, g_o, g_x;
  const float *weight, *bias;            // (E, K), (E), contiguous; bias may be absent
  float *partial_weight, *partial_bias;  // (Bt, E, K), (Bt, E)
};

struct Conv {
  int64_t batch, channels, taps, steps, directions;
  ConvDirection direction[2];
};

namespace {

constexpr int64_t chunk_steps = 32, unit_channels = 128, unit_tiles = unit_channels / W;
constexpr int64_t thread_work = 1 << 16;  // outputs that justify waking a thread
constexpr int64_t max_taps = 8;  // shapes.py refuses more
constexpr int64_t tile_rows = chunk_steps + max_taps - 1, tile_floats = tile_rows * W;

// Inputs of a chunk with the halo before it, and gradients of a chunk with the halo after it, as rows of W in tiles.
struct Scratch {
  alignas(64) float x[unit_tiles * tile_floats], g[unit_tiles * tile_floats], out[unit_tiles * tile_floats];
  alignas(64) float weight[unit_tiles][max_taps * W], bias[unit_tiles][W];
  alignas(64) float g_weight[unit_tiles][max_taps * W], g_bias[unit_tiles][W];

  void load_filter(const Conv& s, const ConvDirection& d, int64_t first, int64_t channels) {
    std::memset(weight, 0, sizeof weight + sizeof bias + sizeof g_weight + sizeof g_bias);
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t k = 0; k < s.taps; k++) weight[c / W][k * W + c % W] = d.weight[(first + c) * s.taps + k];
      if (d.bias) bias[c / W][c % W] = d.bias[first + c];
    }
  }
  // Loads x from step t0 - halo on, with zeros before the first step.
  void load_inputs(const Strided& s, int64_t t0, int64_t halo, int64_t steps, int64_t channels) {
    const int64_t missing = std::max<int64_t>(0, halo - t0);
    for (int64_t i = 0; i < unit_tiles; i++) std::fill_n(x + i * tile_floats, missing * W, 0.0f);
    tiles::load({x + missing * W, tile_floats, W}, s.from_step(t0 - halo + missing), channels, steps + halo - missing);
  }
};

// K, the number of taps, is a template argument, so that the filter stays in registers.
template <int K>
void forward_unit(const Conv& s, const ConvDirection& d, int64_t b, int64_t first, int64_t channels, bool) {
  thread_local Scratch m;
  m.load_filter(s, d, first, channels);
  for (int64_t t0 = 0; t0 < s.steps; t0 += chunk_steps) {
    const int64_t steps = std::min(chunk_steps, s.steps - t0);
    m.load_inputs(d.x.at(b, 0, first), t0, K - 1, steps, channels);
    const int64_t ahead = std::min(chunk_steps, s.steps - t0 - steps);
    for (int64_t i = 0; i * W < channels; i++) {
      tiles::prefetch(d.x.at(b, 0, first).from_step(t0 + steps), channels, ahead, i, pieces(channels, W));
      tiles::prefetch(d.o.at(b, 0, first).from_step(t0), channels, steps, i, pieces(channels, W));
      const float* x = m.x + i * tile_floats;
      float* out = m.out + i * tile_floats;
      Float w[K];
      for (int k = 0; k < K; k++) w[k] = load(m.weight[i] + k * W);
      const Float bias = load(m.bias[i]);
      for (int64_t t = 0; t < steps; t++) {
        Float sum = bias;
        for (int k = 0; k < K; k++) sum += w[k] * load(x + (t + k) * W);
        store(out + t * W, sum * simd::sigmoid(sum));
      }
    }
    tiles::store(d.o.at(b, 0, first).from_step(t0), {m.out, tile_floats, W}, channels, steps);
  }
}

template <int K>
void backward_unit(const Conv& s, const ConvDirection& d, int64_t b, int64_t first, int64_t channels, bool add) {
  thread_local Scratch m;
  m.load_filter(s, d, first, channels);
  std::memset(m.g, 0, sizeof m.g);
  constexpr int64_t halo = K - 1;
  for (int64_t t0 = (s.steps - 1) / chunk_steps * chunk_steps; t0 >= 0; t0 -= chunk_steps) {
    const int64_t steps = std::min(chunk_steps, s.steps - t0);
    m.load_inputs(d.x.at(b, 0, first), t0, halo, steps, channels);
    for (int64_t i = 0; i < unit_tiles; i++) {  // the first rows of the later chunk become the halo of this one
      float* g = m.g + i * tile_floats;
      std::memmove(g + steps * W, g, halo * W * sizeof(float));
    }
    tiles::load({m.g, tile_floats, W}, d.g_o.at(b, 0, first).from_step(t0), channels, steps);
    const int64_t ahead = std::min(chunk_steps, t0);
    for (int64_t i = 0; i * W < channels; i++) {
      for (const Strided* tensor : {&d.x, &d.g_o})
        tiles::prefetch(tensor->at(b, 0, first).from_step(t0 - ahead), channels, ahead, i, pieces(channels, W));
      tiles::prefetch(d.g_x.at(b, 0, first).from_step(t0), channels, steps, i, pieces(channels, W));
      const float* x = m.x + i * tile_floats;
      float *g = m.g + i * tile_floats, *out = m.out + i * tile_floats;
      Float w[K], g_w[K];
      for (int k = 0; k < K; k++) w[k] = load(m.weight[i] + k * W), g_w[k] = load(m.g_weight[i] + k * W);
      const Float bias = load(m.bias[i]);
      Float g_bias = load(m.g_bias[i]);
      for (int64_t t = 0; t < steps; t++) {
        Float sum = bias;
        for (int k = 0; k < K; k++) sum += w[k] * load(x + (t + k) * W);
        const Float sigmoid = simd::sigmoid(sum);
        const Float g_sum = load(g + t * W) * sigmoid * (1.0f + sum * (1.0f - sigmoid));
        store(g + t * W, g_sum);
        g_bias += g_sum;
        for (int k = 0; k < K; k++) g_w[k] += g_sum * load(x + (t + k) * W);
      }
      for (int64_t t = 0; t < steps; t++) {
        Float sum{};
        for (int k = 0; k < K; k++) sum += w[k] * load(g + (t + halo - k) * W);
        store(out + t * W, sum);
      }
      for (int k = 0; k < K; k++) store(m.g_weight[i] + k * W, g_w[k]);
      store(m.g_bias[i], g_bias);
    }
    tiles::store(d.g_x.at(b, 0, first).from_step(t0), {m.out, tile_floats, W}, channels, steps, add);
  }
  for (int64_t c = 0; c < channels; c++) {
    const int64_t row = b * s.channels + first + c;
    d.partial_bias[row] = m.g_bias[c / W][c % W];
    for (int64_t k = 0; k < K; k++) d.partial_weight[row * K + k] = m.g_weight[c / W][k * W + c % W];
  }
}

using Work = void (*)(const Conv&, const ConvDirection&, int64_t, int64_t, int64_t, bool);

template <int... K>
Work pick(bool backward, int64_t taps, std::integer_sequence<int, K...>) {
  Work work = nullptr;
  ((taps == K + 1 ? void(work = backward ? backward_unit<K + 1> : forward_unit<K + 1>) : void()), ...);
  return work;
}

void for_units(const Conv& s, bool backward) {
  const Work work = pick(backward, s.taps, std::make_integer_sequence<int, max_taps>{});
  const int64_t blocks = pieces(s.channels, unit_channels);
  const int64_t unit_work = std::min(unit_channels, s.channels) * s.steps + 1;
  at::parallel_for(0, s.batch * blocks, pieces(thread_work, unit_work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t k = 0; k < s.directions; k++) {
        const int64_t first = i % blocks * unit_channels;
        work(s, s.direction[k], i / blocks, first, std::min(unit_channels, s.channels - first), k > 0);
      }
  });
}

}  // namespace

extern "C" {
int64_t conv_struct_bytes() { return sizeof(Conv); }
void conv_forward(const Conv* s) { for_units(*s, false); }
void conv_backward(const Conv* s) { for_units(*s, true); }
}
