"""Kernels that copy: bytes by blocks and warps, tiles by TMA; written once for both targets."""

import tilelang.language as T

import tscompile.language as tl
from tscompile.language.dialects import Dialect

from .kernels import CTX

WAYS = ("put_block", "get_block", "put_warp", "get_warp")
COLUMNS = 6  # of a job: rank and byte of the destination, rank and byte of the source, bytes, number of the way
TILE = 1 << 16


def copies(d: Dialect, jobs: int):
    """A block for each job: bytes from anywhere in the data region of any rank to anywhere in that of any other."""

    @T.prim_func
    def copies_kernel(ctx: CTX, table: T.Tensor((jobs, COLUMNS), "int64")):
        with T.Kernel(jobs, threads=128, prelude=d.prelude) as job:
            thread = d.thread()
            dst = tl.peer_address(ctx, T.cast(table[job, 0], "int32"), table[job, 1])
            src = tl.peer_address(ctx, T.cast(table[job, 2], "int32"), table[job, 3])
            size, way = table[job, 4], table[job, 5]
            if way == 0:
                tl.put_block(dst, src, size, thread, 128)
            elif way == 1:
                tl.get_block(dst, src, size, thread, 128)
            elif thread < 32:
                if way == 2:
                    tl.put_warp(dst, src, size)
                else:
                    tl.get_warp(dst, src, size)

    return copies_kernel


def typed_copies(d: Dialect, dtype: str, item_bytes: int, size: int = 3000):
    """`count` elements of x from `start` to a peer's tensor, and of that tensor to y, by a block; the same by a warp."""

    @T.prim_func
    def typed_copies_kernel(
        ctx: CTX,
        x: T.Tensor((size,), dtype),
        y: T.Tensor((2, size), dtype),
        to: T.int32,
        start: T.int32,
        at: T.int32,
        count: T.int32,
    ):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            there = tl.peer(ctx, to, 0, (2, size), dtype)
            tl.put_block(there[0, at], x[start], count * item_bytes, thread, 128)
            d.sync()
            tl.get_block(y[0, start], there[0, at], count * item_bytes, thread, 128)
            if thread < 32:
                tl.put_warp(there[1, at], x[start], count * item_bytes)
                tl.get_warp(y[1, start], there[1, at], count * item_bytes)

    return typed_copies_kernel


def tiles(d: Dialect, jobs: int):
    """As `copies`, through shared memory by TMA: multiples of 16 bytes, TILE at most. ok[job]: the tile has arrived."""

    @T.prim_func
    def tiles_kernel(ctx: CTX, table: T.Tensor((jobs, COLUMNS), "int64"), ok: T.Tensor((jobs,), "int32")):
        with T.Kernel(jobs, threads=32, prelude=d.prelude) as job:
            tile = d.alloc_shared((TILE,), "uint8")
            arrived = d.alloc_shared((1,), "uint64")
            source = T.cast(table[job, 2], "int32")
            if d.thread() == 0:
                tl.mbarrier_init(arrived[0])
                tl.bulk_get(tile[0], tl.peer_address(ctx, source, table[job, 3]), table[job, 4], arrived[0])
                if tl.mbarrier_wait(ctx, arrived[0], 0, peer=source, site=8):
                    dst = tl.peer_address(ctx, T.cast(table[job, 0], "int32"), table[job, 1])
                    tl.bulk_put(dst, tile[0], table[job, 4])
                    tl.bulk_wait()
                    ok[job] = 1

    return tiles_kernel
