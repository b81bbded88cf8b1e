// Inference of Vision Mamba on the CPU, fp32: whole blocks in one call.
//
// A block is a norm and its in-projection, the scans of all directions, the gate with the out-projection and the sum after it, and a
// SwiGLU if it has one. Tokens are rows (batch, steps, width), contiguous. With at least as many images as threads, each thread takes
// the same number of whole images through a block, so that more of what passes between the layers stays in its cache; all threads
// share the images that are left. One thread computes each output element in a fixed order, so the result depends neither on the
// number of threads nor on the other images.
#include "layers.h"
#include "recurrence.h"

using namespace products;

namespace {

constexpr int64_t chunk_tiles = W == 16 ? 3 : 6;  // about 40 steps, whose inputs and weights fit the second-level cache
constexpr int64_t chunk_rows = chunk_tiles * tile_rows;
constexpr int low_unit = 8;  // inputs of the step size are read in units of this many
constexpr int max_taps = 8;  // shapes.py refuses more

struct Normed {
  int64_t rows, in, out, centred;  // centred: a layer norm, else an RMS norm
  double eps;
  const float *x, *weight, *bias;
  float* y;
};

struct Direction {
  const int64_t* tokens;  // (steps): the token at each step
  // (taps, inner), (inner), panels (inner -> rank | states | states), panels (rank -> inner), (inner),
  // (inner / W, states, W) in units of log 2, (inner). `inner` and `rank` are padded to `pad`.
  const float *taps, *taps_bias, *project, *spread, *spread_bias, *rates, *skip;
};

struct Scan {
  int64_t batch, steps, inner, states, rank, taps, directions;  // states: padded to 8 or 16
  const float* xz;                                              // (batch, steps, 2 inner)
  float *y, *v, *delta, *low;  // y: see Scanned; scratch for each direction and image, see Walk
  const Direction* direction;
};

struct Gate {
  int64_t batch, steps, inner, out, directions;
  const float *y, *xz, *weight;  // y: see Scanned; weight: panels (inner -> out)
  float* x;                      // (batch steps, out)
};

struct Swiglu {
  int64_t rows, width, hidden, centred;
  double eps;
  const float *both, *both_bias, *down, *down_bias;  // both: W columns of one layer beside W of the other, in turn
  float* x;
};

// The weights of a block. This structure, Direction and BlocksCall are mirrored field by field in vision_library.py. A norm's weight
// and bias are part of the weight and bias after it.
struct Block {
  int64_t inner, states, rank, taps, directions, centred, hidden, hidden_centred;  // hidden: 0 without a SwiGLU
  double eps, hidden_eps;
  const float *project, *project_bias, *join, *both, *both_bias, *down, *down_bias;
  Direction direction[4];
};

// All blocks have the same sizes; only `hidden` may differ. A slot is what one image needs. There are as many slots as images, at
// most one for each thread. Each thread takes its images through its slot one after another; the images that are left use the first
// slots together. If these images times directions are fewer than the threads, v, delta and low hold what the recurrence reads; else
// they are null, and it stays in the cache.
struct BlocksCall {
  int64_t batch, steps, width, count;
  const Block* blocks;
  float *x, *xz, *y;       // x: (batch, steps, width), changed; for each slot (steps, 2 inner) and Scanned
  float *v, *delta, *low;  // for each direction of the images that are left, see Walk
};

// What the scans give: (directions, batch, inner / W, steps, W), `inner` padded to `pad`. A scan writes W channels of many tokens
// after another. In rows of tokens each of these stores would lie some kilobytes from the one before, and wait for its line.
struct Scanned {
  int64_t batch, steps, inner = 0;
  int64_t at(int64_t direction, int64_t image, int64_t token, int64_t channel) const {
    return ((direction * batch + image) * inner + channel) * steps + token * W;
  }
};

// Packs `count` rows of `width` floats as one tile, normalised. Beyond `width` the weights are zero, and any finite input will do.
void pack_normalised(const float* rows, int64_t width, int64_t padded, int count, float eps, bool centred, float* tile) {
  for (int r = 0; r < count; r++, rows += width) {
    const auto [mean, scale] = moments(rows, width, eps, centred);
    for (int64_t c = 0; c < padded; c += W) store(tile + c * count + r * W, (load_some(rows + c, width - c) - mean) * scale);
  }
}

// y = norm(x) W + b.
void normed(const Normed& s) {
  const int64_t in = up(s.in, pad);
  product(
      s.rows, in, s.out, s.weight,
      [&](int64_t row, int count, float* tile) {
        pack_normalised(s.x + row * s.in, s.in, in, count, float(s.eps), s.centred, tile);
      },
      [&](int64_t row, int64_t column, Float sum) {
        store_some(s.y + row * s.out + column, sum + load(s.bias + column), s.out - column);
      },
      [](int64_t, int, int64_t, int64_t) {});
}

// x += ((sum of the directions' y) SiLU(z)) W.
void gate(const Gate& s) {
  const int64_t in = up(s.inner, pad);
  const Scanned y{s.batch, s.steps, in};
  product(
      s.batch * s.steps, in, s.out, s.weight,
      [&](int64_t row, int count, float* tile) {
        int64_t first[tile_rows];  // where each row begins in y
        for (int r = 0; r < count; r++) first[r] = y.at(0, (row + r) / s.steps, (row + r) % s.steps, 0);
        for (int64_t c = 0; c < in; c += W)
          for (int r = 0; r < count; r++) {
            Float sum{};
            for (int64_t k = 0; c < s.inner && k < s.directions; k++) sum += load(s.y + first[r] + y.at(k, 0, 0, c));
            const Float z = load_some(s.xz + (2 * (row + r) + 1) * s.inner + c, s.inner - c);
            store(tile + c * count + r * W, sum * (z * simd::sigmoid(z)));
          }
      },
      [&](int64_t row, int64_t column, Float sum) {
        float* to = s.x + row * s.out + column;
        store_some(to, sum + load_some(to, s.out - column), s.out - column);
      },
      [](int64_t, int, int64_t, int64_t) {});
}

// x += W3 (SiLU(W1 t + b1) (W2 t + b2)) + b3 with t = norm(x). The hidden rows never leave the cache.
void swiglu(const Swiglu& s) {
  const int64_t D = s.width, in = up(D, pad), hidden = up(s.hidden, pad);
  const Cut cut(s.rows, free_threads());
  in_blocks(cut, block_tiles, [&](int64_t t0, int64_t t1) {
    Scratch& scratch = Scratch::begin(block_tiles * tile_rows * (in + hidden) + tile_rows * panel);
    float *x = scratch.take(block_tiles * tile_rows * in), *h = scratch.take(block_tiles * tile_rows * hidden);
    float* both = scratch.take(tile_rows * panel);
    for (int64_t t = t0; t < t1; t++)
      pack_normalised(s.x + cut.first(t) * D, D, in, cut.height(t), float(s.eps), s.centred, x + (t - t0) * tile_rows * in);
    for (int64_t n = 0; n < hidden; n += W)
      for (int64_t t = t0; t < t1; t++)
        with_sizes(cut.height(t), panel, [&]<int R, int V>() {
          multiply<R, V>(x + (t - t0) * tile_rows * in, s.both + 2 * n * in, panel, in / W, [&](int r, int v, Float sum) {
            store(both + (r * V + v) * W, sum + load(s.both_bias + 2 * n + v * W));
          });
          float* to = h + (t - t0) * tile_rows * hidden + n * R;
          for (int r = 0; r < R; r++) {
            const Float one = load(both + r * panel), two = load(both + r * panel + W);
            store(to + r * W, one * simd::sigmoid(one) * two);
          }
        });
    for (int64_t n = 0; n < D; n += panel)
      for (int64_t t = t0; t < t1; t++)
        with_sizes(cut.height(t), D - n, [&]<int R, int V>() {
          const int64_t first = cut.first(t) * D + n;
          multiply<R, V>(h + (t - t0) * tile_rows * hidden, s.down + n * hidden, panel, hidden / W, [&](int r, int v, Float sum) {
            float* to = s.x + first + r * D + v * W;
            const int64_t left = D - n - v * W;
            store_some(to, sum + load(s.down_bias + n + v * W) + load_some(to, left), left);
          });
        });
  });
}

template <class F, int... K>
inline void with_taps(int64_t taps, F&& f, std::integer_sequence<int, K...>) {
  ((taps == K + 1 ? f.template operator()<K + 1>() : void()), ...);
}

// The steps of one image in one direction. What the recurrence reads lies in tiles of at most `tile_rows` steps: v and delta as
// [inner / W][rows][W], and the rows low | B | C of `columns` floats, whose low part has `rank` padded to `pad`. Buffers begin with
// the tile `from`.
struct Walk {
  const Scan& s;
  int64_t unit;
  const Direction& d = s.direction[unit / s.batch];
  int64_t image = unit % s.batch;
  Cut cut{s.steps, 1};
  int64_t inner = up(s.inner, pad), rank = up(s.rank, pad), columns = rank + 2 * s.states;

