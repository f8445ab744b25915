// Small sums: every multiplying warp sends its stripe of a tile straight from its registers, and sums what the peers sent it.
// Follows tile.h in the prelude of kernels/sum_push.py.
//
// A stripe is the 16 rows of a tile [128, 2 * NF] that one warp holds, in the order of the registers: 16 bytes of lane l at i * 512 + l * 16.

// SCATTER: a stripe is summed by the rank that owns its rows. TWO_SHOT: each rank sums some stripes of each tile and sends the sums to all.
// ONE_SHOT: each rank gets all stripes of all ranks, and every rank sums them in the same order: one way instead of two, for more bytes.
enum { TSK_SCATTER = 0, TSK_TWO_SHOT = 1, TSK_ONE_SHOT = 2 };

template <int NF, int DT> TSL void tsk_send_stripe(const float *acc, char *to) {
  to += (threadIdx.x & 31) * 16;
  #pragma unroll
  for (int i = 0; i < NF / 8; ++i) tsl_st_v4(to + i * 512, tsk_pack8<DT>(acc + i * 8));
}
template <int NF> TSL void tsk_send_words(const uint4 *words, char *to) {
  to += (threadIdx.x & 31) * 16;
  #pragma unroll
  for (int i = 0; i < NF / 8; ++i) tsl_st_v4(to + i * 512, words[i]);
}
template <int NF, int DT> TSL void tsk_add_stripe(float *acc, const char *from) {
  constexpr int LOADS = NF / 8 < 8 ? NF / 8 : 8;   // on their way
  from += (threadIdx.x & 31) * 16;
  #pragma unroll
  for (int j = 0; j < NF / 8; j += LOADS) {
    uint4 v[LOADS];
    #pragma unroll
    for (int u = 0; u < LOADS; ++u) if (j + u < NF / 8) v[u] = tsl_ld_v4(from + (j + u) * 512);
    #pragma unroll
    for (int u = 0; u < LOADS; ++u) if (j + u < NF / 8) tsk_add8<DT>(acc + (j + u) * 8, v[u]);
  }
}
template <int NF> TSL void tsk_zero(float *acc) {
  #pragma unroll
  for (int i = 0; i < NF; ++i) acc[i] = 0;
}
// Lane r sets flag `flag` of rank r to `now`, for the ranks in `mask`. Stores of the whole warp come before: __syncwarp orders them before
// the fences of the lanes that signal, and a fence at system scope is cumulative.
TSL void tsk_signal_stripe(const TslContext *c, uint32_t mask, int flag, uint32_t now) {
  const int lane = threadIdx.x & 31;
  __syncwarp();
  if (lane < TSL_MAX_RANKS && (mask >> lane & 1)) {
    tsl_fence_sys();
    tsl_st_relaxed_sys((void *)(c->flags[lane] + 4ull * (uint32_t)flag), now);
  }
  __syncwarp();
}
// Lane r waits until flag `first + r * apart` of this rank has `now`, for the ranks in `mask`.
TSL void tsk_await_stripe(TskAddress context, uint32_t mask, int first, int apart, uint32_t now, int site) {
  const TslContext *c = tsl_context(context.p);
  const int lane = threadIdx.x & 31;
  if (lane < TSL_MAX_RANKS && (mask >> lane & 1))
    tsl_wait_epoch(context.p, (const void *)(c->flags[c->rank] + 4ull * (uint32_t)(first + lane * apart)), now, lane, site);
  __syncwarp();
}

