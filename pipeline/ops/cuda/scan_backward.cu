// The gradients of the scan (closed form: Mamba's backward).
//
//   lam_t = C_t g_t + a_{t+1} lam_{t+1}    q_t = sum_n lam_t B_t    slope_t = lam_t a_t h_{t-1}
//   g_u = dt q + D g_y    g_dt = u q + sum_n slope A    g_A = sum_t slope dt    g_B = lam dt u    g_C = g h
//
// h runs with the direction and lam against it. One of the two runs forward in time, so both directions go over the same
// steps in the same order: a first sweep, forward in time, keeps that state at the beginning of each tile; the second sweep
// takes the tiles from the last to the first, computes that state again and keeps it in registers, and runs the other one
// backward in time beside it. So the gate's gradient, a sum over the directions, is complete in the block, and the forward
// needs to keep nothing.

#define THREADS 256
#define MIN_BLOCKS (LANE_STATES == 4 ? 2 : 1)
#include "scan.cuh"

constexpr int channels = channels_of_block;
constexpr int W = S < 8 ? S : 8, halves = S / W;  // a lane's states are reordered within W; see `sum_channels`
constexpr int values = S / 4;                     // sums over channels that a lane gets in each step

// One step forward in time of the state that runs that way: h, or with a reversed direction the lam that enters the step.
// Returns h_t or lam_t.
template <bool REVERSED>
__device__ inline void advance(const float4& e, const float* row, const float (&A)[S], float (&v)[S], float (&out)[S]) {
  float X[S];
  read(REVERSED ? row + W * 4 * S : row, X);  // C or B
  const float weight = REVERSED ? e.z : e.x * e.y;
#pragma unroll
  for (int i = 0; i < S; i++) {
    const float a = exp2_fast(e.x * A[i]);
    if (REVERSED) {
      out[i] = fmaf(weight, X[i], v[i]);
      v[i] = a * out[i];
    } else {
      v[i] = fmaf(a, v[i], weight * X[i]);
      out[i] = v[i];
    }
  }
}

// Sums the gradients of B and C over the 8 channels of a warp. Register i of a lane is its state i ^ f, f from the lane's
// channel, so that both partners of an exchange keep the same registers and send the same ones: no selection is needed.
__device__ inline void sum_channels(const Place& at, float (&g_B)[S], float (&g_C)[S], float* out) {
#pragma unroll
  for (int m = W / 2; m > 0; m /= 2)
#pragma unroll
    for (int i = 0; i < S; i++)
      if (i % W < m) {
        g_B[i] += __shfl_xor_sync(~0u, g_B[i + m], 4 * m);
        g_C[i] += __shfl_xor_sync(~0u, g_C[i + m], 4 * m);
      }
  if (W == 4) {  // two groups of 4 channels are left: one takes B, the other C
    const bool high = at.c8 & 4;
    out[0] = (high ? g_C[0] : g_B[0]) + __shfl_xor_sync(~0u, high ? g_B[0] : g_C[0], 16);
  } else {
#pragma unroll
    for (int i = 0; i < halves; i++) out[i] = g_B[i * W], out[halves + i] = g_C[i * W];
  }
}

// Reads what the first sweep kept of this thread at the beginning of a tile; 0 for the first tile.
__device__ inline void read_mark(const float4* mark, float (&v)[S]) {
#pragma unroll
  for (int j = 0; j < values; j++) {
    const float4 x = mark ? mark[j * threads] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    v[4 * j] = x.x, v[4 * j + 1] = x.y, v[4 * j + 2] = x.z, v[4 * j + 3] = x.w;
  }
}

// What a block computes at a time. It lies in shared memory, because it is needed seldom and registers are scarce.
struct Part {
  int b, g, first_channel, count;          // count: channels that exist; none or less: the block is done
  int round, unused[3];                    // tiles of channels done
  float2 sums[DIRECTIONS * channels];      // of the gradients of D and the bias, over the steps so far
  __device__ void set(const Scan& s, int next) {
    round = next;
    const int block = blockIdx.x % s.blocks, group_channels = s.channels / s.groups;
    const int first = (block * s.tiles + round) * channels;
    g = blockIdx.x / s.blocks % s.groups, b = blockIdx.x / s.blocks / s.groups;
    first_channel = g * group_channels + first, count = min(group_channels - first, channels);
  }
  __device__ int channel(int c) const { return first_channel + min(c, count - 1); }
};

