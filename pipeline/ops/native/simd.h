// A vector of W floats on GCC/Clang vector extensions, with the functions that the kernels need.
//
// W is 16 with AVX-512, 8 with AVX2, 4 elsewhere (SSE, NEON); one source serves all. Lanes are channels. Without fast-math
// every function below returns NaN for NaN, and is accurate to a few units in the last place.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace simd {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Float __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint32_t Uint __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));

inline Float splat(float x) { return x - Float{}; }

inline Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }

// bf16 is the upper half of a float. Rounding is to nearest even, and a NaN must not become infinity.
inline Float load(const uint16_t* p) {
  Half v;
  std::memcpy(&v, p, sizeof v);
  return (Float)(__builtin_convertvector(v, Uint) << 16);
}
inline void store(uint16_t* p, Float v) {
  Uint bits = (Uint)v;
  Uint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Uint quiet = (bits >> 16) | 0x40u;
  Half h = __builtin_convertvector((v == v) ? rounded : quiet, Half);
  std::memcpy(p, &h, sizeof h);
}

// The first `count` floats at p, and zeros in the other lanes; the first `count` lanes of v to p. Nothing behind them is touched.
template <class T>
inline Float load_first(const T* p, int64_t count) {
  T all[W] = {};
  for (int64_t i = 0; i < count; i++) all[i] = p[i];
  return load(all);
}
template <class T>
inline void store_first(T* p, Float v, int64_t count) {
  T all[W];
  store(all, v);
  for (int64_t i = 0; i < count; i++) p[i] = all[i];
}
#if defined(__AVX512F__)
inline Float load_first(const float* p, int64_t count) { return (Float)_mm512_maskz_loadu_ps((1u << count) - 1, p); }
inline void store_first(float* p, Float v, int64_t count) { _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v); }
#endif

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void narrow(float* p, float x) { *p = x; }
inline void narrow(uint16_t* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *p = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t((bits >> 16) | 0x40u);
}

// The greater or the smaller of x and a limit. A NaN in x comes through: the instructions return their second operand then. Written as a
// comparison each is two instructions, which made a scan on AVX2 a fifth slower.
inline Float at_least(Float x, float limit) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)splat(limit), (__m512)x);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)splat(limit), (__m256)x);
#else
  return x < limit ? splat(limit) : x;
#endif
}
inline Float at_most(Float x, float limit) {
#if defined(__AVX512F__)
  return (Float)_mm512_min_ps((__m512)splat(limit), (__m512)x);
#elif defined(__AVX2__)
  return (Float)_mm256_min_ps((__m256)splat(limit), (__m256)x);
#else
  return x > limit ? splat(limit) : x;
#endif
}

// 2^x with a relative error of 2e-7: a power of two, times a root of two from a table in a register (not in the last form), times a
// polynomial on what is left of x. Its first two coefficients are exactly 1 and log 2, because a scan multiplies hundreds of factors
// near 1, where even a small error of one sign would add up. Without AVX-512 the result is 2^-126 for less than -126, and infinity
// from 127.9 on.
inline Float exp2(Float x) {
#if defined(__AVX512F__)
  const __m512 roots = _mm512_setr_ps(1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                                      1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f);
  Float whole = (Float)_mm512_roundscale_ps((__m512)x, 0x48);  // to the nearest sixteenth, without an exception
  Float f = x - whole;
  Float sixteenths = whole + 1.5f * (1 << 19);  // in the lowest bits of the mantissa, of which the table reads four
  Float root = (Float)_mm512_permutexvar_ps((__m512i)sixteenths, roots);
  Float p = f * 5.55041087e-2f + 2.40226507e-1f;
  p = p * f + 6.931471806e-1f;
  p = (root * f) * p + root;
  return (Float)_mm512_scalef_ps((__m512)p, (__m512)whole);  // uses the integer below `whole`; handles NaN, infinity and underflow
#elif defined(__AVX2__)
  // The bits of 2^(k / 8) are those of k in eighths, moved to the exponent, plus what the table has for the lowest three.
  const __m256i roots = _mm256_setr_epi32(0, -289342, -509968, -655657, -719629, -694486, -572163, -343865);
  constexpr float to_exponent = 1.5f * (1 << 20) + 127.0f;  // 127 is the bias of an exponent
  x = at_most(at_least(x, -126.0f), 128.0f);
  Float eighths = x + to_exponent;
  Float f = x - (eighths - to_exponent);
  Int scale = ((Int)eighths << 20) + (Int)_mm256_permutevar8x32_epi32(roots, (__m256i)eighths);
  Float p = f * 5.55041087e-2f + 0.240241f;
  p = p * f + 6.931471806e-1f;
  p = p * f + 1.0f;
  return p * (Float)scale;
#else
  // Adding 1.5 * 2^23 moves round(x) into the lowest bits of the mantissa.
  constexpr float to_exponent = 12582912.0f + 127.0f;
  x = at_most(at_least(x, -126.0f), 128.0f);
  Float shifted = x + to_exponent;
  Float f = x - (shifted - to_exponent);
  Float p = f * 1.330026412e-3f + 9.669708406e-3f;
  p = p * f + 5.550559994e-2f;
  p = p * f + 2.402228161e-1f;
  p = p * f + 6.931471806e-1f;
  p = p * f + 1.0f;
  return p * (Float)((Int)shifted << 23);
#endif
}

