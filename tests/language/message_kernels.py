"""Message passing: data and then a flag from rank to rank, round after round, in every way that the language has."""

import tilelang.language as T

import tscompile.language as tl
from tscompile.language.dialects import Dialect

from .kernels import CTX
from .rank_kernels import RANKS, threads_of

WORDS = 512  # of a message
PAUSES = 256
WAYS = ("plain", "put", "get", "release", "fence", "fence_gpu", "bulk_put", "bulk_get")
"""How data goes and how it is told. `plain`: stores, st.release, wait. `put`: put_block, a counter, warp_wait, get_block. `get`: stays
where it is written and is read from there. `release`, `fence`, `fence_gpu`: 64-bit flags through st and ld, ordered by themselves or
by fences; the last among blocks of one GPU. `bulk_put`: by TMA, and read by TMA. `bulk_get`: fetched from the peer by TMA."""
BULK = ("bulk_put", "bulk_get")
OUT = 5  # wrong words, then round, index and value of one of them, then waits that ended well


def messages(d: Dialect, way: str, blocks: int = 8):
    """Each block sends to its like on rank `to` and receives from rank `source`. A round ends when what was sent has been read.

    Memory: messages at [kind, from, block] of the data; flags at [told or read, from, block].
    """
    wide, near = way in ("release", "fence", "fence_gpu"), way == "fence_gpu"
    polls = 1 << 22 if d.name == "cuda" else 1 << 30  # some seconds
    flag, shift, scope = ("int64" if wide else "int32"), (1 if near else 0), ("gpu" if near else "sys")
    threads = threads_of(d)
    bulk, pulled = way in BULK, way in ("get", "bulk_get")
    bytes_ = 4 * WORDS

    @T.prim_func
    def messages_kernel(
        ctx: CTX,
        to: T.int32,
        source: T.int32,
        rounds: T.int32,
        pauses: T.Tensor((PAUSES,), "int32"),
        mine: T.Tensor((blocks, WORDS), "int32"),
        out: T.Tensor((blocks, OUT), "int32"),
    ):
        with T.Kernel(blocks, threads=128, prelude=d.prelude) as block:
            thread = d.thread()
            me = tl.rank(ctx)
            there_block = (block + shift) % blocks
            from_block = (block + blocks - shift) % blocks
            there = tl.peer(ctx, to, 0, (RANKS, blocks, WORDS), "int32")
            here = tl.peer(ctx, me, 0, (RANKS, blocks, WORDS), "int32")
            own = tl.peer(ctx, me, bytes_ * RANKS * blocks, (blocks, WORDS), "int32")
            theirs = tl.peer(ctx, source, bytes_ * RANKS * blocks, (blocks, WORDS), "int32")
            tell = tl.peer(ctx, to, 0, (2, RANKS, blocks), flag, region="flags")
            back = tl.peer(ctx, source, 0, (2, RANKS, blocks), flag, region="flags")
            flags = tl.peer(ctx, me, 0, (2, RANKS, blocks), flag, region="flags")
            tile = d.alloc_shared((WORDS,), "int32")
            got = d.alloc_shared((WORDS,), "int32")
            arrived = d.alloc_shared((1,), "uint64")
            wrong = T.alloc_var("int32")
            good = T.alloc_var("int32")
            seen = T.alloc_var("int64")
            tries = T.alloc_var("int32")
            limit = T.alloc_var("int32")
            word = T.alloc_var("int32")
            limit = polls
            wrong = 0
            good = 0
            if bulk:
                if thread == 0:
                    tl.mbarrier_init(arrived[0])
                d.sync()
            for step in T.serial(rounds):
                number = step + 1
                # The message, and a pause of some hundred nanoseconds to some microseconds before it is told.
                for part in T.serial(WORDS // threads):
                    i = part * threads + thread
                    if way == "bulk_put":
                        tile[i] = (number * RANKS + me) * WORDS + i
                    elif way == "put":
                        mine[block, i] = (number * RANKS + me) * WORDS + i
                    elif pulled:
                        own[block, i] = (number * RANKS + me) * WORDS + i
                    else:
                        there[me, there_block, i] = (number * RANKS + me) * WORDS + i
                d.sync()
                if way == "put":
                    tl.put_block(there[me, block, 0], mine[block, 0], bytes_, thread, threads)
                    d.sync()
                if thread == 0:
                    for _ in T.serial(pauses[step % PAUSES]):
                        tl.ld(pauses[0], "volatile", dtype="uint32")
                    if way == "bulk_put":
                        tl.bulk_put(there[me, block, 0], tile[0], bytes_)
                        tl.bulk_wait()
                    if way == "put":
                        tl.signal(tell[0, me, block], 1, "add")
                    elif way == "release":
                        tl.st(tell[0, me, block], number, "release", "sys")
                    elif wide:
                        tl.fence(scope)
                        tl.st(tell[0, me, there_block], number, "relaxed", scope)
                    else:
                        tl.signal(tell[0, me, block], number)
                # Wait for the message of the others, and read it.
                if wide:
                    if thread == 0:
                        seen = 0
                        tries = 0
                        while seen < number and tries < limit:
                            if way == "release":
                                seen = tl.ld(flags[0, source, block], "acquire", "sys")
                            else:
                                seen = tl.ld(flags[0, source, block], "relaxed", scope)
                            tries = tries + 1
                        if way != "release":
                            tl.fence(scope)
                        if seen >= number:
                            good = good + 1
                        else:
                            limit = 0  # the rounds to come end at once
                elif way == "plain" or way == "get":
                    if thread == 0:
                        if tl.wait(ctx, flags[0, source, block], "epoch", number, peer=source, site=1):
                            good = good + 1
                else:
                    if thread < 32:
                        if tl.warp_wait(ctx, flags[0, source, block], "epoch", number, peer=source, site=2):
                            good = good + 1
                d.sync()
                if bulk:
                    if thread == 0:
                        if pulled:
                            tl.bulk_get(got[0], theirs[block, 0], bytes_, arrived[0])
                        else:
                            tl.bulk_get(got[0], here[source, block, 0], bytes_, arrived[0])
                    tl.mbarrier_wait(ctx, arrived[0], T.cast(step % 2, "uint32"), peer=source, site=3)
                if way == "put":
                    tl.get_block(mine[block, 0], here[source, block, 0], bytes_, thread, threads)
                    d.sync()
                for part in T.serial(WORDS // threads):
                    i = part * threads + thread
                    if bulk:
                        word = got[i]
                    elif way == "put":
                        word = mine[block, i]
                    elif way == "get":
                        word = theirs[block, i]
                    else:
                        word = here[source, block, i]
                    if word != (number * RANKS + source) * WORDS + i:
                        wrong = wrong + 1
                        out[block, 1] = number
                        out[block, 2] = i
                        out[block, 3] = word
                d.sync()
                # Say that it has been read, and wait for the same.
                if thread == 0:
                    if near:
                        tl.st(back[1, me, from_block], number, "release", "gpu")
                        seen = 0
                        tries = 0
                        while seen < number and tries < limit:
                            seen = tl.ld(flags[1, to, block], "acquire", "gpu")
                            tries = tries + 1
                        if seen >= number:
                            good = good + 1
                        else:
                            limit = 0  # the rounds to come end at once
                    else:
                        tl.signal(back[1, me, block], number)
                        if tl.wait(ctx, flags[1, to, block], "epoch", number, peer=to, site=4):
                            good = good + 1
                d.sync()
            tl.red_add(out[block, 0], wrong)
            if thread == 0:
                out[block, 4] = good

    return messages_kernel