// One tile's exchange, by each multiplying warp for its stripe, which needs no other warp of the CTA.
//
// row, rows, number, column: of the tile in the result, its rows that count, its number, its place among `columns` tiles of its tile row.
// inner: rows of an owner's run, a multiple of 16 (SCATTER alone). share: stripes that a rank sums, at most.
// A rank's slot: parts [ranks, share, stripe], of a TWO_SHOT followed by the sums [tiles, 8, stripe]. Flags alike.
template <int NF, int DT, int FORM>
TSL void tsk_exchange(float *acc, TskAddress context, TskAddress out, int row, int col, int rows, int number, int column, int columns,
                      int inner, int share, int n, float scale, int epoch, int site) {
  constexpr int64_t STRIPE = NF * 64;
  const TslContext *c = tsl_context(context.p);
  const int size = (int)c->size, rank = (int)c->rank, lane = threadIdx.x & 31, warp = TSK_THREAD >> 5, first = warp * 16;
  const uint32_t now = tsk_epoch(context, epoch), all = (1u << size) - 1, peers = all & ~(1u << rank);
  if (first >= rows) return;
  int owner, index, to = row;   // to: of the tile's first row in the output
  if (FORM == TSK_SCATTER) {
    const int run = (row + first) / inner, at = run / size * inner + (row + first) % inner;
    owner = run % size;
    index = at / 16 * columns + column;
    to = at - first;
  } else if (FORM == TSK_TWO_SHOT) {
    owner = (warp + column) % size;
    index = number * ((8 + size - 1) / size) + warp / size;
  } else {
    owner = rank;
    index = number * 8 + warp;
  }
  const int here = rank * share + index;
  char *const mine = (char *)c->data[rank];
  const int sums = size * share + number * 8 + warp;   // place of this stripe's sum, and its flag
  if (FORM == TSK_ONE_SHOT) {
    #pragma unroll 1
    for (int i = 1; i < size; ++i) tsk_send_stripe<NF, DT>(acc, (char *)c->data[(rank + i) % size] + here * STRIPE);
    tsk_signal_stripe(c, peers, here, now);
    // Every rank adds the same rounded parts in the same order, so all get the same bits: the own part lies in the own slot for that.
    tsk_send_stripe<NF, DT>(acc, mine + here * STRIPE);
    __syncwarp();
    tsk_zero<NF>(acc);
    tsk_await_stripe(context, peers, index, share, now, site);
    #pragma unroll 1
    for (int r = 0; r < size; ++r) tsk_add_stripe<NF, DT>(acc, mine + (r * share + index) * STRIPE);
  } else if (owner == rank) {
    tsk_await_stripe(context, peers, index, share, now, site);
    #pragma unroll 1
    for (int i = 1; i < size; ++i) tsk_add_stripe<NF, DT>(acc, mine + ((rank + i) % size * share + index) * STRIPE);
  } else {
    tsk_send_stripe<NF, DT>(acc, (char *)c->data[owner] + here * STRIPE);
    tsk_signal_stripe(c, 1u << owner, here, now);
    if (FORM == TSK_SCATTER) return;
  }
  if (FORM != TSK_TWO_SHOT) {
    tsk_scale<NF>(acc, scale);
    tsk_rows<NF, DT, false>(acc, out, to, col, rows, n, n, nullptr);
    return;
  }
  uint4 sum[NF / 8];   // rounded, so that it takes half the registers
  if (owner == rank) {
    tsk_scale<NF>(acc, scale);
    #pragma unroll
    for (int i = 0; i < NF / 8; ++i) sum[i] = tsk_pack8<DT>(acc + i * 8);
    #pragma unroll 1
    for (int i = 1; i < size; ++i) tsk_send_words<NF>(sum, (char *)c->data[(rank + i) % size] + sums * STRIPE);
    tsk_signal_stripe(c, peers, sums, now);
  } else {
    tsk_await_stripe(context, 1u << owner, sums, 0, now, site);
    #pragma unroll
    for (int i = 0; i < NF / 8; ++i) sum[i] = tsl_ld_v4(mine + sums * STRIPE + i * 512 + lane * 16);
  }
  tsk_store_words<NF, false>([&](int i) { return ((const uint32_t *)sum)[i]; }, out, row, col, rows, n, n, nullptr);
}

#define TSK_EXCHANGE(NF, DT, FORM, ...) tsk_exchange<NF, DT, FORM>(Cl, __VA_ARGS__)
