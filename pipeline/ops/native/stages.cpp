// What lies between the stem and the classifier of EfficientViM, for inference on the CPU: the blocks of a stage in one call, a
// downsampler in another, and what the heads read.
#include "vision.h"

namespace vision {

constexpr int64_t group_rows = 8 * block_tiles * tile_rows, group_pixels = 4096;

namespace {

// The layers of a block. Of these structures only the weights, `channels`, `states`, `inner`, `hidden` and `eps` are set.
struct Block {
  MixerCall mixer;
  FfnCall ffn;
};

// All blocks of a stage have the same channels and states. `hidden` takes the hidden states of the last one.
struct StageCall {
  int64_t batch, height, width, count;
  const Block* blocks;
  const float* x;
  float *y, *hidden;  // hidden: (batch, states, channels padded)
};

struct Downsample {
  DepthwiseCall first;
  WidenCall widen;
  LinearCall squeeze, excite, narrow;
  DepthwiseCall last;
};

struct DownsampleCall {
  int64_t batch, height, width;
  const Downsample* layers;
  const float* x;
  float* y;
  float *first, *wide, *means, *squeezed, *factors, *narrow;  // scratch: the outputs of the layers
};

// y = mean over the rows of norm(x scale). Images of x and of y are image and out_image floats apart, rows of x `row` floats.
struct PoolCall {
  int64_t batch, rows, width, image, row, out_image, normed;
  double eps;
  const float *x, *scale;
  float* y;
};

// Takes `images` images from number `first` on through all blocks.
void blocks_of(const StageCall& s, int64_t first, int64_t images) {
  const MixerCall& of = s.blocks->mixer;
  const int64_t pixels = s.height * s.width, D = of.local.channels, wide = up(D, pad), N = of.states, rows = images * pixels;
  Scratch& scratch = Scratch::begin(rows * (2 * D + wide + 4 * N) + 2 * images * N * wide + 128, 1);
  float *mixed = scratch.take(rows * D), *map = scratch.take(rows * D), *tokens = scratch.take(rows * wide);
  float *projected = scratch.take(rows * 3 * N), *read = scratch.take(rows * N);
  float *gathered = scratch.take(images * N * wide), *h = scratch.take(images * N * wide);
  const float* x = s.x + first * pixels * D;
  for (int64_t i = 0; i < s.count; i++) {
    const bool last = i + 1 == s.count;
    MixerCall m = s.blocks[i].mixer;
    m.local.height = s.height, m.local.width = s.width, m.local.x = x, m.batch = images;
    m.y = mixed, m.tokens = tokens, m.rows = projected, m.read = read, m.gathered = gathered;
    m.h = last ? s.hidden + first * N * wide : h;
    mixer(m);
    FfnCall f = s.blocks[i].ffn;
    f.local.height = s.height, f.local.width = s.width, f.local.x = mixed, f.batch = images;
    f.y = last ? s.y + first * pixels * D : map;
    ffn(f);
    x = map;
  }
}

// Each thread takes as many images as the others through all blocks, in groups whose states share a pass over the weights and whose
// maps do not take much memory. All threads share the images that are left.
void stage(const StageCall& s) {
  const int64_t pixels = s.height * s.width;
  if (!pixels) return;
  const int64_t fewest = std::min(pixels, s.blocks->mixer.states);  // the fewest rows that an image adds to a product
  const int64_t group = std::clamp<int64_t>(up(group_rows, fewest) / fewest, 1, std::max<int64_t>(group_pixels / pixels, 1));
  by_images(
      s.batch,
      [&](int64_t, int64_t first, int64_t images) {
        const int64_t groups = up(images, group) / group;
        for (int64_t i = 0; i < groups; i++)
          blocks_of(s, first + i * images / groups, (i + 1) * images / groups - i * images / groups);
      },
      [&](int64_t first, int64_t images) { blocks_of(s, first, images); });
}

// The mean of the rows of each image.
void means(const float* x, int64_t batch, int64_t rows, int64_t width, float* to) {
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t c = 0; c < width; c += W) {
        Float sum{};
        for (int64_t r = 0; r < rows; r++) sum += load_some(x + (b * rows + r) * width + c, width - c);
        store_some(to + b * width + c, sum / float(rows), width - c);
      }
  });
}

void downsample(const DownsampleCall& s) {
  const Downsample& of = *s.layers;
  const int64_t height = (s.height + 1) / 2, width = (s.width + 1) / 2, pixels = height * width, wide = of.widen.out;
  auto local = [&](DepthwiseCall call, int64_t h, int64_t w, const float* x, float* y) {
    call.local.height = h, call.local.width = w, call.local.x = x, call.batch = s.batch, call.y = y;
    depthwise(call);
  };
  auto rows = [&](LinearCall call, int64_t count, const float* x, float* y) {
    call.rows = count, call.x = x, call.y = y;
    linear(call);
  };
  local(of.first, s.height, s.width, s.x, s.first);
  WidenCall w = of.widen;
  w.batch = s.batch, w.height = s.height, w.width = s.width, w.x = s.first, w.y = s.wide;
  widen(w);
  means(s.wide, s.batch, pixels, wide, s.means);
  rows(of.squeeze, s.batch, s.means, s.squeezed);
  rows(of.excite, s.batch, s.squeezed, s.factors);
  at::parallel_for(0, s.batch * pixels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t c = 0; c < wide; c += W) {
        float* to = s.wide + r * wide + c;
        store_some(to, load_some(to, wide - c) * load_some(s.factors + r / pixels * wide + c, wide - c), wide - c);
      }
  });
  rows(of.narrow, s.batch * pixels, s.wide, s.narrow);
  local(of.last, height, width, s.narrow, s.y);
}

void pool(const PoolCall& s) {
  at::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
    const int64_t whole = up(s.width, W);
    Scratch& scratch = Scratch::begin(2 * whole);
    float *row = scratch.take(whole), *sum = scratch.take(whole);
    for (int64_t b = begin; b < end; b++) {
      std::fill_n(sum, whole, 0.0f);
      for (int64_t r = 0; r < s.rows; r++) {
        const float* x = s.x + b * s.image + r * s.row;
        for (int64_t c = 0; c < s.width; c += W)
          store(row + c, load_some(x + c, s.width - c) * load_some(s.scale + c, s.width - c));
        const Moments of = s.normed ? moments(row, s.width, float(s.eps), true) : Moments{0, 1};
        for (int64_t c = 0; c < s.width; c += W) store(sum + c, load(sum + c) + (load(row + c) - of.mean) * of.scale);
      }
      for (int64_t c = 0; c < s.width; c += W)
        store_some(s.y + b * s.out_image + c, load(sum + c) / float(s.rows), s.width - c);
    }
  });
}

}  // namespace
}  // namespace vision

extern "C" {
int64_t vision_stage(const vision::StageCall* call) {
  return products::guarded([=] { vision::stage(*call); });
}
int64_t vision_downsample(const vision::DownsampleCall* call) {
  return products::guarded([=] { vision::downsample(*call); });
}
int64_t vision_pool(const vision::PoolCall* call) {
  return products::guarded([=] { vision::pool(*call); });
}
}
