// Device primitives of tscompile.language for NVIDIA GPUs that reach each other's memory over NVLink.
// The text is inlined into each kernel as its prelude, so that TileLang's cache key sees it. It precedes TileLang's own headers.
// cuda_words.h, cuda_grid.h and cuda_team.h follow it. Everything is __forceinline__: a real call inside a kernel with wgmma makes ptxas serialise the matrix instructions.
#pragma once
#ifdef __CUDACC_RTC__   // TileLang's backend "nvrtc": there is no C++ standard library, and memcpy is built in
#include <cuda/std/cstddef>
#include <cuda/std/cstdint>
#else
#include <cstddef>
#include <cstdint>
#include <cstring>
// TileLang's backend "cython" lets each kernel begin before the one in front of it has ended, and no kernel waits for what that one
// wrote. Host code that follows this line launches in stream order.
#define cudaLaunchAttributeProgrammaticStreamSerialization cudaLaunchAttributeIgnore
#endif

#define TSL static __device__ __forceinline__

constexpr int TSL_MAX_RANKS = 8;

// What a kernel knows of its group: one per (group, slot), written by the host once. context.py mirrors it word for word.
struct TslContext {
  uint64_t rank;
  uint64_t size;
  uint64_t timeout_ns;
  uint64_t epoch_cell;                // local u32, added to the epoch that a launch passes
  uint64_t abort_word;                // local u32 in this rank's control block; peers write it too
  uint64_t abort_offset;              // of that word from a rank's control base, in bytes
  uint64_t record;                    // host-mapped u64[8]: 1 + rank that gave up, peer, site, expected, seen, ...
  uint64_t team;                      // TslTeam in this rank's control block, 0 if there is none
  uint64_t data[TSL_MAX_RANKS];       // base of the slot in each rank's region, as mapped here
  uint64_t flags[TSL_MAX_RANKS];      // base of the slot's flags in each rank's control block
  uint64_t control[TSL_MAX_RANKS];    // base of each rank's control block
};

// What the ranks of a group keep to meet, at the same place in each rank's control block. Zero at first, but for `pes`.
struct TslTeam {
  uint64_t turn;                      // meetings and collectives that this rank has ended
  uint64_t pes;                       // byte r: 1 + the NVSHMEM PE of rank r; 0: NVSHMEM cannot address this group
  uint64_t flags[TSL_MAX_RANKS];      // flags[r]: the turn that rank r is in, written by rank r
};
constexpr uint32_t TSL_REFUSED = 0xffffffffu;   // the site of a call that was refused
enum TslRefusal { TSL_NO_TEAM = 1, TSL_NO_NVSHMEM = 2, TSL_NO_STATE = 3, TSL_NO_PE = 4 };

// ---- loads, stores and fences at system scope -------------------------------------------------------------------------------

