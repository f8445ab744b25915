"""Kernels that make every call of `tl.nvshmem`, written once for GPUs and CPU ranks."""

import tilelang.language as T

import tscompile.language as tl
from tscompile.language.dialects import Dialect
from tscompile.language.nvshmem import Amo, CmpType, Team

from .kernels import CTX

BYTES, WORDS, SLOTS = 1 << 16, 1 << 10, 16
SCOPES = ("", "_warp", "_block")
MOVES = ("putmem", "putmem_nbi", "getmem", "getmem_nbi", "putmem_signal", "putmem_signal_nbi")
COLLECTIVES = ("broadcast", "fcollect", "barrier", "barrier_all", "sync", "sync_all")
GROUP_TEAMS = (Team.WORLD, Team.SHARED, Team.NODE)
ALONE = {"": 1, "_warp": 32, "_block": 128}
"""Threads that make a call of each scope."""


def named(name: str, scope: str):
    return getattr(tl.nvshmem, f"{name}{scope}")


def moves(d: Dialect, scope: str):
    """One copy of `size` bytes by the call number `which` of MOVES: from src[start] to dst[at], here and at `pe`. Signals: [0] is set
    to `value`, [1] is added to."""
    put, put_nbi, get, get_nbi, put_signal, put_signal_nbi = [named(name, scope) for name in MOVES]
    callers = ALONE[scope]

    @T.prim_func
    def moves_kernel(
        ctx: CTX,
        dst: T.Tensor((BYTES,), "uint8"),
        src: T.Tensor((BYTES,), "uint8"),
        signals: T.Tensor((SLOTS,), "int64"),
        which: T.int32,
        at: T.int32,
        start: T.int32,
        size: T.int64,
        value: T.int64,
        pe: T.int32,
    ):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            if thread < callers:
                if which == 0:
                    put(ctx, dst[at], src[start], size, pe)
                if which == 1:
                    put_nbi(ctx, dst[at], src[start], size, pe)
                    tl.nvshmem.quiet(ctx)
                if which == 2:
                    get(ctx, dst[at], src[start], size, pe)
                if which == 3:
                    get_nbi(ctx, dst[at], src[start], size, pe)
                    tl.nvshmem.quiet(ctx)
                if which == 4:
                    put_signal(ctx, dst[at], src[start], size, signals[0], value, Amo.SIGNAL_SET, pe)
                if which == 5:
                    put_signal_nbi(ctx, dst[at], src[start], size, signals[1], value, Amo.SIGNAL_ADD, pe)
                    tl.nvshmem.quiet(ctx)

    return moves_kernel


COMPARISONS = tuple(CmpType)
WAITED = {CmpType.EQ: 7, CmpType.NE: 0, CmpType.GT: 6, CmpType.LE: 7, CmpType.LT: 8, CmpType.GE: 7}
"""What each comparison is made with; it holds for 7, and for what the signal is before only where BEFORE says so."""


def signals(d: Dialect):
    """PE and number of PEs; an int32 and then signals to `pe`; waits for those of `source` with every comparison.

    Signals: [i] is set to 7 for comparison i (8 before, where it must sink), [6] is added to. out: PE, number of PEs, then for each
    wait whether it ended well, and what int_p left by then.
    """
    compares = [(i, cmp, WAITED[cmp]) for i, cmp in enumerate(COMPARISONS)]

    @T.prim_func
    def signals_kernel(
        ctx: CTX,
        word: T.Tensor((SLOTS,), "int32"),
        signals: T.Tensor((SLOTS,), "int64"),
        to: T.int32,
        source: T.int32,
        value: T.int32,
        pauses: T.int32,
        out: T.Tensor((2 * SLOTS,), "int32"),
    ):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                out[0] = tl.nvshmem.get_pe(ctx)
                out[1] = tl.nvshmem.get_pe_num(ctx)
                for i, cmp, expected in compares:
                    for _ in T.serial(pauses):
                        tl.ld(word[SLOTS - 1], "volatile", dtype="uint32")
                    tl.nvshmem.int_p(ctx, word[i], value + i, to)
                    tl.nvshmem.fence(ctx)
                    tl.nvshmem.signal_op(ctx, signals[i], 7, Amo.SIGNAL_SET, to)
                    out[2 + 2 * i] = T.cast(
                        tl.nvshmem.signal_wait_until(ctx, signals[i], cmp, expected, peer=source, site=i), "int32"
                    )
                    out[3 + 2 * i] = tl.ld(word[i], "relaxed")
                tl.nvshmem.signal_op(ctx, signals[6], 3, Amo.SIGNAL_ADD, to)
                tl.nvshmem.signal_op(ctx, signals[6], -1, Amo.SIGNAL_ADD, to)
                out[14] = T.cast(tl.nvshmem.signal_wait_until(ctx, signals[6], CmpType.EQ, 2), "int32")
                tl.nvshmem.quiet(ctx)

    return signals_kernel


