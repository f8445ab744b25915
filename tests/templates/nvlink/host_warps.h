// What device code calls, on the host. Follows host_world.h; device code follows as it stands.

TSL void __syncwarp() { world->meet(-1 - threadIdx.x / 32, 32); }
TSL void __syncthreads() { world->meet(0, world->current->block->indices.size()); }
template <typename T> T __shfl_sync(unsigned, T value, int lane) {
  uint64_t *words = world->current->block->words[threadIdx.x / 32];
  words[threadIdx.x & 31] = (uint64_t)value;
  __syncwarp();
  const T found = (T)words[lane & 31];
  __syncwarp();
  return found;
}
TSL unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (unsigned)(__shfl_sync(mask, (int)value, lane) != 0) << lane;
  return bits;
}
TSL unsigned atomicAdd(unsigned *p, unsigned value) { world->act(); const unsigned old = *p; *p += value; return old; }
TSL unsigned atomicExch_system(unsigned *p, unsigned value) { world->act(); return std::exchange(*p, value); }
TSL int __ldg(const int *p) { return *p; }
TSL uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
TSL uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

TSL uint4 tsl_ld_v4(const void *p) { world->act(); return world->load(p); }
TSL void tsl_st_v4(void *p, uint4 v) { world->act(); world->store(p, v); }
TSL uint32_t tsl_ld_relaxed_sys(const void *p) { world->poll(); return *(const uint32_t *)p; }
TSL uint32_t tsl_ld_acquire_sys(const void *p) { return tsl_ld_relaxed_sys(p); }
template <typename T> T tsl_acquire(const void *p) { return (T)tsl_ld_acquire_sys(p); }
TSL void tsl_fence_sys() { world->act(); world->fence(); }
TSL void __threadfence() { tsl_fence_sys(); }
TSL void __threadfence_system() { tsl_fence_sys(); }
TSL void tsl_fence_async() {}
TSL void tsl_st_relaxed_sys(void *p, uint32_t v) { world->act(); *(uint32_t *)p = v; }
TSL void tsl_st_release_sys(void *p, uint32_t v) { tsl_fence_sys(); tsl_st_relaxed_sys(p, v); }
TSL uint64_t tsl_now_ns() { return world->now; }

// asm volatile("bar.sync NUMBER, THREADS;" ::: "memory"), and nothing else.
TSL void host_assembly(const char *text) {
  int number = 0, threads = 0;
  if (sscanf(text, "\"bar.sync %d, %d;\"", &number, &threads) != 2) abort();
  world->meet(number, threads);
}
#define asm
#define volatile(...) host_assembly(#__VA_ARGS__)
