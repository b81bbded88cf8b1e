// The stem of EfficientViM on the CPU, fp32: 3x3 convolutions with stride 2 from images or channels-last maps to such maps.
#include "layers.h"

using namespace products;

namespace {

// Mirrored field by field in vision_library.py.
struct ConvCall {
  int64_t batch, height, width, in, out, act;
  const float *x, *weight, *bias;
  float* y;
};

// Convolutions one after another, `count` of them in `others`. Only the last one has `y`, only the first one `x`.
struct StemCall {
  ConvCall one, two;
  int64_t count;
  const ConvCall* others;
};

// A 3x3 convolution with stride 2 and zero padding of an image (in, height, width). It computes one row (out_width, out) at
// a time.
class ImageConv {
 public:
  static int64_t line(const ConvCall& s) { return up((s.width + 1) / 2 + 1, 16); }
  static int64_t floats(const ConvCall& s) { return 3 * s.in * 2 * line(s); }
  ImageConv(const ConvCall& s, Scratch& scratch) : s_(s), lines_(scratch.take(floats(s))), at_(9 * s.in) {}

  void row(const float* image, int64_t y, float* to) {
    const int64_t out_width = (s_.width + 1) / 2, taps = 9 * s_.in, line = ImageConv::line(s_);
    const float least = least_of(s_.act);
    for (int64_t i = 0; i < 3; i++)
      for (int64_t c = 0; c < s_.in; c++) {
        // Splits a line into even columns, and odd columns with a zero before them. Neighbours then serve neighbouring outputs.
        float *even = lines_ + (i * s_.in + c) * 2 * line, *odd = even + line;
        const int64_t from_row = 2 * y - 1 + i;
        if (from_row < 0 || from_row >= s_.height) {
          std::fill_n(even, 2 * line, 0.0f);
        } else {
          const float* from = image + (c * s_.height + from_row) * s_.width;
          const int64_t pairs = s_.width / 2;
          std::fill(even + pairs, odd, 0.0f);
          std::fill(odd + pairs + 1, odd + line, 0.0f);
          odd[0] = 0;
          int64_t x = 0;
          for (; x + W <= pairs; x += W) {
            Float evens, odds;
            simd::split(load(from + 2 * x), load(from + 2 * x + W), evens, odds);
            store(even + x, evens);
            store(odd + x + 1, odds);
          }
          for (; x < pairs; x++) even[x] = from[2 * x], odd[x + 1] = from[2 * x + 1];
          if (s_.width % 2) even[pairs] = from[s_.width - 1];
        }
        const float* taps_of[3] = {odd, even, odd + 1};
        for (int64_t j = 0; j < 3; j++) at_[(i * 3 + j) * s_.in + c] = taps_of[j];
      }
    const Cut cut(out_width, 1);
    for (int64_t t = 0; t < cut.tiles; t++)
      for (int64_t n = 0; n < s_.out; n += panel)
        with_sizes(cut.height(t), s_.out - n, [&]<int R, int V>() {
          const int64_t x = cut.first(t);
          float* out = to + x * s_.out + n;
          multiply_side_by_side<R, V>(
              [&](int64_t k) { return at_[k] + x; }, s_.weight + n * taps, panel, taps, [&](int r, int v, Float sum) {
                sum = at_least(sum + load(s_.bias + n + v * W), least);
                store_some(out + r * s_.out + v * W, sum, s_.out - n - v * W);
              });
        });
  }

