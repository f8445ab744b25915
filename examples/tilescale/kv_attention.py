"""Kernels of sp_ag_attention.py: flash attention that waits for keys where it first needs them, and two that guard their buffer.

On GPUs a block of 384 threads has one tile of queries of one head. Its first warp loads: before the first step of a slab it waits for
the slab's flag, then it fills a ring of stages by TMA. Two warpgroups multiply, 64 queries each: the scores of a step are computed
while the weights of the last one are applied to its values, so tensor cores do not wait for the softmax. On the C target the same
tables are worked off in plain loops.
"""

import math

import tilelang.language as T
from common import CTX, Kernel

import tscompile.language as tl
from tscompile.language.dialects import Dialect

TILE = {"cuda": 128, "cpu": 16}  # queries of a tile, and keys of a step
THREADS = 384
ROW, ROWS, FIRST, STEPS = range(4)  # words of a tile, and below of a step: tscompile/templates/kv_schedule.py, `tables`
FROM, SLAB, VALID, DIAGONAL = range(4)
LOWEST = -1e30  # where the largest score starts: finite, so that a step that a query sees nothing of leaves no nan
# Warps meet at mbarriers alone. No index of the tables is out of range, and TMA fills with zeros what is beyond the last query.
PASS_CONFIGS = {"tl.disable_thread_storage_sync": True, "tl.disable_safe_memory_legalize": True}
# TileLang's exp2 keeps denormals, at three more instructions for each score.
EXP2 = """
static __device__ __forceinline__ float sp_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
"""


def attention(d: Dialect, heads: int, kv_heads: int, dim: int, dtype: str):
    """softmax(q k^T / sqrt(dim)) v for the tiles of a table; `heads` / `kv_heads` heads of queries share one of keys and values.

    The gathered buffer has the `kv_heads` keys of a position before its values. Arguments: q and out [rows, heads, dim]; kv
    [gathered rows, 2 kv_heads, dim]; the two tables; a flag for each slab, `parts` of each rank; the epoch that says that it is there.
    """
    return (_attention_cuda if d.name == "cuda" else _attention_cpu)(d, heads, kv_heads, dim, dtype)


