// CUDA's threads on a CPU, so that the tests run the kernels' own source without a GPU.
//
// Each thread of a block is a fiber. __syncthreads, __syncwarp and the shuffles switch to the next fiber until all that take
// part have arrived. Blocks run one after another. It finds wrong arithmetic, wrong indices and most missing barriers; it knows
// nothing about speed, and fast functions are exact here.

#pragma once
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Index {
  unsigned x;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  int parity = 0, warp_ticket = 0, block_ticket = 0;  // barriers passed
  bool done = false;
};
inline std::vector<Fiber> fibers;
inline std::vector<unsigned> slots[2];         // what each lane offers in a shuffle; two, so that one barrier suffices
inline std::vector<int> warp_arrivals;
inline int block_arrivals = 0, current = 0;
inline ucontext_t scheduler;
inline std::vector<float4> shared;
inline void (*body)(const void*) = nullptr;
inline const void* argument = nullptr;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
inline void run_body() {
  body(argument);
  fibers[current].done = true;
  yield();
}

// All threads of a group arrive equally often, so the count of arrivals tells who has passed which barrier.
inline void wait(int& arrivals, int& ticket, int size) {
  arrivals++;
  ticket++;
  while (arrivals < ticket * size) yield();
}

inline Index thread_index() { return {unsigned(current)}; }
inline Index block_index{0};

inline long arrivals() {
  long sum = block_arrivals;
  for (int n : warp_arrivals) sum += n;
  return sum;
}

// Runs one block; aborts if threads wait for a barrier that others never reach.
inline void run_block(int threads) {
  if (int(fibers.size()) != threads) fibers = std::vector<Fiber>(threads);
  for (auto& s : slots) s.assign(threads, 0);
  warp_arrivals.assign(threads / 32, 0);
  block_arrivals = 0;
  for (auto& f : fibers) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, run_body, 0);
    f.parity = f.warp_ticket = f.block_ticket = 0;
    f.done = false;
  }
  bool backward = false;  // the order changes in every round, so that a missing barrier shows
  for (long alive = threads; alive > 0;) {
    alive = 0;
    const long before = arrivals();
    long finished = 0;
    backward = !backward;
    for (int i = 0; i < threads; i++) {
      current = backward ? threads - 1 - i : i;
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      (fibers[current].done ? finished : alive)++;
    }
    if (alive && !finished && before == arrivals()) {
      std::fprintf(stderr, "emulator: threads wait for a barrier that others never reach\n");
      std::abort();
    }
  }
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index)

inline void __syncthreads() {
  auto& f = emulator::fibers[emulator::current];
  emulator::wait(emulator::block_arrivals, f.block_ticket, int(emulator::fibers.size()));
}
inline void __syncwarp() {
  auto& f = emulator::fibers[emulator::current];
  emulator::wait(emulator::warp_arrivals[emulator::current / 32], f.warp_ticket, 32);
}
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  auto& f = emulator::fibers[emulator::current];
  auto& slot = emulator::slots[f.parity ^= 1];
  slot[emulator::current] = std::bit_cast<unsigned>(x);
  __syncwarp();
  return std::bit_cast<float>(slot[emulator::current ^ mask]);
}
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
template <class T>
inline T __ldcs(const T* p) { return *p; }
template <class T>
inline void __stcs(T* p, T x) { *p = x; }

inline char* address(char* base, int index, int stride) { return base + (long long)index * stride; }
inline float opaque(float x) { return x; }
inline int thread_now() { return threadIdx.x; }
inline int uniform(int x) { return x; }
inline void prefetch(const void*) {}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline unsigned short bf16_bits(float x) {
  const auto bits = std::bit_cast<unsigned>(x);
  if (x != x) return static_cast<unsigned short>((bits >> 16) | 0x40);
  return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float4* shared_memory() { return emulator::shared.data(); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

#define KERNEL(name, Params)                                                                              \
  static void name##_body(const Params& params);                                                          \
  extern "C" void name(const Params* params, long long blocks, int threads, long long shared_bytes) {     \
    emulator::shared.assign(shared_bytes / sizeof(float4) + 1, float4{NAN, NAN, NAN, NAN});                \
    emulator::argument = params;                                                                          \
    emulator::body = [](const void* p) { name##_body(*static_cast<const Params*>(p)); };                   \
    for (long long block = 0; block < blocks; block++) {                                                  \
      emulator::block_index = {unsigned(block)};                                                          \
      emulator::run_block(threads);                                                                       \
    }                                                                                                     \
  }                                                                                                       \
  static void name##_body(const Params& params)