// The second sweep over a tile. `mark` is the state that runs forward in time, at the beginning of the tile; `w` the other
// one: what enters the tile's last step. A lane leaves {g_u, g_delta, y} of step 4 i + p in its entry.
template <bool REVERSED>
__device__ inline void sweep_back(float4* tile, const float* states, const float (&A)[S], const float* D, const Part& part,
                                  const float4* mark, float (&w)[S], float (&g_A)[S], float2& sums,
                                  float (&out)[T * values]) {
  const Place at(thread_now());
  const float* rows = states + (at.k * T * 2 * W + at.c8 % W) * 4 * S + at.p * S;
  constexpr int row = 2 * W * 4 * S;
  float kept[T][S], v[S];
  read_mark(mark, v);
#pragma unroll
  for (int t = 0; t < T; t++) advance<REVERSED>(tile[entry(at.k, t, at.c)], rows + t * row, A, v, kept[t]);
  __syncwarp();
  const float skip = D ? D[part.channel(at.c)] : 0.0f;
  sums = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int group = T - 4; group >= 0; group -= 4) {
    float q[4], rate[4], y[4];  // of the steps, then of pairs of them
#pragma unroll
    for (int j = 3; j >= 0; j--) {
      const int t = group + j;
      __syncwarp();  // keeps the compiler from loading so far ahead that registers run out
      const float4 e = tile[entry(at.k, t, at.c)];
      const float dtu = e.x * e.y;
      float B[S], C[S], g_B[S], g_C[S];
      read(rows + t * row, B);
      read(rows + t * row + W * 4 * S, C);
      if (!REVERSED && t == 0) read_mark(mark, v);
      q[j] = rate[j] = y[j] = 0.0f;
#pragma unroll
      for (int i = 0; i < S; i++) {
        const float a = exp2_fast(e.x * A[i]);
        float h, lam, passed;  // passed: a_t h_{t-1}
        if (REVERSED) {
          lam = kept[t][i];
          passed = a * w[i];
          h = w[i] = fmaf(dtu, B[i], passed);
        } else {
          lam = fmaf(e.z, C[i], w[i]);
          h = kept[t][i];
          passed = a * (t ? kept[t ? t - 1 : 0][i] : v[i]);
          w[i] = a * lam;
        }
        const float slope = lam * passed;
        q[j] = fmaf(lam, B[i], q[j]);
        y[j] = fmaf(h, C[i], y[j]);
        rate[j] = fmaf(slope, A[i], rate[j]);
        g_A[i] = fmaf(slope, e.x, g_A[i]);
        g_B[i] = lam * dtu;
        g_C[i] = h * e.z;
      }
      sum_channels(at, g_B, g_C, out + t * values);
      if (j % 2 == 0) {
        q[j] = sum_pair(q[j], q[j + 1], at.p);
        rate[j] = sum_pair(rate[j], rate[j + 1], at.p);
        if (GATE) y[j] = sum_pair(y[j], y[j + 1], at.p);
      }
    }
    const float q_p = sum_quad(q[0], q[2], at.p), rate_p = sum_quad(rate[0], rate[2], at.p);
    const float y_p = GATE ? sum_quad(y[0], y[2], at.p) : 0.0f;
    const int place = entry(at.k, group + at.p, at.c);
    const float4 e = tile[place];  // dt, u, g, g_y
    const float g_dt = fmaf(e.y, q_p, rate_p * ln_2) * (SOFTPLUS ? softplus_slope(e.x) : 1.0f);
    sums.x = fmaf(e.w, e.y, sums.x);
    sums.y += g_dt;
    __syncwarp();  // all lanes have read the entries that are now replaced
    // One of the sums over channels waits in the entry too: registers are scarce.
    tile[place] = make_float4(fmaf(e.x, q_p, skip * e.w), g_dt, fmaf(skip, e.y, y_p), out[(group + 3) * values]);
  }
}

// Writes {dt, u, g at C.h, g at y} of a tile. The first sweep needs not all of it.
template <bool FIRST>
__device__ inline void fill(const Scan& s, const Share& share, int b, int first, float4* tile) {
  constexpr int run = Share::run;
  const int t = first + share.j;
  float g_o[run], g_y[run];
  load_window<false>(Column<const Wide>(s.g_o, b, 0, share.channel), t, s.steps, share.real, g_o);
  if (GATE) load_window<false>(Column<const Wide>(s.z, b, 0, share.channel), t, s.steps, share.real, g_y);
#pragma unroll
  for (int i = 0; i < run; i++) g_y[i] = GATE ? g_o[i] * g_y[i] * sigmoid(g_y[i]) : g_o[i];
#pragma unroll
  for (int k = 0; k < DIRECTIONS; k++) {
    const Direction& d = s.direction[k];
    const Source source(d, share, b);
    float dt[run], u[run], g_p[run];
    source.step_sizes<!FIRST>(t, s.steps, share.real, dt);
#pragma unroll
    for (int i = 0; i < run; i++) u[i] = 0.0f;
    if (!FIRST || !d.reversed) source.inputs(t, s.steps, share.real, u);
    const float mix = BLEND ? d.blend[b] : 0.0f;
    if (UNGATED) load_window<!FIRST>(Column<const Wide>(d.g_p, b, 0, share.channel), t, s.steps, share.real, g_p);
#pragma unroll
    for (int i = 0; i < run; i++) {
      const float g = g_y[i] + (BLEND ? mix * g_o[i] : 0.0f) + (UNGATED ? g_p[i] : 0.0f);
      tile[entry(k, share.j + i, share.c)] = make_float4(dt[i], u[i], g, g_y[i]);
    }
    if (FIRST) source.prefetch(t + T, s.steps);
  }
  if (FIRST) {
    prefetch_window<run>(Column<const Wide>(s.g_o, b, 0, share.channel), t + T, s.steps);
    if (GATE) prefetch_window<run>(Column<const Wide>(s.z, b, 0, share.channel), t + T, s.steps);
  }
}

