// Layers of EfficientViM for inference on the CPU, fp32: what vision.cpp, mixer.cpp and stages.cpp share.
//
// Maps are channels-last and contiguous. Images, rows and columns of a call are divided among the threads. One thread computes
// each output element in a fixed order, so the result does not depend on the number of threads.
#pragma once

#include "layers.h"

namespace vision {

using namespace products;

// A 3x3 depthwise convolution with zero padding and stride 1 of a channels-last map (batch, height, width, channels).
struct Local {
  int64_t height, width, channels;
  const float *x, *weight, *bias;  // (9, channels), (channels)

  // Computes `count` pixels from pixel `first` on.
  void rows(int64_t first, int64_t count, float* to) const {
    for (int64_t n; count; first += n, count -= n, to += n * channels) {
      n = std::min(count, width - first % width);
      run(first, n, to);
    }
  }

 private:
  // Computes `count` neighbouring pixels of a line. Each reads three new inputs, and six that its neighbour has read.
  void run(int64_t first, int64_t count, float* to) const {
    const int64_t y = first / width % height, x0 = first % width;
    const bool above = y > 0, below = y + 1 < height;
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t lanes = channels - c;
      const float* line = x + (first - x0) * channels + c;
      Float taps[9], window[3][3];
#pragma GCC unroll 9
      for (int k = 0; k < 9; k++) taps[k] = load_some(weight + k * channels + c, lanes);
      const Float offset = load_some(bias + c, lanes);
      auto read = [&](int64_t column, int j) {
        const bool inside = column >= 0 && column < width;
        const float* at = line + column * channels;
        window[0][j] = inside && above ? load_some(at - width * channels, lanes) : Float{};
        window[1][j] = inside ? load_some(at, lanes) : Float{};
        window[2][j] = inside && below ? load_some(at + width * channels, lanes) : Float{};
      };
      read(x0 - 1, 1);
      read(x0, 2);
      for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 3
        for (int k = 0; k < 3; k++) window[k][0] = window[k][1], window[k][1] = window[k][2];
        read(x0 + i + 1, 2);
        Float sum = offset;
#pragma GCC unroll 9
        for (int k = 0; k < 9; k++) sum += taps[k] * window[k / 3][k % 3];
        store_some(to + i * channels + c, sum, lanes);
      }
    }
  }
};

// The structures of the layers are mirrored field by field in vision_library.py, which lays the weights out as panels of columns with
// padded inputs.
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

void linear(const LinearCall& s);
void ffn(const FfnCall& s);
void depthwise(const DepthwiseCall& s);
void widen(const WidenCall& s);
void mixer(const MixerCall& s);

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

}  // namespace vision
