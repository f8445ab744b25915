"""The exchanges around attention with sequence parallelism (Ulysses): before it a rank has some of the sequence of every head, in it
all of the sequence of some heads, and afterwards the first again.

    before             [B, H, S/P, D] -> [B, H/P, S, D]
    before, transposed [B, S/P, H, D] -> [B, H/P, S, D]
    after, transposed  [B, H/P, S, D] -> [B, S/P, H, D]

Each is one kernel that moves rows of D numbers to where they belong and transposes on the way, with no copy before or after.
"""

import tilelang.language as T
import torch
import torch.distributed as dist
from common import CTX, Example, Kernel, World, assert_equal

import tscompile.language as tl
from tscompile.language.dialects import Dialect

NAMES = ("before", "before_transposed", "after_transposed")


def before(d: Dialect, ranks: int, batch: int, heads: int, seq: int, dim: int):
    """[batch, heads, seq/ranks, dim] -> [batch, heads/ranks, seq, dim]; a block sends the rows of one head at once.

    Block (row, step) sends to the rank `step` ahead and waits for what the rank `step` behind sends under the same number, so it does
    not matter how many blocks run at once. Two results alternate with the epoch, as in allgather.py.
    """
    own_heads, own_seq = heads // ranks, seq // ranks

    @T.prim_func
    def before_kernel(
        ctx: CTX,
        x: T.Tensor((batch, heads, own_seq, dim), "float32"),
        out: T.Tensor((2, batch, own_heads, seq, dim), "float32"),
        arrived: T.Tensor((ranks, batch * own_heads), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(batch * own_heads, ranks, threads=128, prelude=d.prelude) as (row, step):
            thread = d.thread()
            me = tl.rank(ctx)
            to = (me + step) % ranks
            source = (me + ranks - step) % ranks
            b = row // own_heads
            h = row % own_heads
            there = tl.remote(ctx, out[epoch % 2, b, h, me * own_seq, 0], to)
            tl.put_block(there, x[b, to * own_heads + h, 0, 0], 4 * own_seq * dim, thread, 128)
            d.sync()
            if thread == 0:
                tl.signal(tl.remote(ctx, arrived[me, row], to), epoch, dtype="int32")
                tl.wait(ctx, arrived[source, row], "epoch", epoch, peer=source, site=1)

    return before_kernel


def before_transposed(d: Dialect, ranks: int, batch: int, heads: int, seq: int, dim: int):
    """[batch, seq/ranks, heads, dim] -> [batch, heads/ranks, seq, dim]; the warps of a block send rows of dim numbers."""
    own_heads, own_seq, warps = heads // ranks, seq // ranks, 4 if d.name == "cuda" else 1

    @T.prim_func
    def before_transposed_kernel(
        ctx: CTX,
        x: T.Tensor((batch, own_seq, heads, dim), "float32"),
        out: T.Tensor((2, batch, own_heads, seq, dim), "float32"),
        arrived: T.Tensor((ranks, batch * own_heads), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(batch * own_heads, ranks, threads=32 * warps, prelude=d.prelude) as (row, step):
            thread = d.thread()
            me = tl.rank(ctx)
            to = (me + step) % ranks
            source = (me + ranks - step) % ranks
            b = row // own_heads
            h = row % own_heads
            for i in T.serial(own_seq // warps):
                s = i * warps + thread // 32
                there = tl.remote(ctx, out[epoch % 2, b, h, me * own_seq + s, 0], to)
                tl.put_warp(there, x[b, s, to * own_heads + h, 0], 4 * dim)
            d.sync()
            if thread == 0:
                tl.signal(tl.remote(ctx, arrived[me, row], to), epoch, dtype="int32")
                tl.wait(ctx, arrived[source, row], "epoch", epoch, peer=source, site=2)

    return before_transposed_kernel


def after_transposed(d: Dialect, ranks: int, batch: int, heads: int, seq: int, dim: int):
    """[batch, heads/ranks, seq, dim] -> [batch, seq/ranks, heads, dim], the way back."""
    own_heads, own_seq, warps = heads // ranks, seq // ranks, 4 if d.name == "cuda" else 1

    @T.prim_func
    def after_transposed_kernel(
        ctx: CTX,
        x: T.Tensor((batch, own_heads, seq, dim), "float32"),
        out: T.Tensor((2, batch, own_seq, heads, dim), "float32"),
        arrived: T.Tensor((ranks, batch * own_heads), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(batch * own_heads, ranks, threads=32 * warps, prelude=d.prelude) as (row, step):
            thread = d.thread()
            me = tl.rank(ctx)
            to = (me + step) % ranks
            source = (me + ranks - step) % ranks
            b = row // own_heads
            h = row % own_heads
            for i in T.serial(own_seq // warps):
                s = i * warps + thread // 32
                there = tl.remote(ctx, out[epoch % 2, b, s, me * own_heads + h, 0], to)
                tl.put_warp(there, x[b, h, to * own_seq + s, 0], 4 * dim)
            d.sync()
            if thread == 0:
                tl.signal(tl.remote(ctx, arrived[me, row], to), epoch, dtype="int32")
                tl.wait(ctx, arrived[source, row], "epoch", epoch, peer=source, site=3)

    return after_transposed_kernel


MAKE = {"before": before, "before_transposed": before_transposed, "after_transposed": after_transposed}


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel(name, make(d, 4, 2, 16, 256, 64)) for name, make in MAKE.items()]


def reference(name: str, x: torch.Tensor, ranks: int) -> torch.Tensor:
    """What the kernels do, by torch: chunks for each rank, all_to_all_single, chunks put together."""
    split, joined = {"before": (1, 2), "before_transposed": (2, 1), "after_transposed": (2, 1)}[name]
    sent = torch.stack(x.chunk(ranks, split))
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent)
    together = torch.cat(list(got), joined)
    return together if name == "before" else together.transpose(1, 2).contiguous()


def run(world: World) -> str:
    args, size, group = world.args, world.size, world.group
    batch, heads, seq, dim = args.batch, args.heads, args.seq, args.dim
    if heads % size or seq % (4 * size):
        raise ValueError(f"--heads {heads} must be a multiple of {size} ranks, and --seq {seq} of {4 * size}")
    own_heads, own_seq = heads // size, seq // size
    inner, outer = (batch, own_heads, seq, dim), (batch, own_seq, heads, dim)
    shapes = {"before": (batch, heads, own_seq, dim), "before_transposed": outer, "after_transposed": inner}
    for name in NAMES:
        kernel = world.compile(MAKE[name](world.dialect, size, batch, heads, seq, dim))
        out = group.tensor((2, *(outer if name == "after_transposed" else inner)), torch.float32)
        arrived = group.tensor((size, batch * own_heads), torch.int32)
        calls = []
        for epoch in world.rounds():
            x = world.random(*shapes[name])
            kernel(group.context, x, out, arrived, epoch)
            calls.append((x, world.keep(out[epoch % 2])))
        group.check()
        for x, got in calls:
            assert_equal(name, got, reference(name, x, size))
    return f"{', '.join(NAMES)}: as transposes and all_to_all_single of {world.rival}"


EXAMPLE = Example(run, kernels, {"batch": (2, 2), "heads": (8, 32), "seq": (64, 4096), "dim": (16, 128)})

if __name__ == "__main__":
    EXAMPLE.main()
