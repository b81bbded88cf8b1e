// |a - b|^2 and |b|^2 in one pass over both: what the certificate of a teacher needs of weights a and teacher b.
// Differences and sums of 16 are fp32, the rest fp64. Blocks are summed in their order, so nothing depends on the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace {
constexpr int64_t block = 1 << 14, lanes = 64, run = 16;  // a block's 128 KiB stay in the first two caches
constexpr int64_t ahead = 1024;  // elements fetched early: two far streams outrun the hardware's own prefetching

// 16 squares are summed in fp32 (a relative error of at most 16 units of roundoff), then on in fp64, lane by lane: a chain
// of scalar additions here would be slower than the memory.
void block_sums(const float* a, const float* b, int64_t n, double* out) {
  double distances[lanes] = {}, sizes[lanes] = {};
  int64_t i = 0;
  for (; i + lanes * run <= n; i += lanes * run) {
    float distance[lanes] = {}, size[lanes] = {};
    for (int64_t k = i; k < i + lanes * run; k += lanes) {
      for (int64_t l = 0; l < lanes; l += 16) __builtin_prefetch(a + k + l + ahead), __builtin_prefetch(b + k + l + ahead);
      for (int64_t l = 0; l < lanes; ++l) {  // independent sums, which the compiler turns into vectors
        const float d = a[k + l] - b[k + l], t = b[k + l];
        distance[l] += d * d;
        size[l] += t * t;
      }
    }
    for (int64_t l = 0; l < lanes; ++l) distances[l] += distance[l], sizes[l] += size[l];
  }
  out[0] = out[1] = 0;
  for (int64_t l = 0; l < lanes; ++l) out[0] += distances[l], out[1] += sizes[l];
  for (; i < n; ++i) {
    const double d = a[i] - b[i], t = b[i];
    out[0] += d * d;
    out[1] += t * t;
  }
}
}  // namespace

extern "C" {
int64_t distance_blocks(int64_t n) { return (n + block - 1) / block; }

// `partial` (2 distance_blocks(n)) is scratch; `out` gets the two sums.
void squared_distance(const float* a, const float* b, int64_t n, double* partial, double* out) {
  const int64_t blocks = distance_blocks(n);
  at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      block_sums(a + k * block, b + k * block, std::min(block, n - k * block), partial + 2 * k);
  });
  out[0] = out[1] = 0;
  for (int64_t k = 0; k < blocks; ++k) out[0] += partial[2 * k], out[1] += partial[2 * k + 1];
}
}