  struct Buffers {
    int64_t from;
    float *v, *delta, *low;
  };
  float* wide(float* buffer, int64_t from, int64_t tile) const { return buffer + (cut.first(tile) - cut.first(from)) * inner; }
  float* narrow(float* buffer, int64_t from, int64_t tile) const {
    return buffer + (cut.first(tile) - cut.first(from)) * columns;
  }
  int64_t token(int64_t step) const { return image * s.steps + d.tokens[step]; }

  // v = SiLU(conv(x)) of a tile.
  template <int K>
  void convolve(int64_t tile, float* v) const {
    thread_local std::vector<float> zeros;
    if (int64_t(zeros.size()) < s.inner) zeros.resize(s.inner);
    const int R = cut.height(tile);
    const float* rows[K - 1 + tile_rows];
    for (int i = 0; i < K - 1 + R; i++) {
      const int64_t step = cut.first(tile) + i - (K - 1);
      rows[i] = step < 0 ? zeros.data() : s.xz + token(step) * 2 * s.inner;
    }
    for (int64_t c = 0; c < inner; c += W) {
      const int64_t lanes = s.inner - c;
      Float taps[K], window[K];
      for (int k = 0; k < K; k++) taps[k] = load(d.taps + k * inner + c);
      for (int k = 0; k + 1 < K; k++) window[k + 1] = load_some(rows[k] + c, lanes);
      const Float bias = load(d.taps_bias + c);
      for (int r = 0; r < R; r++) {
        for (int k = 0; k + 1 < K; k++) window[k] = window[k + 1];
        window[K - 1] = load_some(rows[K - 1 + r] + c, lanes);
        Float sum = bias;
        for (int k = 0; k < K; k++) sum += taps[k] * window[k];
        store(v + c * R + r * W, sum * simd::sigmoid(sum));
      }
    }
  }

