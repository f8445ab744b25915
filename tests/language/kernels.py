"""Kernels that call every primitive, written once for both targets."""

import tilelang.language as T

import tscompile.language as tl
from tscompile.language.dialects import Dialect

ORDERS = {
    "ld": ("relaxed", "acquire"),
    "st": ("relaxed", "release"),
    "atomic_add": ("relaxed", "acquire", "release", "acq_rel"),
    "red_add": ("relaxed", "release"),
}
SCOPES = ("cta", "gpu", "sys")
COMPARES = ("eq", "ne", "ge", "gt", "le", "lt", "epoch")
CTX = T.Tensor((tl.WORDS,), "int64")


def carrier(dtype: str) -> str:
    """What a tensor parameter is declared as: TileLang's C target has no unsigned words."""
    return dtype.removeprefix("u")


def words(d: Dialect, dtype: str):
    """Loads, stores and atomics with all semantics and scopes: out[i] takes what the i-th operation returned."""
    count = 3 * sum(len(orders) for orders in ORDERS.values()) + 2
    adds = dtype != "float64"

    @T.prim_func
    def words_kernel(cells: T.Tensor((count,), carrier(dtype)), out: T.Tensor((count,), carrier(dtype))):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            if d.thread() == 0:
                for i, semantics, scope in _forms("ld", 0):
                    out[i] = tl.ld(cells[i], semantics, scope, dtype)
                out[count - 2] = tl.ld(cells[count - 2], "volatile", dtype=dtype)
                for i, semantics, scope in _forms("st", 6):
                    tl.st(cells[i], i + 1, semantics, scope, dtype)
                tl.st(cells[count - 1], 5, "volatile", dtype=dtype)
                if adds:
                    for i, semantics, scope in _forms("atomic_add", 12):
                        out[i] = tl.atomic_add(cells[i], 3, semantics, scope, dtype)
                    for i, semantics, scope in _forms("red_add", 24):
                        tl.red_add(cells[i], 4, semantics, scope, dtype)

    return words_kernel


def _forms(name: str, first: int):
    return [(first + i, *form) for i, form in enumerate((o, s) for o in ORDERS[name] for s in SCOPES)]


def word_forms(name: str, wide: bool = False) -> list[tuple[int, dict]]:
    """All that `ld` or `st` (of 128 bits: `wide`) can be told beside the element, numbered."""
    orders = ("relaxed",) if wide else ORDERS[name]
    coherent = [{}, {"no_allocate": True}]
    forms = [{"semantics": "volatile"}, *({"semantics": "weak"} | more for more in coherent)]
    if name == "ld":
        forms += [{"semantics": "weak", "non_coherent": True} | more for more in coherent]
    forms += [{"semantics": order, "scope": scope} | more for order in orders for scope in SCOPES for more in coherent]
    return list(enumerate(forms))


def every_word(d: Dialect, dtype: str, element: str | None = None):
    """Every form of load and store: out[i] takes cells[i], cells[32 + i] takes i + 1. `element`: what to take the cells for."""
    loads, stores = word_forms("ld"), word_forms("st")

    @T.prim_func
    def every_word_kernel(cells: T.Tensor((64,), dtype), out: T.Tensor((32,), dtype)):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                for i, form in loads:
                    out[i] = tl.ld(cells[i], dtype=element, **form)
                for i, form in stores:
                    tl.st(cells[32 + i], i + 1, dtype=element, **form)

    return every_word_kernel


def every_wide_word(d: Dialect, dtype: str, lanes: int):
    """Every form of load and store of 128 bits: row i of out takes that of cells, row 16 + i of cells takes twice row i."""
    loads, stores = word_forms("ld", wide=True), word_forms("st", wide=True)

    @T.prim_func
    def every_wide_word_kernel(cells: T.Tensor((32, lanes), dtype), out: T.Tensor((16, lanes), dtype)):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                value = T.alloc_local((lanes,), dtype)
                for i, form in loads:
                    tl.ld128(value[0], cells[i, 0], **form)
                    for lane in range(lanes):
                        out[i, lane] = value[lane]
                for i, form in stores:
                    for lane in range(lanes):
                        value[lane] = cells[i, lane] * 2
                    tl.st128(cells[16 + i, 0], value[0], **form)

    return every_wide_word_kernel


