// A gather of several ranks on the host: in each CTA warps 2 and 3 push and collect, and warp 0 waits. Follows push.h.

struct Gather { int seed, ranks, ctas, rows, inner, pieces, k, slices, slice_k, epoch; };

// One warp of a CTA. `sums` gets, for each slice, the sum of all words of all ranks' rows of the slice when it was there.
static void gather(const Gather &g, const TslContext *c, unsigned *counters, const void *x, char *out, uint64_t *sums) {
  if (threadIdx.x >= 64) {
    tsk_push(c, counters, x, g.rows, g.inner, g.k, g.slices, g.slice_k, g.epoch);
    tsk_collect_slices(c, out, x, (int64_t)g.inner * g.k * 2, g.pieces, g.slices, g.epoch, 1);
    return;
  }
  int64_t ready = 0;
  for (int s = 0; s < g.slices; ++s) {
    for (int rank = 0; rank < g.ranks; ++rank) ready = tsk_wait_slice(c, 1 << rank, s, ready, g.epoch, 1);
    if (threadIdx.x) continue;
    for (int row = 0; row < g.rows * g.ranks; ++row)
      for (int i = s * g.slice_k; i < min((s + 1) * g.slice_k, g.k); i += 8) {
        const uint4 v = world->load((const uint16_t *)c->data[c->rank] + (int64_t)row * g.k + i);
        for (uint32_t word : {v.x, v.y, v.z, v.w}) sums[s] += (word & 0xffff) + (word >> 16);
      }
  }
}

// Addresses of each rank: shard, output, context, counters; `sums` [ranks, ctas, TSK_SLICES].
extern "C" const char *run(const Gather *g, void **shards, void **outs, void **contexts, void **counters, uint64_t *sums) {
  return in_world(g->seed, g->ranks, [=](World &all, int rank) {
    const auto *context = (const TslContext *)contexts[rank];
    auto *counts = (unsigned *)counters[rank];
    all.launch(rank, g->ctas, threads_of({{0, 32}, {64, 128}}), [=] {
      gather(*g, context, counts, shards[rank], (char *)outs[rank], sums + (rank * g->ctas + blockIdx.x) * TSK_SLICES);
    });
    all.launch(rank, 1, threads_of({{128, 384}}), [=] { tsk_finish_push(context, counts, g->epoch, -1); });
  });
}
