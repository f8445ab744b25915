/* The primitives of tscompile.language for ranks that are processes of one host, see cpu.h. Kernels link this library: TileLang's
 * C target declares every extern itself, so the functions cannot stand in the kernel's own source.
 */
#include "cpu.h"

#include <sched.h>
#include <string.h>
#include <time.h>

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static const TslContext *context(TslAddress c) { return (const TslContext *)c; }

int tsl_x_aborted(TslAddress c) { return __atomic_load_n((uint32_t *)context(c)->abort_word, __ATOMIC_ACQUIRE) != 0; }

static void give_up(TslAddress address, int peer, uint32_t site, uint64_t expected, uint64_t seen) {
  const TslContext *c = context(address);
  if (__atomic_exchange_n((uint32_t *)c->abort_word, 1u + (uint32_t)c->rank, __ATOMIC_ACQ_REL) == 0) {
    uint64_t *r = (uint64_t *)c->record;
    r[1] = (uint64_t)peer;
    r[2] = site;
    r[3] = expected;
    r[4] = seen;
    __atomic_store_n(r, 1 + c->rank, __ATOMIC_RELEASE);
  }
  for (uint64_t i = 0; i < c->size; i++)
    if (i != c->rank)
      __atomic_store_n((uint32_t *)(c->control[i] + c->abort_offset), 1u + (uint32_t)c->rank, __ATOMIC_RELAXED);
}

/* ---- loads, stores, atomics and fences ---- */

#define LD(NAME, TYPE, T, ORDER) \
  T tsl_x_ld_##NAME##_##TYPE(TslAddress p) { return __atomic_load_n((T *)p, ORDER); }
#define ST(NAME, TYPE, T, ORDER) \
  int tsl_x_st_##NAME##_##TYPE(TslAddress p, T v) { return __atomic_store_n((T *)p, v, ORDER), 0; }
#define ADD(NAME, TYPE, T, ORDER) \
  T tsl_x_atom_add_##NAME##_##TYPE(TslAddress p, T v) { return __atomic_fetch_add((T *)p, v, ORDER); }
#define ADD_FLOAT(NAME, ORDER)                                                                                     \
  float tsl_x_atom_add_##NAME##_f32(TslAddress p, float v) {                                                       \
    uint32_t old = __atomic_load_n((uint32_t *)p, __ATOMIC_RELAXED), new_bits;                                     \
    float sum;                                                                                                     \
    do {                                                                                                           \
      memcpy(&sum, &old, 4);                                                                                       \
      sum += v;                                                                                                    \
      memcpy(&new_bits, &sum, 4);                                                                                  \
    } while (!__atomic_compare_exchange_n((uint32_t *)p, &old, new_bits, 0, ORDER, __ATOMIC_RELAXED));             \
    memcpy(&sum, &old, 4);                                                                                         \
    return sum;                                                                                                    \
  }
#define RED(NAME, TYPE, T) \
  int tsl_x_red_add_##NAME##_##TYPE(TslAddress p, T v) { return (void)tsl_x_atom_add_##NAME##_##TYPE(p, v), 0; }
/* What is weak, bypasses the L1 cache or is not coherent on a GPU is a relaxed access here. */
#define WIDTHS(MACRO, NAME, ORDER)                                                                                 \
  MACRO(NAME, u8, uint8_t, ORDER) MACRO(NAME, u16, uint16_t, ORDER)                                                \
  MACRO(NAME, u32, uint32_t, ORDER) MACRO(NAME, u64, uint64_t, ORDER)
#define WORDS(MACRO, NAME, ORDER) WIDTHS(MACRO, NAME, ORDER) WIDTHS(MACRO, NAME##_na, ORDER)
/* 128 bits are four words, as in PTX: nothing says that they are read or written together. */
#define WIDE(NAME)                                                                                                 \
  int tsl_x_ld_##NAME##_u128(TslAddress to, TslAddress p) {                                                        \
    uint32_t v[4];                                                                                                 \
    for (int i = 0; i < 4; i++) v[i] = __atomic_load_n((uint32_t *)p + i, __ATOMIC_RELAXED);                       \
    return memcpy((void *)to, v, 16), 0;                                                                           \
  }                                                                                                                \
  int tsl_x_st_##NAME##_u128(TslAddress p, TslAddress from) {                                                      \
    uint32_t v[4];                                                                                                 \
    memcpy(v, (const void *)from, 16);                                                                             \
    for (int i = 0; i < 4; i++) __atomic_store_n((uint32_t *)p + i, v[i], __ATOMIC_RELAXED);                       \
    return 0;                                                                                                      \
  }
