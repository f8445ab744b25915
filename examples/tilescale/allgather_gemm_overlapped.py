"""All-gather and matmul, overlapped: one kernel sends the rows, another multiplies those that have arrived.

On GPUs the two run at once, on two streams: C = all_gather(A) @ B begins with the own rows, and each tile waits for its rows only. On
CPU ranks they run one after the other, which shows the same protocol and no gain.
"""

from contextlib import nullcontext

import tilelang.language as T
import torch
from common import CTX, MATMUL, Example, Kernel, World, assert_close, assert_equal

import tscompile.language as tl
from tscompile.language.dialects import Dialect


def send(d: Dialect, ranks: int, rows: int, k: int):
    """One block per row tile: its rows to all other ranks, the next one first."""
    m = MATMUL[d.name]
    row_tiles, row_bytes = rows // m.rows, k * m.item_bytes

    @T.prim_func
    def send_kernel(
        ctx: CTX,
        gathered: T.Tensor((ranks * rows, k), m.dtype),
        arrived: T.Tensor((ranks, row_tiles), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(row_tiles, threads=256, prelude=d.prelude) as row_tile:
            thread = d.thread()
            me = tl.rank(ctx)
            for step in T.serial(1, ranks):
                to = (me + step) % ranks
                row = me * rows + row_tile * m.rows
                tl.put_block(tl.remote(ctx, gathered[row, 0], to), gathered[row, 0], m.rows * row_bytes, thread, 256)
                d.sync()
                if thread == 0:
                    tl.signal(tl.remote(ctx, arrived[me, row_tile], to), epoch, dtype="int32")

    return send_kernel


def multiply(d: Dialect, ranks: int, rows: int, k: int, n: int):
    """One block per tile of C; the warp that loads waits for the rows. `arrived` is a parameter, so the wait stays beside the loads."""
    m = MATMUL[d.name]
    row_tiles, col_tiles = rows // m.rows, n // m.cols

    @T.prim_func
    def multiply_kernel(
        ctx: CTX,
        gathered: T.Tensor((ranks * rows, k), m.dtype),
        b: T.Tensor((k, n), m.dtype),
        c: T.Tensor((ranks * rows, n), m.dtype),
        arrived: T.Tensor((ranks, row_tiles), "int32"),
        first: T.int32,
        epoch: T.int32,
    ):
        with T.Kernel(col_tiles * row_tiles * ranks, threads=256, prelude=d.prelude) as block:
            # From the tiles of rank `first` on, which is this one: a number that the host passes, so that TMA may use it.
            row = (block // col_tiles + first * row_tiles) % (ranks * row_tiles)
            col = block % col_tiles
            a_tile = d.alloc_shared((m.rows, m.depth), m.dtype)
            b_tile = d.alloc_shared((m.depth, m.cols), m.dtype)
            total = d.alloc_fragment((m.rows, m.cols), "float32")
            T.clear(total)
            for i in T.Pipelined(k // m.depth, num_stages=3):
                if i == 0 and d.thread() < 32:
                    owner = row // row_tiles
                    tl.warp_wait(ctx, arrived[owner, row % row_tiles], "epoch", epoch, peer=owner, site=1)
                T.copy(gathered[row * m.rows, i * m.depth], a_tile)
                T.copy(b[i * m.depth, col * m.cols], b_tile)
                T.gemm(a_tile, b_tile, total)
            T.copy(total, c[row * m.rows, col * m.cols])

    return multiply_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel("send", send(d, 4, 256, 512)), Kernel("multiply", multiply(d, 4, 256, 512, 512))]


class AllGatherGemm:
    """C = all_gather(A) @ B, call after call: two buffers and their flags, and on GPUs a stream of their own for sends."""

    def __init__(self, world: World, rows: int, k: int, n: int) -> None:
        m, size = world.matmul, world.size
        if rows % m.rows or n % m.cols or k % m.depth:
            raise ValueError(f"--rows, --n and --k must be multiples of {m.rows}, {m.cols} and {m.depth}")
        self.rank, self.group, self.rows = world.rank, world.group, rows
        self.send = world.compile(send(world.dialect, size, rows, k))
        self.multiply = world.compile(multiply(world.dialect, size, rows, k, n))
        self.halves = self.group.tensor((2, size * rows, k), world.dtype)
        self.arrived = self.group.tensor((size, rows // m.rows), torch.int32)
        self.c = torch.empty(size * rows, n, dtype=world.dtype, device=world.device)
        # Sends before what fills the GPU: a high priority, since the blocks of the matmul wait for those of other ranks' sends.
        self.side = torch.cuda.Stream(priority=-1) if world.device.type == "cuda" else None
        self.epoch = 0

    def __call__(self, shard: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.epoch += 1
        gathered = self.halves[self.epoch % 2]
        gathered[self.rank * self.rows : (self.rank + 1) * self.rows].copy_(shard)
        self.arrived[self.rank].fill_(self.epoch)  # in the order of the stream, so no tile waits for the own rows
        if self.side is not None:
            # After all that this rank has done so far, the last matmul too: who has its rows may overwrite the other half here.
            self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side) if self.side is not None else nullcontext():
            self.send(self.group.context, gathered, self.arrived, self.epoch)
        self.multiply(self.group.context, gathered, b, self.c, self.arrived, self.rank, self.epoch)
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
        return self.c


def run(world: World) -> str:
    args, group = world.args, world.group
    op = AllGatherGemm(world, args.rows, args.k, args.n)
    b = world.random(args.k, args.n, dtype=world.dtype)
    calls = []
    for epoch in world.rounds():
        shard = world.random(args.rows, args.k, dtype=world.dtype)
        c = op(shard, b)
        calls.append((shard, world.keep(op.halves[epoch % 2]), c.clone()))
    group.check()
    for shard, gathered, product in calls:
        want = torch.cat(world.gather(shard))
        assert_equal("gathered", gathered, want)
        assert_close("C", product, want.float() @ b.float())
    ours = world.milliseconds(lambda: op(shard, b))
    whole = torch.empty_like(want)

    def one_after_the_other() -> None:
        world.gather_into(whole, shard)
        torch.mm(whole, b)

    theirs = world.milliseconds(one_after_the_other)
    group.check()
    return (
        f"C {list(c.shape)} of k = {args.k} as {world.rival} and torch have it; {ours:.2f} ms, they {theirs:.2f} ms"
        + ("" if world.device.type == "cuda" else " (plain C loops here)")
    )


EXAMPLE = Example(run, kernels, {"rows": (64, 2048), "k": (128, 8192), "n": (128, 8192)})

if __name__ == "__main__":
    EXAMPLE.main()
