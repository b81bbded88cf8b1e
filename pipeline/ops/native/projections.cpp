// The narrow products of a direction of a mixer: from u (rows, channels) to the inputs of the scan, and their gradients.
//
// projected = u x_proj^T has R + 2 N columns, a few dozen. Its first R columns, times dt_proj^T, are delta. On narrow matrices
// libraries of matrix products reach a fraction of the processor's speed, and the copies between the products cost time too. Here
// a tile of rows goes through both products while it is in the cache. Every sum runs over channels, columns or rows in a fixed
// order, so no result depends on the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>

#include "layers.h"
#include "tiles.h"

using namespace products;

// Mirrored field by field in library.py. All matrices are rows of floats without gaps.
struct Projections {
  int64_t rows, channels, rank, width;  // width: R + 2 N
  const float *x_proj, *dt_proj;        // (width, channels), (channels, rank)
  const float* u;                       // (rows, channels)
  float *projected, *delta;             // (rows, width), (rows, channels)
  const float* g_delta;                 // (rows, channels); this and all below are for the backward only
  float *g_projected, *g_u;             // (rows, width), whose first `rank` columns are written; (rows, channels), added to
  float *g_x_proj, *g_dt_proj;          // like the weights
};

namespace {

constexpr int64_t sum_rows = 256;         // rows of a partial sum of a weight's gradient; they fit the second-level cache
constexpr int64_t thread_work = 1 << 20;  // multiply-adds that justify waking a thread

// The weight of a product as panels of columns, [panel][in][panel], with zeros from `in` up to whole vectors.
struct Weight {
  int64_t in, columns, padded = up(in, W);
  float* panels;

  static int64_t floats(int64_t in, int64_t columns) { return up(in, W) * up(columns, panel); }

  // Packs a matrix (in, columns).
  static Weight of_rows(Scratch& scratch, const float* matrix, int64_t in, int64_t columns) {
    return Weight(scratch, in, columns, [&](int64_t c, float* to) {
      for (int64_t k = 0; k < in; k++) store(to + k * panel, load_some(matrix + k * columns + c, columns - c));
    });
  }
  // Packs the transpose of a matrix (columns, in).
  static Weight of_transpose(Scratch& scratch, const float* matrix, int64_t in, int64_t columns) {
    const Strided channels{const_cast<float*>(matrix), 0, 0, in, 1, 0};
    return Weight(scratch, in, columns, [&](int64_t c, float* to) {
      tiles::load({to, 0, panel}, channels.at(0, 0, c), std::min<int64_t>(W, columns - c), in);
    });
  }

  // Multiplies a packed tile of rows with the weight, and writes (rows, columns) with `stride` to out.
  void multiply_tile(int rows, const float* tile, float* out, int64_t stride) const {
    for (int64_t n = 0; n < columns; n += panel)
      with_sizes(rows, columns - n, [&]<int R, int V>() {
        multiply<R, V>(tile, panels + n * padded, panel, padded / W, [&](int r, int v, Float sum) {
          store_some(out + r * stride + n + v * W, sum, columns - n - v * W);
        });
      });
  }
  // Multiplies rows of few inputs, with `stride`, and writes (rows, columns) to out, or adds them. `turned` is memory for rows * in
  // floats.
  template <bool add>
  void multiply_few(int rows, const float* x, int64_t stride, float* out, float* turned) const {
    for (int64_t k = 0; k < in; k++)
      for (int r = 0; r < rows; r++) turned[k * rows + r] = x[r * stride + k];
    for (int64_t n = 0; n < columns; n += panel)
      with_sizes(rows, columns - n, [&]<int R, int V>() {
        multiply_side_by_side<R, V>([&](int64_t k) { return turned + k * R; }, panels + n * padded, panel, in,
                                    [&](int r, int v, Float sum) {
                                      float* at = out + r * columns + n + v * W;
                                      const int64_t left = columns - n - v * W;
                                      store_some(at, add ? load_some(at, left) + sum : sum, left);
                                    });
      });
  }

 private:
  // `pack(column, to)` stores W columns from `column` on, one row of the panel after another.
  template <class Pack>
  Weight(Scratch& scratch, int64_t in, int64_t columns, Pack&& pack)
      : in(in), columns(columns), panels(scratch.take(floats(in, columns))) {
    for (int64_t n = 0; n < columns; n += panel) {
      float* to = panels + n * padded;
      std::fill_n(to + in * panel, (padded - in) * panel, 0.0f);
      for (int64_t c = n; c < std::min(n + panel, columns); c += W) pack(c, to + c - n);
    }
  }
};

// Computes between = x first and out = between second, or adds to out, one tile of rows after another. x and out are
// (rows, channels), and `between` is (rows, width): of its columns the first product writes as many as its weight has, and the second
// one reads as many as its weight has inputs.
template <bool add>
void multiply_twice(const Projections& p, const float* x, const Weight& first, float* between, const Weight& second, float* out) {
  const Cut cut(p.rows, at::get_num_threads());
  const int64_t work = tile_rows * p.channels * (p.width + p.rank);
  at::parallel_for(0, cut.tiles, up(thread_work, work) / work, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t row = cut.first(t);
      const int rows = cut.height(t);
      Scratch& own = Scratch::begin(tile_rows * (first.padded + second.in));
      float *tile = own.take(rows * first.padded), *turned = own.take(rows * second.in);
      pack_tile(x + row * p.channels, p.channels, first.padded, rows, tile);
      first.multiply_tile(rows, tile, between + row * p.width, p.width);
      second.multiply_few<add>(rows, between + row * p.width, p.width, out + row * p.channels, turned);
    }
  });
}

