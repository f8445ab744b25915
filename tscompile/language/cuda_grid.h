
// ---- barriers of one GPU's blocks ---------------------------------------------------------------------------------------------
// One u64: the high half counts the epochs that are over, the low half the arrivals of the next one. Arriver 0 adds what makes n
// arrivals carry into the high half, so that nothing is ever reset and no division (which is a call) is needed.

TSL uint32_t tsl_x_gpu_arrive(TslAddress word, uint32_t arrivals, int index) {
  const uint64_t step = index == 0 ? (1ull << 32) - (arrivals - 1) : 1;
  return (uint32_t)(tsl_x_atom_add_release_gpu_u64(word, step) >> 32) + 1;
}
TSL int tsl_x_gpu_wait(TslAddress c, TslAddress word, uint32_t epoch, uint32_t site) {
  const TslContext *context = tsl_context((const void *)c);
  const uint64_t start = tsl_now_ns();
  while (true) {
    uint32_t seen = 0;
    #pragma unroll 1
    for (int i = 0; i < 128; ++i) {
      seen = (uint32_t)(tsl_x_ld_acquire_gpu_u64(word) >> 32);
      if ((int32_t)(seen - epoch) >= 0) return 1;
    }
    if (tsl_aborted(context)) return 0;
    if (tsl_now_ns() - start > context->timeout_ns) {
      tsl_give_up(context, (int)context->rank, site, epoch, seen);
      return 0;
    }
  }
}
TSL int tsl_x_grid_sync(TslAddress c, TslAddress word, uint32_t blocks, int block, uint32_t site) {
  int ok = 1;
  __syncwarp();
  if (tsl_lane() == 0) ok = tsl_x_gpu_wait(c, word, tsl_x_gpu_arrive(word, blocks, block), site);
  __syncwarp();
  return __shfl_sync(0xffffffffu, ok, 0);
}
