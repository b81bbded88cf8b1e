// A view of an image under an affine map, interpolated once. Small images are many, so what a call costs beside the
// arithmetic decides: torch needs a dozen calls for a view.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {
struct Image {
  const uint8_t* data;
  int64_t rows, columns, row_stride, column_stride, channel_stride;  // strides in bytes
};

// Weights of the taps around a position whose fraction is t. Bicubic has the coefficient -0.75 of torch's grid_sample.
template <int taps>
void weigh(float t, float* w) {
  if constexpr (taps == 2) {
    w[0] = 1 - t, w[1] = t;
  } else {
    constexpr float a = -0.75f;
    const auto near = [](float x) { return ((a + 2) * x - (a + 3)) * x * x + 1; };
    const auto far = [](float x) { return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a; };
    w[0] = far(1 + t), w[1] = near(t), w[2] = near(1 - t), w[3] = far(2 - t);
  }
}

// Taps outside of the image have the colour of the ground, so its difference from the ground counts only inside.
template <int taps>
void sample(const Image& image, const double* map, const float* ground, uint8_t* out, int64_t height, int64_t width) {
  constexpr int before = taps / 2 - 1;
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const double x = map[0] + map[2] * (j + 0.5) + map[3] * (i + 0.5) - 0.5;
      const double y = map[1] + map[4] * (j + 0.5) + map[5] * (i + 0.5) - 0.5;
      const double left = std::floor(x), top = std::floor(y);
      float across[taps], down[taps], sums[3] = {};
      weigh<taps>(float(x - left), across), weigh<taps>(float(y - top), down);
      // As doubles until they are known to be near the image: a far position fits no integer.
      const bool near = left >= -taps && top >= -taps && left < image.columns + taps && top < image.rows + taps;
      const int64_t first_row = near ? int64_t(top) - before : 0, first_column = near ? int64_t(left) - before : 0;
      for (int r = 0; near && r < taps; ++r) {
        const int64_t row = first_row + r;
        if (row < 0 || row >= image.rows) continue;
        for (int c = 0; c < taps; ++c) {
          const int64_t column = first_column + c;
          if (column < 0 || column >= image.columns) continue;
          const uint8_t* pixel = image.data + row * image.row_stride + column * image.column_stride;
          const float weight = down[r] * across[c];
          for (int k = 0; k < 3; ++k) sums[k] += weight * (pixel[k * image.channel_stride] - ground[k]);
        }
      }
      for (int k = 0; k < 3; ++k)
        out[(k * height + i) * width + j] = uint8_t(std::clamp(std::nearbyint(sums[k] + ground[k]), 0.0f, 255.0f));
    }
  }
}
}  // namespace

extern "C" {
// `shape` is rows, columns and the strides of the rows, columns and channels of the image. `map` is where the corner of the view lies in
// the image, and what a step along x and along y of the view adds to x and to y there: x, y, xx, xy, yx, yy.
void affine_sample(const uint8_t* data, const int64_t* shape, const double* map, const float* ground, int64_t bicubic,
                   uint8_t* out, int64_t height, int64_t width) {
  const Image image = {data, shape[0], shape[1], shape[2], shape[3], shape[4]};
  (bicubic ? sample<4> : sample<2>)(image, map, ground, out, height, width);
}
}