#define BOTH(MACRO, NAME, ORDER) MACRO(NAME, u32, uint32_t, ORDER) MACRO(NAME, u64, uint64_t, ORDER)
#define ALL_ADD(NAME, ORDER) BOTH(ADD, NAME, ORDER) ADD_FLOAT(NAME, ORDER)
#define ALL_RED(NAME) RED(NAME, u32, uint32_t) RED(NAME, u64, uint64_t) RED(NAME, f32, float)
#define SCOPE(S)                                                                                                     \
  WORDS(LD, relaxed_##S, __ATOMIC_RELAXED) WORDS(LD, acquire_##S, __ATOMIC_ACQUIRE)                                  \
  WORDS(ST, relaxed_##S, __ATOMIC_RELAXED) WORDS(ST, release_##S, __ATOMIC_RELEASE)                                  \
  WIDE(relaxed_##S) WIDE(relaxed_##S##_na)                                                                           \
  ALL_ADD(relaxed_##S, __ATOMIC_RELAXED) ALL_ADD(acquire_##S, __ATOMIC_ACQUIRE)                                      \
  ALL_ADD(release_##S, __ATOMIC_RELEASE) ALL_ADD(acq_rel_##S, __ATOMIC_ACQ_REL)                                      \
  ALL_RED(relaxed_##S) ALL_RED(release_##S)                                                                          \
  int tsl_x_fence_##S(void) { return __atomic_thread_fence(__ATOMIC_SEQ_CST), 0; }
SCOPE(cta)
SCOPE(gpu)
SCOPE(sys)
WIDTHS(LD, volatile, __ATOMIC_RELAXED)
WIDTHS(ST, volatile, __ATOMIC_RELAXED)
WORDS(LD, weak, __ATOMIC_RELAXED)
WORDS(LD, weak_nc, __ATOMIC_RELAXED)
WORDS(ST, weak, __ATOMIC_RELAXED)
WIDE(weak)
WIDE(weak_na)
WIDE(weak_nc)
WIDE(weak_nc_na)
WIDE(volatile)
uint32_t tsl_x_bits_f32(float v) {
  uint32_t bits;
  return memcpy(&bits, &v, 4), bits;
}
uint64_t tsl_x_bits_f64(double v) {
  uint64_t bits;
  return memcpy(&bits, &v, 8), bits;
}
int tsl_x_fence_async(void) { return 0; }

/* ---- bounded waits ---- */

/* There may be more ranks than cores, so a waiting one gives up its time slice at once. */
#define WAIT(TYPE, T, UNSIGNED, SIGNED)                                                                              \
  int tsl_x_wait_##TYPE(TslAddress c, TslAddress flag, int compare, T expected, int peer, uint32_t site) {           \
    const uint64_t start = now_ns(), limit = context(c)->timeout_ns;                                                 \
    for (;;) {                                                                                                       \
      T seen = __atomic_load_n((T *)flag, __ATOMIC_ACQUIRE);                                                         \
      int holds = compare == TSL_EQ   ? seen == expected                                                             \
                  : compare == TSL_NE ? seen != expected                                                             \
                  : compare == TSL_GE ? seen >= expected                                                             \
                  : compare == TSL_GT ? seen > expected                                                              \
                  : compare == TSL_LE ? seen <= expected                                                             \
                  : compare == TSL_LT ? seen < expected                                                              \
                                      : (SIGNED)((UNSIGNED)seen - (UNSIGNED)expected) >= 0;                          \
      if (holds) return 1;                                                                                           \
      if (tsl_x_aborted(c)) return 0;                                                                                \
      if (now_ns() - start > limit) return give_up(c, peer, site, (uint64_t)expected, (uint64_t)seen), 0;            \
      sched_yield();                                                                                                 \
    }                                                                                                                \
  }                                                                                                                  \
  int tsl_x_warp_wait_##TYPE(TslAddress c, TslAddress flag, int compare, T expected, int peer, uint32_t site) {      \
    return tsl_x_wait_##TYPE(c, flag, compare, expected, peer, site);                                                \
  }
WAIT(u32, uint32_t, uint32_t, int32_t)
WAIT(s32, int32_t, uint32_t, int32_t)
WAIT(u64, uint64_t, uint64_t, int64_t)
WAIT(s64, int64_t, uint64_t, int64_t)

int tsl_x_barrier(TslAddress address, uint64_t offset, uint32_t epoch, uint32_t site) {
  const TslContext *c = context(address);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  for (uint64_t i = 0; i < c->size; i++)
    __atomic_store_n((uint32_t *)(c->flags[i] + offset + 4 * c->rank), epoch, __ATOMIC_RELEASE);
  for (uint64_t i = 0; i < c->size; i++)
    if (!tsl_x_wait_u32(address, c->flags[c->rank] + offset + 4 * i, TSL_EPOCH, epoch, (int)i, site)) return 0;
  return 1;
}

/* ---- copies ---- */

/* The caller's only thread is number 0; a template text that loops over its threads copies once. */
int tsl_x_copy_block(TslAddress dst, TslAddress src, int64_t bytes, int thread, int threads) {
  (void)threads;
  if (thread == 0) memcpy((void *)dst, (const void *)src, (size_t)bytes);
  return 0;
}
int tsl_x_copy_warp(TslAddress dst, TslAddress src, int64_t bytes) { return memcpy((void *)dst, (const void *)src, (size_t)bytes), 0; }
int tsl_x_bulk_put(TslAddress dst, TslAddress shared, uint32_t bytes) { return memcpy((void *)dst, (const void *)shared, bytes), 0; }
int tsl_x_bulk_wait(void) { return 0; }
int tsl_x_bulk_wait_read(void) { return 0; }
int tsl_x_mbarrier_init(TslAddress b, uint32_t count) { return *(uint64_t *)b = count, 0; }
int tsl_x_bulk_get(TslAddress shared, TslAddress src, uint32_t bytes, TslAddress b) {
  (void)b;
  return memcpy((void *)shared, (const void *)src, bytes), 0;
}
int tsl_x_mbarrier_wait(TslAddress c, TslAddress b, uint32_t parity, int peer, uint32_t site) {
  return (void)c, (void)b, (void)parity, (void)peer, (void)site, 1;   /* bulk_get has copied already */
}

/* ---- blocks and warps of one thread ---- */

int tsl_x_block_sync(int id, int threads) { return (void)id, (void)threads, 0; }
int tsl_x_block_arrive(int id, int threads) { return (void)id, (void)threads, 0; }
int tsl_x_warp_sync(uint32_t mask) { return (void)mask, 0; }
int tsl_x_warp_any(int value, uint32_t mask) { return (void)mask, value != 0; }
int tsl_x_warp_all(int value, uint32_t mask) { return (void)mask, value != 0; }
uint32_t tsl_x_warp_ballot(int value, uint32_t mask) { return (void)mask, value != 0; }
int tsl_x_elect(void) { return 1; }
uint32_t tsl_x_lane(void) { return 0; }
#define SHUFFLE(NAME, TYPE, T) \
  T tsl_x_##NAME##_##TYPE(T v, int lane, uint32_t mask) { return (void)lane, (void)mask, v; }
#define ALL_SHUFFLE(TYPE, T) \
  SHUFFLE(shuffle, TYPE, T) SHUFFLE(shuffle_xor, TYPE, T) SHUFFLE(shuffle_up, TYPE, T) SHUFFLE(shuffle_down, TYPE, T)
ALL_SHUFFLE(u32, uint32_t)
ALL_SHUFFLE(u64, uint64_t)

#include "cpu_nvshmem.h"