 private:
  const ConvCall s_;
  float* lines_;
  std::vector<const float*> at_;
};

// A 3x3 convolution with stride 2 in 25 multiplications for 2 x 2 outputs instead of 36. On a line, the outputs
// y0 = x0 g0 + x1 g1 + x2 g2 and y1 = x2 g0 + x3 g1 + x4 g2 share m = x2 (g0 + g2):
// y0 = (x0 - x2) g0 + x1 g1 + m and y1 = (x4 - x2) g2 + x3 g1 + m (Winograd's F(2, 2) on the even inputs).
// So three sums, of 2, 2 and 1 products, give two outputs. In the plane nine sums give four outputs.
constexpr int products_of[3] = {2, 2, 1}, first_product[3] = {0, 2, 4};

// For each product of the plane, in the order of the weights: which of the five differences of a row and a column it uses.
struct Order {
  int row[25] = {}, column[25] = {};
  constexpr Order() {
    int k = 0;
    for (int p = 0; p < 3; p++)
      for (int q = 0; q < 3; q++)
        for (int i = 0; i < products_of[p]; i++)
          for (int j = 0; j < products_of[q]; j++) row[k] = first_product[p] + i, column[k++] = first_product[q] + j;
  }
};
constexpr Order order;

inline __attribute__((always_inline)) void differences(const Float (&x)[5], Float (&to)[5]) {
  to[0] = x[0] - x[2], to[1] = x[1], to[2] = x[4] - x[2], to[3] = x[3], to[4] = x[2];
}

// Transforms the 5 x 5 inputs of 2 x 2 outputs, for the U channels from c on, to a row of a tile. The 25 results are `step`
// floats apart.
template <int U>
void transform(const float* const (&pixels)[5][5], int64_t c, float* to, int64_t step) {
#pragma GCC unroll 8
  for (int o = 0; o < U; o += W) {
    const int within = std::min(o, U - W);  // the last vector of a chunk overlaps the one before it
    Float lines[5][5], plane[5][5];
#pragma GCC unroll 5
    for (int i = 0; i < 5; i++) {
      Float x[5];
#pragma GCC unroll 5
      for (int j = 0; j < 5; j++) x[j] = load(pixels[i][j] + c + within);
      differences(x, lines[i]);
    }
#pragma GCC unroll 5
    for (int j = 0; j < 5; j++) {
      Float x[5], y[5];
#pragma GCC unroll 5
      for (int i = 0; i < 5; i++) x[i] = lines[i][j];
      differences(x, y);
#pragma GCC unroll 5
      for (int i = 0; i < 5; i++) plane[i][j] = y[i];
    }
#pragma GCC unroll 25
    for (int k = 0; k < 25; k++) store(to + k * step + within, plane[order.row[k]][order.column[k]]);
  }
}

constexpr int64_t sums_floats = 9 * tile_rows * panel;

// The number of floats that conv_blocks needs as its memory.
int64_t conv_floats(const ConvCall& s) {
  return up(block_tiles * tile_rows * 25 * s.in, 16) + block_tiles * sums_floats + up(s.in, 16);
}

// Computes the tiles t0 to t1 of a cut of 2 x 2 outputs. The first output of the cut is number `first` of the map.
template <int U>
void conv_blocks(const ConvCall& s, const Cut& cut, int64_t first, int64_t t0, int64_t t1, float* memory) {
  struct Place {
    float* outputs[2][2];  // null outside the map
  };
  const int64_t out_height = (s.height + 1) / 2, out_width = (s.width + 1) / 2;
  const int64_t down = (out_height + 1) / 2, across = (out_width + 1) / 2;
  const int64_t inputs = 25 * s.in;
  const float least = least_of(s.act);
  float *tiles = memory, *sums = tiles + up(block_tiles * tile_rows * inputs, 16), *zeros = sums + block_tiles * sums_floats;
  Place places[block_tiles][tile_rows];
  std::fill_n(zeros, s.in, 0.0f);
  for (int64_t t = t0; t < t1; t++) {
    const int R = cut.height(t);
    float* tile = tiles + (t - t0) * tile_rows * inputs;
    for (int r = 0; r < R; r++) {
      const int64_t at = first + cut.first(t) + r, b = at / (down * across), y = at / across % down, x = at % across;
      const float* pixels[5][5];
      for (int i = 0; i < 5; i++) {
        const int64_t row = 4 * y - 1 + i;
        const float* line = s.x + (b * s.height + row) * s.width * s.in;
        for (int j = 0; j < 5; j++) {
          const int64_t column = 4 * x - 1 + j;
          const bool outside = row < 0 || column < 0 || row >= s.height || column >= s.width;
          pixels[i][j] = outside ? zeros : line + column * s.in;
        }
      }
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
          const bool outside = 2 * y + i >= out_height || 2 * x + j >= out_width;
          places[t - t0][r].outputs[i][j] = outside ? nullptr : s.y + ((b * out_height + 2 * y + i) * out_width + 2 * x + j) * s.out;
        }
      for (int64_t c = 0; c < s.in; c += U) transform<U>(pixels, c, tile + c * R + r * U, s.in * R);
    }
  }
  for (int64_t n = 0; n < s.out; n += panel) {
    int64_t before = 0;  // products of the groups before
    for (int group = 0; group < 9; group++) {
      const int64_t size = products_of[group / 3] * products_of[group % 3];
      for (int64_t t = t0; t < t1; t++)
        with_sizes(cut.height(t), s.out - n, [&]<int R, int V>() {
          float* to = sums + (t - t0) * sums_floats + group * tile_rows * panel;
          multiply<R, V, U>(
              tiles + (t - t0) * tile_rows * inputs + before * s.in * R, s.weight + n * inputs + before * s.in * panel, panel,
              size * s.in / U, [&](int r, int v, Float sum) { store(to + r * panel + v * W, sum); });
        });
      before += size;
    }
    for (int64_t v = 0; v < panel && n + v < s.out; v += W) {
      const Float bias = load(s.bias + n + v);
      for (int64_t t = t0; t < t1; t++)
        for (int r = 0; r < cut.height(t); r++) {
          const float* from = sums + (t - t0) * sums_floats + r * panel + v;
          Float sum[3][3];
#pragma GCC unroll 9
          for (int k = 0; k < 9; k++) sum[k / 3][k % 3] = load(from + k * tile_rows * panel);
#pragma GCC unroll 2
          for (int j = 0; j < 2; j++) {
            const Float shared = sum[2][j] + sum[2][2] + bias;
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
              const Float all = sum[i][j] + sum[i][2] + shared;
              if (float* to = places[t - t0][r].outputs[i][j])
                store_some(to + n + v, at_least(all, least), s.out - n - v);
            }
          }
        }
    }
  }
}

