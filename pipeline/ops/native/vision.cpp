// Inference of EfficientViM on the CPU, fp32. A layer and the operations after it run together while the data is in the cache.
//
// Maps are channels-last and contiguous. Images, rows and columns of a call are divided among the threads. One thread computes
// each output element in a fixed order, so the result does not depend on the number of threads.
#include "layers.h"

using namespace products;

namespace {

constexpr int64_t band_pixels = 512;  // pixels of a band whose wide map fits the cache

// A 3x3 depthwise convolution with zero padding and stride 1 of a channels-last map (batch, height, width, channels).
struct Local {
  int64_t height, width, channels;
  const float *x, *weight, *bias;  // (9, channels), (channels)

  // Computes `count` pixels from pixel `first` on.
  void rows(int64_t first, int count, float* to) const {
    thread_local std::vector<float> zeros;
    if (int64_t(zeros.size()) < channels) zeros.resize(channels);
    const float* pixels[tile_rows][9];
    for (int r = 0; r < count; r++) {
      const int64_t at = first + r, y = at / width % height, x_ = at % width;
      for (int k = 0; k < 9; k++) {
        const int64_t i = k / 3 - 1, j = k % 3 - 1;
        const bool outside = y + i < 0 || y + i >= height || x_ + j < 0 || x_ + j >= width;
        pixels[r][k] = outside ? zeros.data() : x + (at + i * width + j) * channels;
      }
    }
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t lanes = channels - c;
      Float taps[9];
#pragma GCC unroll 9
      for (int k = 0; k < 9; k++) taps[k] = load_some(weight + k * channels + c, lanes);
      const Float offset = load_some(bias + c, lanes);
      for (int r = 0; r < count; r++) {
        Float sum = offset;
        if (lanes >= W) {
#pragma GCC unroll 9
          for (int k = 0; k < 9; k++) sum += taps[k] * load(pixels[r][k] + c);
          store(to + r * channels + c, sum);
        } else {
          for (int k = 0; k < 9; k++) sum += taps[k] * load_some(pixels[r][k] + c, lanes);
          store_some(to + r * channels + c, sum, lanes);
        }
      }
    }
  }
};

// Mirrored field by field in vision_library.py, which lays the weights out as panels of columns with padded inputs.
struct LinearCall {
  int64_t rows, in, out, act;
  const float *x, *weight, *bias;
  float* y;
};

struct FfnCall {
  Local local;
  int64_t batch, hidden;
  const float *up, *up_bias, *down, *down_bias;
  float* y;
};

struct DepthwiseCall {
  Local local;
  int64_t batch;
  float* y;
};

struct WidenCall {
  int64_t batch, height, width, in, out;
  const float *x, *weight, *bias, *taps, *taps_bias;
  float* y;
};

struct MixerCall {
  Local local;
  int64_t batch, states, inner;  // states: padded to 16; inner: outputs of to_h and to_gate
  double eps;
  const float *gamma, *beta, *project, *spread, *to_h, *to_gate, *skip, *to_out;
  float *y, *tokens, *rows, *read, *gathered, *h;
};

// y = act(x W + b).
void linear(const LinearCall& s) {
  const int64_t in = up(s.in, pad);
  const float least = least_of(s.act);
  product(
      s.rows, in, s.out, s.weight,
      [&](int64_t row, int count, float* tile) { pack_tile(s.x + row * s.in, s.in, in, count, tile); },
      [&](int64_t row, int64_t column, Float sum) {
        store_some(s.y + row * s.out + column, at_least(sum + load(s.bias + column), least), s.out - column);
      },
      [&](int64_t row, int count, int64_t column, int64_t columns) {
        activate(s.y + row * s.out + column, s.out, count, columns, s.act);
      });
}

