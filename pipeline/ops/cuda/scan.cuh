// What both scan kernels share: the parameters, the place of a thread, and B and C in shared memory.
//
// Four lanes own a channel of one direction, each with a quarter of its states. The recurrence runs along time in their
// registers. All that does not depend on the state (convolution, step size, gate) is computed once for each channel and step
// by another split of the same threads, over a tile of a few steps, and passes through shared memory.

#pragma once
#include "common.cuh"

constexpr int threads = 256, warps = threads / 32, lanes = 4, S = LANE_STATES;
constexpr int T = 64 / S;  // steps of a tile: a thread has 64 states of it
constexpr int direction_warps = warps / DIRECTIONS, channels_of_block = 8 * direction_warps;

struct Direction {
  Strided delta, B, C, g_p, p, g_u, g_delta;
  const float *A, *D, *bias, *blend;             // (E, N), (E), (E), (Bt): contiguous; D and bias may be absent
  const float *conv_weight, *conv_bias;          // (E, K), (E)
  float *partial_A, *partial_D, *partial_bias;   // (Bt, E, N), (Bt, E), (Bt, E)
  Strided u;                                     // x, if the convolution is fused: both directions then have the same
  int reversed, unused;
};

struct Scan {
  int batch, groups, channels, states, steps;
  int blocks;        // blocks of a group
  int tiles;         // tiles of channels that a block of the backward computes one after another
  int unused;
  Strided z, o, g_o, g_z;
  float* scratch;     // for what does not fit into shared memory; absent if all fits
  float* partial_BC;  // the backward: (Bt, G, blocks, directions, L, 2, N)
  Direction direction[2];
};

#ifdef EMULATE
extern "C" int parameter_bytes = sizeof(Scan);
#endif

// Threads for the recurrence: a warp holds 8 channels of one direction.
struct Place {
  int lane, warp, p, c8, k, c;  // p: the lane of its channel; k: direction; c: channel of the block
  __device__ explicit Place(int t) {
    lane = t % 32, p = lane % 4, c8 = lane / 4;
    warp = uniform(t / 32);
    k = warp / direction_warps, c = warp % direction_warps * 8 + c8;
  }
};

// The entry of a channel and step in a tile. The swizzle puts neighbouring steps into different banks.
__device__ inline int entry(int k, int t, int c) {
  return (k * T + t) * channels_of_block + (c ^ (t & 1) * 4);
}

// Copies B and C of a tile into shared memory in fp32: [direction][step][B, C][copy][4 S]. Copy f holds the states of each
// lane in the order i ^ f. Steps and states that do not exist are 0. Every thread copies the same four states in each tile.
template <int COPIES>
struct States {
  static constexpr int items = DIRECTIONS * T * 2 * S;  // 128 for each direction
  char* from;
  int thread, step, channel, j, k, quad, matrix, states;
  __device__ States(const Scan& s, int b, int g, int thread)
      : thread(thread), j(thread / (2 * S) % T), k(thread / (2 * S * T) % DIRECTIONS), quad(thread % S),
        matrix(thread / S % 2), states(s.states) {
    const Strided& source = matrix ? s.direction[k].C : s.direction[k].B;
    from = address(source.data + b * source.batch + g * source.group, quad * 4, source.channel);
    step = source.step, channel = source.channel;
  }
  __device__ void copy(int first, int steps, float* out) const {
    if (items < threads && thread >= items) return;
    const int t = first + j, quads = S / 4;
    char* p = address(from, t, step);
    float x[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      x[n] = 0.0f;
      if (t < steps && quad * 4 + n < states) x[n] = load(reinterpret_cast<const Narrow*>(address(p, n, channel)));
    }
#pragma unroll
    for (int f = 0; f < COPIES; f++) {
      float4* to = reinterpret_cast<float4*>(out + (((k * T + j) * 2 + matrix) * COPIES + f) * 4 * S);
      const int at = quad / quads * quads + ((quad % quads) ^ (f / 4 % quads));
      switch (f % 4) {
        case 0: to[at] = make_float4(x[0], x[1], x[2], x[3]); break;
        case 1: to[at] = make_float4(x[1], x[0], x[3], x[2]); break;
        case 2: to[at] = make_float4(x[2], x[3], x[0], x[1]); break;
        default: to[at] = make_float4(x[3], x[2], x[1], x[0]); break;
      }
    }
  }
};

// Reads a lane's S floats at a multiple of 16 bytes.
__device__ inline void read(const float* from, float (&x)[S]) {
#pragma unroll
  for (int i = 0; i < S / 4; i++) {
    const float4 v = reinterpret_cast<const float4*>(from)[i];
    x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
  }
}

// What a thread computes that is not recurrence: `run` neighbouring steps of one channel in every tile.
struct Share {
  static constexpr int run = T * channels_of_block / threads;
  int c, j;     // channel of the block; first step of the tile
  bool real;    // whether the channel exists
  int channel;  // in all channels; the last one that exists stands for those that do not
  __device__ Share(int first_channel, int count, int thread)
      : c(thread % channels_of_block), j(thread / channels_of_block * run), real(c < count),
        channel(first_channel + min(c, count - 1)) {}
};

// The inputs of a Share's channel in one direction.
struct Source {
  static constexpr int run = Share::run;
  Column<const Wide> delta, u;
  float bias;
#if TAPS
  Taps<TAPS> taps;
#endif
  int reversed;
  __device__ Source(const Direction& d, const Share& share, int b)
      : delta(d.delta, b, 0, share.channel), u(d.u, b, 0, share.channel), bias(d.bias ? d.bias[share.channel] : 0.0f),
#if TAPS
        taps(d.conv_weight, d.conv_bias, d.reversed, share.channel),
#endif
        reversed(d.reversed) {
  }

  __device__ void prefetch(int t, int steps) const {
    prefetch_window<run>(delta, t, steps);
    prefetch_window<run>(u, t, steps);
  }

  // dt of the run from step t on; 0 where there is none, so that the state passes through.
  template <bool LAST>
  __device__ void step_sizes(int t, int steps, bool real, float (&dt)[run]) const {
    load_window<LAST>(delta, t, steps, real, dt);
#pragma unroll
    for (int i = 0; i < run; i++) {
      const float value = opaque(SOFTPLUS ? softplus(dt[i] + bias) : dt[i] + bias);
      dt[i] = real && t + i < steps ? value : 0.0f;
    }
  }

  // u of the run, 0 where there is none.
  __device__ void inputs(int t, int steps, bool real, float (&out)[run]) const {
#if TAPS
    float x[run + TAPS - 1];
    load_window<false>(u, reversed ? t : t - TAPS + 1, steps, real, x);
#pragma unroll
    for (int i = 0; i < run; i++) {
      const float sum = taps.convolve(x + i), value = opaque(sum * sigmoid(sum));
      out[i] = real && t + i < steps ? value : 0.0f;
    }
#else
    load_window<false>(u, t, steps, real, out);
#endif
  }
};
