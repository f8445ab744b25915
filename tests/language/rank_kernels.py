"""Kernels in which ranks, blocks and threads do something to each other, written once for both targets where both can."""

import tilelang.language as T

import tscompile.language as tl
from tscompile.language.dialects import Dialect

from .kernels import COMPARES, CTX, ORDERS, SCOPES, carrier

RANKS = tl.MAX_RANKS
ADD_FORMS = [("atomic_add", order, scope) for order in ORDERS["atomic_add"] for scope in SCOPES]
RED_FORMS = [("red_add", order, scope) for order in ORDERS["red_add"] for scope in SCOPES]

# A flag that waits for `value` holds value + START at first, for which the wait must not end, and is then moved by 1 or -1.
START = {"eq": 1, "ne": 0, "ge": -1, "gt": 0, "le": 1, "lt": 0, "epoch": -1}
MOVES = {"eq": -1, "ne": 1, "ge": 1, "gt": 1, "le": -1, "lt": -1, "epoch": 1}

PRIMITIVES = ("wait", "warp_wait", "barrier", "mbarrier_wait", "gpu_wait", "grid_sync")
"""What `stuck` can wait in; the first three on both targets."""


def threads_of(d: Dialect, count: int = 128) -> int:
    return count if d.name == "cuda" else 1


def _row(scope: str, rank):
    """Whose cell a rank adds to: all ranks to one where the scope allows it."""
    return 0 if scope == "sys" else rank


def _column(scope: str, block):
    return block if scope == "cta" else 0


def adds(d: Dialect, dtype: str, blocks: int):
    """All threads of all ranks add 1 to every cell that the scope lets them share; before[...] takes what atomic_add returned."""
    atomics, reds = list(enumerate(ADD_FORMS)), list(enumerate(RED_FORMS, len(ADD_FORMS)))
    count = len(ADD_FORMS) + len(RED_FORMS)

    @T.prim_func
    def adds_kernel(
        cells: T.Tensor((count, RANKS, blocks), carrier(dtype)),
        before: T.Tensor((len(ADD_FORMS), RANKS, blocks, threads_of(d)), carrier(dtype)),
        rank: T.int32,
    ):
        with T.Kernel(blocks, threads=128, prelude=d.prelude) as block:
            thread = d.thread()
            for i, (_, order, scope) in atomics:
                before[i, rank, block, thread] = tl.atomic_add(
                    cells[i, _row(scope, rank), _column(scope, block)], 1, order, scope, dtype
                )
            for i, (_, order, scope) in reds:
                tl.red_add(cells[i, _row(scope, rank), _column(scope, block)], 1, order, scope, dtype)

    return adds_kernel


def signals(d: Dialect, dtype: str, compares: tuple[str, ...] = COMPARES):
    """Comparisons, late: each flag comes after a word of data. Threads wait for "set", warps for "add".

    Row f of results: whether wait f ended well, and what its data were then. Data and flags: [from, f], in the receiver's memory.
    """
    sets = [(i, compare, START[compare] + MOVES[compare]) for i, compare in enumerate(compares)]
    adds = [(len(sets) + i, compare, MOVES[compare]) for i, compare in enumerate(compares)]
    count, last = 2 * len(sets), threads_of(d, 32) - 1

    @T.prim_func
    def signals_kernel(
        ctx: CTX,
        value: T.int64,
        to: T.int32,
        source: T.int32,
        pauses: T.Tensor((count,), "int32"),
        results: T.Tensor((count, 2), "int32"),
    ):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            thread = d.thread()
            me = tl.rank(ctx)
            there = tl.peer(ctx, to, 0, (RANKS, count), "int32")
            here = tl.peer(ctx, me, 0, (RANKS, count), "int32")
            tell = tl.peer(ctx, to, 0, (RANKS, count), carrier(dtype), region="flags")
            flags = tl.peer(ctx, me, 0, (RANKS, count), carrier(dtype), region="flags")
            for i, compare, sent in sets:
                if thread == 0:
                    for _ in T.serial(pauses[i]):
                        tl.ld(pauses[i], "volatile", dtype="uint32")
                    there[me, i] = pauses[i] + 1000 + i
                    tl.signal(tell[me, i], value + sent, dtype=dtype)
                    results[i, 0] = T.cast(
                        tl.wait(ctx, flags[source, i], compare, value, peer=source, site=i, dtype=dtype), "int32"
                    )
                    results[i, 1] = here[source, i]
            for i, compare, added in adds:
                if thread == 0:
                    for _ in T.serial(pauses[i]):
                        tl.ld(pauses[i], "volatile", dtype="uint32")
                    there[me, i] = pauses[i] + 1000 + i
                    tl.signal(tell[me, i], added, "add", dtype=dtype)
                ok = tl.warp_wait(ctx, flags[source, i], compare, value, peer=source, site=i, dtype=dtype)
                if thread == last:
                    results[i, 0] = T.cast(ok, "int32")
                    results[i, 1] = here[source, i]

    return signals_kernel


