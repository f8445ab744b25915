// An all_to_all whose permutes are in its two copies. Follows tile.h in the prelude of exchange.py.
//
// What a rank sends to one peer is a row of words of 16 bytes: the blocks of all exchanges of the launch, one behind the other, each in the order
// of its grid. It is cut into batches. A CTA has two groups of eight warps. The first one pushes: it gathers a batch from wherever it lies, stores
// it to the peer's slot as one run of memory, and sets the batch's flag. The second one collects, and so does the first one when nothing is left
// to push: it waits for a flag and scatters the batch to wherever the outputs want it. The own block goes straight from the inputs to the outputs.
// Pushes wait for nothing and are claimed from a counter, so any resident subset of the CTAs of all ranks sends all.
//
// A whole group works on a batch, because each batch takes a fence at system scope: an SM runs one such fence at a time, and each takes
// microseconds. All but one thread of the group go on with the next batch meanwhile.
//
// A slot holds [ranks - 1, batches, batch]: what the next rank sent first, then the one behind it. Flags lie in the same order. Where copy engines
// send, nobody pushes, and a flag [ranks - 1, legs] says that all of a leg is there.

enum { TSX_DIMS = 5, TSX_LOADS = 8, TSX_UNIT = TSX_LOADS * 32 };   // words that a warp moves at a time: eight of each lane
enum { TSX_GROUP = 256, TSX_STEP = TSX_GROUP / 32 * TSX_UNIT };    // threads of a group, and the words that it moves at a time
enum { TSX_PUSHES = 0, TSX_COLLECTS = 2 };                         // words of `counters`, beside those in tile.h
// A row of the table: a leg is an exchange, a target is where the outputs want (a part of) what arrives of it. The quotient of an index and
// a size is `(index * multiplier >> 32) >> shift`, exact below 2**31 (Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication", PLDI 1994); the GPU has no division.
enum { TSX_LEG_BATCH, TSX_LEG_WORDS, TSX_LEG_TARGET, TSX_LEG_TARGETS, TSX_RANK_STRIDE, TSX_SIZES, TSX_STRIDES = TSX_SIZES + TSX_DIMS,
       TSX_FIXED = TSX_STRIDES + TSX_DIMS, TSX_MULTIPLIERS = TSX_FIXED + TSX_DIMS, TSX_SHIFTS = TSX_MULTIPLIERS + TSX_DIMS,
       TSX_ROW = TSX_SHIFTS + TSX_DIMS };

TSL uint64_t *tsx_addresses() {
  __shared__ uint64_t addresses[16];
  return addresses;
}
TSL void tsx_address(int index, TskAddress address) {
  if (threadIdx.x == 0) tsx_addresses()[index] = (uint64_t)address.p;
}

// One launch. table: rows of legs, then those of targets; addresses 0 to 7 are of legs, 8 to 15 of targets.
struct TskExchange {
  const TslContext *c;
  const int *table;
  int legs, batches, batch_words, first_flag;
  int64_t offset;   // of this launch's part of a slot, in bytes
  bool copied;      // by copy engines
  __device__ __forceinline__ const int *row(int i) const { return table + i * TSX_ROW; }
  __device__ __forceinline__ int leg_of(int batch) const {
    int leg = 0;
    while (leg + 1 < legs && batch >= __ldg(row(leg + 1) + TSX_LEG_BATCH)) ++leg;
    return leg;
  }
  // Place of `source` among those that `owner` receives from.
  __device__ __forceinline__ int64_t distance(int source, int owner) const {
    const int size = (int)c->size;
    return (source - owner + size - 1) % size;
  }
  __device__ __forceinline__ char *data(int source, int owner, int batch) const {
    return (char *)c->data[owner] + offset + (distance(source, owner) * batches + batch) * batch_words * 16;
  }
  __device__ __forceinline__ void *flag(int source, int owner, int batch, int leg) const {
    const int64_t place = copied ? distance(source, owner) * legs + leg : distance(source, owner) * batches + batch;
    return (void *)(c->flags[owner] + 4 * (uint64_t)(first_flag + place));
  }
};

