// Warps of a GPU as threads of the host, as far as kernels/push.h asks for them: it is compiled behind this as it stands.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define TSL static inline
#define __device__
#define __forceinline__ inline
using std::min;

struct Warp {
  std::barrier<> meeting{32};
  uint64_t words[32];
};
struct Index { int x; };
static thread_local Index threadIdx, blockIdx, gridDim;
static thread_local Warp *warp;

static void __syncwarp() { warp->meeting.arrive_and_wait(); }
template <typename T> static T __shfl_sync(unsigned, T value, int lane) {
  warp->words[threadIdx.x & 31] = (uint64_t)value;
  __syncwarp();
  const T found = (T)warp->words[lane & 31];
  __syncwarp();
  return found;
}
static unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (unsigned)(__shfl_sync(mask, (int)value, lane) != 0) << lane;
  return bits;
}
static unsigned atomicAdd(unsigned *p, unsigned value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }

struct uint4 { uint32_t x, y, z, w; };
static uint4 tsl_ld_v4(const void *p) { uint4 v; memcpy(&v, p, 16); return v; }
static void tsl_st_v4(void *p, uint4 v) { memcpy(p, &v, 16); }
static uint32_t tsl_ld_acquire_sys(const void *p) { return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE); }
static void tsl_st_relaxed_sys(void *p, uint32_t v) { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELAXED); }
static void tsl_fence_sys() { std::atomic_thread_fence(std::memory_order_acq_rel); }
static void tsl_fence_async() {}
static bool tsl_wait_epoch(const void *, const void *flag, uint32_t epoch, int, uint32_t) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while ((int32_t)(tsl_ld_acquire_sys(flag) - epoch) < 0) {
    if (std::chrono::steady_clock::now() > end) {
      fprintf(stderr, "a wait for epoch %u does not end\n", epoch);
      abort();
    }
    std::this_thread::yield();
  }
  return true;
}
#define TSK_THREAD ((int)threadIdx.x - 128)
static int finished;
static void tsk_finish_of_tile_h() { ++finished; }
#define tsk_finish(...) tsk_finish_of_tile_h()