TSL uint32_t tsl_ld_acquire_sys(const void *p) {
  uint32_t x;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
TSL uint32_t tsl_ld_relaxed_sys(const void *p) {
  uint32_t x;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
TSL void tsl_st_release_sys(void *p, uint32_t v) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
TSL void tsl_st_relaxed_sys(void *p, uint32_t v) { asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
TSL void tsl_fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
// Data that arrived by other means is about to be read, or was written to be read, by TMA (the async proxy).
TSL void tsl_fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
TSL void tsl_fence_cta() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }
TSL void tsl_fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
TSL uint32_t tsl_lane() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
  return x;
}
TSL uint64_t tsl_now_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
TSL uint4 tsl_ld_v4(const void *p) {   // never the read-only path: peers write this memory while the kernel runs
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
TSL void tsl_st_v4(void *p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---- bounded waits ----------------------------------------------------------------------------------------------------------

TSL const TslContext *tsl_context(const void *p) { return reinterpret_cast<const TslContext *>(p); }
TSL bool tsl_aborted(const void *context) { return tsl_ld_relaxed_sys((const void *)tsl_context(context)->abort_word) != 0; }

// This rank gives up waiting for `peer`: leave a record for the host, then end the waits of all ranks. The first record stays.
TSL void tsl_give_up(const void *context, int peer, uint32_t site, uint64_t expected, uint64_t seen) {
  const TslContext *c = tsl_context(context);
  if (atomicExch_system((unsigned int *)c->abort_word, 1u + (unsigned)c->rank) == 0u) {
    volatile uint64_t *r = (volatile uint64_t *)c->record;
    r[1] = peer; r[2] = site; r[3] = expected; r[4] = seen;
    __threadfence_system();
    r[0] = 1 + c->rank;
  }
  for (int i = 0; i < (int)c->size; ++i)
    if (i != (int)c->rank) tsl_st_relaxed_sys((void *)(c->control[i] + c->abort_offset), 1u + (uint32_t)c->rank);
}

enum TslCompare { TSL_EQ = 0, TSL_NE = 1, TSL_GE = 2, TSL_GT = 3, TSL_LE = 4, TSL_LT = 5, TSL_EPOCH = 6 };

template <typename T> TSL T tsl_acquire(const void *p) {
  if constexpr (sizeof(T) == 4) {
    return (T)tsl_ld_acquire_sys(p);
  } else {
    uint64_t x;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return (T)x;
  }
}
template <typename T> TSL bool tsl_holds(int compare, T seen, T expected) {   // `compare` is a constant wherever this is inlined
  switch (compare) {
    case TSL_EQ: return seen == expected;
    case TSL_NE: return seen != expected;
    case TSL_GE: return seen >= expected;
    case TSL_GT: return seen > expected;
    case TSL_LE: return seen <= expected;
    case TSL_LT: return seen < expected;
    default: return sizeof(T) == 4 ? (int32_t)((uint32_t)seen - (uint32_t)expected) >= 0
                                   : (int64_t)((uint64_t)seen - (uint64_t)expected) >= 0;
  }
}

// Acquire wait of one thread until `*flag compare expected`; T says how wide the flag is and whether it is signed. False: the
// group was aborted or this wait ran out of time; what the flag guards must then not be trusted.
template <typename T>
TSL bool tsl_wait_until(const void *context, const void *flag, int compare, T expected, int peer, uint32_t site) {
  T seen = tsl_acquire<T>(flag);
  if (tsl_holds(compare, seen, expected)) return true;
  const uint64_t start = tsl_now_ns(), limit = tsl_context(context)->timeout_ns;
  while (true) {
    #pragma unroll 1
    for (int i = 0; i < 128; ++i) {
      seen = tsl_acquire<T>(flag);
      if (tsl_holds(compare, seen, expected)) return true;
    }
    if (tsl_aborted(context)) return false;
    if (tsl_now_ns() - start > limit) {
      tsl_give_up(context, peer, site, (uint64_t)expected, (uint64_t)seen);
      return false;
    }
  }
}

// The same until the epoch at `flag` has reached `epoch` (modulo 2^32).
TSL bool tsl_wait_epoch(const void *context, const void *flag, uint32_t epoch, int peer, uint32_t site) {
  return tsl_wait_until<uint32_t>(context, flag, TSL_EPOCH, epoch, peer, site);
}

// The same by a whole warp: lane 0 polls. At the end what was guarded may also be read by TMA that this warp issues.
template <typename T>
TSL bool tsl_warp_wait_until(const void *context, const void *flag, int compare, T expected, int peer, uint32_t site) {
  int ok = 1;
  if (tsl_lane() == 0) ok = tsl_wait_until<T>(context, flag, compare, expected, peer, site);
  __syncwarp();
  ok = __shfl_sync(0xffffffffu, ok, 0);
  tsl_fence_async();
  return ok != 0;
}

// All ranks of the group meet; called by one warp. Lane r tells rank r, then waits for it. `offset`: of `size` u32 words from the
// base of the flags. What this warp's CTA wrote before (ordered by a CTA barrier) is visible to every rank afterwards.
TSL bool tsl_meet(const void *context, uint64_t offset, uint32_t epoch, uint32_t site) {
  const TslContext *c = tsl_context(context);
  const uint32_t lane = tsl_lane();
  int ok = 1;
  __syncwarp();
  if (lane < c->size) {
    tsl_st_release_sys((void *)(c->flags[lane] + offset + 4 * c->rank), epoch);
    ok = tsl_wait_epoch(context, (const void *)(c->flags[c->rank] + offset + 4 * lane), epoch, (int)lane, site);
  }
  ok = __all_sync(0xffffffffu, ok);
  __syncwarp();
  return ok != 0;
}

// ---- copies between any two global addresses of this or another GPU ---------------------------------------------------------

#define TSL_WORD(BITS, PTX, REG)                                                                                       \
  TSL uint##BITS##_t tsl_get_word(const uint##BITS##_t *p) {                                                           \
    uint##BITS##_t v;                                                                                                  \
    asm volatile("ld.global.L1::no_allocate." PTX " %0, [%1];" : "=" REG(v) : "l"(p) : "memory");                      \
    return v;                                                                                                          \
  }                                                                                                                    \
  TSL void tsl_set_word(uint##BITS##_t *p, uint##BITS##_t v) {                                                         \
    asm volatile("st.global." PTX " [%0], %1;" ::"l"(p), REG(v) : "memory");                                           \
  }
TSL_WORD(16, "u16", "h")
TSL_WORD(32, "u32", "r")
TSL_WORD(64, "u64", "l")
TSL uint8_t tsl_get_word(const uint8_t *p) {
  uint32_t v;
  asm volatile("ld.global.L1::no_allocate.u8 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return (uint8_t)v;
}
TSL void tsl_set_word(uint8_t *p, uint8_t v) { asm volatile("st.global.u8 [%0], %1;" ::"l"(p), "r"((uint32_t)v) : "memory"); }
TSL uint4 tsl_get_word(const uint4 *p) { return tsl_ld_v4(p); }
TSL void tsl_set_word(uint4 *p, uint4 v) { tsl_st_v4(p, v); }

template <typename V> TSL void tsl_copy_words(uint64_t dst, uint64_t src, int64_t count, int thread, int threads) {
  V *d = (V *)dst;
  const V *s = (const V *)src;
  int64_t i = thread;
  for (; i + 3 * (int64_t)threads < count; i += 4 * (int64_t)threads) {   // four loads in flight per thread: NVLink is far away
    V a = tsl_get_word(s + i), b = tsl_get_word(s + i + threads);
    V e = tsl_get_word(s + i + 2 * threads), f = tsl_get_word(s + i + 3 * threads);
    tsl_set_word(d + i, a);
    tsl_set_word(d + i + threads, b);
    tsl_set_word(d + i + 2 * threads, e);
    tsl_set_word(d + i + 3 * threads, f);
  }
  #pragma unroll 1
  for (; i < count; i += threads) tsl_set_word(d + i, tsl_get_word(s + i));
}

// `bytes` bytes by `threads` threads, of which this is number `thread`. The widest word for which both sides can be aligned
// together is used; what lies before and after goes byte by byte. No order is implied: a fence or a release must follow.
TSL void tsl_copy(uint64_t dst, uint64_t src, int64_t bytes, int thread, int threads) {
  const uint64_t apart = dst ^ src;
  const int width = (apart & 15) == 0 ? 16 : (apart & 7) == 0 ? 8 : (apart & 3) == 0 ? 4 : (apart & 1) == 0 ? 2 : 1;
  int64_t head = (int64_t)((0 - dst) & (uint64_t)(width - 1));
  if (head > bytes) head = bytes;
  const int64_t words = (bytes - head) / width, tail = bytes - head - words * width;
  #pragma unroll 1
  for (int64_t i = thread; i < head + tail; i += threads) {
    const int64_t at = i < head ? i : words * width + i;
    tsl_set_word((uint8_t *)(dst + at), tsl_get_word((const uint8_t *)(src + at)));
  }
  dst += head;
  src += head;
  if (width == 16) tsl_copy_words<uint4>(dst, src, words, thread, threads);
  else if (width == 8) tsl_copy_words<uint64_t>(dst, src, words, thread, threads);
  else if (width == 4) tsl_copy_words<uint32_t>(dst, src, words, thread, threads);
  else if (width == 2) tsl_copy_words<uint16_t>(dst, src, words, thread, threads);
  else tsl_copy_words<uint8_t>(dst, src, words, thread, threads);
}

// ---- what the Python wrappers of tscompile.language call ----------------------------------------------------------------------
// Same names and types as in cpu.c. Addresses are integers, so that one call has one prototype whatever a tensor's dtype; every
// function returns a value, because TileLang's C target declares externs by the type of their use.

typedef uint64_t TslAddress;

#define TSL_ENTRY_ATOM(NAME, PTX, TYPE, T, REG)                                                                        \
  TSL T tsl_x_atom_add_##NAME##_##TYPE(TslAddress p, T v) {                                                            \
    T old;                                                                                                             \
    asm volatile("atom." PTX "global.add." #TYPE " %0, [%1], %2;" : "=" REG(old) : "l"(p), REG(v) : "memory");         \
    return old;                                                                                                        \
  }
#define TSL_ENTRY_RED(NAME, PTX, TYPE, T, REG)                                                                         \
  TSL int tsl_x_red_add_##NAME##_##TYPE(TslAddress p, T v) {                                                           \
    asm volatile("red." PTX "global.add." #TYPE " [%0], %1;" ::"l"(p), REG(v) : "memory");                             \
    return 0;                                                                                                          \
  }
#define TSL_ENTRY_TYPES(MACRO, NAME, PTX)                                                                              \
  MACRO(NAME, PTX, u32, uint32_t, "r") MACRO(NAME, PTX, u64, uint64_t, "l") MACRO(NAME, PTX, f32, float, "f")
#define TSL_ENTRY_SCOPE(SCOPE)                                                                                         \
  TSL_ENTRY_TYPES(TSL_ENTRY_ATOM, relaxed_##SCOPE, "relaxed." #SCOPE ".")                                              \
  TSL_ENTRY_TYPES(TSL_ENTRY_ATOM, acquire_##SCOPE, "acquire." #SCOPE ".")                                              \
  TSL_ENTRY_TYPES(TSL_ENTRY_ATOM, release_##SCOPE, "release." #SCOPE ".")                                              \
  TSL_ENTRY_TYPES(TSL_ENTRY_ATOM, acq_rel_##SCOPE, "acq_rel." #SCOPE ".")                                              \
  TSL_ENTRY_TYPES(TSL_ENTRY_RED, relaxed_##SCOPE, "relaxed." #SCOPE ".")                                               \
  TSL_ENTRY_TYPES(TSL_ENTRY_RED, release_##SCOPE, "release." #SCOPE ".")                                               \
  TSL int tsl_x_fence_##SCOPE() { tsl_fence_##SCOPE(); return 0; }
TSL_ENTRY_SCOPE(cta)
TSL_ENTRY_SCOPE(gpu)
TSL_ENTRY_SCOPE(sys)
TSL int tsl_x_fence_async() { tsl_fence_async(); return 0; }

#define TSL_ENTRY_WAIT(TYPE, T)                                                                                        \
  TSL int tsl_x_wait_##TYPE(TslAddress c, TslAddress flag, int compare, T expected, int peer, uint32_t site) {         \
    return tsl_wait_until<T>((const void *)c, (const void *)flag, compare, expected, peer, site);                      \
  }                                                                                                                    \
  TSL int tsl_x_warp_wait_##TYPE(TslAddress c, TslAddress flag, int compare, T expected, int peer, uint32_t site) {    \
    return tsl_warp_wait_until<T>((const void *)c, (const void *)flag, compare, expected, peer, site);                 \
  }
TSL_ENTRY_WAIT(u32, uint32_t)
TSL_ENTRY_WAIT(s32, int32_t)
TSL_ENTRY_WAIT(u64, uint64_t)
TSL_ENTRY_WAIT(s64, int64_t)
TSL int tsl_x_barrier(TslAddress c, uint64_t offset, uint32_t epoch, uint32_t site) {
  return tsl_meet((const void *)c, offset, epoch, site);
}
TSL int tsl_x_aborted(TslAddress c) { return tsl_aborted((const void *)c); }

TSL int tsl_x_copy_block(TslAddress dst, TslAddress src, int64_t bytes, int thread, int threads) {
  tsl_copy(dst, src, bytes, thread, threads);
  return 0;
}
TSL int tsl_x_copy_warp(TslAddress dst, TslAddress src, int64_t bytes) {
  tsl_copy(dst, src, bytes, (int)tsl_lane(), 32);
  __syncwarp();
  return 0;
}

// Named barriers, not bar.sync 0: in a warp-specialised kernel not all threads of the CTA arrive.
TSL int tsl_x_block_sync(int id, int threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); return 0; }
TSL int tsl_x_block_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
  return 0;
}
TSL int tsl_x_warp_sync(uint32_t mask) { __syncwarp(mask); return 0; }
TSL int tsl_x_warp_any(int value, uint32_t mask) { return __any_sync(mask, value); }
TSL int tsl_x_warp_all(int value, uint32_t mask) { return __all_sync(mask, value); }
TSL uint32_t tsl_x_warp_ballot(int value, uint32_t mask) { return __ballot_sync(mask, value); }
TSL int tsl_x_elect() {
  uint32_t chosen;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen)::"memory");
  return (int)chosen;
}
TSL uint32_t tsl_x_lane() { return tsl_lane(); }
#define TSL_ENTRY_SHUFFLE(TYPE, T)                                                                                     \
  TSL T tsl_x_shuffle_##TYPE(T v, int lane, uint32_t mask) { return (T)__shfl_sync(mask, v, lane); }                   \
  TSL T tsl_x_shuffle_xor_##TYPE(T v, int lane, uint32_t mask) { return (T)__shfl_xor_sync(mask, v, lane); }           \
  TSL T tsl_x_shuffle_up_##TYPE(T v, int by, uint32_t mask) { return (T)__shfl_up_sync(mask, v, by); }                 \
  TSL T tsl_x_shuffle_down_##TYPE(T v, int by, uint32_t mask) { return (T)__shfl_down_sync(mask, v, by); }
TSL_ENTRY_SHUFFLE(u32, uint32_t)
TSL_ENTRY_SHUFFLE(u64, unsigned long long)

// ---- bulk copies by TMA ------------------------------------------------------------------------------------------------------

TSL uint32_t tsl_shared(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
// Shared memory and barriers by their 32-bit addresses. What one thread stores is in flight until it waits for the groups it has committed.
TSL void tsl_bulk_load(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier) : "memory");
}
TSL void tsl_bulk_store(void *to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
TSL void tsl_bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All groups but the NEWER last ones that this thread has committed are written where they go, or have left shared memory.
template <int NEWER = 0> TSL void tsl_bulk_written() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(NEWER) : "memory"); }
template <int NEWER = 0> TSL void tsl_bulk_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(NEWER) : "memory"); }
TSL void tsl_mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
TSL uint32_t tsl_mbarrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done;
}
TSL int tsl_x_bulk_put(TslAddress dst, TslAddress shared, uint32_t bytes) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  tsl_bulk_store((void *)dst, tsl_shared((const void *)shared), bytes);
  tsl_bulk_commit();
  return 0;
}
TSL int tsl_x_bulk_wait() { tsl_bulk_written(); return 0; }
TSL int tsl_x_bulk_wait_read() { tsl_bulk_read(); return 0; }
TSL int tsl_x_mbarrier_init(TslAddress b, uint32_t count) {
  tsl_mbarrier_init(tsl_shared((const void *)b), count);
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
  return 0;
}
TSL int tsl_x_bulk_get(TslAddress shared, TslAddress src, uint32_t bytes, TslAddress b) {
  tsl_bulk_load(tsl_shared((const void *)shared), (const void *)src, bytes, tsl_shared((const void *)b));
  return 0;
}
TSL int tsl_x_mbarrier_wait(TslAddress c, TslAddress b, uint32_t parity, int peer, uint32_t site) {
  const uint64_t start = tsl_now_ns(), limit = tsl_context((const void *)c)->timeout_ns;
  while (true) {
    #pragma unroll 1
    for (int i = 0; i < 16; ++i)
      if (tsl_mbarrier_try(tsl_shared((const void *)b), parity)) return 1;
    if (tsl_aborted((const void *)c)) return 0;
    if (tsl_now_ns() - start > limit) {
      tsl_give_up((const void *)c, peer, site, parity, parity ^ 1);
      return 0;
    }
  }
}