def meetings(d: Dialect, blocks: int):
    """All ranks, and all blocks of each if there are several, meet twice a round: each writes to all, and looks after the first
    meeting. out[block]: words that were wrong, meetings that took place."""

    @T.prim_func
    def meetings_kernel(
        ctx: CTX,
        word: T.Tensor((1,), "int64"),
        rounds: T.int32,
        out: T.Tensor((blocks, 2), "int32"),
    ):
        with T.Kernel(blocks, threads=128, prelude=d.prelude) as block:
            thread = d.thread()
            me = tl.rank(ctx)
            here = tl.peer(ctx, me, 0, (RANKS, blocks), "int32")
            wrong = T.alloc_var("int32")
            met = T.alloc_var("int32")
            wrong = 0
            met = 0
            for meeting in T.serial(2 * rounds):
                if meeting % 2 == 0 and thread == 0:
                    for rank in T.serial(tl.num_ranks(ctx)):
                        tl.peer(ctx, rank, 0, (RANKS, blocks), "int32")[me, block] = meeting + 1
                if blocks > 1:
                    d.sync()
                    if thread < 32:
                        tl.grid_sync(ctx, word[0], blocks, block, site=71)
                d.sync()
                if block == 0 and thread < 32:
                    if tl.barrier(ctx, 128, meeting + 1, site=70):
                        met = met + 1
                d.sync()
                if blocks > 1:
                    if thread < 32:
                        tl.grid_sync(ctx, word[0], blocks, block, site=72)
                    d.sync()
                if meeting % 2 == 0 and thread == 0:
                    for rank in T.serial(tl.num_ranks(ctx)):
                        if here[rank, (block + 1) % blocks] != meeting + 1:
                            wrong = wrong + 1
            if thread == 0:
                out[block, 0] = wrong
                out[block, 1] = met

    return meetings_kernel


def meeting_blocks(d: Dialect, size: int):
    """Ranks meet on words of a tensor, twice; between the meetings each reads what all wrote before the first one.

    out: cells that were wrong, and meetings that took place. Epochs are used in pairs."""

    @T.prim_func
    def meeting_blocks_kernel(
        ctx: CTX,
        words: T.Tensor((64,), "int32"),
        cells: T.Tensor((size,), "int32"),
        epoch: T.int32,
        out: T.Tensor((2,), "int32"),
    ):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            thread = d.thread()
            if thread == 0:
                for rank in T.serial(size):
                    tl.st(tl.remote(ctx, cells[tl.rank(ctx)], rank), epoch, "relaxed", dtype="int32")
            d.sync()
            if tl.barrier_blocks(ctx, words[32], epoch):
                if thread == 0:
                    out[1] = out[1] + 1
                    for rank in T.serial(size):
                        if tl.ld(cells[rank], "relaxed") != epoch:
                            out[0] = out[0] + 1
            d.sync()
            if tl.sync_blocks(ctx, words[32], epoch + 1):
                if thread == 0:
                    out[1] = out[1] + 1

    return meeting_blocks_kernel


def who(d: Dialect):
    """Rank, number of ranks, and the address of byte 8 * r + 1 of each region of each rank r."""
    regions = list(enumerate(("data", "flags", "control")))

    @T.prim_func
    def who_kernel(ctx: CTX, out: T.Tensor((4, RANKS), "int64")):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                out[3, 0] = T.cast(tl.rank(ctx), "int64")
                out[3, 1] = T.cast(tl.num_ranks(ctx), "int64")
                for rank in T.serial(tl.num_ranks(ctx)):
                    for i, region in regions:
                        out[i, rank] = T.cast(tl.peer_address(ctx, rank, 8 * rank + 1, region), "int64")

    return who_kernel


def stuck(d: Dialect):
    """Wait in one of PRIMITIVES for what never comes. results[0]: what it returned; results[1]: whether the group was aborted then."""
    cuda = d.name == "cuda"

    @T.prim_func
    def stuck_kernel(
        ctx: CTX, which: T.int32, peer: T.int32, word: T.Tensor((1,), "int64"), results: T.Tensor((2,), "int32")
    ):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            me = tl.rank(ctx)
            narrow = tl.peer(ctx, me, 0, (4,), "int32", region="flags")
            wide = tl.peer(ctx, me, 64, (4,), "int64", region="flags")
            arrived = d.alloc_shared((1,), "uint64")
            ok = T.alloc_var("int32")
            ok = 7
            if which == 0 and thread == 0:
                ok = T.cast(tl.wait(ctx, narrow[1], "eq", 5, peer=peer, site=60), "int32")
            if which == 1 and thread < 32:
                ok = T.cast(tl.warp_wait(ctx, wide[1], "ge", 1 << 40, peer=peer, site=61), "int32")
            if which == 2 and thread < 32:
                ok = T.cast(tl.barrier(ctx, 512, 77, site=62), "int32")
            if cuda:
                if which == 3:
                    if thread == 0:
                        tl.mbarrier_init(arrived[0])
                    d.sync()
                    ok = T.cast(tl.mbarrier_wait(ctx, arrived[0], 0, peer=peer, site=63), "int32")
                if which == 4 and thread == 0:
                    ok = T.cast(tl.gpu_wait(ctx, word[0], 1, site=64), "int32")
                if which == 5 and thread < 32:
                    ok = T.cast(tl.grid_sync(ctx, word[0], 9, 0, site=65), "int32")
            if thread == 0:
                results[0] = ok
                results[1] = T.cast(tl.aborted(ctx), "int32")

    return stuck_kernel