def grid(d: Dialect, blocks: int = 4):
    """Each block writes, all meet, each reads what the next one wrote; twice. Then block 0 alone waits for all."""

    @T.prim_func
    def grid_kernel(
        ctx: CTX,
        cells: T.Tensor((2, blocks), "int32"),
        word: T.Tensor((2,), "int64"),
        out: T.Tensor((3, blocks), "int32"),
    ):
        with T.Kernel(blocks, threads=128, prelude=d.prelude) as block:
            thread = d.thread()
            for step in T.unroll(2):
                if thread == 0:
                    cells[step, block] = out[step, block] + 1
                T.sync_threads()
                if thread < 32:
                    tl.grid_sync(ctx, word[0], blocks, block, site=5)
                T.sync_threads()
                if thread == 0:
                    out[step, block] = cells[step, (block + 1) % blocks]
            T.sync_threads()
            if thread == 0:
                epoch = T.alloc_var("uint32")
                epoch = tl.gpu_arrive(word[1], blocks, block)
                if block == 0:
                    out[2, 0] = T.cast(tl.gpu_wait(ctx, word[1], epoch, site=6), "int32")

    return grid_kernel


def waits(d: Dialect, dtype: str):
    """Each comparison once: results[i] says whether the wait ended with what it waited for."""
    forms = list(enumerate(COMPARES))

    @T.prim_func
    def waits_kernel(
        ctx: CTX, flags: T.Tensor((len(COMPARES),), carrier(dtype)), value: T.int64, results: T.Tensor((16,), "int32")
    ):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            if thread == 0:
                for i, compare in forms:
                    reached = tl.wait(ctx, flags[i], compare, value, peer=i, site=40 + i, dtype=dtype)
                    results[i] = T.cast(reached, "int32")
            if thread < 32:
                if tl.warp_wait(ctx, flags[2], "ge", value, peer=2, site=50, dtype=dtype):
                    results[7] = 1
                if tl.aborted(ctx):
                    results[8] = 1

    return waits_kernel


def named_waits(d: Dialect):
    """The short forms on flags of a peer, and the epoch of a launch."""
    forms = list(enumerate((tl.wait_eq, tl.wait_ne, tl.wait_ge, tl.wait_gt, tl.wait_le, tl.wait_lt)))

    @T.prim_func
    def named_waits_kernel(ctx: CTX, to: T.int32, passed: T.int32, results: T.Tensor((8,), "int32")):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                flags = tl.peer(ctx, to, 64, (8,), "uint32", region="flags")
                now = tl.epoch(ctx, passed)
                results[7] = T.cast(now, "int32")
                results[6] = tl.rank(ctx) * 10 + tl.num_ranks(ctx)
                for i, wait in forms:
                    results[i] = T.cast(wait(ctx, flags[i], now, peer=to, site=i), "int32")

    return named_waits_kernel


def threads(d: Dialect):
    """Votes, shuffles, fences, barriers of a block, and the barrier of all ranks."""

    @T.prim_func
    def threads_kernel(ctx: CTX, epoch: T.int32, out: T.Tensor((16,), "int32"), x: T.Tensor((4,), "float32")):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            for scope in SCOPES:
                tl.fence(scope)
            tl.fence_async()
            tl.block_sync(9, 128)
            if thread < 64:
                tl.block_arrive(10, 128)
            else:
                tl.block_sync(10, 128)
            if thread < 32:
                reached = tl.barrier(ctx, 256, epoch, site=7)
                any_lane = tl.warp_any(thread == 0)
                all_lanes = tl.warp_all(thread == 0)
                lanes = tl.warp_ballot(thread == 0)
                moved = tl.shuffle(x[0], 1) + tl.shuffle(x[1], 1, "xor") + tl.shuffle(x[2], 1, "up")
                wide = tl.shuffle(T.cast(thread, "int64"), 1, "down")
                tl.warp_sync()
                if tl.elect():
                    out[0] = T.cast(reached, "int32")
                    out[1] = T.cast(any_lane, "int32")
                    out[2] = T.cast(all_lanes, "int32")
                    out[3] = T.cast(lanes, "int32")
                    out[4] = T.cast(wide, "int32")
                    out[5] = tl.lane()
                    x[3] = moved

    return threads_kernel


