"""All-to-all as experts need it: every rank sends every other one some of its rows, how many is known to the sender alone.

The rows of each sender arrive in a place of their own, with their number. The counts travel with the data, under the same signal.
"""

import tilelang.language as T
import torch
import torch.distributed as dist
from common import CTX, Example, Kernel, World, assert_equal

import tscompile.language as tl
from tscompile.language.dialects import Dialect

PIECES = 64


def all_to_all(d: Dialect, ranks: int, cols: int):
    """Block (piece, step) sends its part of the rows for the rank `step` ahead and waits for its part from the rank `step` behind.

    `rows`: of the tokens of a rank. `room`: for the rows of one sender. Two inboxes alternate, as in allgather.py.
    """
    rows, room = T.dynamic("rows"), T.dynamic("room")

    @T.prim_func
    def all_to_all_kernel(
        ctx: CTX,
        tokens: T.Tensor((rows, cols), "float32"),
        starts: T.Tensor((ranks + 1,), "int32"),
        inbox: T.Tensor((2, ranks, room, cols), "float32"),
        counts: T.Tensor((2, ranks), "int32"),
        arrived: T.Tensor((ranks, PIECES), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(PIECES, ranks, threads=256, prelude=d.prelude) as (piece, step):
            thread = d.thread()
            me = tl.rank(ctx)
            to = (me + step) % ranks
            source = (me + ranks - step) % ranks
            count = starts[to + 1] - starts[to]
            first = count * piece // PIECES
            size = T.cast(count * (piece + 1) // PIECES - first, "int64") * (4 * cols)
            there = tl.remote(ctx, inbox[epoch % 2, me, first, 0], to)
            tl.put_block(there, tokens[starts[to] + first, 0], size, thread, 256)
            d.sync()
            if thread == 0:
                tl.st(tl.remote(ctx, counts[epoch % 2, me], to), count, "relaxed", dtype="int32")
                tl.signal(tl.remote(ctx, arrived[me, piece], to), epoch, dtype="int32")
                tl.wait(ctx, arrived[source, piece], "epoch", epoch, peer=source, site=1)

    return all_to_all_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel("all_to_all", all_to_all(d, 4, 512))]


def run(world: World) -> str:
    rows, cols, size, group = world.args.rows, world.args.cols, world.size, world.group
    kernel = world.compile(all_to_all(world.dialect, size, cols))
    inbox = group.tensor((2, size, rows, cols), torch.float32)
    counts = group.tensor((2, size), torch.int32)
    arrived = group.tensor((size, PIECES), torch.int32)
    calls, moved = [], 0
    for epoch in world.rounds():
        tokens = world.random(rows, cols)
        cuts = sorted(world.dice.randint(0, rows) for _ in range(size - 1))  # some ranks may get nothing
        starts = torch.tensor([0, *cuts, rows], dtype=torch.int32, device=world.device)
        kernel(group.context, tokens, starts, inbox, counts, arrived, epoch)
        calls.append((tokens, starts.diff(), world.keep(counts[epoch % 2]), world.keep(inbox[epoch % 2])))
    group.check()
    for tokens, sent, got_counts, got in calls:
        want_counts = torch.empty_like(sent)
        dist.all_to_all_single(want_counts, sent)
        assert_equal("counts", got_counts, want_counts)
        want = torch.empty(int(want_counts.sum()), cols, device=world.device)
        dist.all_to_all_single(want, tokens, want_counts.tolist(), sent.tolist())
        rows_of = [got[source, :count] for source, count in enumerate(want_counts.tolist())]
        assert_equal("rows", torch.cat(rows_of), want)
        moved += len(want)
    return f"{moved} rows of {cols}, and how many came from whom, as {world.rival} has it"


EXAMPLE = Example(run, kernels, {"rows": (64, 4096), "cols": (256, 3584)})

if __name__ == "__main__":
    EXAMPLE.main()
