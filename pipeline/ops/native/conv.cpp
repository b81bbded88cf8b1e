// Depthwise causal convolution with SiLU, and its backward; one or two directions of one input in one call.
//
// Units, tiles and reversal as in scan.cpp. Output t sees inputs t-K+1..t; `x` is read once from memory and a second time
// from the cache. The backward recomputes the convolution instead of keeping it, walks from the last chunk to the first
// and adds the second direction's input gradient to the first one's.

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "tiles.h"

using simd::Float;
using simd::load;
using simd::store;
using simd::W;

// Mirrored field by field in operators.py.
struct ConvDirection {
  Strided x, o, g_o, g_x;
  const float *weight, *bias;      // (E, K), (E) contiguous; bias may be absent
  float *part_weight, *part_bias;  // (Bt, E, K), (Bt, E)
};

struct Conv {
  int64_t batch, channels, taps, steps, directions;
  ConvDirection direction[2];
};

namespace {

constexpr int64_t chunk_steps = 64;

// The first `steps` rows of a tile from step t0 on, zero where t0 + row is outside [0, L).
void load_padded(float* tile, const Strided& s, int64_t t0, int64_t steps, int64_t length, int64_t channels) {
  const int64_t before = std::min(steps, std::max<int64_t>(0, -t0));
  const int64_t inside = std::max<int64_t>(0, std::min(t0 + steps, length) - (t0 + before));
  std::fill_n(tile, before * W, 0.0f);
  tiles::load({tile + before * W, 0, W}, s.from_step(t0 + before), channels, inside);
  std::fill_n(tile + (before + inside) * W, (steps - before - inside) * W, 0.0f);
}

struct Rows {
  std::vector<float> weight, bias;  // [tap][lane], [lane]
  Rows(const Conv& s, const ConvDirection& d, int64_t first, int64_t channels) : weight(s.taps * W), bias(W) {
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t k = 0; k < s.taps; k++) weight[k * W + c] = d.weight[(first + c) * s.taps + k];
      if (d.bias) bias[c] = d.bias[first + c];
    }
  }
};

Float convolve(const Rows& rows, const float* x, int64_t taps) {
  Float sum = load(rows.bias.data());
  for (int64_t k = 0; k < taps; k++) sum += load(rows.weight.data() + k * W) * load(x + k * W);
  return sum;
}

void forward_tile(const Conv& s, const ConvDirection& d, int64_t b, int64_t first, int64_t channels, bool) {
  const Rows rows(s, d, first, channels);
  const Strided x = d.x.at(b, 0, first), o = d.o.at(b, 0, first);
  std::vector<float> in((chunk_steps + s.taps - 1) * W), out(chunk_steps * W);
  for (int64_t t0 = 0; t0 < s.steps; t0 += chunk_steps) {
    const int64_t steps = std::min(chunk_steps, s.steps - t0);
    load_padded(in.data(), x, t0 - s.taps + 1, steps + s.taps - 1, s.steps, channels);
    for (int64_t t = 0; t < steps; t++) {
      Float sum = convolve(rows, in.data() + t * W, s.taps);
      store(out.data() + t * W, sum * simd::sigmoid(sum));
    }
    tiles::store(o.from_step(t0), {out.data(), 0, W}, channels, steps);
  }
}

void backward_tile(const Conv& s, const ConvDirection& d, int64_t b, int64_t first, int64_t channels, bool add) {
  const Rows rows(s, d, first, channels);
  const Strided x = d.x.at(b, 0, first), g_o = d.g_o.at(b, 0, first), g_x = d.g_x.at(b, 0, first);
  const int64_t halo = s.taps - 1;
  std::vector<float> in((chunk_steps + halo) * W), g((chunk_steps + halo) * W), out(chunk_steps * W);
  std::vector<float> g_weight(s.taps * W);
  Float g_bias{};
  // g holds the gradient at the convolution's output: `steps` rows of this chunk, then `halo` rows of the later one.
  for (int64_t t0 = (s.steps - 1) / chunk_steps * chunk_steps; t0 >= 0; t0 -= chunk_steps) {
    const int64_t steps = std::min(chunk_steps, s.steps - t0);
    std::copy_backward(g.begin(), g.begin() + halo * W, g.begin() + (steps + halo) * W);
    load_padded(in.data(), x, t0 - halo, steps + halo, s.steps, channels);
    tiles::load({g.data(), 0, W}, g_o.from_step(t0), channels, steps);
    for (int64_t t = 0; t < steps; t++) {
      Float sum = convolve(rows, in.data() + t * W, s.taps), sigmoid = simd::sigmoid(sum);
      Float g_sum = load(g.data() + t * W) * sigmoid * (1.0f + sum * (1.0f - sigmoid));
      store(g.data() + t * W, g_sum);
      g_bias += g_sum;
      for (int64_t k = 0; k < s.taps; k++)
        store(g_weight.data() + k * W, load(g_weight.data() + k * W) + g_sum * load(in.data() + (t + k) * W));
    }
    for (int64_t t = 0; t < steps; t++) {
      Float sum{};
      for (int64_t k = 0; k < s.taps; k++) sum += load(rows.weight.data() + k * W) * load(g.data() + (t + halo - k) * W);
      store(out.data() + t * W, sum);
    }
    tiles::store(g_x.from_step(t0), {out.data(), 0, W}, channels, steps, add);
  }
  for (int64_t c = 0; c < channels; c++) {
    const int64_t row = b * s.channels + first + c;
    d.part_bias[row] = g_bias[c];
    for (int64_t k = 0; k < s.taps; k++) d.part_weight[row * s.taps + k] = g_weight[k * W + c];
  }
}

void for_tiles(const Conv& s, void (*work)(const Conv&, const ConvDirection&, int64_t, int64_t, int64_t, bool)) {
  const int64_t tiles = (s.channels + W - 1) / W;
  at::parallel_for(0, s.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t k = 0; k < s.directions; k++) {
        const int64_t first = i % tiles * W;
        work(s, s.direction[k], i / tiles, first, std::min<int64_t>(W, s.channels - first), k > 0);
      }
  });
}

}  // namespace

extern "C" {
int64_t conv_struct_bytes() { return sizeof(Conv); }
void conv_forward(const Conv* s) { for_tiles(*s, forward_tile); }
void conv_backward(const Conv* s) { for_tiles(*s, backward_tile); }
}
