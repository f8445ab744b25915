// Parts of the fused GEMM kernels that TileLang has no words for: tile claims, epilogues on the accumulator's registers, and
// what the idle warps of a CTA do. Follows language/cuda.h in the prelude.
//
// A CTA has 384 threads: warp 0 loads tiles, warp 1 signals, warps 2 and 3 collect or pull, warps 4 to 11 (two
// warpgroups) multiply.
// The accumulator of a tile [128, 2 * NF] lies in wgmma's register order under GemmWarpPolicy.FullRow: warp w of the eight holds
// rows 16w to 16w+15 and lane l of it, in group j of four registers, columns 8j + 2 * (l % 4) + {0, 1} of rows l / 4 and 8 + l / 4.

#define TSK_CONSUMERS 256
#define TSK_THREAD ((int)threadIdx.x - 128)   // of a multiplying thread

enum { TSK_BF16 = 0, TSK_FP16 = 1 };
enum { TSK_WORDS = 8 };   // of a row in the tile table and in a list of pulls (tiles.py)

// An address that a kernel gets as a pointer or as an int64: what TMA does not read needs no shape, so it is passed by address.
struct TskAddress {
  void *p;
  __device__ __forceinline__ TskAddress(const void *q) : p(const_cast<void *>(q)) {}
  __device__ __forceinline__ TskAddress(int64_t q) : p(reinterpret_cast<void *>(q)) {}
  __device__ __forceinline__ operator void *() const { return p; }
};
TSL int tsk_word(TskAddress table, int row, int word) { return __ldg((const int *)table.p + row * TSK_WORDS + word); }
TSL int tsk_aborted(TskAddress context) { return tsl_aborted(context.p); }

// ---- tiles are claimed from a counter, so that any resident subset of the CTAs finishes all of them ---------------------------

TSL int *tsk_ring() {
  __shared__ int ring[8];
  return ring;
}
TSL int tsk_claim(TskAddress counter, int total) {
  int tile = 0;
  if ((threadIdx.x & 31) == 0) tile = (int)atomicAdd((unsigned int *)counter.p, 1u);
  tile = __shfl_sync(0xffffffffu, tile, 0);
  return tile < total ? tile : -1;
}
// The loading warp passes its w-th tile on to the multiplying warps, ahead of the tile's first stage. The ring is longer than
// the pipeline, so an entry is read before it is overwritten.
TSL void tsk_pass(int w, int tile) {
  if ((threadIdx.x & 31) == 0) tsk_ring()[w & 7] = tile;
  __syncwarp();
}
TSL int tsk_passed(int w) { return ((volatile int *)tsk_ring())[w & 7]; }

TSL void tsk_sync() { asm volatile("bar.sync 9, 256;" ::: "memory"); }   // of the multiplying warps

TSL uint32_t tsk_epoch(TskAddress context, int epoch) {
  return (uint32_t)epoch + *(volatile uint32_t *)tsl_context(context.p)->epoch_cell;
}

// ---- waits ------------------------------------------------------------------------------------------------------------------

// Loading warp: waits for what `mask` has and `ready` has not; returns the new `ready`. Bit r is the data of rank r, or where these come
// in chunks bit TSL_MAX_RANKS * i + r is one of them; flags have the same numbers.
TSL int tsk_wait_ranks(TskAddress context, int mask, int ready, int epoch, int site) {
  const TslContext *c = tsl_context(context.p);
  if ((mask & ~ready) == 0) return ready;
  const int lane = threadIdx.x & 31;
  if ((mask & ~ready) >> lane & 1)
    tsl_wait_epoch(context.p, (const void *)(c->flags[c->rank] + 4ull * lane), tsk_epoch(context, epoch), lane % TSL_MAX_RANKS, site);
  __syncwarp();
  tsl_fence_async();
  return ready | mask;
}

