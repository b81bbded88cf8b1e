// |a - b|^2 and |b|^2 in one pass over the weights a and the teacher's weights b, for the certificate of the teacher.
// Differences and sums of 16 values are fp32, all other sums fp64. Blocks are summed in order, so the result does not depend on
// the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {
constexpr int64_t block = 1 << 14, lanes = 64, run = 16;  // the 128 KiB of a block fit the first two caches
constexpr int64_t ahead = 1024;  // elements to prefetch; the hardware alone does not keep up with two distant streams

// Sums 16 squares in fp32 (a relative error of at most 16 units of roundoff), and these sums in fp64, lane by lane. A chain of
// scalar additions would be slower than the memory.
void block_sums(const float* a, const float* b, int64_t n, double* out) {
  double distances[lanes] = {}, sizes[lanes] = {};
  int64_t i = 0;
  for (; i + lanes * run <= n; i += lanes * run) {
    float distance[lanes] = {}, size[lanes] = {};
    for (int64_t k = i; k < i + lanes * run; k += lanes) {
      for (int64_t l = 0; l < lanes; l += 16) __builtin_prefetch(a + k + l + ahead), __builtin_prefetch(b + k + l + ahead);
      for (int64_t l = 0; l < lanes; ++l) {  // independent sums, which the compiler vectorises
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

int64_t distance_blocks(int64_t n) { return (n + block - 1) / block; }
}  // namespace

extern "C" {
// One call sums over all `tensors` pairs, because a model has hundreds of small tensors. Pair j has counts[j] elements. `out`
// receives the two sums.
void squared_distance(const float* const* a, const float* const* b, const int64_t* counts, int64_t tensors, double* out) {
  std::vector<int64_t> first(tensors + 1, 0);  // first block of each pair
  for (int64_t j = 0; j < tensors; ++j) first[j + 1] = first[j] + distance_blocks(counts[j]);
  const int64_t blocks = first[tensors];
  std::vector<double> partial(2 * blocks);
  at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    int64_t j = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t k = begin; k < end; ++k) {
      while (k >= first[j + 1]) ++j;  // pairs without elements have no block
      const int64_t at = (k - first[j]) * block;
      block_sums(a[j] + at, b[j] + at, std::min(block, counts[j] - at), partial.data() + 2 * k);
    }
  });
  out[0] = out[1] = 0;
  for (int64_t k = 0; k < blocks; ++k) out[0] += partial[2 * k], out[1] += partial[2 * k + 1];
}
}