  // Computes v, low | B | C and delta of the tiles t0 ... t1 - 1. `scratch` takes their low rows as tiles.
  void prepare(int64_t t0, int64_t t1, const Buffers& to, float* scratch) const {
    for (int64_t t = t0; t < t1; t++)
      with_taps(
          s.taps, [&]<int K>() { convolve<K>(t, wide(to.v, to.from, t)); }, std::make_integer_sequence<int, max_taps>{});
    for (int64_t n = 0; n < columns; n += panel)
      for (int64_t t = t0; t < t1; t++)
        with_sizes(cut.height(t), columns - n, [&]<int R, int V>() {
          float* low = narrow(to.low, to.from, t) + n;
          multiply<R, V>(wide(to.v, to.from, t), d.project + n * inner, panel, inner / W,
                         [&](int r, int v, Float sum) { store(low + r * columns + v * W, sum); });
        });
    const int64_t used = up(s.rank, low_unit);
    for (int64_t t = t0; t < t1; t++) {
      const int R = cut.height(t);
      const float* low = narrow(to.low, to.from, t);
      float* tile = scratch + (t - t0) * tile_rows * rank;
      for (int64_t c = 0; c < used; c += low_unit)
        for (int r = 0; r < R; r++) std::memcpy(tile + c * R + r * low_unit, low + r * columns + c, 4 * low_unit);
    }
    for (int64_t n = 0; n < inner; n += panel)
      for (int64_t t = t0; t < t1; t++)
        with_sizes(cut.height(t), panel, [&]<int R, int V>() {
          float* delta = wide(to.delta, to.from, t) + n * R;
          multiply<R, V, low_unit>(
              scratch + (t - t0) * tile_rows * rank, d.spread + n * rank, panel, used / low_unit,
              [&](int r, int v, Float sum) { store(delta + (v * R + r) * W, sum + load(d.spread_bias + n + v * W)); });
        });
  }