// Sums few[row][column] * many[row][channel] over all rows, for the columns of some tiles and one panel of channels.
// put(column, channel, sum) takes W channels of a sum.
template <class Put>
void sum_panel(const Projections& p, const float* few, const Cut& columns, int64_t begin, int64_t end, const float* many, int64_t n,
               Put&& put) {
  const int64_t first = columns.first(begin), count = columns.first(end) - first, width = std::min<int64_t>(panel, p.channels - n);
  Scratch& own = Scratch::begin((sum_rows + count) * panel);
  float *packed = own.take(sum_rows * panel), *totals = own.take(count * panel);
  std::fill_n(totals, count * panel, 0.0f);
  for (int64_t row = 0; row < p.rows; row += sum_rows) {
    const int64_t rows = std::min(sum_rows, p.rows - row);
    for (int64_t k = 0; k < rows; k++)  // rows far from each other would displace each other in the cache
      for (int64_t v = 0; v < width; v += W) {
        const float* from = many + (row + k) * p.channels + n + v;
        __builtin_prefetch(from + ahead * p.channels);
        store(packed + k * panel + v, load_some(from, width - v));
      }
    for (int64_t tile = begin; tile < end; tile++)
      with_sizes(columns.height(tile), width, [&]<int R, int V>() {
        const float* values = few + row * p.width + columns.first(tile);
        float* total = totals + (columns.first(tile) - first) * panel;
        auto at = [&](int64_t k) { return values + k * p.width; };
        multiply_side_by_side<R, V>(at, packed, panel, rows, [&](int r, int v, Float sum) {
          float* into = total + r * panel + v * W;
          store(into, load(into) + sum);
        });
      });
  }
  for (int64_t k = 0; k < count; k++)
    for (int64_t v = 0; v < width; v += W) put(first + k, n + v, load(totals + k * panel + v));
}

// Computes the gradient of a weight: calls put for the first `columns` of `width` columns and all channels. The threads share the
// panels of channels. If these are fewer, they share the columns too, and every part of them reads the rows anew.
template <class Put>
void for_sums(const Projections& p, const float* few, int64_t columns, const float* many, Put&& put) {
  const Cut cut(columns, 1);
  const int64_t panels = up(p.channels, panel) / panel, work = p.rows * columns * p.channels;
  const int64_t threads = std::clamp<int64_t>(work / thread_work, 1, at::get_num_threads());
  const int64_t parts = std::clamp<int64_t>(up(threads, panels) / panels, 1, cut.tiles), units = panels * parts;
  at::parallel_for(0, units, up(units, threads) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t part = unit % parts;
      sum_panel(p, few, cut, part * cut.tiles / parts, (part + 1) * cut.tiles / parts, many, unit / parts * panel, put);
    }
  });
}

}  // namespace

extern "C" {

int64_t projections_struct_bytes() { return sizeof(Projections); }

void projections_forward(const Projections* call) {
  const Projections& p = *call;
  Scratch& shared = Scratch::begin(Weight::floats(p.channels, p.width) + Weight::floats(p.rank, p.channels), 1);
  const Weight x_proj = Weight::of_transpose(shared, p.x_proj, p.channels, p.width);
  const Weight dt_proj = Weight::of_transpose(shared, p.dt_proj, p.rank, p.channels);
  multiply_twice<false>(p, p.u, x_proj, p.projected, dt_proj, p.delta);
}

void projections_backward(const Projections* call) {
  const Projections& p = *call;
  Scratch& shared = Scratch::begin(Weight::floats(p.channels, p.rank) + Weight::floats(p.width, p.channels), 1);
  const Weight dt_proj = Weight::of_rows(shared, p.dt_proj, p.channels, p.rank);
  const Weight x_proj = Weight::of_rows(shared, p.x_proj, p.width, p.channels);
  multiply_twice<true>(p, p.g_delta, dt_proj, p.g_projected, x_proj, p.g_u);
  for_sums(p, p.g_projected, p.width, p.u, [&](int64_t column, int64_t channel, Float sum) {
    store_some(p.g_x_proj + column * p.channels + channel, sum, p.channels - channel);
  });
  for_sums(p, p.projected, p.rank, p.g_delta, [&](int64_t column, int64_t channel, Float sum) {
    for (int64_t l = 0; l < std::min<int64_t>(W, p.channels - channel); l++) p.g_dt_proj[(channel + l) * p.rank + column] = sum[l];
  });
}

}  // extern "C"