// Multiplying warps: wait until the partial tiles `index` of all peers have landed. `landed` holds epochs, [ranks, tiles].
TSL void tsk_wait_landed(TskAddress context, TskAddress landed, int index, int tiles, int epoch, int site) {
  const TslContext *c = tsl_context(context.p);
  const int t = TSK_THREAD, size = (int)c->size;
  if (t < size - 1) {
    const int peer = ((int)c->rank + 1 + t) % size;
    tsl_wait_epoch(context.p, (char *)landed.p + 4ull * (peer * tiles + index), tsk_epoch(context, epoch), peer, site);
  }
  tsk_sync();
}

// ---- conversions ------------------------------------------------------------------------------------------------------------

template <int DT> TSL uint32_t tsk_pack(float a, float b) {
  uint32_t r;
  if (DT == TSK_BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
template <int DT> TSL float tsk_low(uint32_t x) {
  if (DT == TSK_BF16) return __uint_as_float(x << 16);
  float f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(x));
  return f;
}
template <int DT> TSL float tsk_high(uint32_t x) {
  if (DT == TSK_BF16) return __uint_as_float(x & 0xffff0000u);
  float f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(x));
  return f;
}
template <int DT> TSL uint4 tsk_pack8(const float *a) {
  uint4 v;
  v.x = tsk_pack<DT>(a[0], a[1]); v.y = tsk_pack<DT>(a[2], a[3]); v.z = tsk_pack<DT>(a[4], a[5]); v.w = tsk_pack<DT>(a[6], a[7]);
  return v;
}
template <int DT> TSL void tsk_add8(float *a, uint4 v) {
  a[0] += tsk_low<DT>(v.x); a[1] += tsk_high<DT>(v.x); a[2] += tsk_low<DT>(v.y); a[3] += tsk_high<DT>(v.y);
  a[4] += tsk_low<DT>(v.z); a[5] += tsk_high<DT>(v.z); a[6] += tsk_low<DT>(v.w); a[7] += tsk_high<DT>(v.w);
}

// 4x4 transpose over the four lanes of a quad. In: a[j] = this lane's word of column block j; out: a[k] = word k of block `lane`.
TSL void tsk_quad_transpose(uint32_t a[4], int lane) {
  #pragma unroll
  for (int s = 1; s < 4; s <<= 1) {
    #pragma unroll
    for (int j = 0; j < 4; ++j)
      if (!(j & s)) {
        const uint32_t mine = (lane & s) ? a[j] : a[j | s];
        const uint32_t got = __shfl_xor_sync(0xffffffffu, mine, s);
        if (lane & s) a[j] = got; else a[j | s] = got;
      }
  }
}

// ---- epilogues --------------------------------------------------------------------------------------------------------------

// acc[row, :] += bias[:], one rounding later; bias is [n] of the tile's dtype.
template <int NF, int DT> TSL void tsk_bias(float *acc, TskAddress bias, int col, int n) {
  const int q = threadIdx.x & 3;
  #pragma unroll
  for (int j = 0; j < NF / 4; ++j) {
    const int c = col + j * 8 + q * 2;
    if (c < n) {
      const uint32_t x = *(const uint32_t *)((char *)bias.p + 2ull * c);
      const float lo = tsk_low<DT>(x), hi = tsk_high<DT>(x);
      acc[j * 4] += lo; acc[j * 4 + 1] += hi; acc[j * 4 + 2] += lo; acc[j * 4 + 3] += hi;
    }
  }
}

template <int NF> TSL void tsk_scale(float *acc, float factor) {
  #pragma unroll
  for (int i = 0; i < NF; ++i) acc[i] *= factor;
}

