// SiLU of a depthwise causal convolution for one or two directions of one input, and its backward.
//
// A thread owns a channel and a run of neighbouring steps. It loads the steps around the run once for both directions. The
// backward computes the convolution again instead of keeping it.

#define THREADS 256
#define MIN_BLOCKS 2
#include "common.cuh"

constexpr int K = TAPS, channels = 32, rows = THREADS / channels;

struct Filter {
  Strided out, g_out;
  const float *weight, *bias;           // (E, K), (E): contiguous; the bias may be absent
  float *partial_weight, *partial_bias; // (Bt, E, K), (Bt, E)
  int reversed, unused;
};

struct Conv {
  int batch, channels, steps, blocks;  // blocks of channels
  int step_blocks, unused;             // the forward: blocks of steps
  Strided x, g_x;
  Filter filter[2];
};


#ifdef EMULATE
extern "C" int parameter_bytes = sizeof(Conv);
#endif

KERNEL(conv_forward, Conv) {
  constexpr int run = 8;
  const Conv& s = params;
  const int block = blockIdx.x % s.blocks, step_block = blockIdx.x / s.blocks % s.step_blocks;
  const int b = blockIdx.x / s.blocks / s.step_blocks;
  const int c = block * channels + threadIdx.x % channels, t = (step_block * rows + threadIdx.x / channels) * run;
  if (c >= s.channels || t >= s.steps) return;
  float x[run + 2 * K - 2];
  load_window<false>(Column<const Wide>(s.x, b, 0, c), t - K + 1, s.steps, true, x);
#pragma unroll
  for (int k = 0; k < DIRECTIONS; k++) {
    const Filter& f = s.filter[k];
    const Taps<K> taps(f.weight, f.bias, f.reversed, c);
    const Column<Wide> out(f.out, b, 0, c);
#pragma unroll
    for (int i = 0; i < run; i++) {
      const float sum = f.reversed ? taps.convolve(x + i + K - 1) : taps.convolve(x + i);
      if (t + i < s.steps) store_last(out.at(t + i), sum * sigmoid(sum));
    }
  }
}

KERNEL(conv_backward, Conv) {
  constexpr int run = 4;
  const Conv& s = params;
  const int block = blockIdx.x % s.blocks, b = blockIdx.x / s.blocks;
  const int row = threadIdx.x / channels, c = block * channels + threadIdx.x % channels;
  const bool real = c < s.channels;
  const int channel = min(c, s.channels - 1);

  float g_weight[DIRECTIONS][K], g_bias[DIRECTIONS];
#pragma unroll
  for (int k = 0; k < DIRECTIONS; k++) {
    g_bias[k] = 0.0f;
#pragma unroll
    for (int j = 0; j < K; j++) g_weight[k][j] = 0.0f;
  }
  for (int t = row * run; t < s.steps; t += rows * run) {
    float x[run + 2 * K - 2], g_x[run];
    load_window<false>(Column<const Wide>(s.x, b, 0, channel), t - K + 1, s.steps, real, x);
#pragma unroll
    for (int i = 0; i < run; i++) g_x[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) {
      const Filter& f = s.filter[k];
      const Taps<K> taps(f.weight, f.bias, f.reversed, channel);
      // The outputs that see the run, in the order of time: output j sees x[j .. j + K - 1] of the window.
      float g[run + K - 1];
      load_window<true>(Column<const Wide>(f.g_out, b, 0, channel), f.reversed ? t - K + 1 : t, s.steps, real, g);
#pragma unroll
      for (int j = 0; j < run + K - 1; j++) {
        const float sum = taps.convolve(x + j), gate = sigmoid(sum);
        g[j] *= gate * fmaf(sum, 1.0f - gate, 1.0f);
        const bool own = f.reversed ? j >= K - 1 : j < run;  // outputs at the steps of the run count for the weights here
        const float counted = own ? g[j] : 0.0f;
        g_bias[k] += counted;
#pragma unroll
        for (int i = 0; i < K; i++) g_weight[k][i] = fmaf(counted, x[j + i], g_weight[k][i]);
      }
#pragma unroll
      for (int i = 0; i < run; i++)
#pragma unroll
        for (int j = 0; j < K; j++) g_x[i] = fmaf(taps.weight[j], g[i + K - 1 - j], g_x[i]);
    }
#pragma unroll
    for (int i = 0; i < run; i++)
      if (real && t + i < s.steps) store_last(Column<Wide>(s.g_x, b, 0, channel).at(t + i), g_x[i]);
  }

  // The sums over the rows, in their order.
  float* sums = reinterpret_cast<float*>(shared_memory());  // [row][channel]
#pragma unroll
  for (int k = 0; k < DIRECTIONS; k++) {
    const Filter& f = s.filter[k];
#pragma unroll
    for (int j = 0; j <= K; j++) {
      sums[threadIdx.x] = j < K ? g_weight[k][j < K ? j : 0] : g_bias[k];
      __syncthreads();
      if (row == 0 && real) {
        float sum = 0.0f;
        for (int r = 0; r < rows; r++) sum += sums[r * channels + threadIdx.x];
        const long long at = (long long)b * s.channels + c;
        if (j == K)
          f.partial_bias[at] = sum;
        else
          f.partial_weight[at * K + (f.reversed ? K - 1 - j : j)] = sum;
      }
      __syncthreads();
    }
  }
}