def bulk(d: Dialect):
    """A tile to a peer's slot and on to its other half, with a signal after it has arrived."""

    @T.prim_func
    def bulk_kernel(ctx: CTX, x: T.Tensor((1024,), "float32"), to: T.int32, ok: T.Tensor((1,), "int32")):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            tile = d.alloc_shared((1024,), "float32")
            arrived = d.alloc_shared((1,), "uint64")
            if thread == 0:
                tl.mbarrier_init(arrived[0])
            T.copy(x, tile)
            tl.block_sync(9, 128)
            if thread == 0:
                tl.bulk_put(tl.peer_address(ctx, to, 0), tile[0], 4096)
                tl.bulk_wait_read()
                tl.bulk_wait()
                tl.signal(tl.peer(ctx, to, 0, (2,), "uint32", region="flags")[0], 1)
                tl.signal(tl.peer(ctx, to, 0, (2,), "uint32", region="flags")[1], 2, "add")
                tl.bulk_get(tile[0], tl.peer_address(ctx, to, 0), 4096, arrived[0])
            if tl.mbarrier_wait(ctx, arrived[0], 0, peer=to, site=3):
                ok[0] = 1
            there = tl.peer(ctx, to, 4096, (1024,), "float32")
            tl.put_block(there[0], x[0], 4096, thread, 128)

    return bulk_kernel


def waiting_gemm(d: Dialect, size: int = 256, dtype: str = "bfloat16", one_warp: bool = False):
    """A warp-specialised GEMM whose rows of A arrive while it runs; all warps of the producer wait, or the one that loads."""

    @T.prim_func
    def waiting_gemm_kernel(
        ctx: CTX,
        a: T.Tensor((size, size), dtype),
        b: T.Tensor((size, size), dtype),
        c: T.Tensor((size, size), dtype),
        arrived: T.Tensor((size // 64,), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(size // 64, size // 64, threads=128, prelude=d.prelude) as (bx, by):
            a_tile = d.alloc_shared((64, 64), dtype)
            b_tile = d.alloc_shared((64, 64), dtype)
            result = d.alloc_fragment((64, 64), "float32")
            T.clear(result)
            for k in T.Pipelined(size // 64, num_stages=2):
                if k == 0 and (not one_warp or d.thread() < 32):
                    tl.warp_wait(ctx, arrived[by], "epoch", epoch, peer=0, site=1)
                T.copy(a[by * 64, k * 64], a_tile)
                T.copy(b[k * 64, bx * 64], b_tile)
                T.gemm(a_tile, b_tile, result)
            T.copy(result, c[by * 64, bx * 64])

    return waiting_gemm_kernel


def exchange(d: Dialect, size: int = 1000):
    """Each rank sends `size` numbers to a peer, tells it, waits for what the peer sends, and takes it. Two halves alternate."""

    @T.prim_func
    def exchange_kernel(
        ctx: CTX,
        x: T.Tensor((size,), "float32"),
        out: T.Tensor((size,), "float32"),
        to: T.int32,
        epoch: T.int32,
        awaited: T.int32,
        done: T.Tensor((1,), "int32"),
    ):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            me = tl.rank(ctx)
            there = tl.peer(ctx, to, (epoch % 2) * 4 * size, (size,), "float32")
            tl.put_block(there[0], x[0], 4 * size, thread, 128)
            d.sync()
            if thread == 0:
                tl.signal(tl.peer(ctx, to, 0, (tl.MAX_RANKS,), "int32", region="flags")[me], epoch)
            if thread < 32:
                flags = tl.peer(ctx, me, 0, (tl.MAX_RANKS,), "int32", region="flags")
                if tl.warp_wait(ctx, flags[to], "epoch", awaited, peer=to, site=11):
                    done[0] = epoch
            d.sync()
            here = tl.peer(ctx, me, (epoch % 2) * 4 * size, (size,), "float32")
            tl.get_block(out[0], here[0], 4 * size, thread, 128)

    return exchange_kernel
