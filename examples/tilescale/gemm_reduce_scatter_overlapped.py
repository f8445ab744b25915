"""Matmul and reduce-scatter, overlapped: each finished tile of A @ B goes straight to the rank that owns its rows, while others are
still multiplied; a second kernel adds up what arrives.

C = reduce_scatter(A @ B): every rank has some columns of A and the rows of B that belong to them, and gets some rows of the sum. On CPU
ranks blocks run one after another, so transfers hide nothing there.
"""

import tilelang.language as T
import torch
import torch.distributed as dist
from common import CTX, MATMUL, Example, Kernel, World, assert_close

import tscompile.language as tl
from tscompile.language.dialects import Dialect


def multiply_and_send(d: Dialect, ranks: int, rows: int, k: int, n: int):
    """One block per tile of A @ B, the next rank's rows first and the own last; `rows` are those that a rank gets."""
    m = MATMUL[d.name]
    row_tiles, col_tiles = rows // m.rows, n // m.cols

    @T.prim_func
    def multiply_and_send_kernel(
        ctx: CTX,
        a: T.Tensor((ranks * rows, k), m.dtype),
        b: T.Tensor((k, n), m.dtype),
        inbox: T.Tensor((ranks, rows, n), m.dtype),
        arrived: T.Tensor((ranks, row_tiles, col_tiles), "int32"),
        first: T.int32,
        epoch: T.int32,
    ):
        with T.Kernel(col_tiles * row_tiles * ranks, threads=256, prelude=d.prelude) as block:
            thread = d.thread()
            me = tl.rank(ctx)
            row = (block // col_tiles + first * row_tiles) % (ranks * row_tiles)
            col = block % col_tiles
            owner = row // row_tiles
            a_tile = d.alloc_shared((m.rows, m.depth), m.dtype)
            b_tile = d.alloc_shared((m.depth, m.cols), m.dtype)
            total = d.alloc_fragment((m.rows, m.cols), "float32")
            T.clear(total)
            for i in T.Pipelined(k // m.depth, num_stages=3):
                T.copy(a[row * m.rows, i * m.depth], a_tile)
                T.copy(b[i * m.depth, col * m.cols], b_tile)
                T.gemm(a_tile, b_tile, total)
            there = T.make_tensor(T.cast(tl.remote(ctx, inbox[0, 0, 0], owner), "int64"), (ranks, rows, n), m.dtype)
            T.copy(total, there[me, row % row_tiles * m.rows, col * m.cols])
            d.sync()
            if thread == 0:
                flag = tl.remote(ctx, arrived[me, row % row_tiles, col], owner)
                tl.signal(flag, epoch, dtype="int32")

    return multiply_and_send_kernel


def add_up(d: Dialect, ranks: int, rows: int, n: int):
    """One block per tile of C: the tile of every rank as it arrives, the previous rank's first, which was sent first."""
    m = MATMUL[d.name]
    row_tiles, col_tiles = rows // m.rows, n // m.cols

    @T.prim_func
    def add_up_kernel(
        ctx: CTX,
        inbox: T.Tensor((ranks, rows, n), m.dtype),
        c: T.Tensor((rows, n), m.dtype),
        arrived: T.Tensor((ranks, row_tiles, col_tiles), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(col_tiles * row_tiles, threads=256, prelude=d.prelude) as block:
            me = tl.rank(ctx)
            row = block // col_tiles
            col = block % col_tiles
            total = d.alloc_fragment((m.rows, m.cols), "float32")
            # An address, not the parameter: what a kernel only reads TileLang loads non-coherently, but peers still write here.
            here = T.make_tensor(T.cast(tl.remote(ctx, inbox[0, 0, 0], me), "int64"), (ranks, rows, n), m.dtype)
            T.clear(total)
            for step in T.serial(ranks):
                source = (me + ranks - 1 - step) % ranks
                # Every warp for itself, since all of them load.
                tl.warp_wait(ctx, arrived[source, row, col], "epoch", epoch, peer=source, site=1)
                for i, j in d.parallel(m.rows, m.cols):
                    total[i, j] = total[i, j] + T.cast(here[source, row * m.rows + i, col * m.cols + j], "float32")
            T.copy(total, c[row * m.rows, col * m.cols])

    return add_up_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [
        Kernel("multiply_and_send", multiply_and_send(d, 4, 256, 512, 512)),
        Kernel("add_up", add_up(d, 4, 256, 512)),
    ]


class GemmReduceScatter:
    """C = reduce_scatter(A @ B), call after call. Two inboxes alternate: who has added up an epoch has heard of all ranks in it, and
    a rank's kernels follow one another, so by then all have added up the one before.
    """

    def __init__(self, world: World, rows: int, k: int, n: int) -> None:
        m, size = world.matmul, world.size
        if rows % m.rows or n % m.cols or k % m.depth:
            raise ValueError(f"--rows, --n and --k must be multiples of {m.rows}, {m.cols} and {m.depth}")
        self.rank, self.size, self.group = world.rank, size, world.group
        self.multiply = world.compile(multiply_and_send(world.dialect, size, rows, k, n))
        self.add_up = world.compile(add_up(world.dialect, size, rows, n))
        self.halves = self.group.tensor((2, size, rows, n), world.dtype)
        self.arrived = self.group.tensor((size, rows // m.rows, n // m.cols), torch.int32)
        self.c = torch.empty(rows, n, dtype=world.dtype, device=world.device)
        self.epoch = 0

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.epoch += 1
        inbox, first = self.halves[self.epoch % 2], (self.rank + 1) % self.size
        self.multiply(self.group.context, a, b, inbox, self.arrived, first, self.epoch)
        self.add_up(self.group.context, inbox, self.c, self.arrived, self.epoch)
        return self.c


def run(world: World) -> str:
    args, group, size = world.args, world.group, world.size
    op = GemmReduceScatter(world, args.rows, args.k, args.n)
    calls = []
    for _ in world.rounds():
        a = world.random(size * args.rows, args.k, dtype=world.dtype)
        b = world.random(args.k, args.n, dtype=world.dtype)
        c = op(a, b)
        calls.append((a, b, c.clone()))
    group.check()
    for a, b, product in calls:
        want = a.float() @ b.float()
        dist.all_reduce(want)
        assert_close("C", product, want.chunk(size)[world.rank])
    ours = world.milliseconds(lambda: op(a, b))
    out = torch.empty_like(c)
    theirs = world.milliseconds(lambda: world.reduce_scatter(out, torch.mm(a, b)))
    group.check()
    return (
        f"C {list(c.shape)} of k = {size} x {args.k} as torch and {world.rival} have it; {ours:.2f} ms, they {theirs:.2f} ms"
        + ("" if world.device.type == "cuda" else " (plain C loops here)")
    )


EXAMPLE = Example(run, kernels, {"rows": (64, 2048), "k": (128, 4096), "n": (128, 8192)})

if __name__ == "__main__":
    EXAMPLE.main()
