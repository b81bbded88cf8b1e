// The mixer of EfficientViM for inference on the CPU, with the convolution and the norm before it and the sum after it.
#include "vision.h"

namespace vision {

// HSM-SSD with the convolution and the norm before it and the sum after it. With x' = DWConv(x), t = LN(x') and
// (b, c, d) = DWConv(t P), each (states, pixels): s = (softmax(d) b) t, h = ((s Wh) (SiLU(s Wz) + skip)) Wo, y = x' + c' h
// (EfficientViM, section 3.2).
void mixer(const MixerCall& s) {
  const int64_t height = s.local.height, width = s.local.width, L = height * width;
  const int64_t D = s.local.channels, N = s.states, in = up(D, pad), inner = up(s.inner, pad), all = 3 * N;
  const int64_t threads = free_threads();
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

}  // namespace vision

extern "C" {
int64_t vision_mixer(const vision::MixerCall* call) {
  return products::guarded([=] { vision::mixer(*call); });
}
}
