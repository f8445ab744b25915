"""Kernels that move rows.

    dispatch   a warp stores a token's row at its final place in the memory of a rank that has one of its experts
    combine    a warp loads a token's rows from all those ranks, adds them in float32 in the order of ranks, and stores the sum

All ranks launch them in the same order, each call with the same, growing epoch. A kernel begins when all ranks are there (`all_ready`):
what a rank did before with the memory that is about to be overwritten, or read, is then over. It ends when all ranks are done with
this rank's memory (`all_done`). A block waits only for block 0 and for the block of its own number of other ranks, so it does not
matter how many of them run at once.
"""

import tilelang.language as T
from common import CTX

import tscompile.language as tl
from tscompile.language.dialects import Dialect

from . import halves
from .sizes import CHUNK, Sizes

ARRIVING, ARRIVED, READABLE, READ = 2, 3, 4, 5  # sites of waits, for messages
WARPS = 16  # of a block
LOADS = 8  # of 16 bytes that a lane of combine has in flight: what is asked for now arrives some microseconds later


@T.macro
def all_ready(d, s, ctx, ready, epoch, site, block, thread):
    """Wait until every rank has begun this epoch."""
    if thread == 0:
        if block == 0:
            for to in T.serial(s.ranks):
                tl.signal(tl.remote(ctx, ready[tl.rank(ctx)], to), epoch, dtype="int32")
        for source in T.serial(s.ranks):
            tl.wait(ctx, ready[source], "epoch", epoch, peer=source, site=site)
    d.sync()


@T.macro
def all_done(d, s, ctx, done, epoch, site, block, thread):
    """Tell every rank that this block is done, and wait until the block of this number is on every rank."""
    d.sync()
    if thread == 0:
        for to in T.serial(s.ranks):
            tl.signal(tl.remote(ctx, done[tl.rank(ctx), block], to), epoch, dtype="int32")
        for source in T.serial(s.ranks):
            tl.wait(ctx, done[source, block], "epoch", epoch, peer=source, site=site)


