// The layers of EfficientViM except its mixer. A layer and the operations after it run together while the data is in the cache.
#include "vision.h"

namespace vision {

constexpr int64_t band_pixels = 512;  // pixels of a band whose wide map fits the cache

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
  const Cut cut(s.batch * s.local.height * s.local.width, free_threads());
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

// The depthwise convolution alone.
void depthwise(const DepthwiseCall& s) {
  const Cut cut(s.batch * s.local.height * s.local.width, free_threads());
  in_blocks(cut, 1, [&](int64_t t, int64_t) {
    s.local.rows(cut.first(t), cut.height(t), s.y + cut.first(t) * s.local.channels);
  });
}

// relu(DWConv(relu(x W + b))) with stride 2, one panel of channels at a time, so that the wide map never leaves the cache.
void widen(const WidenCall& s) {
  const int64_t L = s.height * s.width, in = up(s.in, pad), threads = free_threads();
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

}  // namespace vision

extern "C" {
int64_t vision_panel() { return products::panel; }
int64_t vision_linear(const vision::LinearCall* call) {
  return products::guarded([=] { vision::linear(*call); });
}
int64_t vision_ffn(const vision::FfnCall* call) {
  return products::guarded([=] { vision::ffn(*call); });
}
int64_t vision_depthwise(const vision::DepthwiseCall* call) {
  return products::guarded([=] { vision::depthwise(*call); });
}
int64_t vision_widen(const vision::WidenCall* call) {
  return products::guarded([=] { vision::widen(*call); });
}
}