  // Runs the recurrence over the tiles t0 ... t1 - 1 (at most `chunk_tiles`) of the channels c ... c + W - 1.
  void recur(int64_t t0, int64_t t1, const Buffers& from, int64_t c, float* state) const {
    alignas(64) float dt[chunk_rows * W], dtu[chunk_rows * W], y[chunk_rows * W];
    const Float skip = load(d.skip + c);
    int64_t steps = 0;
    for (int64_t t = t0; t < t1; t++) {
      const int R = cut.height(t);
      const float *v = wide(from.v, from.from, t) + c * R, *delta = wide(from.delta, from.from, t) + c * R;
      for (int r = 0; r < R; r++, steps++) {
        const Float u = load(v + r * W), size = simd::softplus(load(delta + r * W));
        store(dt + steps * W, size);
        store(dtu + steps * W, size * u);
        store(y + steps * W, skip * u);
      }
    }
    const float* B = narrow(from.low, from.from, t0) + rank;
    auto advance_by = [&]<int S>() {
      for (int64_t n = 0; n < s.states; n += S)
        advance<S, false>(dt, dtu, y, state + n * W, d.rates + (c / W * s.states + n) * W, B + n, B + s.states + n, columns,
                          steps, nullptr, nullptr);
    };
    if (s.states % W)
      advance_by.template operator()<W / 2>();
    else
      advance_by.template operator()<W>();
    float* to = s.y + Scanned{s.batch, s.steps, inner}.at(unit / s.batch, image, 0, c);
    const int64_t* tokens = d.tokens + cut.first(t0);
    for (int64_t i = 0; i < steps; i++) store(to + tokens[i] * W, load(y + i * W));
  }
};

// y of each direction, without the gate: D v + the scan of v = SiLU(conv(x)).
void scan(const Scan& s) {
  const int64_t units = s.directions * s.batch, inner = up(s.inner, pad), rank = up(s.rank, pad), columns = rank + 2 * s.states;
  const int64_t tiles = Cut(s.steps, 1).tiles, chunks = up(tiles, chunk_tiles) / chunk_tiles;
  auto last = [&](int64_t chunk) { return std::min((chunk + 1) * chunk_tiles, tiles); };

  if (!s.v) {  // a unit stays in one thread, and its chunks in the cache
    at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; unit++) {
        const Walk walk{s, unit};
        Scratch& m = Scratch::begin(chunk_rows * (2 * inner + columns + rank) + inner * s.states);
        float *v = m.take(chunk_rows * inner), *delta = m.take(chunk_rows * inner), *low = m.take(chunk_rows * columns);
        float *scratch = m.take(chunk_rows * rank), *state = m.take(inner * s.states);
        std::fill_n(state, inner * s.states, 0.0f);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          const int64_t t0 = chunk * chunk_tiles, t1 = last(chunk);
          const Walk::Buffers buffers{t0, v, delta, low};
          walk.prepare(t0, t1, buffers, scratch);
          for (int64_t c = 0; c < s.inner; c += W) walk.recur(t0, t1, buffers, c, state + c * s.states);
        }
      }
    });
    return;
  }

  // There are more threads than units: first all chunks, then all channels, by way of the memory.
  auto buffers = [&](int64_t unit) {
    return Walk::Buffers{0, s.v + unit * s.steps * inner, s.delta + unit * s.steps * inner, s.low + unit * s.steps * columns};
  };
  at::parallel_for(0, units * chunks, 1, [&](int64_t begin, int64_t end) {
    float* scratch = Scratch::begin(chunk_rows * rank).take(chunk_rows * rank);
    for (int64_t i = begin; i < end; i++) {
      const int64_t unit = i / chunks, chunk = i % chunks;
      Walk{s, unit}.prepare(chunk * chunk_tiles, last(chunk), buffers(unit), scratch);
    }
  });
  const int64_t blocks = up(s.inner, W) / W;
  at::parallel_for(0, units * blocks, 1, [&](int64_t begin, int64_t end) {
    float* state = Scratch::begin(W * s.states).take(W * s.states);
    for (int64_t i = begin; i < end; i++) {
      const int64_t unit = i / blocks, c = i % blocks * W;
      const Walk walk{s, unit};
      std::fill_n(state, W * s.states, 0.0f);
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        walk.recur(chunk * chunk_tiles, last(chunk), buffers(unit), c, state);
    }
  });
}

// Takes `images` images from number `first` on through a block. Their xz and y begin at slot `slot`.
void block(const Block& b, const BlocksCall& s, int64_t first, int64_t images, int64_t slot, bool apart) {
  const int64_t rows = images * s.steps;
  float *x = s.x + first * s.steps * s.width, *xz = s.xz + slot * s.steps * 2 * b.inner;
  float* y = s.y + slot * b.directions * s.steps * up(b.inner, pad);
  normed({rows, s.width, 2 * b.inner, b.centred, b.eps, x, b.project, b.project_bias, xz});
  scan({images, s.steps, b.inner, b.states, b.rank, b.taps, b.directions, xz, y, apart ? s.v : nullptr, s.delta, s.low, b.direction});
  gate({images, s.steps, b.inner, s.width, b.directions, y, xz, b.join, x});
  if (b.hidden) swiglu({rows, s.width, b.hidden, b.hidden_centred, b.hidden_eps, b.both, b.both_bias, b.down, b.down_bias, x});
}

void blocks(const BlocksCall& s) {
  for (const Block* b = s.blocks; b < s.blocks + s.count; b++)
    by_images(
        s.batch,
        [&](int64_t thread, int64_t first, int64_t images) {
          for (int64_t image = first; image < first + images; image++) block(*b, s, image, 1, thread, false);
        },
        [&](int64_t first, int64_t images) { block(*b, s, first, images, 0, s.v); });
}

}  // namespace

extern "C" {
int64_t mamba_blocks(const BlocksCall* call) {
  return guarded([=] { blocks(*call); });
}
}