KERNEL(scan_backward, Scan) {
  const Scan& s = params;
  const int tiles = (s.steps + T - 1) / T;

  constexpr int state_floats = DIRECTIONS * T * 2 * W * 4 * S, warp_sums = warps * T * values * 32;
  Part& part = *reinterpret_cast<Part*>(shared_memory());
  float4* tile = shared_memory() + sizeof(Part) / sizeof(float4);               // [direction][T][channel]
  float* states = reinterpret_cast<float*>(tile + DIRECTIONS * T * channels);   // States, or the sums of the warps
  float4* marks = reinterpret_cast<float4*>(states + (state_floats > warp_sums ? state_floats : warp_sums));
  if (s.scratch) marks = reinterpret_cast<float4*>(s.scratch) + (long long)blockIdx.x * (tiles - 1) * threads * values;

  if (threadIdx.x == 0) part.set(s, 0);
  __syncthreads();
  while (part.round < s.tiles && part.count > 0) {
    float A[S], v[S], w[S];
    {
      const Place at(thread_now());
      const Direction& own = s.direction[at.k];
#pragma unroll
      for (int i = 0; i < S; i++) {
        const int n = at.p * S + (i ^ (at.c8 % W));
        const bool real = at.c < part.count && n < s.states;
        A[i] = real ? own.A[(long long)part.channel(at.c) * s.states + n] * log2_e : 0.0f;
        v[i] = w[i] = 0.0f;
      }
    }
    if (threadIdx.x < DIRECTIONS * channels) part.sums[threadIdx.x] = make_float2(0.0f, 0.0f);

    for (int i = 0; i < tiles - 1; i++) {
      fill<true>(s, Share(part.first_channel, part.count, thread_now()), part.b, i * T, tile);
      States<W>(s, part.b, part.g, thread_now()).copy(i * T, s.steps, states);
      __syncthreads();
      const Place at(thread_now());
      const float* rows = states + (at.k * T * 2 * W + at.c8 % W) * 4 * S + at.p * S;
      float unused[S];
      if (s.direction[at.k].reversed) {
#pragma unroll
        for (int t = 0; t < T; t++) advance<true>(tile[entry(at.k, t, at.c)], rows + t * 2 * W * 4 * S, A, v, unused);
      } else {
#pragma unroll
        for (int t = 0; t < T; t++) advance<false>(tile[entry(at.k, t, at.c)], rows + t * 2 * W * 4 * S, A, v, unused);
      }
#pragma unroll
      for (int j = 0; j < values; j++)
        marks[(i * values + j) * threads + thread_now()] = make_float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
      __syncthreads();
    }

    for (int i = tiles - 1; i >= 0; i--) {
      fill<false>(s, Share(part.first_channel, part.count, thread_now()), part.b, i * T, tile);
      States<W>(s, part.b, part.g, thread_now()).copy(i * T, s.steps, states);
      __syncthreads();
      const Place at(thread_now());
      const Direction& own = s.direction[at.k];
      float4* mark = marks + (i - 1) * values * threads + thread_now();
      float2 sums;
      float g_A[S], out[T * values];
#pragma unroll
      for (int j = 0; j < S; j++) g_A[j] = 0.0f;
      if (own.reversed)
        sweep_back<true>(tile, states, A, own.D, part, i ? mark : nullptr, w, g_A, sums, out);
      else
        sweep_back<false>(tile, states, A, own.D, part, i ? mark : nullptr, w, g_A, sums, out);
      for (int m = 1; m < 4; m *= 2) {  // the four lanes of a channel had different steps
        sums.x += __shfl_xor_sync(~0u, sums.x, m);
        sums.y += __shfl_xor_sync(~0u, sums.y, m);
      }
      if (at.p == 0) {
        float2& sum = part.sums[at.k * channels + at.c];
        sum.x += sums.x, sum.y += sums.y;
      }
      // The mark of the later tile is free by now: the sum of g_A so far waits there.
#pragma unroll
      for (int j = 0; j < values; j++) {
        float4 sum = make_float4(g_A[4 * j], g_A[4 * j + 1], g_A[4 * j + 2], g_A[4 * j + 3]);
        if (i < tiles - 1) {
          const float4 later = mark[(values + j) * threads];
          sum.x += later.x, sum.y += later.y, sum.z += later.z, sum.w += later.w;
        }
        if (i) mark[j * threads] = sum;
        if (!i && at.c < part.count) {
          float* to = own.partial_A + ((long long)part.b * s.channels + part.channel(at.c)) * s.states;
          const int n = at.p * S, f = at.c8 % W;
          if (n + (4 * j ^ f) < s.states) to[n + (4 * j ^ f)] = sum.x;
          if (n + (4 * j + 1 ^ f) < s.states) to[n + (4 * j + 1 ^ f)] = sum.y;
          if (n + (4 * j + 2 ^ f) < s.states) to[n + (4 * j + 2 ^ f)] = sum.z;
          if (n + (4 * j + 3 ^ f) < s.states) to[n + (4 * j + 3 ^ f)] = sum.w;
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < T * values; j++) {
        const bool waits = j % (4 * values) == 3 * values;
        states[(at.warp * T * values + j) * 32 + at.lane] = waits ? tile[entry(at.k, j / values - 3 + at.p, at.c)].w : out[j];
      }
      const Share share(part.first_channel, part.count, thread_now());
      const int b = part.b;
      const int t0 = i * T + share.j;
      float y[Share::run];
#pragma unroll
      for (int r = 0; r < Share::run; r++) {
        y[r] = 0.0f;
#pragma unroll
        for (int k = 0; k < DIRECTIONS; k++) {
          const float4 e = tile[entry(k, share.j + r, share.c)];
          y[r] += e.z;
          if (share.real && t0 + r < s.steps) {
            const Direction& d = s.direction[k];
            store_last(Column<Wide>(d.g_u, b, 0, share.channel).at(t0 + r), e.x);
            store_last(Column<Wide>(d.g_delta, b, 0, share.channel).at(t0 + r), e.y);
          }
        }
      }
      if (GATE) {
        float g_o[Share::run], z[Share::run];
        load_window<true>(Column<const Wide>(s.g_o, b, 0, share.channel), t0, s.steps, share.real, g_o);
        load_window<true>(Column<const Wide>(s.z, b, 0, share.channel), t0, s.steps, share.real, z);
#pragma unroll
        for (int r = 0; r < Share::run; r++) {
          const float gate = sigmoid(z[r]), g_z = g_o[r] * y[r] * gate * fmaf(z[r], 1.0f - gate, 1.0f);
          if (share.real && t0 + r < s.steps) store_last(Column<Wide>(s.g_z, b, 0, share.channel).at(t0 + r), g_z);
        }
      }
      __syncthreads();

      // The sums over the warps of each direction; added to those of this block's earlier channels.
      float* partial = s.partial_BC + (long long)blockIdx.x * DIRECTIONS * s.steps * 2 * s.states;
#pragma unroll
      for (int e = 0; e < DIRECTIONS * T * values * 32; e += threads) {
        // a thread keeps its lane and, in each round, takes another row of `warps` rows of lanes
        const int thread = thread_now(), lane = thread % 32, row = thread / 32 + e / 32;
        const int value = row % values, t = row / values % T, k = row / values / T;
        const int c8 = lane / 4, matrix = W == 4 ? c8 / 4 : value / halves;
        const int n = lane % 4 * S + value % halves * W + c8 % W;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < direction_warps; warp++)
          sum += states[(((k * direction_warps + warp) * T + t) * values + value) * 32 + lane];
        if (n < s.states && i * T + t < s.steps) {
          float* to = partial + (((long long)k * s.steps + i * T + t) * 2 + matrix) * s.states + n;
          *to = part.round ? *to + sum : sum;
        }
      }
      __syncthreads();
    }

    const Place at(thread_now());
    if (at.c < part.count && at.p == 0) {
      const Direction& own = s.direction[at.k];
      const long long row = (long long)part.b * s.channels + part.channel(at.c);
      own.partial_D[row] = part.sums[at.k * channels + at.c].x;
      own.partial_bias[row] = part.sums[at.k * channels + at.c].y;
    }
    __syncthreads();
    if (threadIdx.x == 0) part.set(s, part.round + 1);
    __syncthreads();
  }
}
