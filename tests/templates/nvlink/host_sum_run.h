// Runs what host_sum.h and sum_push.h define.

struct Sum { int seed, ranks, ctas, tiles, m, n, columns, inner, share, epoch; float scale; };

// The registers of a lane for a tile at (row, col) of a product [m, n], as wgmma leaves them; zeros beyond its edges.
template <int NF> static void load(float *acc, const Sum &s, const float *product, int row, int col) {
  const int warp = TSK_THREAD >> 5, lane = threadIdx.x & 31;
  for (int i = 0; i < NF; ++i) {
    const int r = row + warp * 16 + lane / 4 + 8 * (i / 2 % 2), c = col + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    acc[i] = r < s.m && c < s.n ? product[(int64_t)r * s.n + c] : 0;
  }
}

static int *claimed() {
  __shared__ int tile;
  return &tile;
}
// The multiplying warps of a CTA, which claim one tile after the other.
template <int NF, int FORM>
static void sum(const Sum &s, const int *table, void *context, const float *product, void *out, unsigned *claims) {
  while (true) {
    if (TSK_THREAD == 0) *claimed() = atomicAdd(claims, 1);
    tsk_sync();
    const int tile = *claimed();
    tsk_sync();
    if (tile >= s.tiles) return;
    const int *at = table + tile * 8;
    float acc[NF];
    load<NF>(acc, s, product, at[0], at[1]);
    tsk_exchange<NF, TSK_BF16, FORM>(acc, context, out, at[0], at[1], at[2], at[4], at[7], s.columns, s.inner, s.share, s.n, s.scale,
                                     s.epoch, 1);
  }
}

extern "C" const char *run_sum(int form, const Sum *s, const int *table, void **contexts, const float **products, void **outs) {
  std::vector<unsigned> claims(s->ranks);
  return in_world(s->seed, s->ranks, [&](World &all, int rank) {
    all.launch(rank, s->ctas, threads_of({{128, 384}}), [=, count = &claims[rank]] {
      if (form == TSK_SCATTER) sum<32, TSK_SCATTER>(*s, table, contexts[rank], products[rank], outs[rank], count);
      if (form == TSK_TWO_SHOT) sum<32, TSK_TWO_SHOT>(*s, table, contexts[rank], products[rank], outs[rank], count);
      if (form == TSK_ONE_SHOT) sum<32, TSK_ONE_SHOT>(*s, table, contexts[rank], products[rank], outs[rank], count);
    });
  });
}
