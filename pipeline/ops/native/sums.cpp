// Sums over the processes of one machine, through memory that they share.
//
// Each process has two slots, which it uses in turn. To sum, it copies its numbers into a slot, raises its counter, waits until the
// counters of all are as high, and adds up the slots in the order of the ranks. So every process gets the same bits. Two slots are
// enough: a process that raises its counter to k has read all slots of k - 1, and so the slots of k - 2 may be written.
// A sum that fails on one process, and a process that leaves, end all later sums of all, since they could be of different steps.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {
using Clock = std::chrono::steady_clock;
constexpr int64_t slot_bytes = 1 << 18;
enum Outcome : int64_t { done = 0, late = 1, differ = 2, gone = 3, failed = 4 };
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4, "a futex is a plain word");

struct alignas(128) Rank {
  std::atomic<uint32_t> counter, sleepers, ended;  // ended: this process sums no more
  int64_t bytes[2];  // twice what is still to sum with each slot, and 1 for fp64
  alignas(128) char slot[2][slot_bytes];
};

struct Wait {
  int64_t spins;
  Clock::time_point until;
};

void rest() {
#ifdef __SSE2__
  _mm_pause();
#endif
}

// Sleeps until `word` is no longer `seen`, for a tenth of a second at most.
void sleep_on(std::atomic<uint32_t>& word, uint32_t seen) {
#ifdef __linux__
  const timespec tenth = {0, 100'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &tenth, nullptr, 0);
#else
  std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

void wake(std::atomic<uint32_t>& word) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// Whether the process of a pidfd has exited; also one that nobody has reaped yet, which still has its number.
bool has_exited(int handle) {
#ifdef __linux__
  pollfd watched = {handle, POLLIN, 0};
  return handle >= 0 && poll(&watched, 1, 0) == 1;
#else
  return false;
#endif
}

Outcome wait_for(Rank& other, uint32_t counter, const Wait& wait, int handle) {
  const auto there = [&](uint32_t seen) { return int32_t(seen - counter) >= 0; };  // right also where the counter begins anew
  for (int64_t i = 0; i < wait.spins; ++i, rest())
    if (there(other.counter.load(std::memory_order_acquire))) return done;
  Outcome outcome = done;
  ++other.sleepers;
  for (uint32_t seen; outcome == done && !there(seen = other.counter.load());) {
    if (other.ended.load()) outcome = failed;
    else if (has_exited(handle)) outcome = gone;
    else if (Clock::now() > wait.until) outcome = late;
    else sleep_on(other.counter, seen);
  }
  if (there(other.counter.load())) outcome = done;  // a process may sum and end between two looks
  --other.sleepers;
  return outcome;
}

// A list of arrays, walked as if they lay behind one another.
struct Walk {
  char* const* arrays;
  const int64_t* sizes;
  int64_t array = 0, at = 0;

  // Calls `visit(pointer, offset, bytes)` for the next `bytes` bytes, array by array.
  template <class Visit>
  void next(int64_t bytes, Visit visit) {
    for (int64_t done = 0; done < bytes;) {
      while (at == sizes[array]) ++array, at = 0;
      const int64_t part = std::min(bytes - done, sizes[array] - at);
      visit(arrays[array] + at, done, part);
      at += part, done += part;
    }
  }
};

template <class T>
void add_up(const Rank* ranks, int64_t size, int64_t which, int64_t offset, char* out, int64_t bytes, double factor) {
  const auto slot = [&](int64_t rank) { return reinterpret_cast<const T*>(ranks[rank].slot[which] + offset); };
  T* sums = reinterpret_cast<T*>(out);
  const int64_t n = bytes / sizeof(T);
  std::memcpy(out, slot(0), bytes);
  for (int64_t rank = 1; rank < size; ++rank) {
    const T* values = slot(rank);
    for (int64_t i = 0; i < n; ++i) sums[i] += values[i];
  }
  if (factor != 1)
    for (int64_t i = 0; i < n; ++i) sums[i] *= T(factor);
}
}  // namespace

extern "C" {
int64_t sums_bytes(int64_t size) { return size * int64_t(sizeof(Rank)); }

// Says that this process sums no more, and wakes who waits for it.
void sums_leave(Rank* ranks, int64_t rank) {
  ranks[rank].ended = 1;
  wake(ranks[rank].counter);
}

// Replaces the numbers of `count` arrays, fp32 or fp64 where `wide`, by `factor` times their sums over all ranks. Returns an Outcome;
// its rank is in `culprit`. The ranks must bring as many bytes of one type. `handles` are the pidfds of the ranks, or -1.
int64_t sums_add(Rank* ranks, int64_t size, int64_t rank, char* const* arrays, const int64_t* sizes, int64_t count, int64_t wide,
                 double factor, int64_t spins, double seconds, const int* handles, int64_t* culprit) {
  Rank& own = ranks[rank];
  const Wait wait = {spins, Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds))};
  for (*culprit = 0; *culprit < size; ++*culprit)  // one that has ended cannot come to this sum
    if (ranks[*culprit].ended.load()) return sums_leave(ranks, rank), failed;
  Walk read = {arrays, sizes}, write = {arrays, sizes};
  int64_t bytes = std::accumulate(sizes, sizes + count, int64_t(0));
  do {
    const uint32_t counter = own.counter.load(std::memory_order_relaxed) + 1;
    const int64_t which = counter % 2, part = std::min(bytes, slot_bytes);
    read.next(part, [&](const char* from, int64_t offset, int64_t n) { std::memcpy(own.slot[which] + offset, from, n); });
    own.bytes[which] = 2 * bytes + (wide != 0);
    own.counter.store(counter);
    if (own.sleepers.load()) wake(own.counter);
    for (int64_t i = 1; i < size; ++i) {
      *culprit = (rank + i) % size;
      Rank& other = ranks[*culprit];
      Outcome outcome = wait_for(other, counter, wait, handles[*culprit]);
      if (outcome == done && other.bytes[which] != own.bytes[which]) outcome = differ;
      if (outcome != done) return sums_leave(ranks, rank), outcome;
    }
    write.next(part, [&](char* to, int64_t offset, int64_t n) {
      (wide ? add_up<double> : add_up<float>)(ranks, size, which, offset, to, n, factor);
    });
    bytes -= part;
  } while (bytes);
  return done;
}
}