// Store the tile to a row-major matrix [.., n] at (row, col), as far as `rows` and the columns below `end` go; both n and `end` are
// multiples of 8 and the base 16-byte aligned. word(i): the values of registers 2i and 2i + 1 of the accumulator. If COPY, the whole
// tile goes to `copy` as well, row-major and contiguous.
template <int NF, bool COPY, typename Words> TSL void tsk_store_words(Words word, TskAddress out, int row, int col, int rows, int end, int n, TskAddress copy) {
  const int t = TSK_THREAD, w = t >> 5, l = t & 31, q = l & 3, first = w * 16 + (l >> 2);
  #pragma unroll
  for (int jb = 0; jb < NF / 16; ++jb) {
    #pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t a[4];
      #pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = word((jb * 4 + j) * 2 + h);
      tsk_quad_transpose(a, q);
      const int c = col + jb * 32 + q * 8, r = first + h * 8;
      uint4 v; v.x = a[0]; v.y = a[1]; v.z = a[2]; v.w = a[3];
      if (c < end && r < rows) tsl_st_v4((char *)out.p + ((uint64_t)(row + r) * n + c) * 2, v);
      if (COPY) tsl_st_v4((char *)copy.p + (r * (NF * 2) + jb * 32 + q * 8) * 2, v);
    }
  }
  if (NF % 16) {
    #pragma unroll
    for (int j = NF / 16 * 4; j < NF / 4; ++j)
      #pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = col + j * 8 + q * 2, r = first + h * 8;
        const uint32_t x = word(j * 2 + h);
        if (c < end && r < rows) *(uint32_t *)((char *)out.p + ((uint64_t)(row + r) * n + c) * 2) = x;
        if (COPY) *(uint32_t *)((char *)copy.p + (r * (NF * 2) + j * 8 + q * 2) * 2) = x;
      }
  }
}

template <int NF, int DT, bool COPY> TSL void tsk_rows(float *acc, TskAddress out, int row, int col, int rows, int end, int n, TskAddress copy) {
  tsk_store_words<NF, COPY>([&](int i) { return tsk_pack<DT>(acc[2 * i], acc[2 * i + 1]); }, out, row, col, rows, end, n, copy);
}

// Tiles that travel keep the registers' order: thread t's i-th 16 bytes lie at i * 4096 + t * 16, so stores and loads are whole lines.
template <int NF, int DT> TSL void tsk_stage(float *acc, TskAddress tile) {
  char *p = (char *)tile.p + TSK_THREAD * 16;
  #pragma unroll
  for (int i = 0; i < NF / 8; ++i) tsl_st_v4(p + i * 4096, tsk_pack8<DT>(acc + i * 8));
}
// acc += the partial tile of every peer, in ring order: a fixed order, so results repeat bit by bit.
template <int NF, int DT> TSL void tsk_add_parts(float *acc, TskAddress context, TskAddress landing, int64_t index, int64_t tiles) {
  const TslContext *c = tsl_context(context.p);
  const int size = (int)c->size, rank = (int)c->rank;
  constexpr int LOADS = 6;   // on their way: as many as registers allow, since nothing else covers their latency
  #pragma unroll 1
  for (int i = 1; i < size; ++i) {
    const int peer = (rank + i) % size;
    const char *p = (char *)landing.p + (peer * tiles + index) * (NF * 512ll) + TSK_THREAD * 16;
    #pragma unroll
    for (int j = 0; j < NF / 8; j += LOADS) {
      uint4 v[LOADS];
      #pragma unroll
      for (int u = 0; u < LOADS; ++u) if (j + u < NF / 8) v[u] = tsl_ld_v4(p + (j + u) * 4096);
      #pragma unroll
      for (int u = 0; u < LOADS; ++u) if (j + u < NF / 8) tsk_add8<DT>(acc + (j + u) * 8, v[u]);
    }
  }
}

// ---- signalling warp: a fence at system scope in a multiplying warp would stall its warpgroup until the tile has drained -------

