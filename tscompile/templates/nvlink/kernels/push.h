// What a gather does that sends its shard itself: warps 2 and 3 store it to the slots of all ranks, the loading warp waits for slices of it.
// Follows tile.h in the prelude of gather_push.py.
//
// A shard [rows, K] goes out in slices of k, the first one first, so that a tile may begin when a small part is there. A slice is sent in
// units of 2 KiB, which are claimed from a counter: whichever CTAs are resident send everything, and no send waits for anything.
// Flag `slice * TSL_MAX_RANKS + source` of a slot says that all rows of the source's slice are there.

// Words of `counters` beyond those in tile.h: [2] claims of units, from [8] on units that have been sent, by slices.
enum { TSK_SLICES = 8, TSK_UNIT_CLAIMS = 2, TSK_SENT = 8 };
enum { TSK_UNIT_LOADS = 4, TSK_UNIT = TSK_UNIT_LOADS * 32 };   // 16-byte words of a unit: a lane has four on their way

// The shard as it is cut: sizes in 16-byte words, but for rows.
struct TskShard {
  int rows, row_words, slice_words, slices;
  __device__ __forceinline__ int words(int slice) const { return min(slice_words, row_words - slice * slice_words); }   // of a row
  __device__ __forceinline__ int units(int slice) const { return (rows * words(slice) + TSK_UNIT - 1) / TSK_UNIT; }
  __device__ __forceinline__ int total() const { return (slices - 1) * units(0) + units(slices - 1); }
};

// Addresses at all ranks, the next rank's first and this one's last: lane i holds the i-th, since a load behind a fence takes as long as the
// stores of a unit.
struct TskTargets {
  uint64_t slot, flags;   // `flags` of this rank's slice 0
  __device__ __forceinline__ TskTargets(const TslContext *c) : slot(0), flags(0) {
    const int lane = threadIdx.x & 31;
    if (lane >= (int)c->size) return;
    const int rank = ((int)c->rank + 1 + lane) % (int)c->size;
    slot = c->data[rank];
    flags = c->flags[rank] + 4ull * c->rank;
  }
};

// `done` units of a slice are stored at every rank: count them, and set the slice's flag everywhere if they were its last ones.
//
// Why a peer that sees the flag sees the data: all lanes' stores come before the fence of lane 0 (__syncwarp), the fence before its
// addition, and the additions to one counter follow one another. They are relaxed, but the fence before an earlier one and the fence behind
// the last one synchronise. So the last fence comes after the stores of all units. The same lane then stores the flags at system scope, and
// whoever acquires one sees what came before that fence, whichever warp has stored it. Peers read the slot by TMA: both sides have the
// fence that this takes.
TSL void tsk_sent(const TskTargets &targets, int size, unsigned int *count, int done, int units, int slice, uint32_t now) {
  const int lane = threadIdx.x & 31;
  int last = 0;
  __syncwarp();
  if (lane == 0) {
    tsl_fence_async();
    tsl_fence_sys();
    last = atomicAdd(count, (unsigned)done) + done == (unsigned)units;
    if (last) tsl_fence_sys();
  }
  if (!__shfl_sync(0xffffffffu, last, 0)) return;
  #pragma unroll 1
  for (int i = 0; i < size; ++i) {
    const uint64_t flags = __shfl_sync(0xffffffffu, targets.flags, i);
    if (lane == 0) tsl_st_relaxed_sys((void *)(flags + 4ull * (slice * TSL_MAX_RANKS)), now);
  }
}