constexpr float log2_e = 1.44269504f, ln_2 = 0.69314718f;

inline Float exp(Float x) { return exp2(x * log2_e); }

inline Float sigmoid(Float x) { return 1.0f / (1.0f + exp(-x)); }

// log(1 + e^x) = max(x, 0) + log1p(e) with e = e^-|x|, and log1p(e) / e is a polynomial of degree 8 on [0, 1] (error 3e-8).
// Above 20 it is x itself, as in torch. The slope, which is wanted if it is not null, is 1 / (1 + e^-x).
inline Float softplus(Float x, Float* slope = nullptr) {
  Float e = exp((Float)((Int)x | INT32_MIN));
  Float p = e * 5.36469876e-3f - 3.00652101e-2f;
  p = p * e + 7.92034500e-2f;
  p = p * e - 1.37536981e-1f;
  p = p * e + 1.91536004e-1f;
  p = p * e - 2.48571487e-1f;
  p = p * e + 3.33213208e-1f;
  p = p * e - 4.99996479e-1f;
  p = p * e + 1.0f;
  if (slope) *slope = (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
  return at_least(x, 0.0f) + e * p;
}

#if defined(__clang__)
#define SIMD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SIMD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int{__VA_ARGS__})
#endif

// The lanes of a and then of b with even and with odd numbers.
template <int... I>
inline void split(Float a, Float b, Float& even, Float& odd, std::integer_sequence<int, I...>) {
  even = SIMD_SHUFFLE(a, b, (2 * I)...);
  odd = SIMD_SHUFFLE(a, b, (2 * I + 1)...);
}
inline void split(Float a, Float b, Float& even, Float& odd) { split(a, b, even, odd, std::make_integer_sequence<int, W>{}); }

// One step of a transpose: swaps the off-diagonal S x S blocks of each 2S x 2S block of the rows a and b.
template <int S, int... I>
inline void swap_blocks(Float& a, Float& b, std::integer_sequence<int, I...>) {
  Float low = SIMD_SHUFFLE(a, b, ((I & S) ? W + I - S : I)...);
  Float high = SIMD_SHUFFLE(a, b, ((I & S) ? W + I : I + S)...);
  a = low;
  b = high;
}

template <int S>
inline void transpose_from(Float* rows) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & S)) swap_blocks<S>(rows[i], rows[i | S], std::make_integer_sequence<int, W>{});
    transpose_from<2 * S>(rows);
  }
}
inline void transpose(Float* rows) { transpose_from<1>(rows); }

// The sum over the lanes, by halves.
inline float sum_lanes(Float v) {
  float a[W];
  store(a, v);
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) a[i] += a[i + half];
  return a[0];
}

// The sums over the lanes of each of W rows: lane n of the result is that of rows[n]. It is a transpose that adds at each step, and
// destroys rows.
template <int R = W>
inline Float sum_lanes(Float* rows) {
  if constexpr (R == 1) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < R / 2; i++) {
      swap_blocks<R / 2>(rows[i], rows[i + R / 2], std::make_integer_sequence<int, W>{});
      rows[i] += rows[i + R / 2];
    }
    return sum_lanes<R / 2>(rows);
  }
}

}  // namespace simd