TSL int *tsk_note() {
  __shared__ int note[3];
  return note;
}
TSL void tsk_leave_note(int kind, int peer, int flag) {
  if (TSK_THREAD == 0) { tsk_note()[0] = kind; tsk_note()[1] = peer; tsk_note()[2] = flag; }
}
TSL int tsk_note_kind() { return ((volatile int *)tsk_note())[0]; }
TSL int tsk_note_peer() { return ((volatile int *)tsk_note())[1]; }
TSL int tsk_note_flag() { return ((volatile int *)tsk_note())[2]; }
// Set flag `flag` of one peer to the epoch: what this rank wrote for it may be read.
TSL void tsk_signal_peer(TskAddress context, int peer, int flag, int epoch) {
  const uint32_t e = tsk_epoch(context, epoch);
  if ((threadIdx.x & 31) == 0) {
    tsl_fence_async();   // peers read by bulk copies
    tsl_fence_sys();
    tsl_st_relaxed_sys((void *)(tsl_context(context.p)->flags[peer] + 4ull * (uint32_t)flag), e);
  }
  __syncwarp();
}
// Set flag `flag` to the epoch at every peer.
TSL void tsk_signal_peers(TskAddress context, int flag, int epoch) {
  const TslContext *c = tsl_context(context.p);
  const int lane = threadIdx.x & 31;
  const uint32_t e = tsk_epoch(context, epoch);
  if (lane == 0) {
    tsl_fence_async();
    tsl_fence_sys();
  }
  __syncwarp();
  if (lane < (int)c->size && lane != (int)c->rank) tsl_st_relaxed_sys((void *)(c->flags[lane] + 4ull * (uint32_t)flag), e);
  __syncwarp();
}

// ---- collecting warps (2 and 3): copy what arrived in the slot to the op's own output -------------------------------------------

enum { TSK_COPIED = 8 * 16 };   // bytes that a thread has on their way

TSL void tsk_copy_words(char *to, const char *from, int64_t words, int64_t first, int64_t stride) {   // of 16 bytes
  #pragma unroll 1
  for (int64_t i = first; i < words; i += stride * 8) {
    uint4 v[8];
    #pragma unroll
    for (int u = 0; u < 8; ++u) if (i + u * stride < words) v[u] = tsl_ld_v4(from + (i + u * stride) * 16);
    #pragma unroll
    for (int u = 0; u < 8; ++u) if (i + u * stride < words) tsl_st_v4(to + (i + u * stride) * 16, v[u]);
  }
}
// By all CTAs: rows of `bytes`, a multiple of 16. All share each row, or a warp copies one by itself: whichever takes fewer round trips to
// memory one after the other. Thousands of short rows that all share would take milliseconds.
TSL void tsk_copy_rows(char *to, const char *from, int rows, int64_t bytes, int64_t to_pitch, int64_t from_pitch) {
  const int warps = 2 * gridDim.x, thread = (int)threadIdx.x - 64;
  const int64_t all = 32ll * warps * TSK_COPIED, one = 32ll * TSK_COPIED;
  const int64_t together = rows * ((bytes + all - 1) / all), apart = (rows + warps - 1) / warps * ((bytes + one - 1) / one);
  if (together <= apart) {
    for (int r = 0; r < rows; ++r)
      tsk_copy_words(to + r * to_pitch, from + r * from_pitch, bytes / 16, (int64_t)blockIdx.x * 64 + thread, 32ll * warps);
    return;
  }
  for (int r = blockIdx.x * 2 + thread / 32; r < rows; r += warps)
    tsk_copy_words(to + r * to_pitch, from + r * from_pitch, bytes / 16, thread & 31, 32);
}
TSL void tsk_collect_wait(TskAddress context, int flag, int epoch, int peer, int site) {
  const TslContext *c = tsl_context(context.p);
  tsl_wait_epoch(context.p, (const void *)(c->flags[c->rank] + 4ull * (uint32_t)flag), tsk_epoch(context, epoch), peer, site);
  __syncwarp();
}
// The gathered tensor [pieces, size, bytes]: the shards of the peers from the slot, in the order of their arrival, the own one from
// `shard`, or from the slot as well if `shard` is the slot.
TSL void tsk_collect_shards(TskAddress context, TskAddress out, TskAddress shard, int64_t bytes, int pieces, int epoch, int site) {
  const TslContext *c = tsl_context(context.p);
  const int size = (int)c->size, rank = (int)c->rank;
  const bool placed = shard.p == (const void *)c->data[rank];
  for (int i = 0; i < size; ++i) {
    const int source = (rank + i) % size;
    if (i) tsk_collect_wait(context, source, epoch, source, site);
    const int64_t at = source * bytes, pitch = size * bytes;
    const bool apart = !i && !placed;
    tsk_copy_rows((char *)out.p + at, apart ? (const char *)shard.p : (const char *)c->data[rank] + at, pieces, bytes, pitch,
                  apart ? bytes : pitch);
  }
}

