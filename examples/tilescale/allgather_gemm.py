"""All-gather and matmul in one kernel: C = all_gather(A) @ B, where the blocks that multiply also send.

A block sends rows of the own shard first, then waits for the rows of its tile of C, and multiplies.
"""

import tilelang.language as T
import torch
from common import CTX, MATMUL, Example, Kernel, World, assert_close, assert_equal

import tscompile.language as tl
from tscompile.language.dialects import Dialect


def all_gather_gemm(d: Dialect, ranks: int, rows: int, k: int, n: int):
    """A rank has `rows` rows of A [ranks * rows, k], and its own B [k, n].

    Tiles of C are taken in the order of blocks: those of the own rows first, in which all is sent, and which wait only for what
    earlier blocks of this rank sent to itself. So whatever a later block waits for is on its way, however many blocks run at once.
    """
    m = MATMUL[d.name]
    row_tiles, col_tiles = rows // m.rows, n // m.cols
    own_tiles, item = row_tiles * col_tiles, m.item_bytes

    @T.prim_func
    def all_gather_gemm_kernel(
        ctx: CTX,
        shard: T.Tensor((rows, k), m.dtype),
        gathered: T.Tensor((ranks * rows, k), m.dtype),
        b: T.Tensor((k, n), m.dtype),
        c: T.Tensor((ranks * rows, n), m.dtype),
        arrived: T.Tensor((ranks, row_tiles), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(ranks * own_tiles, threads=256, prelude=d.prelude) as block:
            thread = d.thread()
            me = tl.rank(ctx)
            owner = (me + block // own_tiles) % ranks  # of the rows of this tile
            row_tile = block % own_tiles // col_tiles
            col_tile = block % col_tiles
            a_tile = d.alloc_shared((m.rows, m.depth), m.dtype)
            b_tile = d.alloc_shared((m.depth, m.cols), m.dtype)
            total = d.alloc_fragment((m.rows, m.cols), "float32")
            if block < own_tiles:
                for step in T.serial(ranks):  # the tiles of a row share the ranks to send it to
                    to = (me + step) % ranks
                    if step % col_tiles == col_tile:
                        there = tl.remote(ctx, gathered[me * rows + row_tile * m.rows, 0], to)
                        tl.put_block(there, shard[row_tile * m.rows, 0], m.rows * k * item, thread, 256)
                        d.sync()
                        if thread == 0:
                            tl.signal(tl.remote(ctx, arrived[me, row_tile], to), epoch, dtype="int32")
            # All warps wait, since all of them load.
            tl.warp_wait(ctx, arrived[owner, row_tile], "epoch", epoch, peer=owner, site=1)
            T.clear(total)
            for i in T.serial(k // m.depth):  # a pipeline would set warps aside for loading, but here all send and wait
                T.copy(gathered[owner * rows + row_tile * m.rows, i * m.depth], a_tile)
                T.copy(b[i * m.depth, col_tile * m.cols], b_tile)
                T.gemm(a_tile, b_tile, total)
            T.copy(total, c[owner * rows + row_tile * m.rows, col_tile * m.cols])

    return all_gather_gemm_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel("all_gather_gemm", all_gather_gemm(d, 4, 256, 512, 512))]


def run(world: World) -> str:
    args, size, group, m = world.args, world.size, world.group, world.matmul
    rows, k, n = args.rows, args.k, args.n
    if rows % m.rows or n % m.cols or k % m.depth:
        raise ValueError(f"--rows, --n and --k must be multiples of {m.rows}, {m.cols} and {m.depth}")
    kernel = world.compile(all_gather_gemm(world.dialect, size, rows, k, n))
    halves = group.tensor((2, size * rows, k), world.dtype)  # two alternate, as in allgather.py
    arrived = group.tensor((size, rows // m.rows), torch.int32)
    b = world.random(k, n, dtype=world.dtype)
    c = torch.empty(size * rows, n, dtype=world.dtype, device=world.device)
    calls = []
    for epoch in world.rounds():
        shard = world.random(rows, k, dtype=world.dtype)
        kernel(group.context, shard, halves[epoch % 2], b, c, arrived, epoch)
        calls.append((shard, world.keep(halves[epoch % 2]), c.clone()))
    group.check()
    for shard, gathered, product in calls:
        want = torch.cat(world.gather(shard))
        assert_equal("gathered", gathered, want)
        assert_close("C", product, want.float() @ b.float())
    return f"C {list(c.shape)} of k = {k} as {world.rival} and torch have it"


EXAMPLE = Example(run, kernels, {"rows": (64, 1024), "k": (128, 4096), "n": (128, 4096)})

if __name__ == "__main__":
    EXAMPLE.main()
