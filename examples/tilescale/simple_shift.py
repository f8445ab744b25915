"""Every rank sends its tensor to the next one of a ring, tile by tile through shared memory.

A tile goes from shared memory to the peer by one TMA bulk copy, and the peer is told when it has arrived there.
"""

import tilelang.language as T
import torch
from common import CTX, Example, Kernel, World, assert_equal

import tscompile.language as tl
from tscompile.language.dialects import Dialect

TILE = 4096  # numbers, 16 KiB
# TileLang would put a block barrier around every call that takes shared memory; here one thread makes them.
CONFIGS = {"tl.disable_thread_storage_sync": True}
LOADED = 9  # a named barrier; TileLang takes those below 8


def shift(d: Dialect, count: int):
    """One block per tile. It sends once the next rank has said that its inbox may be overwritten."""
    tiles = count // TILE

    @T.prim_func
    def shift_kernel(
        ctx: CTX,
        x: T.Tensor((count,), "float32"),
        inbox: T.Tensor((count,), "float32"),
        free: T.Tensor((tiles,), "int32"),
        arrived: T.Tensor((tiles,), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(tiles, threads=128, prelude=d.prelude) as block:
            thread = d.thread()
            ranks = tl.num_ranks(ctx)
            to = (tl.rank(ctx) + 1) % ranks
            source = (tl.rank(ctx) + ranks - 1) % ranks
            tile = d.alloc_shared((TILE,), "float32")
            if thread == 0:
                tl.signal(tl.remote(ctx, free[block], source), epoch, dtype="int32")
            T.copy(x[block * TILE], tile)
            tl.block_sync(LOADED, 128)
            if thread == 0:
                tl.wait(ctx, free[block], "epoch", epoch, peer=to, site=1)
                tl.bulk_put(tl.remote(ctx, inbox[block * TILE], to), tile[0], 4 * TILE)
                tl.bulk_wait()  # written at the peer: bulk_wait_read() would be too early to tell it
                tl.signal(tl.remote(ctx, arrived[block], to), epoch, dtype="int32")
                tl.wait(ctx, arrived[block], "epoch", epoch, peer=source, site=2)

    return shift_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel("shift", shift(d, 16 * TILE), CONFIGS)]


def run(world: World) -> str:
    count, group = world.args.count, world.group
    if count % TILE:
        raise ValueError(f"--count {count} must be a multiple of {TILE}")
    kernel = world.compile(shift(world.dialect, count), CONFIGS)
    inbox = group.tensor((count,), torch.float32)
    free, arrived = (group.tensor((count // TILE,), torch.int32) for _ in range(2))
    calls = []
    for epoch in world.rounds():
        mine = world.random(count)
        kernel(group.context, mine, inbox, free, arrived, epoch)
        calls.append((mine, world.keep(inbox)))
    group.check()
    for mine, got in calls:
        assert_equal("the inbox", got, world.gather(mine)[world.rank - 1])
    return f"{count} numbers are those of the previous rank"


EXAMPLE = Example(run, kernels, {"count": (16 * TILE, 4096 * TILE)})

if __name__ == "__main__":
    EXAMPLE.main()