// ---- pulling warps (2 and 3): tiles of the peers, through shared memory, by bulk copies that occupy no registers ----------------

// A row of a list of pulls: peer, its flag here, tile number in the peer's slot; then the tile number in `landing` of a partial tile,
// or row, column and rows of the output for a sum.
enum { TSK_PEER, TSK_FLAG, TSK_FROM, TSK_TO, TSK_TO_COL, TSK_TO_ROWS, TSK_PULL_WORDS };
// A list of pulls. Its tiles lie `offset` bytes behind the start of a peer's slot; a tile is there if its flag has the epoch `now`.
struct TskPulls { TskAddress context, counter, rows; int total; int64_t offset; uint32_t now; int site; };
// A tile of the list that this warp has claimed; `item` is negative if none is left.
struct TskPull { int item, row[TSK_PULL_WORDS]; const char *from; const void *flag; };
TSL TskPull tsk_claim_pull(const TskPulls &pulls, int64_t bytes) {
  TskPull tile;
  tile.item = tsk_claim(pulls.counter, pulls.total);
  if (tile.item < 0) return tile;
  const TslContext *c = tsl_context(pulls.context.p);
  #pragma unroll
  for (int w = 0; w < TSK_PULL_WORDS; ++w) tile.row[w] = ((const int *)pulls.rows.p)[tile.item * TSK_WORDS + w];
  tile.from = (const char *)c->data[tile.row[TSK_PEER]] + pulls.offset + tile.row[TSK_FROM] * bytes;
  tile.flag = (const void *)(c->flags[c->rank] + 4ull * (uint32_t)tile.row[TSK_FLAG]);
  return tile;
}
// Lane 0 looks at the tile's flag, once or until it is set, and may then load the tile.
TSL bool tsk_is_there(const TskPulls &pulls, const TskPull &tile) {
  int there = 0;
  if ((threadIdx.x & 31) == 0) {
    there = tsl_holds<uint32_t>(TSL_EPOCH, tsl_ld_acquire_sys(tile.flag), pulls.now);
    if (there) tsl_fence_async();
  }
  return __shfl_sync(0xffffffffu, there, 0);
}
TSL void tsk_wait_for(const TskPulls &pulls, const TskPull &tile) {
  if ((threadIdx.x & 31) == 0) {
    tsl_wait_epoch(pulls.context.p, tile.flag, pulls.now, tile.row[TSK_PEER], pulls.site);
    tsl_fence_async();
  }
  __syncwarp();
}

TSL void tsk_bulk_wait(uint32_t barrier, uint32_t parity) {
  while (!tsl_mbarrier_try(barrier, parity)) {}
}

