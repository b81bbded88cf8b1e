// o = sum over the directions of (p + D u) SiLU(z) + blend p, with p = C.h.
//
// A block owns some channels of one batch item and both directions, which walk towards each other. Each direction leaves its
// part of the output where it comes first, in shared memory; where it comes second, it adds the other's part and writes.

#define THREADS 256
#define MIN_BLOCKS (WIDE ? 3 : 2)  // fp32 does not fit into the 80 registers of three blocks
#include "scan.cuh"

constexpr int channels = channels_of_block;

// Runs the recurrence of a channel over a tile. Lane p leaves C.h of step 4 i + p (in the order of the walk) in its entry.
template <bool REVERSED>
__device__ inline void walk(const Place& at, float2* tile, const float* states, const float (&A)[S], float (&h)[S]) {
#pragma unroll
  for (int group = 0; group < T; group += 4) {
    float sums[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int t = REVERSED ? T - 1 - group - j : group + j;
      const float2 e = tile[entry(at.k, t, at.c)];  // dt, u
      const float dtu = e.x * e.y;
      const float* row = states + ((at.k * T + t) * 2) * 4 * S + at.p * S;
      float B[S], C[S];
      read(row, B);
      read(row + 4 * S, C);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < S; i++) {
        h[i] = fmaf(exp2_fast(e.x * A[i]), h[i], dtu * B[i]);
        sum = fmaf(C[i], h[i], sum);
      }
      sums[j] = sum;
    }
    const float p = sum_quad(sum_pair(sums[0], sums[1], at.p), sum_pair(sums[2], sums[3], at.p), at.p);
    __syncwarp();  // all lanes have read the entries that are now replaced
    tile[entry(at.k, REVERSED ? T - 1 - group - at.p : group + at.p, at.c)].x = p;
  }
}

KERNEL(scan_forward, Scan) {
  const Scan& s = params;
  const int block = blockIdx.x % s.blocks, g = blockIdx.x / s.blocks % s.groups, b = blockIdx.x / s.blocks / s.groups;
  const int group_channels = s.channels / s.groups, first_channel = g * group_channels + block * channels;
  const int count = min(group_channels - block * channels, channels);  // channels that exist
  const int steps = s.steps, tiles = (steps + T - 1) / T;

  float2* tile = reinterpret_cast<float2*>(shared_memory());                   // [direction][T][channel]
  float* states = reinterpret_cast<float*>(tile + DIRECTIONS * T * channels);  // States
  float* parts = states + DIRECTIONS * T * 2 * 4 * S;                          // [step][channel], twice with BLEND
  if (s.scratch) parts = s.scratch + (long long)blockIdx.x * steps * channels * (1 + BLEND);
  float* blended = parts + steps * channels;

  const Place at(threadIdx.x);
  const Direction& own = s.direction[at.k];
  float A[S], h[S];
#pragma unroll
  for (int i = 0; i < S; i++) {
    const int n = at.p * S + i;
    const bool real = at.c < count && n < s.states;
    A[i] = real ? own.A[(long long)(first_channel + at.c) * s.states + n] * log2_e : 0.0f;
    h[i] = 0.0f;
  }
  const Share share(first_channel, count, threadIdx.x);
  constexpr int run = Share::run;
  const Column<const Wide> z(s.z, b, 0, share.channel);
  const Column<Wide> o(s.o, b, 0, share.channel);
  const Source first_source(s.direction[0], share, b), second_source(s.direction[DIRECTIONS - 1], share, b);

  const States<1> loader(s, b, g, threadIdx.x);

  for (int step = 0; step < tiles; step++) {
    int first[2];  // step of each direction's tile
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) {
      first[k] = T * (s.direction[k].reversed ? tiles - 1 - step : step);
      float dt[run], u[run];
      const Source& source = k ? second_source : first_source;
      source.step_sizes<true>(first[k] + share.j, steps, share.real, dt);
      source.inputs(first[k] + share.j, steps, share.real, u);
#pragma unroll
      for (int i = 0; i < run; i++) tile[entry(k, share.j + i, share.c)] = make_float2(dt[i], u[i]);
      source.prefetch(first[k] + share.j + (s.direction[k].reversed ? -T : T), steps);
    }
    loader.copy(loader.k ? first[1] : first[0], steps, states);
    __syncthreads();
    if (own.reversed)
      walk<true>(at, tile, states, A, h);
    else
      walk<false>(at, tile, states, A, h);
    __syncthreads();

    const bool same = DIRECTIONS == 2 && first[0] == first[1];  // both directions are in one tile
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) {
      const Direction& d = s.direction[k];
      const bool second = DIRECTIONS == 1 || (same ? k == 1 : d.reversed ? first[k] < first[1 - k] : first[k] > first[1 - k]);
      const float skip = d.D ? d.D[share.channel] : 0.0f, mix = BLEND ? d.blend[b] : 0.0f;
      const int t0 = first[k] + share.j;
      float gate[run];
      if (GATE && second) load_window<true>(z, t0, steps, share.real, gate);
#pragma unroll
      for (int i = 0; i < run; i++) {
        const int t = t0 + i;
        if (!share.real || t >= steps) continue;
        const float2 e = tile[entry(k, share.j + i, share.c)];  // C.h, u
        if (UNGATED) store_last(Column<Wide>(d.p, b, 0, share.channel).at(t), e.x);
        const int part = t * channels + share.c;
        float y = fmaf(skip, e.y, e.x), mixed = mix * e.x;
        if (second) {
          if (DIRECTIONS == 2) y += parts[part];
          if (DIRECTIONS == 2 && BLEND) mixed += blended[part];
          if (GATE) y *= gate[i] * sigmoid(gate[i]);
          store_last(o.at(t), BLEND ? y + mixed : y);
        } else {
          parts[part] = y;
          if (BLEND) blended[part] = mixed;
        }
      }
    }
    __syncthreads();
  }
}