// A place that a grid is laid out in, in words; of a target also which part of the grid it takes: `fixed` is an index, or -1.
struct TskLayout {
  int strides[TSX_DIMS], fixed[TSX_DIMS];
  __device__ __forceinline__ explicit TskLayout(const int *row) {
    #pragma unroll
    for (int d = 0; d < TSX_DIMS; ++d) { strides[d] = __ldg(row + TSX_STRIDES + d); fixed[d] = __ldg(row + TSX_FIXED + d); }
  }
};
struct TskSizes {
  uint32_t n[TSX_DIMS], multiplier[TSX_DIMS], shift[TSX_DIMS];
  __device__ __forceinline__ explicit TskSizes(const int *row) {
    #pragma unroll
    for (int d = 0; d < TSX_DIMS; ++d) {
      n[d] = (uint32_t)__ldg(row + TSX_SIZES + d);
      multiplier[d] = (uint32_t)__ldg(row + TSX_MULTIPLIERS + d);
      shift[d] = (uint32_t)__ldg(row + TSX_SHIFTS + d);
    }
  }
  // The offset of word `w` of the grid in a layout, -1 where the layout has no place for it.
  __device__ __forceinline__ int64_t offset(uint32_t w, const TskLayout &layout) const {
    int64_t at = 0;
    bool taken = true;
    #pragma unroll
    for (int d = TSX_DIMS - 1; d >= 0; --d) {
      if (n[d] == 1) continue;   // the same for all threads
      const uint32_t q = __umulhi(w, multiplier[d]) >> shift[d], i = w - q * n[d];
      w = q;
      if (layout.fixed[d] >= 0) taken &= i == (uint32_t)layout.fixed[d];
      else at += (int64_t)i * layout.strides[d];
    }
    return taken ? at : -1;
  }
};

// Store words `first + lane, first + lane + 32, ...` of a leg's grid, of what `source` sent, to all places that want them.
TSL void tsx_deliver(const TskExchange &x, const int *leg, const TskSizes &sizes, int source, uint32_t first, uint32_t end, const uint4 *v) {
  const int target = __ldg(leg + TSX_LEG_TARGET), count = __ldg(leg + TSX_LEG_TARGETS);
  #pragma unroll 1
  for (int t = target; t < target + count; ++t) {
    const int *row = x.row(x.legs + t);
    const TskLayout layout(row);
    uint4 *out = (uint4 *)tsx_addresses()[8 + t] + (int64_t)source * __ldg(row + TSX_RANK_STRIDE);
    #pragma unroll
    for (int u = 0; u < TSX_LOADS; ++u) {
      const uint32_t w = first + u * 32;
      const int64_t at = w < end ? sizes.offset(w, layout) : -1;
      if (at >= 0) tsl_st_v4(out + at, v[u]);
    }
  }
}

// The calling thread's group of warps.
TSL void tsx_sync() {
  if (threadIdx.x < TSX_GROUP) asm volatile("bar.sync 11, 256;" ::: "memory");
  else asm volatile("bar.sync 12, 256;" ::: "memory");
}
// Batches that a group claims one after the other: the next one while it works on this one, by its second warp, since its first thread has a
// fence to wait for. `claim` puts it off until the next `sync`.
struct TskClaims {
  unsigned int *counter;
  int total, turn;
  __device__ __forceinline__ int *next() const {
    __shared__ int claimed[4];
    return claimed + 2 * (threadIdx.x / TSX_GROUP) + (turn & 1);
  }
  __device__ __forceinline__ void claim() {
    ++turn;
    if (threadIdx.x % TSX_GROUP == 32) *(volatile int *)next() = (int)atomicAdd(counter, 1u);
  }
  __device__ __forceinline__ int claimed() const {
    const int i = *(volatile int *)next();
    return i < total ? i : -1;
  }
};
// The words of a batch that a thread moves: of its leg's grid.
struct TskBatch {
  int number;   // of the leg
  const int *leg;
  uint32_t first, end;
  __device__ __forceinline__ TskBatch(const TskExchange &x, int batch) : number(x.leg_of(batch)), leg(x.row(number)) {
    first = (batch - __ldg(leg + TSX_LEG_BATCH)) * x.batch_words;
    end = min(first + x.batch_words, (uint32_t)__ldg(leg + TSX_LEG_WORDS));
  }
  __device__ __forceinline__ uint32_t mine() const { return first + threadIdx.x % TSX_GROUP / 32 * TSX_UNIT + (threadIdx.x & 31); }
};