// y = t + W2 relu(W1 t + b1) + b2 with t = DWConv(x). The hidden rows never leave the cache.
void ffn(const FfnCall& s) {
  const int64_t D = s.local.channels, in = up(D, pad), hidden = up(s.hidden, pad);
  const Cut cut(s.batch * s.local.height * s.local.width, at::get_num_threads());
  in_blocks(cut, block_tiles, [&](int64_t t0, int64_t t1) {
    Scratch& scratch = Scratch::begin(block_tiles * tile_rows * (in + hidden) + tile_rows * D);
    float *x = scratch.take(block_tiles * tile_rows * in), *h = scratch.take(block_tiles * tile_rows * hidden);
    float* rows = scratch.take(tile_rows * D);
    for (int64_t t = t0; t < t1; t++) {
      s.local.rows(cut.first(t), cut.height(t), rows);
      pack_tile(rows, D, in, cut.height(t), x + (t - t0) * tile_rows * in);
    }
    for (int64_t n = 0; n < hidden; n += panel)
      for (int64_t t = t0; t < t1; t++)
        with_sizes(cut.height(t), panel, [&]<int R, int V>() {
          float* to = h + (t - t0) * tile_rows * hidden + n * R;
          multiply<R, V>(x + (t - t0) * tile_rows * in, s.up + n * in, panel, in / W, [&](int r, int v, Float sum) {
            store(to + (v * R + r) * W, at_least(sum + load(s.up_bias + n + v * W), 0));
          });
        });
    for (int64_t n = 0; n < D; n += panel)
      for (int64_t t = t0; t < t1; t++)
        with_sizes(cut.height(t), D - n, [&]<int R, int V>() {
          const float* own = x + (t - t0) * tile_rows * in + n * R;
          float* to = s.y + cut.first(t) * D + n;
          multiply<R, V>(h + (t - t0) * tile_rows * hidden, s.down + n * hidden, panel, hidden / W, [&](int r, int v, Float sum) {
            sum += load(s.down_bias + n + v * W) + load(own + (v * R + r) * W);
            store_some(to + r * D + v * W, sum, D - n - v * W);
          });
        });
  });
}

// Computes a row of a 3x3 depthwise convolution for one vector of channels. `rows` are the three input rows, null outside the
// map; `put(x, sum)` takes the results. Neighbouring pixels are `stride_x` floats apart.
template <int stride, class Put>
inline __attribute__((always_inline)) void depthwise_row(
    const float* const rows[3], int64_t stride_x, int64_t width, int64_t out_width, const Float (&weight)[9], Float bias,
    Put&& put) {
  for (int64_t x = 0; x < out_width; x++) {
    Float sum = bias;
    const bool inside = x > 0 && x * stride + 1 < width;
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
      if (!rows[i]) continue;
      const float* at = rows[i] + (x * stride - 1) * stride_x;
      if (inside) {
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) sum += weight[3 * i + j] * load(at + j * stride_x);
      } else {
        for (int j = 0; j < 3; j++)
          if (x * stride + j >= 1 && x * stride + j <= width) sum += weight[3 * i + j] * load(at + j * stride_x);
      }
    }
    put(x, sum);
  }
}

// The depthwise convolution alone.
void depthwise(const DepthwiseCall& s) {
  const Cut cut(s.batch * s.local.height * s.local.width, at::get_num_threads());
  in_blocks(cut, 1, [&](int64_t t, int64_t) {
    s.local.rows(cut.first(t), cut.height(t), s.y + cut.first(t) * s.local.channels);
  });
}

// relu(DWConv(relu(x W + b))) with stride 2, one panel of channels at a time, so that the wide map never leaves the cache.
void widen(const WidenCall& s) {
  const int64_t L = s.height * s.width, in = up(s.in, pad), threads = at::get_num_threads();
  const int64_t out_height = (s.height + 1) / 2, out_width = (s.width + 1) / 2, panels = up(s.out, panel) / panel;
  // A unit is a band of rows of an image, or several small images that share a pass over the weights. If there are fewer units
  // than threads, the panels are divided as well.
  const int64_t band = std::clamp<int64_t>(band_pixels / s.width / 2, 1, out_height), bands = up(out_height, band) / band;
  const int64_t together = bands > 1 ? 1 : std::clamp<int64_t>(block_tiles * tile_rows / L, 1, std::max<int64_t>(s.batch / threads, 1));
  const int64_t units = up(s.batch, together) / together * bands, shares = std::clamp<int64_t>(threads / units, 1, panels);
  at::parallel_for(0, units * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b0 = unit / shares / bands * together, b1 = std::min(b0 + together, s.batch);
      const int64_t y0 = unit / shares % bands * band, y1 = std::min(y0 + band, out_height);
      const int64_t top = std::max<int64_t>(2 * y0 - 1, 0), bottom = std::min(2 * y1, s.height);
      const int64_t n0 = unit % shares * panels / shares * panel, n1 = (unit % shares + 1) * panels / shares * panel;
      const int64_t pixels = (bottom - top) * s.width, first = b0 * L + top * s.width;  // number and start for each image of this unit
      const Cut cut((b1 - b0) * pixels, 1);
      Scratch& scratch = Scratch::begin(cut.tiles * tile_rows * in + cut.rows * panel);
      float *x = scratch.take(cut.tiles * tile_rows * in), *map = scratch.take(cut.rows * panel);
      for (int64_t t = 0; t < cut.tiles; t++)
        pack_tile(s.x + (first + cut.first(t)) * s.in, s.in, in, cut.height(t), x + t * tile_rows * in);
      for (int64_t n = n0; n < n1; n += panel) {
        for (int64_t t = 0; t < cut.tiles; t++)
          with_sizes(cut.height(t), s.out - n, [&]<int R, int V>() {
            float* to = map + cut.first(t) * panel;
            multiply<R, V>(x + t * tile_rows * in, s.weight + n * in, panel, in / W, [&](int r, int v, Float sum) {
              store(to + r * panel + v * W, at_least(sum + load(s.bias + n + v * W), 0));
            });
          });
        for (int64_t c = n; c < std::min(n + panel, s.out); c += W) {
          const int64_t lanes = s.out - c;
          Float weight[9];
          for (int k = 0; k < 9; k++) weight[k] = load_some(s.taps + k * s.out + c, lanes);
          const Float bias = load_some(s.taps_bias + c, lanes);
          for (int64_t b = b0; b < b1; b++)
            for (int64_t y = y0; y < y1; y++) {
              const float* rows[3];
              for (int i = 0; i < 3; i++) {
                const int64_t at = 2 * y - 1 + i;
                rows[i] = at < 0 || at >= s.height ? nullptr : map + ((b - b0) * pixels + (at - top) * s.width) * panel + c - n;
              }
              float* to = s.y + (b * out_height + y) * out_width * s.out + c;
              depthwise_row<2>(rows, panel, s.width, out_width, weight, bias, [&](int64_t x_, Float sum) {
                store_some(to + x_ * s.out, at_least(sum, 0), lanes);
              });
            }
        }
      }
    }
  });
}

