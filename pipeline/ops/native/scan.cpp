// The selective scan and its closed-form backward, for one or two directions in one call.
//
// The work is divided into units of one batch item and at most `unit_channels` channels of one group. The division and
// the order of sums over units are fixed, so the bits do not depend on the number of threads. A unit walks time in chunks
// and, inside a chunk, its tiles of W channels. States are computed in blocks of S: as many as leave registers for what the
// backward carries from step to step. The forward keeps the state at the beginning of each chunk, and the backward recomputes
// one chunk at a time, so no (Bt, E, L, N) tensor exists.
//
// Two directions share z and o. The second adds to the output of the first while it is still in the cache.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "recurrence.h"
#include "tiles.h"

using simd::Float;
using simd::load;
using simd::store;
using simd::W;

namespace {

constexpr int64_t chunk_steps = 32;     // a unit's inputs of a chunk and a tile's states fit the second-level cache
constexpr int64_t unit_channels = 128;  // a multiple of every W
constexpr int64_t unit_tiles = unit_channels / W;
constexpr int wide = W < 8 ? W : 8, narrow = W == 8 ? 4 : wide;  // S; `narrow` where there are no more states than that

constexpr int64_t thread_work = 1 << 18;  // state steps that justify waking a thread: about 50 microseconds

}  // namespace

// Mirrored field by field in library.py.
struct Direction {
  Strided u, delta, B, C, z, o, p;                    // p: ungated output, may be absent
  Strided g_o, g_p, g_u, g_delta, g_z;                // backward only; g_p may be absent
  const float *A, *D, *bias, *blend;                  // (E, N), (E), (E), (Bt), contiguous; all except A may be absent
  float* carries;                                     // scan_carry_floats() floats; may be absent in the forward
  float *partial_A, *partial_D, *partial_bias;        // (Bt, E, N), (Bt, E), (Bt, E)
  float* partial_BC;                                  // (Bt, G, blocks, L, width / S, 2, S): sums over a unit's channels
  int64_t reversed;                                   // the Strided tensors run backwards in time, partial_BC does not
};

struct Scan {
  int64_t batch, groups, channels, states, steps;  // channels: of all groups
  int64_t softplus, directions;
  Direction direction[2];
};

namespace {

// The sizes that all units of a call share.
struct Plan {
  const Scan& s;
  int64_t group_channels = s.channels / s.groups;
  int64_t blocks = pieces(group_channels, unit_channels);
  int64_t units = s.batch * s.groups * blocks;
  int64_t block = s.states <= narrow ? narrow : wide;  // S, the states that are computed together
  int64_t width = pieces(s.states, block) * block;    // states, padded
  int64_t chunks = pieces(s.steps, chunk_steps);
  int64_t tile_state = width * W;

  struct Unit {
    int64_t b, g, block, first, channels, tiles;
  };
  Unit unit(int64_t i) const {
    int64_t block = i % blocks, g = i / blocks % s.groups, b = i / blocks / s.groups;
    int64_t count = std::min(unit_channels, group_channels - block * unit_channels);
    return {b, g, block, block * unit_channels, count, pieces(count, W)};
  }
  float* carry(const Direction& d, int64_t unit, int64_t chunk) const {
    return d.carries + (unit * chunks + chunk) * unit_tiles * tile_state;
  }
};

// A chunk of a direction of a unit; without a direction there is none.
struct Place {
  const Direction* d;
  int64_t unit, chunk;
};

// Fetches slice `slice` of `slices` of a chunk of some of the tensors into the cache, before it is read or written.
__attribute__((always_inline)) inline void prefetch(const Plan& plan, const Place& place, int64_t slice, int64_t slices,
                                                    std::initializer_list<Strided Direction::*> tensors) {
  if (!place.d) return;
  const Plan::Unit unit = plan.unit(place.unit);
  const int64_t t0 = place.chunk * chunk_steps, steps = std::min(chunk_steps, plan.s.steps - t0);
  for (auto tensor : tensors)
    if (const Strided& s = place.d->*tensor)
      tiles::prefetch(s.at(unit.b, 0, unit.g * plan.group_channels + unit.first).from_step(t0), unit.channels, steps, slice,
                      slices);
}

// Scratch memory of one thread in 64-byte aligned pieces. It only grows, and lives as long as the thread.
class Arena {
 public:
  explicit Arena(int64_t floats) {
    thread_local std::vector<float> memory;
    memory.resize(std::max<size_t>(memory.size(), floats + 16));
    next_ = (float*)((uintptr_t(memory.data()) + 63) & ~uintptr_t(63));
  }
  float* take(int64_t floats) {  // `floats` must be a multiple of 16, else alignment is lost
    float* piece = next_;
    next_ += floats;
    return piece;
  }

