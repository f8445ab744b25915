// A gather of several ranks on the host: in each CTA warps 2 and 3 push and collect, and warp 0 waits. Follows push.h.

struct Gather { int ranks, ctas, rows, inner, pieces, k, slices, slice_k, epoch; };

// One CTA's warps of one rank. `sums` gets, for each slice, the sum of all words of all ranks' rows of the slice when it was there.
static void cta(const Gather &g, const TslContext *c, unsigned *counters, const void *x, char *out, uint64_t *sums, int number, std::vector<std::thread> &threads) {
  for (int w : {0, 2, 3}) {
    auto shared = std::make_shared<Warp>();
    for (int lane = 0; lane < 32; ++lane)
      threads.emplace_back([=] {
        threadIdx.x = w * 32 + lane;
        blockIdx.x = number;
        gridDim.x = g.ctas;
        warp = shared.get();
        if (w) {
          tsk_push(c, counters, x, g.rows, g.inner, g.k, g.slices, g.slice_k, g.epoch);
          tsk_collect_slices(c, out, x, (int64_t)g.inner * g.k * 2, g.pieces, g.slices, g.epoch, 1);
          return;
        }
        int64_t ready = 0;
        for (int s = 0; s < g.slices; ++s) {
          for (int rank = 0; rank < g.ranks; ++rank) ready = tsk_wait_slice(c, 1 << rank, s, ready, g.epoch, 1);
          if (lane) continue;
          const uint16_t *slot = (const uint16_t *)c->data[c->rank];
          for (int row = 0; row < g.rows * g.ranks; ++row)
            for (int i = s * g.slice_k; i < min((s + 1) * g.slice_k, g.k); ++i) sums[s] += slot[(int64_t)row * g.k + i];
        }
      });
  }
}

// Addresses of each rank: shard, output, context, counters; `sums` [ranks, ctas, TSK_SLICES].
extern "C" void run(const Gather *g, void **shards, void **outs, void **contexts, void **counters, uint64_t *sums) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < g->ranks; ++rank)
    for (int number = 0; number < g->ctas; ++number)
      cta(*g, (const TslContext *)contexts[rank], (unsigned *)counters[rank], shards[rank], (char *)outs[rank],
          sums + (rank * g->ctas + number) * TSK_SLICES, number, threads);
  for (auto &thread : threads) thread.join();
  for (int rank = 0; rank < g->ranks; ++rank)
    for (threadIdx.x = 128; threadIdx.x < 128 + 256; ++threadIdx.x) tsk_finish_push(contexts[rank], counters[rank], 0, 0);
}