// Warps 2 and 3: the shard x, of `rows` rows of `k` elements of 2 bytes in pieces of `inner` rows, to its places [pieces, ranks, inner, k] in
// the slots of all ranks, the own one too, since tiles may have rows of several ranks. There are `slices` of `slice_k` elements; the last one
// may be shorter.
TSL void tsk_push(TskAddress context, TskAddress counter_words, TskAddress x, int rows, int inner, int k, int slices, int slice_k, int epoch) {
  const TslContext *c = tsl_context(context.p);
  unsigned int *counters = (unsigned int *)counter_words.p;
  const int lane = threadIdx.x & 31, size = (int)c->size, rank = (int)c->rank;
  const uint32_t now = tsk_epoch(context, epoch);
  const TskTargets targets(c);
  const TskShard shard = {rows, k / 8, slice_k / 8, slices};
  const int whole = shard.units(0), total = shard.total();
  uint4 v[TSK_UNIT_LOADS];
  int64_t to[TSK_UNIT_LOADS];   // offset in a slot, negative beyond the end of the slice
  const auto load = [&](int unit) {
    const int slice = unit / whole, words = shard.words(slice), first = (unit - slice * whole) * TSK_UNIT + lane;
    int row = first / words, word = first - row * words;
    #pragma unroll
    for (int i = 0; i < TSK_UNIT_LOADS; ++i) {
      to[i] = -1;
      if (row < rows) {
        const int at = slice * shard.slice_words + word, piece = row < inner ? 0 : row / inner;
        v[i] = tsl_ld_v4((const char *)x.p + ((int64_t)row * shard.row_words + at) * 16);
        to[i] = ((row + ((int64_t)piece * (size - 1) + rank) * inner) * shard.row_words + at) * 16;
      }
      for (word += 32; word >= words; word -= words) ++row;
    }
  };
  int unit = tsk_claim(counters + TSK_UNIT_CLAIMS, total);
  int done = 0;   // units of the slice that this warp has stored and not counted
  if (unit >= 0) load(unit);
  #pragma unroll 1
  while (unit >= 0) {
    const int slice = unit / whole;
    ++done;
    unit = lane == 0 ? (int)atomicAdd(counters + TSK_UNIT_CLAIMS, 1u) : 0;   // on its way while the stores go out
    #pragma unroll 1
    for (int i = 0; i < size; ++i) {
      char *slot = (char *)__shfl_sync(0xffffffffu, targets.slot, i);
      #pragma unroll
      for (int u = 0; u < TSK_UNIT_LOADS; ++u) if (to[u] >= 0) tsl_st_v4(slot + to[u], v[u]);
    }
    unit = __shfl_sync(0xffffffffu, unit, 0);
    if (unit >= total) unit = -1;
    if (unit >= 0) load(unit);   // on their way while the fence waits for the stores
    if (unit >= 0 && unit / whole == slice) continue;   // a fence takes as long as a unit: one for all that a warp has of a slice
    tsk_sent(targets, size, counters + TSK_SENT + slice, done, shard.units(slice), slice, now);
    done = 0;
  }
}

// Loading warp: wait for a slice of the ranks in `mask`. Bit `slice * TSL_MAX_RANKS + rank` of `ready` says that it has been seen;
// returns the new `ready`, with whatever else has arrived, so a warp that comes late looks once and not at every slice.
TSL int64_t tsk_wait_slice(TskAddress context, int mask, int slice, int64_t ready, int epoch, int site) {
  const uint64_t missing = ((uint64_t)(uint32_t)mask << (slice * TSL_MAX_RANKS)) & ~(uint64_t)ready;
  if (missing == 0) return ready;
  const TslContext *c = tsl_context(context.p);
  const uint32_t now = tsk_epoch(context, epoch);
  const char *flags = (const char *)c->flags[c->rank];
  const int lane = threadIdx.x & 31;
  const uint32_t low = tsl_ld_acquire_sys(flags + 4 * lane), high = tsl_ld_acquire_sys(flags + 4 * (lane + 32));
  uint64_t seen = __ballot_sync(0xffffffffu, tsl_holds(TSL_EPOCH, low, now));
  seen |= (uint64_t)__ballot_sync(0xffffffffu, tsl_holds(TSL_EPOCH, high, now)) << 32;
  if (missing & ~seen) {
    const int flag = slice * TSL_MAX_RANKS + (lane & (TSL_MAX_RANKS - 1));
    if (lane < TSL_MAX_RANKS && (missing >> flag & 1)) tsl_wait_epoch(context.p, flags + 4 * flag, now, lane, site);
  }
  __syncwarp();
  tsl_fence_async();
  return ready | (int64_t)(missing | seen);
}

// Warps 2 and 3, once nothing is left to send: the gathered tensor [pieces, size, bytes] from the slot, in the order of arrival, the own shard
// from x.
TSL void tsk_collect_slices(TskAddress context, TskAddress out, TskAddress x, int64_t bytes, int pieces, int slices, int epoch, int site) {
  const TslContext *c = tsl_context(context.p);
  const int size = (int)c->size, rank = (int)c->rank, lane = threadIdx.x & 31;
  const uint32_t now = tsk_epoch(context, epoch);
  for (int i = 0; i < size; ++i) {
    const int source = (rank + i) % size;
    if (i && lane < slices)
      tsl_wait_epoch(context.p, (const void *)(c->flags[rank] + 4ull * (lane * TSL_MAX_RANKS + source)), now, source, site);
    __syncwarp();
    const int64_t at = source * bytes, pitch = size * bytes;
    const char *from = i ? (const char *)c->data[rank] + at : (const char *)x.p;
    tsk_copy_rows((char *)out.p + at, from, pieces, bytes, pitch, i ? pitch : bytes);
  }
}

// As tsk_finish; the counts of the slices are zero for the next launch as well. By now no CTA's warps 2 and 3 claim or count: they have joined.
TSL void tsk_finish_push(TskAddress context, TskAddress counters, int epoch, int ack_flag) {
  if (TSK_THREAD < TSK_SLICES) ((volatile unsigned int *)counters.p)[TSK_SENT + TSK_THREAD] = 0;
  tsk_finish(context, counters, epoch, ack_flag);
}