def dispatch(d: Dialect, s: Sizes):
    """A warp moves a row to one rank at a time, 64 bytes per lane in flight. Successive tokens begin with different ranks, so that all
    links are busy all the time.

    `whole`: 1 if the receivers get, beside x, the token's number at its rank and its experts and weights here, -1 and 0 for experts of
    other ranks; 0 if they have all that from an earlier call.
    """
    warps, lanes = (WARPS, 32) if d.name == "cuda" else (1, 1)
    words = s.row_bytes // 4
    tokens = T.dynamic("tokens")

    @T.prim_func
    def dispatch_kernel(
        ctx: CTX,
        x: T.Tensor((tokens, words), "int32"),
        topk_idx: T.Tensor((tokens, s.topk), "int64"),
        topk_weights: T.Tensor((tokens, s.topk), "float32"),
        position: T.Tensor((tokens, s.ranks), "int32"),
        first: T.Tensor((T.ceildiv(tokens, CHUNK), s.ranks), "int32"),
        go: T.Tensor((1,), "int32"),
        recv_x: T.Tensor((s.rows, words), "int32"),
        recv_topk_idx: T.Tensor((s.rows, s.topk), "int64"),
        recv_topk_weights: T.Tensor((s.rows, s.topk), "float32"),
        recv_src_idx: T.Tensor((s.rows,), "int32"),
        ready: T.Tensor((s.ranks,), "int32"),
        done: T.Tensor((s.ranks, s.blocks), "int32"),
        whole: T.int32,
        epoch: T.int32,
    ):
        with T.Kernel(s.blocks, threads=32 * warps, prelude=d.prelude) as block:
            thread = d.thread()
            unit = T.alloc_var("int32")  # variables, not expressions: TileLang would work long on what indices may be
            t = T.alloc_var("int32")
            to = T.alloc_var("int32")
            row = T.alloc_var("int32")
            units = T.alloc_var("int32")
            expert = T.alloc_var("int64")
            weight = T.alloc_var("float32")
            all_ready(d, s, ctx, ready, epoch, ARRIVING, block, thread)
            units = tokens * s.ranks
            if go[0] == 0 or tl.aborted(ctx):
                units = 0
            for i in T.serial(T.ceildiv(units, warps * s.blocks)):
                unit = (i * warps + thread // 32) * s.blocks + block
                t = unit // s.ranks
                to = (tl.rank(ctx) + 1 + unit + t + t // 16) % s.ranks
                row = -1
                if unit < units and position[t, to] >= 0:
                    row = first[t // CHUNK, to] + position[t, to]
                if row >= 0:
                    tl.put_warp(tl.remote(ctx, recv_x[row, 0], to), x[t, 0], s.row_bytes)
                    if whole != 0:
                        for k in T.serial(T.ceildiv(s.topk, lanes)):
                            j = k * lanes + thread % 32
                            if j < s.topk:
                                expert = topk_idx[t, j] - T.cast(to * s.local_experts, "int64")
                                weight = topk_weights[t, j]
                                if expert < 0 or expert >= s.local_experts:
                                    expert = -1
                                    weight = 0
                                tl.st(tl.remote(ctx, recv_topk_idx[row, j], to), expert, "relaxed", dtype="int64")
                                tl.st(tl.remote(ctx, recv_topk_weights[row, j], to), weight, "relaxed", dtype="float32")
                        if thread % 32 == 0:
                            tl.st(tl.remote(ctx, recv_src_idx[row], to), t, "relaxed", dtype="int32")
            all_done(d, s, ctx, done, epoch, ARRIVED, block, thread)

    return dispatch_kernel


def combine(d: Dialect, s: Sizes):
    """A warp adds up a token at a time, some 128 bytes per lane in flight, whatever the number of ranks.

    `y`, `weights`: what this rank made of the rows that it received. `out`, `out_weights`: their sums over ranks, per token; the second
    only if `weighted` is 1.
    """
    warps, lanes = (WARPS, 32) if d.name == "cuda" else (1, 1)
    carrier = halves.carrier(d, s.dtype)
    wide = 16 * s.hidden // s.row_bytes  # elements in 16 bytes
    chunks = s.hidden // wide
    depth = max(1, LOADS // s.ranks) if d.name == "cuda" else 1  # chunks at once
    each = T.unroll if d.name == "cuda" else T.serial
    tokens = T.dynamic("tokens")

    @T.prim_func
    def combine_kernel(
        ctx: CTX,
        y: T.Tensor((s.rows, s.hidden), carrier),
        weights: T.Tensor((s.rows, s.topk), "float32"),
        position: T.Tensor((tokens, s.ranks), "int32"),
        first: T.Tensor((T.ceildiv(tokens, CHUNK), s.ranks), "int32"),
        out: T.Tensor((tokens, s.hidden), carrier),
        out_weights: T.Tensor((tokens, s.topk), "float32"),
        ready: T.Tensor((s.ranks,), "int32"),
        done: T.Tensor((s.ranks, s.blocks), "int32"),
        weighted: T.int32,
        epoch: T.int32,
    ):
        with T.Kernel(s.blocks, threads=32 * warps, prelude=d.prelude) as block:
            thread = d.thread()
            row = T.alloc_local((s.ranks,), "int32")
            there = T.alloc_local((s.ranks,), "int64")  # where the rows are, 0 for none
            parts = T.alloc_local((depth, s.ranks, wide), carrier)
            total = T.alloc_local((wide,), "float32")
            sums = T.alloc_local((wide,), carrier)
            weight = T.alloc_var("float32")
            t = T.alloc_var("int32")
            left = T.alloc_var("int32")
            all_ready(d, s, ctx, ready, epoch, READABLE, block, thread)
            left = tokens
            if tl.aborted(ctx):
                left = 0
            for i in T.serial(T.ceildiv(left, warps * s.blocks)):
                t = (i * warps + thread // 32) * s.blocks + block
                if t < left:
                    for r in each(s.ranks):
                        row[r] = position[t, r]
                        there[r] = 0
                        if row[r] >= 0:
                            row[r] = row[r] + first[t // CHUNK, r]
                            there[r] = T.cast(tl.remote(ctx, y[row[r], 0], r), "int64")
                    for k in T.serial(T.ceildiv(chunks, lanes * depth)):
                        for q in each(depth):  # all loads before the first sum: they take long
                            chunk = (k * depth + q) * lanes + thread % 32
                            if chunk < chunks:
                                for r in each(s.ranks):
                                    if there[r] != 0:
                                        from_there = tl.pointer(there[r] + chunk * 16)
                                        tl.ld128(parts[q, r, 0], from_there, "relaxed", no_allocate=True)
                        for q in each(depth):
                            chunk = (k * depth + q) * lanes + thread % 32
                            if chunk < chunks:
                                for e in each(wide):
                                    total[e] = 0
                                for r in each(s.ranks):
                                    if there[r] != 0:
                                        for e in each(wide):
                                            total[e] = total[e] + halves.widen(d, s.dtype, parts[q, r, e])
                                for e in each(wide):
                                    sums[e] = halves.narrow(d, s.dtype, total[e])
                                tl.st128(out[t, chunk * wide], sums[0])
                    if weighted != 0:
                        for k in T.serial(T.ceildiv(s.topk, lanes)):
                            j = k * lanes + thread % 32
                            if j < s.topk:
                                weight = 0
                                for r in each(s.ranks):
                                    if there[r] != 0:
                                        weight += tl.ld(
                                            tl.remote(ctx, weights[row[r], j], r), "relaxed", dtype="float32"
                                        )
                                out_weights[t, j] = weight
            all_done(d, s, ctx, done, epoch, READ, block, thread)

    return combine_kernel