def _attention_cuda(d: Dialect, heads: int, kv_heads: int, dim: int, dtype: str):
    tile, stages = TILE["cuda"], 2 if dim > 64 else 4
    scale = math.log2(math.e) / math.sqrt(dim)
    rows, gathered_rows, tiles, steps, slabs = (
        T.dynamic(n) for n in ("rows", "gathered_rows", "tiles", "steps", "slabs")
    )
    text = f"{d.prelude}{EXP2}"

    @T.macro
    def load(source, row, head, ring, full, stage):
        T.tma_copy(
            source[row : row + tile, head, 0:dim], ring[stage, :, :], barrier=full[stage], leader_scope_threads=32
        )
        if T.shuffle_elect(32):
            T.barrier_arrive(full[stage])

    @T.macro
    def score(q_tile, k_ring, k_full, scores, i):
        T.barrier_wait(k_full[i % stages], i // stages % 2)
        T.wgmma_gemm(
            q_tile[0, :, :],
            k_ring[i % stages, :, :],
            scores,
            transpose_B=True,
            policy=T.GemmWarpPolicy.FullRow,
            clear_accum=True,
        )

    @T.macro
    def apply(weights, v_ring, v_full, total, i):
        T.barrier_wait(v_full[i % stages], i // stages % 2)
        T.wgmma_gemm(weights, v_ring[i % stages, :, :], total, policy=T.GemmWarpPolicy.FullRow)

    @T.macro
    def weigh(scores, valid, diagonal, top, factor, part, mass):
        """Scores become weights relative to the largest score so far; `factor` is what that changes for earlier ones."""
        if valid < tile or diagonal < tile - 1:
            for r, c in T.Parallel(tile, tile):
                scores[r, c] = T.if_then_else(c < valid and c <= r + diagonal, scores[r, c], -T.infinity("float32"))
        T.copy(top, factor)
        T.reduce_max(scores, top, dim=1, clear=False)
        for r in T.Parallel(tile):
            factor[r] = T.call_extern("float32", "sp_exp2", (factor[r] - top[r]) * scale)
        for r, c in T.Parallel(tile, tile):
            scores[r, c] = T.call_extern("float32", "sp_exp2", scores[r, c] * scale - top[r] * scale)
        T.reduce_sum(scores, part, dim=1)
        for r in T.Parallel(tile):
            mass[r] = mass[r] * factor[r] + part[r]

    @T.prim_func
    def attention_kernel(
        ctx: CTX,
        q: T.Tensor((rows, heads, dim), dtype),
        kv: T.Tensor((gathered_rows, 2 * kv_heads, dim), dtype),
        out: T.Tensor((rows, heads, dim), dtype),
        tile_table: T.Tensor((tiles, 4), "int32"),
        step_table: T.Tensor((steps, 4), "int32"),
        arrived: T.Tensor((slabs,), "int32"),
        parts: T.int32,
        epoch: T.int32,
    ):
        with T.Kernel(tiles * heads, threads=THREADS, prelude=text) as block:
            q_tile = T.alloc_shared((1, tile, dim), dtype)
            k_ring = T.alloc_shared((stages, tile, dim), dtype)
            v_ring = T.alloc_shared((stages, tile, dim), dtype)
            scores = T.alloc_fragment((tile, tile), "float32")
            weights = T.alloc_fragment((tile, tile), dtype)
            total = T.alloc_fragment((tile, dim), "float32")
            top = T.alloc_fragment((tile,), "float32")
            factor = T.alloc_fragment((tile,), "float32")
            part = T.alloc_fragment((tile,), "float32")
            mass = T.alloc_fragment((tile,), "float32")
            q_full = T.alloc_barrier([1])
            k_full, v_full = T.alloc_barrier([1] * stages), T.alloc_barrier([1] * stages)
            k_empty, v_empty = T.alloc_barrier([256] * stages), T.alloc_barrier([256] * stages)
            thread = T.get_thread_binding()
            seen = T.alloc_var("int32")
            valid = T.alloc_var("int32")
            diagonal = T.alloc_var("int32")
            # All heads of a tile, one after another: those that share keys run at the same time.
            this = block // heads
            head = block % heads
            kv_head = head // (heads // kv_heads)
            row = tile_table[this, ROW]
            first = tile_table[this, FIRST]
            count = tile_table[this, STEPS]
            if thread < 128:
                T.set_max_nreg(40, 0)
                if thread < 32:
                    load(q, row, head, q_tile, q_full, 0)
                    seen = -1
                    for i in T.serial(count):
                        slab = step_table[first + i, SLAB]
                        at = step_table[first + i, FROM]
                        if slab != seen:
                            tl.warp_wait(ctx, arrived[slab], "epoch", epoch, peer=slab // parts, site=2)
                            seen = slab
                        T.barrier_wait(k_empty[i % stages], i // stages % 2 ^ 1)
                        load(kv, at, kv_head, k_ring, k_full, i % stages)
                        T.barrier_wait(v_empty[i % stages], i // stages % 2 ^ 1)
                        load(kv, at, kv_heads + kv_head, v_ring, v_full, i % stages)
            else:
                T.set_max_nreg(232, 1)
                T.clear(total)
                T.clear(mass)
                T.fill(top, LOWEST)
                valid = step_table[first, VALID]
                diagonal = step_table[first, DIAGONAL]
                T.barrier_wait(q_full[0], 0)
                score(q_tile, k_ring, k_full, scores, 0)
                T.wait_wgmma(0)
                T.barrier_arrive(k_empty[0])
                weigh(scores, valid, diagonal, top, factor, part, mass)
                T.copy(scores, weights)
                for i in T.serial(1, count):
                    # Read before anything is waited for: the first read of a line takes as long as a softmax.
                    valid = step_table[first + i, VALID]
                    diagonal = step_table[first + i, DIAGONAL]
                    score(q_tile, k_ring, k_full, scores, i)
                    apply(weights, v_ring, v_full, total, i - 1)
                    T.wait_wgmma(1)
                    T.barrier_arrive(k_empty[i % stages])
                    weigh(scores, valid, diagonal, top, factor, part, mass)
                    T.wait_wgmma(0)
                    T.barrier_arrive(v_empty[(i - 1) % stages])
                    for r, c in T.Parallel(tile, dim):
                        total[r, c] = total[r, c] * factor[r]
                    T.copy(scores, weights)
                apply(weights, v_ring, v_full, total, count - 1)
                T.wait_wgmma(0)
                for r, c in T.Parallel(tile, dim):
                    total[r, c] = total[r, c] / mass[r]
                for r, c in T.Parallel(tile, dim):
                    if r < tile_table[this, ROWS]:
                        out[row + r, head, c] = total[r, c]

    return attention_kernel


def _attention_cpu(d: Dialect, heads: int, kv_heads: int, dim: int, dtype: str):
    tile, scale = TILE["cpu"], 1.0 / math.sqrt(dim)
    rows, gathered_rows, tiles, steps, slabs = (
        T.dynamic(n) for n in ("rows", "gathered_rows", "tiles", "steps", "slabs")
    )

    @T.prim_func
    def attention_kernel(
        ctx: CTX,
        q: T.Tensor((rows, heads, dim), dtype),
        kv: T.Tensor((gathered_rows, 2 * kv_heads, dim), dtype),
        out: T.Tensor((rows, heads, dim), dtype),
        tile_table: T.Tensor((tiles, 4), "int32"),
        step_table: T.Tensor((steps, 4), "int32"),
        arrived: T.Tensor((slabs,), "int32"),
        parts: T.int32,
        epoch: T.int32,
    ):
        with T.Kernel(tiles * heads, prelude=d.prelude) as block:
            scores = T.alloc_local((tile,), dtype)
            total = T.alloc_local((tile, dim), dtype)
            top = T.alloc_local((tile,), dtype)
            mass = T.alloc_local((tile,), dtype)
            before = T.alloc_local((1,), dtype)
            seen = T.alloc_local((1,), "int32")
            this = block // heads
            head = block % heads
            kv_head = head // (heads // kv_heads)
            row = tile_table[this, ROW]
            first = tile_table[this, FIRST]
            seen[0] = -1
            for r in T.serial(tile):
                top[r] = LOWEST
                mass[r] = 0.0
                for c in T.serial(dim):
                    total[r, c] = 0.0
            for i in T.serial(tile_table[this, STEPS]):
                slab = step_table[first + i, SLAB]
                at = step_table[first + i, FROM]
                if slab != seen[0]:
                    tl.warp_wait(ctx, arrived[slab], "epoch", epoch, peer=slab // parts, site=2)
                    seen[0] = slab
                for r in T.serial(tile_table[this, ROWS]):
                    before[0] = top[r]
                    for j in T.serial(tile):
                        scores[j] = LOWEST * 2
                        if j < step_table[first + i, VALID] and j <= r + step_table[first + i, DIAGONAL]:
                            scores[j] = 0.0
                            for c in T.serial(dim):
                                scores[j] = scores[j] + q[row + r, head, c] * kv[at + j, kv_head, c]
                            scores[j] = scores[j] * scale
                        top[r] = T.max(top[r], scores[j])
                    before[0] = T.exp(before[0] - top[r])
                    mass[r] = mass[r] * before[0]
                    for c in T.serial(dim):
                        total[r, c] = total[r, c] * before[0]
                    for j in T.serial(tile):
                        scores[j] = T.exp(scores[j] - top[r])
                        mass[r] = mass[r] + scores[j]
                        for c in T.serial(dim):
                            total[r, c] = total[r, c] + scores[j] * kv[at + j, kv_heads + kv_head, c]
            for r in T.serial(tile_table[this, ROWS]):
                for c in T.serial(dim):
                    out[row + r, head, c] = total[r, c] / mass[r]

    return attention_kernel


def may_send(d: Dialect, ranks: int):
    """Wait until every rank that `readers` marks has done with what this rank sent it in epoch `epoch`."""

    @T.prim_func
    def may_send_kernel(
        ctx: CTX, readers: T.Tensor((ranks,), "int32"), done: T.Tensor((ranks,), "int32"), epoch: T.int32
    ):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                for peer in T.serial(ranks):
                    if readers[peer] != 0:
                        tl.wait(ctx, done[peer], "epoch", epoch, peer=peer, site=1)

    return may_send_kernel


def have_read(d: Dialect, ranks: int):
    """Tell every rank that `senders` marks that this rank has done with what it sent in epoch `epoch`."""

    @T.prim_func
    def have_read_kernel(
        ctx: CTX, senders: T.Tensor((ranks,), "int32"), done: T.Tensor((ranks,), "int32"), epoch: T.int32
    ):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                for peer in T.serial(ranks):
                    if senders[peer] != 0:
                        tl.signal(tl.remote(ctx, done[tl.rank(ctx)], peer), epoch, dtype="int32")

    return have_read_kernel


def kernels(d: Dialect) -> list[Kernel]:
    shapes = [(8, 2, 128, "bfloat16"), (8, 1, 64, "float16")]
    return [
        *(Kernel(f"attention {shape}", attention(d, *shape), PASS_CONFIGS) for shape in shapes),
        Kernel("may_send", may_send(d, 4)),
        Kernel("have_read", have_read(d, 4)),
    ]