def collectives(d: Dialect, scope: str):
    """`rounds` rounds of everything that all ranks do together, each checked between meetings.

    bad[0]: words that were not what they must be; bad[1]: calls that returned false; bad[2]: calls.
    """
    broadcast, fcollect, barrier, barrier_all, sync, sync_all = [named(name, scope) for name in COLLECTIVES]
    callers = ALONE[scope] if d.name == "cuda" else 1
    block, ranks, whole = scope == "_block", tl.MAX_RANKS, tl.MAX_RANKS * WORDS

    @T.prim_func
    def collectives_kernel(
        ctx: CTX,
        src: T.Tensor((WORDS,), "int32"),
        dst: T.Tensor((WORDS,), "int32"),
        gathered: T.Tensor((whole,), "int32"),
        inbox: T.Tensor((ranks,), "int32"),
        rounds: T.int32,
        count: T.int32,
        bad: T.Tensor((3, 128), "int32"),
    ):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            if thread < callers:
                me = tl.nvshmem.get_pe(ctx)
                size = tl.nvshmem.get_pe_num(ctx)
                wrong = T.alloc_var("int32")
                lost = T.alloc_var("int32")
                made = T.alloc_var("int32")
                wrong = 0
                lost = 0
                made = 0
                for turn in T.serial(rounds):
                    root = turn % size
                    for i in T.serial((count + callers - 1) // callers):
                        if i * callers + thread < count:
                            tl.st(
                                src[i * callers + thread], turn * 1000 + me * 100000 + i * callers + thread, "relaxed"
                            )
                    for team in GROUP_TEAMS:
                        made = made + 2
                        if not sync(ctx, team, site=1):
                            lost = lost + 1
                        if not barrier(ctx, team, site=2):
                            lost = lost + 1
                    if not broadcast(ctx, Team.WORLD, dst[0], src[0], count, root, site=3):
                        lost = lost + 1
                    for i in T.serial(count):
                        if tl.ld(dst[i], "relaxed") != turn * 1000 + root * 100000 + i:
                            wrong = wrong + 1
                    if not fcollect(ctx, Team.NODE, gathered[0], src[0], count, site=4):
                        lost = lost + 1
                    for i in T.serial(count * size):
                        if tl.ld(gathered[i], "relaxed") != turn * 1000 + i // count * 100000 + i % count:
                            wrong = wrong + 1
                    if block:
                        if not sync_all(ctx, site=5):
                            lost = lost + 1
                        if not tl.nvshmem.broadcastmem_block(
                            ctx, Team.SHARED, dst[0], src[0], count * 4, (root + 1) % size, site=6
                        ):
                            lost = lost + 1
                        for i in T.serial(count):
                            if tl.ld(dst[i], "relaxed") != turn * 1000 + (root + 1) % size * 100000 + i:
                                wrong = wrong + 1
                    if not sync_all(ctx, site=7):
                        lost = lost + 1
                    if thread == callers - 1:
                        for pe in T.serial(size):
                            tl.nvshmem.int_p(ctx, inbox[me], turn + 1, pe)
                    if not barrier_all(ctx, site=8):
                        lost = lost + 1
                    for pe in T.serial(size):
                        if tl.ld(inbox[pe], "relaxed") != turn + 1:
                            wrong = wrong + 1
                    made = made + (6 if block else 4)
                bad[0, thread] = wrong
                bad[1, thread] = lost
                bad[2, thread] = made

    return collectives_kernel


def refused(d: Dialect):
    """A put to a PE that may not be there."""

    @T.prim_func
    def refused_kernel(ctx: CTX, dst: T.Tensor((SLOTS,), "int32"), src: T.Tensor((SLOTS,), "int32"), pe: T.int32):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            tl.nvshmem.putmem_block(ctx, dst[0], src[0], 64, pe)

    return refused_kernel


def gemm_and_put(d: Dialect):
    """A warp-specialised matmul whose first warp tells a peer at the end."""

    @T.prim_func
    def gemm_and_put_kernel(
        ctx: CTX,
        a: T.Tensor((256, 256), "bfloat16"),
        b: T.Tensor((256, 256), "bfloat16"),
        c: T.Tensor((256, 256), "bfloat16"),
        arrived: T.Tensor((1,), "int64"),
        pe: T.int32,
    ):
        with T.Kernel(2, 2, threads=128, prelude=d.prelude) as (i, j):
            thread = d.thread()
            left = T.alloc_shared((128, 64), "bfloat16")
            right = T.alloc_shared((64, 128), "bfloat16")
            acc = T.alloc_fragment((128, 128), "float32")
            T.clear(acc)
            for step in T.Pipelined(4, num_stages=3):
                T.copy(a[i * 128, step * 64], left)
                T.copy(b[step * 64, j * 128], right)
                T.gemm(left, right, acc)
            T.copy(acc, c[i * 128, j * 128])
            if thread < 32:
                tl.nvshmem.putmem_signal_warp(ctx, c[0, 0], c[0, 0], 512, arrived[0], 1, Amo.SIGNAL_ADD, pe)

    return gemm_and_put_kernel


def joint_gemm(d: Dialect):
    """The same in small, with a call that all threads of a block make."""

    @T.prim_func
    def joint_gemm_kernel(
        ctx: CTX,
        a: T.Tensor((128, 256), "bfloat16"),
        b: T.Tensor((256, 128), "bfloat16"),
        c: T.Tensor((128, 128), "bfloat16"),
    ):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            left = T.alloc_shared((128, 64), "bfloat16")
            right = T.alloc_shared((64, 128), "bfloat16")
            acc = T.alloc_fragment((128, 128), "float32")
            T.clear(acc)
            for step in T.Pipelined(4, num_stages=3):
                T.copy(a[0, step * 64], left)
                T.copy(b[step * 64, 0], right)
                T.gemm(left, right, acc)
            T.copy(acc, c)
            tl.nvshmem.barrier_all_block(ctx)

    return joint_gemm_kernel