// HSM-SSD with the convolution and the norm before it and the sum after it. With x' = DWConv(x), t = LN(x') and
// (b, c, d) = DWConv(t P), each (states, pixels): s = (softmax(d) b) t, h = ((s Wh) (SiLU(s Wz) + skip)) Wo, y = x' + c' h
// (EfficientViM, section 3.2).
void mixer(const MixerCall& s) {
  const int64_t height = s.local.height, width = s.local.width, L = height * width;
  const int64_t D = s.local.channels, N = s.states, in = up(D, pad), inner = up(s.inner, pad), all = 3 * N;
  const int64_t threads = at::get_num_threads();
  const Cut image(L, 1);  // tiles of one image
  const int64_t tiles = s.batch * image.tiles;

  // Computes x', which stays in y, then t and its projection.
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t0 = begin; t0 < end; t0 += block_tiles) {
      const int64_t t1 = std::min(t0 + block_tiles, end);
      float* tile = Scratch::begin(block_tiles * tile_rows * in).take(block_tiles * tile_rows * in);
      auto first = [&](int64_t t) { return t / image.tiles * L + image.first(t % image.tiles); };
      for (int64_t t = t0; t < t1; t++) {
        const int R = image.height(t % image.tiles);
        s.local.rows(first(t), R, s.y + first(t) * D);
        for (int r = 0; r < R; r++) {
          const float* x = s.y + (first(t) + r) * D;
          float *token = s.tokens + (first(t) + r) * in, *to = tile + (t - t0) * tile_rows * in + r * W;
          const auto [mean, scale] = moments(x, D, float(s.eps), true);
          for (int64_t c = 0; c < in; c += W) {  // gamma and beta are zero beyond D
            const Float value = (load_some(x + c, D - c) - mean) * scale * load(s.gamma + c) + load(s.beta + c);
            store(token + c, value);
            store(to + c * R, value);
          }
        }
      }
      for (int64_t n = 0; n < all; n += panel)
        for (int64_t t = t0; t < t1; t++)
          with_sizes(image.height(t % image.tiles), all - n, [&]<int R, int V>() {
            float* to = s.rows + first(t) * all + n;
            multiply<R, V>(tile + (t - t0) * tile_rows * in, s.project + n * in, panel, in / W, [&](int r, int v, Float sum) {
              store(to + r * all + v * W, sum);
            });
          });
    }
  });

  // Computes b, c and d of 16 states, the softmax, and s.
  constexpr int64_t some = 16;
  at::parallel_for(0, s.batch * N / some, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / (N / some), n = unit % (N / some) * some;
      Scratch& scratch = Scratch::begin(2 * L * some);
      float *share = scratch.take(L * some), *depth = scratch.take(L * some);  // (L, 16)
      for (int kind = 0; kind < 3; kind++)
        for (int64_t lane = 0; lane < some; lane += W) {
          const int64_t column = kind * N + n + lane;
          Float weight[9];
          for (int k = 0; k < 9; k++) weight[k] = load(s.spread + k * all + column);
          for (int64_t y = 0; y < height; y++) {
            const float* rows[3];
            for (int i = 0; i < 3; i++) {
              const int64_t at = y - 1 + i;
              rows[i] = at < 0 || at >= height ? nullptr : s.rows + ((b * height + at) * width) * all + column;
            }
            depthwise_row<1>(rows, all, width, width, weight, Float{}, [&](int64_t x, Float sum) {
              const int64_t l = y * width + x;
              float* to = kind == 1 ? s.read + (b * L + l) * N + n + lane : (kind ? depth : share) + l * some + lane;
              store(to, sum);
            });
          }
        }
      for (int64_t lane = 0; lane < some; lane += W) {
        Float most = load(depth + lane), sum{};
        for (int64_t l = 1; l < L; l++) {
          const Float d = load(depth + l * some + lane);
          most = d > most ? d : most;
        }
        for (int64_t l = 0; l < L; l++) {
          const Float e = simd::exp(load(depth + l * some + lane) - most);
          store(share + l * some + lane, load(share + l * some + lane) * e);
          sum += e;
        }
        for (int64_t l = 0; l < L; l++) store(share + l * some + lane, load(share + l * some + lane) / sum);
      }
      const Cut cut(some, 1);
      for (int64_t c = 0; c < in; c += panel)
        for (int64_t t = 0; t < cut.tiles; t++)
          with_sizes(cut.height(t), in - c, [&]<int R, int V>() {
            const float* of = share + cut.first(t);
            float* to = s.gathered + (b * N + n + cut.first(t)) * in + c;
            multiply_side_by_side<R, V>(
                [&](int64_t l) { return of + l * some; }, s.tokens + b * L * in + c, in, L,
                [&](int r, int v, Float sum) { store(to + r * in + v * W, sum); });
          });
    }
  });

  // Computes h of all images at once, so that their states share a pass over the weights.
  const Cut states(s.batch * N, threads);
  constexpr int64_t many = 2 * block_tiles;
  in_blocks(states, many, [&](int64_t t0, int64_t t1) {
    Scratch& scratch = Scratch::begin(many * tile_rows * (in + inner) + tile_rows * panel);
    float *x = scratch.take(many * tile_rows * in), *h = scratch.take(many * tile_rows * inner);
    float* gate = scratch.take(tile_rows * panel);
    for (int64_t t = t0; t < t1; t++)
      pack_tile(s.gathered + states.first(t) * in, in, in, states.height(t), x + (t - t0) * tile_rows * in);
    for (int64_t n = 0; n < inner; n += panel)
      for (int64_t t = t0; t < t1; t++)
        with_sizes(states.height(t), panel, [&]<int R, int V>() {
          const float* from = x + (t - t0) * tile_rows * in;
          float* to = h + (t - t0) * tile_rows * inner + n * R;
          multiply<R, V>(from, s.to_gate + n * in, panel, in / W, [&](int r, int v, Float sum) {
            store(gate + r * panel + v * W, sum);
          });
          activate(gate, panel, R, panel, silu);
          multiply<R, V>(from, s.to_h + n * in, panel, in / W, [&](int r, int v, Float sum) {
            store(to + (v * R + r) * W, sum * (load(gate + r * panel + v * W) + load(s.skip + n + v * W)));
          });
        });
    for (int64_t n = 0; n < D; n += panel)
      for (int64_t t = t0; t < t1; t++)
        with_sizes(states.height(t), panel, [&]<int R, int V>() {
          float* to = s.h + states.first(t) * in + n;
          multiply<R, V>(h + (t - t0) * tile_rows * inner, s.to_out + n * inner, panel, inner / W, [&](int r, int v, Float sum) {
            store(to + r * in + v * W, sum);
          });
        });
  });

  // Computes y = x' + c' h.
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    float* tile = Scratch::begin(tile_rows * N).take(tile_rows * N);
    for (int64_t t = begin; t < end; t++) {
      const int64_t b = t / image.tiles, first = b * L + image.first(t % image.tiles);
      const int R = image.height(t % image.tiles);
      pack_tile(s.read + first * N, N, N, R, tile);
      for (int64_t c = 0; c < D; c += panel)
        with_sizes(R, D - c, [&]<int R, int V>() {
          float* to = s.y + first * D + c;
          multiply<R, V>(tile, s.h + b * N * in + c, in, N / W, [&](int r, int v, Float sum) {
            const int64_t left = D - c - v * W;
            store_some(to + r * D + v * W, sum + load_some(to + r * D + v * W, left), left);
          });
        });
    }
  });
}

}  // namespace

extern "C" {
int64_t vision_panel() { return panel; }
int64_t vision_linear(const LinearCall* call) {
  return guarded([=] { linear(*call); });
}
int64_t vision_ffn(const FfnCall* call) {
  return guarded([=] { ffn(*call); });
}
int64_t vision_depthwise(const DepthwiseCall* call) {
  return guarded([=] { depthwise(*call); });
}
int64_t vision_widen(const WidenCall* call) {
  return guarded([=] { widen(*call); });
}
int64_t vision_mixer(const MixerCall* call) {
  return guarded([=] { mixer(*call); });
}
}