// Batches for the peers, the next rank's first.
TSL void tsx_push(const TskExchange &x, unsigned int *counters, uint32_t now) {
  const int size = (int)x.c->size, rank = (int)x.c->rank;
  TskClaims claims = {counters + TSX_PUSHES, (size - 1) * x.batches, 0};
  claims.claim();
  tsx_sync();
  #pragma unroll 1
  for (int i = claims.claimed(); i >= 0; i = claims.claimed()) {
    claims.claim();
    const int number = i / (size - 1), owner = (rank + 1 + i % (size - 1)) % size;
    const TskBatch batch(x, number);
    const TskSizes sizes(batch.leg);
    const TskLayout layout(batch.leg);
    const uint4 *from = (const uint4 *)tsx_addresses()[batch.number] + (int64_t)owner * __ldg(batch.leg + TSX_RANK_STRIDE);
    uint4 *to = (uint4 *)x.data(rank, owner, number) - batch.first;
    #pragma unroll 1
    for (uint32_t w = batch.mine(); w < batch.end; w += TSX_STEP) {
      uint4 v[TSX_LOADS];
      #pragma unroll
      for (int u = 0; u < TSX_LOADS; ++u) if (w + u * 32 < batch.end) v[u] = tsl_ld_v4(from + sizes.offset(w + u * 32, layout));
      #pragma unroll
      for (int u = 0; u < TSX_LOADS; ++u) if (w + u * 32 < batch.end) tsl_st_v4(to + w + u * 32, v[u]);
    }
    tsx_sync();
    if (threadIdx.x % TSX_GROUP == 0) {
      tsl_fence_sys();   // what the other threads stored, too: the barrier orders it before
      tsl_st_relaxed_sys(x.flag(rank, owner, number, batch.number), now);
    }
  }
  tsx_sync();   // all have read that nothing is left, before the next claims take its place
}

// The own block first, then what the peers send, in the order in which they send it.
TSL void tsx_collect(const TskExchange &x, TskAddress context, unsigned int *counters, uint32_t now, int site) {
  const int size = (int)x.c->size, rank = (int)x.c->rank;
  TskClaims claims = {counters + TSX_COLLECTS, size * x.batches, 0};
  claims.claim();
  tsx_sync();
  #pragma unroll 1
  for (int i = claims.claimed(); i >= 0; i = claims.claimed()) {
    claims.claim();
    const int j = i - x.batches, number = j < 0 ? i : j / (size - 1), source = j < 0 ? rank : (rank + size - 1 - j % (size - 1)) % size;
    const TskBatch batch(x, number);
    const TskSizes sizes(batch.leg);
    const uint4 *from;
    if (source == rank) {
      from = (const uint4 *)tsx_addresses()[batch.number] + (int64_t)rank * __ldg(batch.leg + TSX_RANK_STRIDE);
    } else {
      // One thread polls: it may be held up by a peer, and the others wait for it at the barrier.
      if (threadIdx.x % TSX_GROUP == 0) tsl_wait_epoch(context.p, x.flag(source, rank, number, batch.number), now, source, site);
      tsx_sync();
      from = (const uint4 *)x.data(source, rank, number) - batch.first;
    }
    const TskLayout layout(batch.leg);
    #pragma unroll 1
    for (uint32_t w = batch.mine(); w < batch.end; w += TSX_STEP) {
      uint4 v[TSX_LOADS];
      #pragma unroll
      for (int u = 0; u < TSX_LOADS; ++u)
        if (w + u * 32 < batch.end) v[u] = tsl_ld_v4(from + (source == rank ? sizes.offset(w + u * 32, layout) : (int64_t)(w + u * 32)));
      tsx_deliver(x, batch.leg, sizes, source, w, batch.end, v);
    }
    tsx_sync();
  }
}

// The whole launch, by all threads of a CTA.
TSL void tsk_exchange(TskAddress context, TskAddress counter_words, TskAddress table, int legs, int batches, int batch_words, int first_flag,
                      int64_t offset, int copied, int epoch, int site) {
  const TskExchange x = {tsl_context(context.p), (const int *)table.p, legs, batches, batch_words, first_flag, offset, copied != 0};
  unsigned int *counters = (unsigned int *)counter_words.p;
  const uint32_t now = tsk_epoch(context, epoch);
  __syncthreads();   // addresses
  if (threadIdx.x < TSX_GROUP && !x.copied) tsx_push(x, counters, now);
  tsx_collect(x, context, counters, now, site);
  __syncthreads();
}

// Last CTA of an aborted launch: every place that waits for elements gets NaN.
TSL void tsk_exchange_nan(TskAddress context, TskAddress table, int legs) {
  const TskExchange x = {tsl_context(context.p), (const int *)table.p, legs, 0, 0, 0, 0, false};
  uint4 v[TSX_LOADS];
  for (int u = 0; u < TSX_LOADS; ++u) v[u] = make_uint4(~0u, ~0u, ~0u, ~0u);
  for (int i = 0; i < legs; ++i) {
    const int *leg = x.row(i);
    const TskSizes sizes(leg);
    const uint32_t end = (uint32_t)__ldg(leg + TSX_LEG_WORDS);
    for (int source = 0; source < (int)x.c->size; ++source)
      for (uint32_t w = (TSK_THREAD >> 5) * TSX_UNIT + (TSK_THREAD & 31); w < end; w += TSK_CONSUMERS / 32 * TSX_UNIT)
        tsx_deliver(x, leg, sizes, source, w, end, v);
  }
}
