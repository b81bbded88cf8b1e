// A view of an image under an affine map, interpolated once. Views are small and many, so what a call costs beside the
// arithmetic decides: torch needs a dozen calls for a view.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {
typedef float Colour __attribute__((vector_size(16)));  // red, green, blue and nothing

// Weights of the taps around a point whose fraction is t. Bicubic has the coefficient -0.75 of torch's grid_sample.
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

// The image as differences from the ground, in an edge of zeros as wide as the taps reach: outside of it all is ground.
struct Framed {
  static constexpr int64_t edge = 3;
  std::vector<Colour> pixels;
  int64_t rows, columns;

  Framed(const uint8_t* data, const int64_t* shape, Colour ground) : rows(shape[0]), columns(shape[1]) {
    pixels.assign((rows + 2 * edge) * (columns + 2 * edge), Colour{});
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* p = data + i * shape[2];
      Colour* out = pixels.data() + (i + edge) * (columns + 2 * edge) + edge;
      for (int64_t j = 0; j < columns; ++j, p += shape[3])
        out[j] = Colour{float(p[0]), float(p[shape[4]]), float(p[2 * shape[4]]), 0.0f} - ground;
    }
  }
};

template <int taps>
void sample(const Framed& image, const double* map, Colour ground, uint8_t* out, int64_t height, int64_t width) {
  constexpr int before = taps / 2 - 1;
  const int64_t stride = image.columns + 2 * Framed::edge, plane = height * width;
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j, ++out) {
      const double x = map[0] + map[2] * (j + 0.5) + map[3] * (i + 0.5) - 0.5;
      const double y = map[1] + map[4] * (j + 0.5) + map[5] * (i + 0.5) - 0.5;
      const double left = std::floor(x), top = std::floor(y);
      Colour sum = {};
      // A point none of whose taps is in the image, or that is no number, is ground. The taps of all others lie within the edge.
      const bool seen = left >= -taps / 2 && top >= -taps / 2 && left < image.columns + before && top < image.rows + before;
      if (seen) {
        float across[taps], down[taps];
        weigh<taps>(float(x - left), across), weigh<taps>(float(y - top), down);
        const Colour* p = image.pixels.data() + (int64_t(top) - before + Framed::edge) * stride + int64_t(left) - before + Framed::edge;
        for (int r = 0; r < taps; ++r, p += stride) {
          Colour row = across[0] * p[0];
          for (int c = 1; c < taps; ++c) row += across[c] * p[c];
          sum += down[r] * row;
        }
      }
      sum += ground;
      for (int k = 0; k < 3; ++k) out[k * plane] = uint8_t(std::clamp(std::nearbyint(sum[k]), 0.0f, 255.0f));
    }
  }
}
}  // namespace

extern "C" {
// `shape` is rows, columns and the strides of the rows, columns and channels of the image. `map` is where the corner of the view
// lies in the image, and what a step along x and along y of the view adds to x and to y there: x, y, xx, xy, yx, yy.
void affine_sample(const uint8_t* data, const int64_t* shape, const double* map, const float* ground, int64_t bicubic,
                   uint8_t* out, int64_t height, int64_t width) {
  const Colour colour = {ground[0], ground[1], ground[2], 0.0f};
  const Framed image(data, shape, colour);
  (bicubic ? sample<4> : sample<2>)(image, map, colour, out, height, width);
}
}
