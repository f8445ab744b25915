// Device primitives of tscompile.language for NVIDIA GPUs that reach each other's memory over NVLink.
// The text is inlined into each kernel as its prelude, so that TileLang's cache key sees it. It precedes TileLang's own headers.
// Everything is __forceinline__: a real call inside a kernel with wgmma makes ptxas serialise the matrix instructions.
#pragma once
#include <cstdint>

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
  uint64_t reserved;
  uint64_t data[TSL_MAX_RANKS];       // base of the slot in each rank's region, as mapped here
  uint64_t flags[TSL_MAX_RANKS];      // base of the slot's flags in each rank's control block
  uint64_t control[TSL_MAX_RANKS];    // base of each rank's control block
};

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
TSL void tsl_give_up(const void *context, int peer, uint32_t site, uint32_t expected, uint32_t seen) {
  const TslContext *c = tsl_context(context);
  if (atomicExch((unsigned int *)c->abort_word, 1u + (unsigned)c->rank) == 0u) {
    volatile uint64_t *r = (volatile uint64_t *)c->record;
    r[1] = peer; r[2] = site; r[3] = expected; r[4] = seen;
    __threadfence_system();
    r[0] = 1 + c->rank;
  }
  for (int i = 0; i < (int)c->size; ++i)
    if (i != (int)c->rank) tsl_st_relaxed_sys((void *)(c->control[i] + c->abort_offset), 1u + (uint32_t)c->rank);
}

// Acquire wait of one thread until the epoch at `flag` has reached `epoch` (modulo 2^32). False: the group was aborted or this
// wait ran out of time; what the flag guards must then not be trusted.
TSL bool tsl_wait_epoch(const void *context, const void *flag, uint32_t epoch, int peer, uint32_t site) {
  uint32_t seen = tsl_ld_acquire_sys(flag);
  if ((int32_t)(seen - epoch) >= 0) return true;
  const uint64_t start = tsl_now_ns(), limit = tsl_context(context)->timeout_ns;
  while (true) {
    #pragma unroll 1
    for (int i = 0; i < 128; ++i) {
      seen = tsl_ld_acquire_sys(flag);
      if ((int32_t)(seen - epoch) >= 0) return true;
    }
    if (tsl_aborted(context)) return false;
    if (tsl_now_ns() - start > limit) {
      tsl_give_up(context, peer, site, epoch, seen);
      return false;
    }
  }
}
