"""Kernels that find out where rows go, before any of them travels.

layout     which ranks each token goes to, and which of this rank's rows there it is; entries per expert
notify     ranks tell each other how much they send; each finds where its rows begin in the memory of every other rank
"""

import tilelang.language as T
from common import CTX

import tscompile.language as tl
from tscompile.language.dialects import Dialect

from .sizes import CHUNK, Sizes

TOLD = 1  # the site of a wait, for messages


def layout(d: Dialect, s: Sizes):
    """A block per chunk of tokens. `position[t, r]`: which of the chunk's rows for rank r token t is, -1 if it does not go there.
    `counts[c, r]`: how many chunk c has. `numbers`: zeros before, see `Sizes.numbers`; rows per rank are left to notify.

    A token's ranks are a word with a byte for each, 1 or 0, so the sum of the words before it holds its rows for all ranks at once.
    """
    threads = CHUNK if d.name == "cuda" else 1
    share, steps = CHUNK // threads, [1 << i for i in range(threads.bit_length() - 1)]
    last, after = len(steps) % 2, s.ranks + s.experts
    tokens = T.dynamic("tokens")

    @T.prim_func
    def layout_kernel(
        topk_idx: T.Tensor((tokens, s.topk), "int64"),
        position: T.Tensor((tokens, s.ranks), "int32"),
        counts: T.Tensor((T.ceildiv(tokens, CHUNK), s.ranks), "int32"),
        numbers: T.Tensor((s.numbers,), "int32"),
    ):
        with T.Kernel(T.ceildiv(tokens, CHUNK), threads=threads, prelude=d.prelude) as chunk:
            thread = d.thread()
            sums = d.alloc_shared((2, threads), "int64")
            goes = T.alloc_local((share,), "int64")
            before = T.alloc_var("int64")
            expert = T.alloc_var("int64")
            before = 0
            for i in T.serial(share):
                goes[i] = 0
                for j in T.serial(s.topk):
                    expert = -1
                    if chunk * CHUNK + thread * share + i < tokens:
                        expert = topk_idx[chunk * CHUNK + thread * share + i, j]
                    if expert >= 0 and expert < s.experts:
                        goes[i] = T.bitwise_or(goes[i], T.int64(1) << (expert // s.local_experts * 8))
                        tl.red_add(numbers[s.ranks + T.cast(expert, "int32")], 1, "relaxed", "gpu")
                    elif expert != -1:
                        tl.red_add(numbers[after], 1, "relaxed", "gpu")
                before += goes[i]
            sums[0, thread] = before
            d.sync()
            for i, step in enumerate(steps):
                if thread >= step:
                    sums[(i + 1) % 2, thread] = sums[i % 2, thread] + sums[i % 2, thread - step]
                else:
                    sums[(i + 1) % 2, thread] = sums[i % 2, thread]
                d.sync()
            if thread == threads - 1:
                for r in T.serial(s.ranks):
                    counts[chunk, r] = T.cast(T.bitwise_and(sums[last, thread] >> (8 * r), 255), "int32")
            before = sums[last, thread] - before
            for i in T.serial(share):
                if chunk * CHUNK + thread * share + i < tokens:
                    for r in T.serial(s.ranks):
                        position[chunk * CHUNK + thread * share + i, r] = -1
                        if T.bitwise_and(goes[i] >> (8 * r), 1) != 0:
                            position[chunk * CHUNK + thread * share + i, r] = T.cast(
                                T.bitwise_and(before >> (8 * r), 255), "int32"
                            )
                before += goes[i]

    return layout_kernel


def notify(d: Dialect, s: Sizes):
    """One block. `told[source]`: the numbers of each rank. `first[c, r]`: where the rows of chunk c begin in the memory of rank r.
    `go`: 1 if rows are to be sent, 0 if not, on all ranks alike, since all have the same numbers. `summary`: see `Sizes.summary`.
    """
    threads = 256 if d.name == "cuda" else 1
    chunks = T.dynamic("chunks")
    after = s.ranks + s.experts

    @T.prim_func
    def notify_kernel(
        ctx: CTX,
        counts: T.Tensor((chunks, s.ranks), "int32"),
        numbers: T.Tensor((s.numbers,), "int32"),
        told: T.Tensor((s.ranks, s.numbers), "int32"),
        ready: T.Tensor((s.ranks,), "int32"),
        first: T.Tensor((chunks, s.ranks), "int32"),
        go: T.Tensor((1,), "int32"),
        summary: T.Tensor((s.summary,), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(1, threads=threads, prelude=d.prelude) as _:
            thread = d.thread()
            me = tl.rank(ctx)
            total = T.alloc_var("int32")
            begin = T.alloc_var("int32")
            send = T.alloc_var("int32")
            for i in T.serial(T.ceildiv(s.ranks, threads)):
                r = i * threads + thread
                if r < s.ranks:
                    total = 0
                    for c in T.serial(chunks):
                        total += counts[c, r]
                    numbers[r] = total
            d.sync()
            for to in T.serial(s.ranks):
                tl.put_block(tl.remote(ctx, told[me, 0], to), numbers[0], 4 * s.numbers, thread, threads)
            d.sync()  # all threads have written before one of them tells
            if thread == 0:
                for to in T.serial(s.ranks):
                    tl.signal(tl.remote(ctx, ready[me], to), epoch, dtype="int32")
                for source in T.serial(s.ranks):
                    tl.wait(ctx, ready[source], "epoch", epoch, peer=source, site=TOLD)
            d.sync()
            for i in T.serial(T.ceildiv(s.ranks, threads)):
                r = i * threads + thread
                if r < s.ranks:
                    total = 0
                    begin = 0
                    for source in T.serial(s.ranks):
                        total += told[source, r]
                        if source < me:
                            begin += told[source, r]
                    summary[1 + r] = total
                    summary[1 + s.ranks + r] = told[r, after]
                    for c in T.serial(chunks):
                        first[c, r] = begin
                        begin += counts[c, r]
            for i in T.serial(T.ceildiv(s.local_experts, threads)):
                e = i * threads + thread
                if e < s.local_experts:
                    total = 0
                    for source in T.serial(s.ranks):
                        total += told[source, s.ranks + me * s.local_experts + e]
                    summary[1 + 2 * s.ranks + e] = total
            d.sync()
            if thread == 0:
                send = 1
                if tl.aborted(ctx):
                    send = 0
                summary[0] = send
                for r in T.serial(s.ranks):
                    if summary[1 + r] > s.rows or summary[1 + s.ranks + r] != 0:
                        send = 0
                go[0] = send

    return notify_kernel