 private:
  float* next_;
};

// A contiguous (channels, states) array as tiles see it.
Strided rows_of(const float* at, int64_t states) { return {const_cast<float*>(at), 0, 0, states, 1, 0}; }

// The per-channel inputs of a unit: a row of W for each tile, zero beyond the last channel.
struct Rows {
  float *rates, *bias, *skip;  // rates: [tile][state][lane], A in units of log 2

  static int64_t floats(const Plan& plan) { return unit_tiles * (plan.tile_state + 2 * W); }
  Rows(Arena& arena, const Plan& plan, const Direction& d, int64_t first, int64_t channels)
      : rates(arena.take(unit_tiles * plan.tile_state)),
        bias(arena.take(unit_channels)),
        skip(arena.take(unit_channels)) {
    std::fill_n(rates, floats(plan), 0.0f);
    const int64_t states = plan.s.states;
    tiles::load({rates, plan.tile_state, W}, rows_of(d.A + first * states, states), channels, states);
    for (int64_t i = 0; i < unit_tiles * plan.tile_state; i++) rates[i] *= simd::log2_e;
    if (d.bias) std::copy_n(d.bias + first, channels, bias);
    if (d.D) std::copy_n(d.D + first, channels, skip);
  }
};

constexpr int64_t tile_floats = chunk_steps * W, block_floats = unit_tiles * tile_floats;

// A unit's chunk of a tensor: one tile after another.
Tiles block(float* at) { return {at, tile_floats, W}; }

// Loads a chunk of B or C as [step][width], with zeros beyond N.
void load_states(float* out, const Plan& plan, const Strided& s, int64_t steps) {
  std::fill_n(out, steps * plan.width, 0.0f);
  const int64_t whole = plan.s.states / W * W;
  tiles::load({out, W, plan.width}, s, whole, steps);
  tiles::load_narrow(out + whole, plan.width, s.at(0, 0, whole), plan.s.states - whole, steps);
}

// The inputs and outputs of the recurrence for one tile and chunk, except the states.
struct Tile {
  alignas(64) float dt[tile_floats], dtu[tile_floats], y[tile_floats];
  alignas(64) float slope[tile_floats];  // d dt / d delta
};

// Computes dt = softplus(delta + bias) and dt * u, and sets y = 0.
template <bool with_slope>
void prepare(Tile& k, bool softplus, const float* u, const float* delta, Float bias, int64_t steps) {
  const Float one = simd::splat(1.0f);
  for (int64_t t = 0; t < steps * W; t += W) {
    const Float x = load(delta + t) + bias;
    Float dt = x, slope = one;
    if (softplus) dt = simd::softplus(x, with_slope ? &slope : nullptr);
    if (with_slope) store(k.slope + t, slope);
    store(k.dt + t, dt);
    store(k.dtu + t, dt * load(u + t));
    store(k.y + t, Float{});
  }
}

template <int S>
void forward_unit(const Plan& plan, const Direction& d, int64_t index, bool add, Place next) {
  const Plan::Unit unit = plan.unit(index);
  const int64_t first = unit.g * plan.group_channels + unit.first;
  const int64_t unit_state = unit_tiles * plan.tile_state, chunk_states = chunk_steps * plan.width;
  Arena arena(Rows::floats(plan) + unit_state + 2 * chunk_states + 4 * block_floats);
  const Rows rows(arena, plan, d, first, unit.channels);
  float *state = arena.take(unit_state), *B = arena.take(chunk_states), *C = arena.take(chunk_states);
  float *us = arena.take(block_floats), *deltas = arena.take(block_floats), *zs = arena.take(block_floats);
  float* ps = arena.take(block_floats);
  std::fill_n(state, unit_state, 0.0f);

  Tile k;
  for (int64_t chunk = 0; chunk < plan.chunks; chunk++) {
    const int64_t t0 = chunk * chunk_steps, steps = std::min(chunk_steps, plan.s.steps - t0);
    auto here = [&](const Strided& s) { return s.at(unit.b, 0, first).from_step(t0); };
    if (d.carries) std::copy_n(state, unit.tiles * plan.tile_state, plan.carry(d, index, chunk));
    load_states(B, plan, d.B.at(unit.b, unit.g, 0).from_step(t0), steps);
    load_states(C, plan, d.C.at(unit.b, unit.g, 0).from_step(t0), steps);
    tiles::load(block(us), here(d.u), unit.channels, steps);
    tiles::load(block(deltas), here(d.delta), unit.channels, steps);
    if (d.z) tiles::load(block(zs), here(d.z), unit.channels, steps);
    for (int64_t i = 0; i < unit.tiles; i++) {
      const float *u = us + i * tile_floats, *z = zs + i * tile_floats;
      float *y = deltas + i * tile_floats, *p = ps + i * tile_floats;
      const Place ahead = chunk + 1 < plan.chunks ? Place{&d, index, chunk + 1} : next;
      prefetch(plan, ahead, i, unit.tiles, {&Direction::u, &Direction::delta, &Direction::z});
      prefetch(plan, {&d, index, chunk}, i, unit.tiles, {&Direction::o, &Direction::p});
      prepare<false>(k, plan.s.softplus, u, y, load(rows.bias + i * W), steps);
      for (int64_t n = 0; n < plan.width; n += S) {
        const int64_t at = i * plan.tile_state + n * W;
        advance<S, false>(k.dt, k.dtu, k.y, state + at, rows.rates + at, B + n, C + n, plan.width, steps, nullptr, nullptr);
      }
      if (d.p) std::copy_n(k.y, steps * W, p);
      const Float skip = load(rows.skip + i * W);
      for (int64_t t = 0; t < steps * W; t += W) {
        Float out = load(k.y + t);
        if (d.D) out += skip * load(u + t);
        if (d.z) out *= load(z + t) * simd::sigmoid(load(z + t));
        if (d.blend) out += d.blend[unit.b] * load(k.y + t);
        store(y + t, out);
      }
    }
    if (d.p) tiles::store(here(d.p), block(ps), unit.channels, steps);
    tiles::store(here(d.o), block(deltas), unit.channels, steps, add);
  }
}

// Computes from the last step of a chunk to its first, for S states:
//   lam_t = C_t g_t + a_{t+1} lam_{t+1},  q_t = sum lam_t B_t,  r_t = sum A lam_t a_t h_{t-1}  (spec 4.2)
// `carried` holds a_{t+1} lam_{t+1}. The results are added to q and r, and the sums of lam_t dtu_t and g_t h_t over the channels to
// g_BC. g is the gradient at C h.
template <int S>
void retreat(const Tile& k, const float* g, float* carried, float* g_rates, const float* rates, const float* B,
             const float* C, int64_t width, int64_t steps, const float* kept_h, const float* kept_a, float* q, float* r,
             float* g_BC, int64_t g_row) {
  Float passed[S], to_rates[S];
#pragma GCC unroll 16
  for (int n = 0; n < S; n++) passed[n] = load(carried + n * W), to_rates[n] = load(g_rates + n * W);
  for (int64_t t = steps - 1; t >= 0; t--) {
    const Float dt = load(k.dt + t * W), dtu = load(k.dtu + t * W), g_t = load(g + t * W);
    Float q_t = load(q + t * W), r_t = load(r + t * W), to_BC[2 * S];
#pragma GCC unroll 16
    for (int n = 0; n < S; n++) {
      const Float lam = g_t * C[t * width + n] + passed[n];
      q_t += lam * B[t * width + n];
      to_BC[n] = lam * dtu;
      to_BC[S + n] = g_t * load(kept_h + ((t + 1) * S + n) * W);
      passed[n] = lam * load(kept_a + (t * S + n) * W);
      const Float decay = passed[n] * load(kept_h + (t * S + n) * W);
      r_t += decay * load(rates + n * W);
      to_rates[n] += decay * dt;
    }
    store(q + t * W, q_t);
    store(r + t * W, r_t);
#pragma GCC unroll 16
    for (int n = 0; n < 2 * S; n += W) {
      float* sums = g_BC + t * g_row + n;
      store(sums, load(sums) + simd::sum_lanes(to_BC + n));
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < S; n++) store(carried + n * W, passed[n]), store(g_rates + n * W, to_rates[n]);
}

template <int S>
void backward_unit(const Plan& plan, const Direction& d, int64_t index, bool add, Place next) {
  const Plan::Unit unit = plan.unit(index);
  const int64_t first = unit.g * plan.group_channels + unit.first, row = unit.b * plan.s.channels + first;
  const int64_t unit_state = unit_tiles * plan.tile_state, chunk_states = chunk_steps * plan.width;
  Arena arena(Rows::floats(plan) + 2 * unit_state + 2 * chunk_states + plan.tile_state + (2 * chunk_steps + 1) * S * W +
              2 * unit_channels + 5 * block_floats);
  const Rows rows(arena, plan, d, first, unit.channels);
  float *carried = arena.take(unit_state), *g_rates = arena.take(unit_state);
  float *g_skip = arena.take(unit_channels), *g_bias = arena.take(unit_channels);
  std::fill_n(carried, 2 * unit_state + 2 * unit_channels, 0.0f);
  float *B = arena.take(chunk_states), *C = arena.take(chunk_states), *state = arena.take(plan.tile_state);
  float *kept_h = arena.take((chunk_steps + 1) * S * W), *kept_a = arena.take(chunk_steps * S * W);
  float *us = arena.take(block_floats), *deltas = arena.take(block_floats), *zs = arena.take(block_floats);
  float *g_os = arena.take(block_floats), *g_ps = arena.take(block_floats);
  const int64_t size_BC = 2 * plan.width * plan.s.steps, row_BC = d.reversed ? -2 * plan.width : 2 * plan.width;
  float* g_BC = d.partial_BC + index * size_BC;
  std::fill_n(g_BC, size_BC, 0.0f);
  if (d.reversed) g_BC += size_BC + row_BC;

  Tile k;
  alignas(64) float g_y[tile_floats], g_Ch[tile_floats], q[tile_floats], r[tile_floats];
  for (int64_t chunk = plan.chunks - 1; chunk >= 0; chunk--) {
    const int64_t t0 = chunk * chunk_steps, steps = std::min(chunk_steps, plan.s.steps - t0);
    auto here = [&](const Strided& s) { return s.at(unit.b, 0, first).from_step(t0); };
    load_states(B, plan, d.B.at(unit.b, unit.g, 0).from_step(t0), steps);
    load_states(C, plan, d.C.at(unit.b, unit.g, 0).from_step(t0), steps);
    tiles::load(block(us), here(d.u), unit.channels, steps);
    tiles::load(block(deltas), here(d.delta), unit.channels, steps);
    tiles::load(block(g_os), here(d.g_o), unit.channels, steps);
    if (d.z) tiles::load(block(zs), here(d.z), unit.channels, steps);
    if (d.g_p) tiles::load(block(g_ps), here(d.g_p), unit.channels, steps);
    for (int64_t i = 0; i < unit.tiles; i++) {
      float *u = us + i * tile_floats, *delta = deltas + i * tile_floats, *z = zs + i * tile_floats;
      const float *g_o = g_os + i * tile_floats, *g_p = g_ps + i * tile_floats;
      const Place ahead = chunk > 0 ? Place{&d, index, chunk - 1} : next;
      prefetch(plan, ahead, i, unit.tiles, {&Direction::u, &Direction::delta, &Direction::z, &Direction::g_o, &Direction::g_p});
      prefetch(plan, {&d, index, chunk}, i, unit.tiles, {&Direction::g_u, &Direction::g_delta, &Direction::g_z});
      prepare<true>(k, plan.s.softplus, u, delta, load(rows.bias + i * W), steps);
      for (int64_t t = 0; t < steps * W; t += W) {
        Float g = load(g_o + t);
        if (d.z) {
          const Float gate = load(z + t), s = simd::sigmoid(gate);
          store(z + t, g * s * (1.0f + gate * (1.0f - s)));  // multiplied by y below, this is the gradient of z
          g *= gate * s;
        }
        store(g_y + t, g);
        if (d.blend) g += d.blend[unit.b] * load(g_o + t);
        store(g_Ch + t, d.g_p ? g + load(g_p + t) : g);
        store(q + t, Float{});
        store(r + t, Float{});
      }

      std::copy_n(plan.carry(d, index, chunk) + i * plan.tile_state, plan.tile_state, state);
      for (int64_t n = 0; n < plan.width; n += S) {
        const int64_t at = i * plan.tile_state + n * W;
        advance<S, true>(k.dt, k.dtu, k.y, state + n * W, rows.rates + at, B + n, C + n, plan.width, steps, kept_h, kept_a);
        retreat<S>(k, g_Ch, carried + at, g_rates + at, rows.rates + at, B + n, C + n, plan.width, steps, kept_h, kept_a, q, r,
                   g_BC + t0 * row_BC + 2 * n, row_BC);
      }

      // The inputs of this tile are no longer needed; the gradients overwrite them.
      const Float skip = load(rows.skip + i * W);
      Float sum_skip = load(g_skip + i * W), sum_bias = load(g_bias + i * W);
      for (int64_t t = (steps - 1) * W; t >= 0; t -= W) {
        const Float u_t = load(u + t), g = load(g_y + t), q_t = load(q + t);
        Float y = load(k.y + t), g_u = load(k.dt + t) * q_t;
        if (d.D) {
          y += skip * u_t;
          g_u += skip * g;
          sum_skip += g * u_t;
        }
        const Float g_delta = (u_t * q_t + load(r + t) * simd::ln_2) * load(k.slope + t);
        sum_bias += g_delta;
        store(u + t, g_u);
        store(delta + t, g_delta);
        if (d.z) store(z + t, load(z + t) * y);
      }
      store(g_skip + i * W, sum_skip);
      store(g_bias + i * W, sum_bias);
    }
    tiles::store(here(d.g_u), block(us), unit.channels, steps);
    tiles::store(here(d.g_delta), block(deltas), unit.channels, steps);
    if (d.z) tiles::store(here(d.g_z), block(zs), unit.channels, steps, add);
  }
  std::copy_n(g_skip, unit.channels, d.partial_D + row);
  std::copy_n(g_bias, unit.channels, d.partial_bias + row);
  const int64_t states = plan.s.states;
  tiles::store(rows_of(d.partial_A + row * states, states), {g_rates, plan.tile_state, W}, unit.channels, states);
}

using Work = void (*)(const Plan&, const Direction&, int64_t, bool, Place);

void for_units(const Scan& s, Work with_wide, Work with_narrow, bool backward) {
  const Plan plan{s};
  const Work work = plan.block == wide ? with_wide : with_narrow;
  const int64_t unit_work = std::min(unit_channels, plan.group_channels) * s.steps * plan.width + 1;
  at::parallel_for(0, plan.units, pieces(thread_work, unit_work), [&](int64_t begin, int64_t end) {
    auto place = [&](int64_t i) {
      return Place{s.direction + i % s.directions, i / s.directions, backward ? plan.chunks - 1 : 0};
    };
    for (int64_t i = begin * s.directions; i < end * s.directions; i++) {
      const Place here = place(i), next = i + 1 < end * s.directions ? place(i + 1) : Place{};
      work(plan, *here.d, here.unit, here.d != s.direction, next);
    }
  });
}

}  // namespace

extern "C" {

int64_t scan_struct_bytes() { return sizeof(Scan); }
int64_t scan_carry_floats(const Scan* s) {
  const Plan plan{*s};
  return plan.units * plan.chunks * unit_tiles * plan.tile_state;
}
int64_t scan_blocks(const Scan* s) { return Plan{*s}.blocks; }
int64_t scan_width(const Scan* s) { return Plan{*s}.width; }
int64_t scan_state_block(const Scan* s) { return Plan{*s}.block; }
void scan_forward(const Scan* s) { for_units(*s, forward_unit<wide>, forward_unit<narrow>, false); }
void scan_backward(const Scan* s) { for_units(*s, backward_unit<wide>, backward_unit<narrow>, true); }

// out[o][i] = sum over k of partials[o][k][i], in the order of k; 0 if count is 0.
void sum_partials(float* out, const float* partials, int64_t outer, int64_t count, int64_t size) {
  at::parallel_for(0, outer * size, 1 << 15, [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0f);
    for (int64_t o = begin / size; o * size < end; o++) {
      const int64_t from = std::max(begin, o * size), to = std::min(end, (o + 1) * size);
      for (int64_t k = 0; k < count; k++) {
        const float* partial = partials + (o * count + k) * size - o * size;
        for (int64_t i = from; i < to; i++) out[i] += partial[i];
      }
    }
  });
}

}  // extern "C"