// A 3x3 convolution with stride 2 and zero padding of a channels-last map whose channels are a multiple of U.
template <int U>
void conv_map(const ConvCall& s) {
  const Cut cut(s.batch * ((s.height + 3) / 4) * ((s.width + 3) / 4), free_threads());
  in_blocks(cut, block_tiles, [&](int64_t t0, int64_t t1) {
    conv_blocks<U>(s, cut, 0, t0, t1, Scratch::begin(conv_floats(s)).take(conv_floats(s)));
  });
}

// Two convolutions of images (batch, in, height, width). Bands of the first map are computed when the second convolution needs
// them, and never leave the cache.
template <int U>
void stem(const ConvCall& one, const ConvCall& two) {
  const int64_t down = (two.height + 3) / 4, across = (two.width + 3) / 4;
  const int64_t rows = std::clamp<int64_t>(block_tiles * tile_rows / across, 1, down), bands = up(down, rows) / rows;
  const int64_t line = two.width * two.in, out = ((two.height + 1) / 2) * ((two.width + 1) / 2) * two.out;
  at::parallel_for(0, one.batch * bands, 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::begin(ImageConv::floats(one) + conv_floats(two) + (4 * rows + 1) * line + 64);
    ImageConv first(one, scratch);
    float *memory = scratch.take(conv_floats(two)), *band = scratch.take((4 * rows + 1) * line);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / bands, y0 = unit % bands * rows, y1 = std::min(y0 + rows, down);
      const int64_t top = std::max<int64_t>(4 * y0 - 1, 0), bottom = std::min(4 * y1, two.height);
      for (int64_t y = top; y < bottom; y++)
        first.row(one.x + b * one.in * one.height * one.width, y, band + (y - top) * line);
      ConvCall image = two;
      image.x = band - top * line, image.y = two.y + b * out;
      const Cut cut((y1 - y0) * across, 1);
      for (int64_t t = 0; t < cut.tiles; t += block_tiles)
        conv_blocks<U>(image, cut, y0 * across, t, std::min(t + block_tiles, cut.tiles), memory);
    }
  });
}

void first_two(const ConvCall& one, const ConvCall& two) { two.in % 28 ? stem<16>(one, two) : stem<28>(one, two); }
void one_more(const ConvCall& s) { s.in % 28 ? conv_map<16>(s) : conv_map<28>(s); }

int64_t floats_out(const ConvCall& s) { return ((s.height + 1) / 2) * ((s.width + 1) / 2) * s.out; }

// Takes `images` images from number `first` on through all convolutions.
void convolutions(const StemCall& s, int64_t first, int64_t images) {
  int64_t largest = 0;
  if (s.count) largest = floats_out(s.two);
  for (int64_t i = 0; i + 1 < s.count; i++) largest = std::max(largest, floats_out(s.others[i]));
  Scratch& scratch = Scratch::begin(2 * images * largest + 64, 1);
  float *from = scratch.take(images * largest), *to = scratch.take(images * largest);
  ConvCall one = s.one, two = s.two;
  one.batch = two.batch = images;
  one.x += first * one.in * one.height * one.width;
  two.y = s.count ? to : two.y + first * floats_out(two);
  first_two(one, two);
  for (int64_t i = 0; i < s.count; i++) {
    std::swap(from, to);
    ConvCall next = s.others[i];
    next.batch = images, next.x = from;
    next.y = i + 1 < s.count ? to : next.y + first * floats_out(next);
    one_more(next);
  }
}

// Each thread takes as many images as the others through all convolutions, one by one, so that their maps stay in its cache. All
// threads share the images that are left.
void whole_stem(const StemCall& s) {
  by_images(
      s.one.batch,
      [&](int64_t, int64_t first, int64_t images) {
        for (int64_t image = first; image < first + images; image++) convolutions(s, image, 1);
      },
      [&](int64_t first, int64_t images) { convolutions(s, first, images); });
}

}  // namespace

extern "C" {
int64_t vision_stem(const StemCall* call) {
  return guarded([=] { whole_stem(*call); });
}
int64_t vision_conv_map(const ConvCall* call) {
  return guarded([=] { one_more(*call); });
}
}