// A pulling warp's SLOTS pieces of shared memory and their barriers; `moved` counts the pieces that went through them.
struct TskRing { uint32_t shared, barrier, moved; };
template <int SLOTS> TSL TskRing tsk_ring_of_pieces(TskAddress buffer, uint32_t piece) {
  __shared__ __align__(8) uint64_t barriers[4];
  const int first = ((threadIdx.x >> 5) & 1) * SLOTS;   // one warp has four pieces, or each of two has two
  const TskRing ring = {tsl_shared(buffer.p) + first * piece, tsl_shared(barriers + first), 0};
  if ((threadIdx.x & 31) == 0) {
    for (int i = 0; i < SLOTS; ++i) tsl_mbarrier_init(ring.barrier + i * 8, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    tsl_fence_async();
  }
  __syncwarp();
  return ring;
}
// Bring the tiles of a list, in pieces of ROWS rows, without a pause between tiles: once all of a tile is on its way, the next one is
// claimed, and if its flag is set by then, its pieces follow into shared memory as it falls free. Not sooner: a warp that holds a
// tile keeps it from the others.
// store(tile, p, piece) issues the copies of piece p from shared memory, by any lanes. tell(tile, newer) comes when all copies of the
// tile are issued, and `newer` groups of copies behind them, and waits for those of the tile. It comes one piece late if the next tile
// is on its way by then, and else before the wait for its flag: what has been moved is never kept back until a peer signals, or two
// ranks could wait for each other.
template <int NF, int ROWS, int SLOTS, typename Store, typename Tell>
TSL void tsk_bring(TskRing &ring, const TskPulls &pulls, Store store, Tell tell) {
  constexpr int PIECES = 128 / ROWS;
  static_assert(PIECES % SLOTS == 0, "every tile begins in the first slot");
  constexpr uint32_t PIECE = ROWS * NF * 4;
  // The stores of a piece may go on while the next piece arrives; of two slots none can be spared for that. Their wait is not short:
  // for sm_90a ptxas makes the same instruction of the wait for reading as of that for writing.
  constexpr int STORING = SLOTS > 2 ? 1 : 0, LOADING = SLOTS - STORING;
  const int lane = threadIdx.x & 31;
  const auto load = [&](const TskPull &tile, int p) {
    if (lane == 0) tsl_bulk_load(ring.shared + p % SLOTS * PIECE, tile.from + p * PIECE, PIECE, ring.barrier + p % SLOTS * 8);
  };
  TskPull tile, next = tsk_claim_pull(pulls, NF * 512), last = next;
  bool there = false, untold = false;   // whether `next` may be loaded, and whether `last` waits to be told of
  int ahead = 0;                        // pieces of `next` that are on their way
  while (next.item >= 0) {
    tile = next;
    if (!there) tsk_wait_for(pulls, tile);
    #pragma unroll 1
    for (; ahead < LOADING; ++ahead) load(tile, ahead);
    ahead = 0;
    there = false;
    #pragma unroll 1
    for (int p = 0; p < PIECES; ++p, ++ring.moved) {
      const int slot = p % SLOTS, follows = p + LOADING;   // the piece that there is room for now
      tsk_bulk_wait(ring.barrier + slot * 8, (ring.moved / SLOTS) & 1);
      store(tile, p, ring.shared + slot * PIECE);
      tsl_bulk_commit();
      tsl_bulk_read<STORING>();
      __syncwarp();
      if (follows < PIECES) load(tile, follows);
      if (untold) tell(last, 1);
      untold = false;
      if (follows == PIECES) next = tsk_claim_pull(pulls, NF * 512);
      if (follows >= PIECES && next.item >= 0) {
        if (!there) there = tsk_is_there(pulls, next);
        if (there)
          #pragma unroll 1
          for (; ahead <= follows - PIECES; ++ahead) load(next, ahead);
      }
    }
    if (there) last = tile; else tell(tile, 0);
    untold = there;
  }
}
// Partial tiles for the sums of this rank, to `landing`, by lane 0; then their epochs to `landed`, for the multiplying warps.
template <int NF, int ROWS, int SLOTS>
TSL void tsk_pull_tiles(TskRing &ring, const TskPulls &pulls, TskAddress landing, TskAddress landed) {
  constexpr uint32_t PIECE = ROWS * NF * 4, TILE = NF * 512;
  const int lane = threadIdx.x & 31;
  const auto store = [&](const TskPull &tile, int p, uint32_t piece) {
    if (lane == 0) tsl_bulk_store((char *)landing.p + (int64_t)tile.row[TSK_TO] * TILE + p * PIECE, piece, PIECE);
  };
  const auto tell = [&](const TskPull &tile, int newer) {
    if (lane == 0) {
      if (newer) tsl_bulk_written<1>(); else tsl_bulk_written();
      tsl_fence_async();
      __threadfence();
      *(volatile uint32_t *)((char *)landed.p + 4ull * tile.row[TSK_TO]) = pulls.now;
    }
    __syncwarp();
  };
  tsk_bring<NF, ROWS, SLOTS>(ring, pulls, store, tell);
}
// Finished sums of the peers, to the output [.., n]. Nobody is told before the kernel ends, so each lane waits for its rows then.
template <int NF, int ROWS, int SLOTS>
TSL void tsk_pull_sums(TskRing &ring, const TskPulls &pulls, TskAddress out, int n) {
  static_assert(ROWS <= 32, "a lane stores a row");
  constexpr uint32_t WIDTH = NF * 4;   // bytes of a row of a tile
  const int lane = threadIdx.x & 31;
  const auto store = [&](const TskPull &tile, int p, uint32_t piece) {
    const int r = p * ROWS + lane, col = tile.row[TSK_TO_COL];
    char *to = (char *)out.p + ((int64_t)(tile.row[TSK_TO] + r) * n + col) * 2;
    const uint32_t bytes = min((uint32_t)(n - col) * 2, WIDTH);
    if (lane < ROWS && r < tile.row[TSK_TO_ROWS]) tsl_bulk_store(to, piece + lane * WIDTH, bytes);
  };
  tsk_bring<NF, ROWS, SLOTS>(ring, pulls, store, [](const TskPull &, int) {});
  tsl_bulk_written();
}
// What warps 2 and 3 do. For an all_reduce warp 2 pulls partial tiles and warp 3 sums, so that neither waits behind the other; sums
// wait for partial tiles alone, so warp 2 may go on with them at the end. Else warp 2 pulls partial tiles. `buffer`: four pieces of
// ROWS rows.
template <int NF, int ROWS, bool ALL>
TSL void tsk_pull(TskAddress context, TskAddress counters, TskAddress pulls, int pull_total, TskAddress results, int result_total,
                  TskAddress buffer, TskAddress landing, TskAddress landed, TskAddress out, int64_t result_offset, int n, int epoch,
                  int site) {
  constexpr int SLOTS = ALL ? 2 : 4;
  if (!ALL && threadIdx.x >= 96) return;
  unsigned int *claims = (unsigned int *)counters.p + 2;
  const uint32_t now = tsk_epoch(context, epoch);
  TskRing ring = tsk_ring_of_pieces<SLOTS>(buffer, ROWS * NF * 4);
  const TskPulls partial = {context, claims, pulls, pull_total, 0, now, site};
  const TskPulls sums = {context, claims + 1, results, result_total, result_offset, now, site};
  if (threadIdx.x < 96) tsk_pull_tiles<NF, ROWS, SLOTS>(ring, partial, landing, landed);
  if constexpr (ALL) tsk_pull_sums<NF, ROWS, SLOTS>(ring, sums, out, n);
}

// ---- end of a kernel ----------------------------------------------------------------------------------------------------------

TSL void tsk_join() { asm volatile("bar.sync 10, 320;" ::: "memory"); }   // multiplying warps and warps 2 and 3
// counters: [0] claims of tiles, [1] CTAs that are done, [2] claims of pulls of partial tiles, [3] of sums. The last CTA leaves them at
// zero for the next launch and tells the peers that this rank has read its slot (unless ack_flag is negative); if the group was aborted it fills the output with
// NaN, since part of it was never computed.
TSL int tsk_last(TskAddress counters) {
  __shared__ int last;
  tsk_sync();
  if (TSK_THREAD == 0) {
    __threadfence();
    last = atomicAdd((unsigned int *)counters.p + 1, 1u) == gridDim.x - 1;
    if (last) __threadfence();
  }
  tsk_sync();
  return *(volatile int *)&last;
}
TSL void tsk_fill_nan(TskAddress out, int64_t bytes) {
  const uint4 nan = make_uint4(~0u, ~0u, ~0u, ~0u);
  for (int64_t i = TSK_THREAD; i < bytes / 16; i += TSK_CONSUMERS) tsl_st_v4((char *)out.p + i * 16, nan);
}
// The group was aborted by another rank: this rank's host hears of it, too, even if that one's process is gone by now.
TSL void tsk_report(TskAddress context) {
  const TslContext *c = tsl_context(context.p);
  volatile uint64_t *r = (volatile uint64_t *)c->record;
  if (TSK_THREAD == 0 && r[0] == 0) {
    r[1] = tsl_ld_relaxed_sys((const void *)c->abort_word) - 1;
    r[2] = r[3] = r[4] = 0;
    __threadfence_system();
    r[0] = 1 + c->rank;
  }
}
TSL void tsk_finish(TskAddress context, TskAddress counters, int epoch, int ack_flag) {
  const TslContext *c = tsl_context(context.p);
  if (TSK_THREAD == 0) { for (int i = 0; i < 4; ++i) ((volatile unsigned int *)counters.p)[i] = 0; }
  const int t = TSK_THREAD;
  if (ack_flag >= 0 && t < (int)c->size && t != (int)c->rank) tsl_st_release_sys((void *)(c->flags[t] + 4ull * (ack_flag + c->rank)), tsk_epoch(context, epoch));
}

// ---- kernels of one warp --------------------------------------------------------------------------------------------------------

// First in a captured call: its epoch is the next one of the slot, and every peer must have read what this rank sent there before.
TSL void tsk_open(TskAddress context, int, int site, int ack_flag) {
  const TslContext *c = tsl_context(context.p);
  const uint32_t before = *(volatile uint32_t *)c->epoch_cell;
  const int lane = threadIdx.x & 31;
  if (lane < (int)c->size && lane != (int)c->rank)
    tsl_wait_epoch(context.p, (const void *)(c->flags[c->rank] + 4ull * (ack_flag + lane)), before, lane, site);
  __syncwarp();
  if (lane == 0) *(volatile uint32_t *)c->epoch_cell = before + 1;
}
TSL void tsk_acknowledge(TskAddress context, int epoch, int, int ack_flag) {
  const TslContext *c = tsl_context(context.p);
  const int lane = threadIdx.x & 31;
  if (lane < (int)c->size && lane != (int)c->rank) tsl_st_release_sys((void *)(c->flags[lane] + 4ull * (ack_flag + c->rank)), tsk_epoch(context, epoch));
}
// Between kernels that know nothing of epochs: those behind it in the stream read what `rank` has sent, or find the group aborted.
TSL void tsk_wait_rank(TskAddress context, int epoch, int site, int rank) {
  const TslContext *c = tsl_context(context.p);
  if ((threadIdx.x & 31) == 0)
    tsl_wait_epoch(context.p, (const void *)(c->flags[c->rank] + 4ull * (uint32_t)rank), tsk_epoch(context, epoch), rank, site);
  __syncwarp();
}
// Behind such kernels, with 384 threads: if the group was aborted, what they made of data that did not come must not look like a result.
TSL void tsk_spoil(TskAddress context, TskAddress out, int64_t bytes) {
  if (TSK_THREAD < 0 || !tsl_aborted(context.p)) return;
  tsk_report(context);
  tsk_fill_nan(out, bytes);
  if (TSK_THREAD < (int)(bytes & 15)) ((volatile unsigned char *)out.p)[bytes - 1 - TSK_THREAD] = 0xff;
}

#define TSK_BIAS(NF, DT, ...) tsk_bias<NF, DT>(Cl, __VA_ARGS__)
#define TSK_SCALE(NF, ...) tsk_scale<NF>(Cl, __VA_ARGS__)
#define TSK_STORE(NF, DT, OUT, ROW, COL, ROWS, N) tsk_rows<NF, DT, false>(Cl, OUT, ROW, COL, ROWS, N, N, nullptr)
#define TSK_STORE_BLOCK(NF, DT, ...) tsk_rows<NF, DT, false>(Cl, __VA_ARGS__, nullptr)
#define TSK_STORE_TWICE(NF, DT, OUT, ROW, COL, ROWS, N, COPY) tsk_rows<NF, DT, true>(Cl, OUT, ROW, COL, ROWS, N, N, COPY)
#define TSK_PULL(NF, ROWS, ALL, ...) tsk_pull<NF, ROWS, ALL>(__VA_ARGS__)
#define TSK_STAGE(NF, DT, ...) tsk_stage<NF, DT>(Cl, __VA_ARGS__)
#define TSK_ADD_PARTS(NF, DT, ...) tsk_add_parts<NF, DT>(Cl, __VA_ARGS__)
