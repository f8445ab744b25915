"""All-gather by pushing: every rank writes its rows into the result of every rank.

The blocks that write a piece also wait for the same piece of another rank, so when the kernel ends, all has arrived.
"""

import tilelang.language as T
import torch
from common import CTX, Example, Kernel, World, assert_equal

import tscompile.language as tl
from tscompile.language.dialects import Dialect

PIECES = 64


def all_gather(d: Dialect, ranks: int, cols: int):
    """Rows of any number. Block (piece, step) sends a piece to the rank `step` ahead and waits for that of the rank `step` behind.

    In this order a block waits only for blocks of its own number, so it does not matter how many of them run at once.

    Two results alternate with the epoch. Two are enough: who has finished an epoch has heard of all ranks in it, so all of them have
    finished with the one before.
    """
    rows = T.dynamic("rows")

    @T.prim_func
    def all_gather_kernel(
        ctx: CTX,
        shard: T.Tensor((rows, cols), "float32"),
        gathered: T.Tensor((2, ranks, rows, cols), "float32"),
        arrived: T.Tensor((ranks, PIECES), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(PIECES, ranks, threads=256, prelude=d.prelude) as (piece, step):
            thread = d.thread()
            me = tl.rank(ctx)
            to = (me + step) % ranks
            source = (me + ranks - step) % ranks
            first = rows * piece // PIECES
            size = T.cast(rows * (piece + 1) // PIECES - first, "int64") * (4 * cols)
            there = tl.remote(ctx, gathered[epoch % 2, me, first, 0], to)
            tl.put_block(there, shard[first, 0], size, thread, 256)
            d.sync()  # all threads have written before one of them tells
            if thread == 0:
                tl.signal(tl.remote(ctx, arrived[me, piece], to), epoch, dtype="int32")
                tl.wait(ctx, arrived[source, piece], "epoch", epoch, peer=source, site=1)

    return all_gather_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel("all_gather", all_gather(d, 4, 512))]


def run(world: World) -> str:
    rows, cols, group = world.args.rows, world.args.cols, world.group
    kernel = world.compile(all_gather(world.dialect, world.size, cols))
    gathered = group.tensor((2, world.size, rows, cols), torch.float32)
    arrived = group.tensor((world.size, PIECES), torch.int32)
    calls = []
    for epoch in world.rounds():
        shard = world.random(rows, cols)
        kernel(group.context, shard, gathered, arrived, epoch)
        calls.append((shard, world.keep(gathered[epoch % 2]).flatten(0, 1)))
    group.check()
    want = torch.empty(world.size * rows, cols, device=world.device)
    for shard, got in calls:
        world.gather_into(want, shard)
        assert_equal("gathered", got, want)
    numbers = iter(range(world.args.rounds + 1, 1 << 30))
    ours = world.milliseconds(lambda: kernel(group.context, shard, gathered, arrived, next(numbers)))
    theirs = world.milliseconds(lambda: world.gather_into(want, shard))
    group.check()
    return f"{list(want.shape)} as {world.rival} has it; {ours:.2f} ms, {world.rival} {theirs:.2f} ms"


EXAMPLE = Example(run, kernels, {"rows": (256, 1024), "cols": (512, 12288)})

if __name__ == "__main__":
    EXAMPLE.main()
