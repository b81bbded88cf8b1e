// What the kernels share: element types, tensors with strides, and the functions of one number.
//
// The file is compiled by NVRTC (which has no headers), by nvcc, and by a C++ compiler with emulator.h in place of CUDA.
// The library defines these macros for a build:
//   WIDE, NARROW    1 if the (Bt, E, L) tensors, or B and C, are bf16; 0 if they are fp32
//   DIRECTIONS      1 or 2
//   LANE_STATES     states of a lane: 4, 8 or 16; four lanes own a channel
//   TAPS            taps of the convolution that is fused into the load of u; 0: u itself is read
//   SOFTPLUS, GATE, BLEND, UNGATED   0 or 1

#pragma once
#ifdef EMULATE
#include "emulator.h"
#else
extern __shared__ float4 shared_floats[];
__device__ inline float4* shared_memory() { return shared_floats; }
__device__ inline char* address(char* base, int index, int stride) {  // in one instruction
  long long y;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(y) : "r"(index), "r"(stride), "l"(base));
  return reinterpret_cast<char*>(y);
}
// Hides where x comes from: the compiler then selects between values instead of branching around how they are computed.
__device__ inline float opaque(float x) {
  asm("" : "+f"(x));
  return x;
}
// threadIdx.x, read anew: what follows from it is then computed again where it is used, instead of occupying registers.
__device__ inline int thread_now() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
__device__ inline int uniform(int x) { return __shfl_sync(~0u, x, 0); }  // tells the compiler that a warp agrees on x
__device__ inline float exp2_fast(float x) {  // 2 units in the last place
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal(float x) {  // 1 unit in the last place
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Brings the line of p into the second-level cache; nobody waits for it.
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ inline unsigned short bf16_bits(float x) {
  unsigned short y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#define KERNEL(name, Params) \
  extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) name(const __grid_constant__ Params params)
#endif

struct bf16 {
  unsigned short bits;
};

template <int IS_BF16>
struct Element {
  using type = float;
};
template <>
struct Element<1> {
  using type = bf16;
};
using Wide = Element<WIDE>::type;
using Narrow = Element<NARROW>::type;

// A tensor (batch, group, channel, step); strides in bytes. Mirrored in library.py, as all structures here.
struct Strided {
  char* data;
  long long batch, group;
  int channel, step;
};

// One channel of a batch item: its elements along time.
template <class T>
struct Column {
  char* data;
  int step;
  __device__ Column(const Strided& s, int b, int g, int c)
      : data(address(s.data + b * s.batch + g * s.group, c, s.channel)), step(s.step) {}
  __device__ T* at(int t) const { return reinterpret_cast<T*>(address(data, t, step)); }
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, bf16& out) { out.bits = bf16_bits(x); }

// Loads that another step or block needs again stay in the cache; the others are marked to be evicted first.
template <class T>
__device__ inline float load(const T* p) {
  return widen(*p);
}
__device__ inline float load_last(const float* p) { return __ldcs(p); }
__device__ inline float load_last(const bf16* p) {
  return widen(bf16{__ldcs(reinterpret_cast<const unsigned short*>(p))});
}
__device__ inline void store_last(float* p, float x) { __stcs(p, x); }
__device__ inline void store_last(bf16* p, float x) {
  bf16 y;
  narrow(x, y);
  __stcs(reinterpret_cast<unsigned short*>(p), y.bits);
}

constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.69314718055994531f;

__device__ inline float exponential(float x) { return exp2_fast(x * log2_e); }
__device__ inline float sigmoid(float x) { return reciprocal(1.0f + exponential(-x)); }

// log(1 + e^x) = max(x, 0) + 2 artanh(e / (2 + e)) with e = e^-|x|. The polynomial for 2 artanh(w) / w, fitted in w^2 up to
// 1/9 with a relative error of 4e-9, keeps the full precision of fp32 where e is small too; a logarithm near 1 would not.
__device__ inline float softplus(float x) {
  const float e = exponential(-fabsf(x));
  const float w = e * reciprocal(2.0f + e), s = w * w;
  float series = 0.28157778f;
  series = fmaf(series, s, 0.27965158f);
  series = fmaf(series, s, 0.40024595f);
  series = fmaf(series, s, 0.66666322f);
  series = fmaf(series, s, 2.0f);
  return fmaf(series, w, fmaxf(x, 0.0f));
}

// The slope of the softplus from its value: 1 - e^-y, as a series where the difference would lose digits.
__device__ inline float softplus_slope(float y) {
  float series = 1.0f - y * (1.0f / 6.0f);
  series = 1.0f - y * 0.2f * series;
  series = 1.0f - y * 0.25f * series;
  series = 1.0f - y * (1.0f / 3.0f) * series;
  series = 1.0f - y * 0.5f * series;
  const float small = opaque(y * series), large = opaque(1.0f - exponential(-y));
  return y < 0.25f ? small : large;
}

// Sums over the four lanes of a channel, of four values at a time; lane p gets the sum of value p. `pair` takes values 2 i
// and 2 i + 1, `quad` the results of two pairs.
__device__ inline float sum_pair(float even, float odd, int p) {
  return (p & 1 ? odd : even) + __shfl_xor_sync(~0u, p & 1 ? even : odd, 1);
}
__device__ inline float sum_quad(float low, float high, int p) {
  return (p & 2 ? high : low) + __shfl_xor_sync(~0u, p & 2 ? low : high, 2);
}

// x of a channel from step `first` on, 0 where there is none.
template <bool LAST, int N, class T>
__device__ inline void load_window(const Column<const T>& x, int first, int steps, bool real, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    out[i] = 0.0f;
    if (real && unsigned(first + i) < unsigned(steps)) out[i] = LAST ? load_last(x.at(first + i)) : load(x.at(first + i));
  }
}

// Lets x of a channel from step `first` on be in the cache when it is loaded.
template <int N, class T>
__device__ inline void prefetch_window(const Column<const T>& x, int first, int steps) {
#pragma unroll
  for (int i = 0; i < N; i++)
    if (unsigned(first + i) < unsigned(steps)) prefetch(x.at(first + i));
}

// The weights of one channel's filter. Output t of a causal convolution sees x[t - K + 1 .. t]; in a reversed direction
// x[t .. t + K - 1], mirrored.
template <int K>
struct Taps {
  float weight[K], bias;  // the weights in the order of time
  __device__ Taps(const float* weights, const float* biases, bool reversed, int c) : bias(biases ? biases[c] : 0.0f) {
#pragma unroll
    for (int j = 0; j < K; j++) {
      const float* own = weights + (long long)c * K;
      const float ahead = own[j], mirrored = own[K - 1 - j];
      weight[j] = reversed ? mirrored : ahead;
    }
  }
  __device__ float convolve(const float* x) const {
    float sum = bias;
#pragma unroll
    for (int j = 0; j < K; j++) sum = fmaf(weight[j], x[j], sum);
    return sum;
  }
};
