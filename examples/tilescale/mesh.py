"""Matmuls over a square mesh of ranks, for cannon.py and summa.py: they differ only in who sends which block to whom.

Rank (i, j), number i * side + j, has the blocks A[i, j], B[i, j] and gets C[i, j]. In each of `side` steps it multiplies a block of A
with one of B; they arrive in two slots that alternate, so the next step's blocks travel while this one's are multiplied.

Two flags for each piece of a block: `arrived`, by its sender, and `free`, by its receiver, without which no slot is overwritten. Each
holds the number of a step. There is one for each rank that may set it: with a single one, a later step of one rank would hide that an
earlier step of another has not come yet.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import tilelang.language as T
import torch
from common import CTX, MATMUL, Kernel, World, assert_close

import tscompile.language as tl
from tscompile.language.dialects import Dialect


@dataclass(frozen=True)
class Route:
    """How one block of A or B moves for one step, as one rank sees it.

    source: who sends to this rank. to: whom this rank sends to. forward: it sends what arrived for the step before, not its own block.
    """

    source: int
    to: range
    forward: bool = False


Routes = Callable[[int, int, int, int], tuple[Route, Route]]
"""(side, i, j, step) -> routes of A and of B."""


def send(d: Dialect, ranks: int, pieces: int, rows: int, width: int):
    """One block per piece (`rows` rows of a block of A or B): say that the slot is free, then send to those whose slots are."""
    m = MATMUL[d.name]

    @T.prim_func
    def send_kernel(
        ctx: CTX,
        x: T.Tensor((pieces * rows, width), m.dtype),
        slot: T.Tensor((pieces * rows, width), m.dtype),
        arrived: T.Tensor((ranks, pieces), "int32"),
        free: T.Tensor((ranks, pieces), "int32"),
        source: T.int32,
        first: T.int32,
        stride: T.int32,
        count: T.int32,
        ready_from: T.int32,
        ready: T.int32,
        step: T.int32,
    ):
        with T.Kernel(pieces, threads=256, prelude=d.prelude) as piece:
            thread = d.thread()
            me = tl.rank(ctx)
            if thread == 0:
                tl.signal(tl.remote(ctx, free[me, piece], source), step, dtype="int32")
                tl.wait(ctx, arrived[ready_from, piece], "epoch", ready, peer=ready_from, site=1)
            for number in T.serial(count):
                to = first + number * stride
                if thread == 0:
                    tl.wait(ctx, free[to, piece], "epoch", step, peer=to, site=2)
                d.sync()
                there = tl.remote(ctx, slot[piece * rows, 0], to)
                tl.put_block(there, x[piece * rows, 0], rows * width * m.item_bytes, thread, 256)
                d.sync()
                if thread == 0:
                    tl.signal(tl.remote(ctx, arrived[me, piece], to), step, dtype="int32")

    return send_kernel


def multiply(d: Dialect, ranks: int, rows: int, k: int, cols: int):
    """C += A @ B for the blocks of one step; the warp that loads waits for its rows of A, and for each piece of B when it is due."""
    m = MATMUL[d.name]

    @T.prim_func
    def multiply_kernel(
        ctx: CTX,
        a: T.Tensor((rows, k), m.dtype),
        b: T.Tensor((k, cols), m.dtype),
        c: T.Tensor((rows, cols), "float32"),
        a_arrived: T.Tensor((ranks, rows // m.rows), "int32"),
        b_arrived: T.Tensor((ranks, k // m.depth), "int32"),
        a_source: T.int32,
        b_source: T.int32,
        step: T.int32,
    ):
        with T.Kernel(rows // m.rows * (cols // m.cols), threads=256, prelude=d.prelude) as block:
            if d.name == "cuda":
                # The warps that load wait at two places, for which TileLang's 24 registers are too few.
                T.annotate_producer_reg_dealloc(40)
                T.annotate_consumer_reg_alloc(232)
            row = block // (cols // m.cols)
            col = block % (cols // m.cols)
            a_tile = d.alloc_shared((m.rows, m.depth), m.dtype)
            b_tile = d.alloc_shared((m.depth, m.cols), m.dtype)
            total = d.alloc_fragment((m.rows, m.cols), "float32")
            T.copy(c[row * m.rows, col * m.cols], total)
            for i in T.Pipelined(k // m.depth, num_stages=3):
                if i == 0 and d.thread() < 32:
                    tl.warp_wait(ctx, a_arrived[a_source, row], "epoch", step, peer=a_source, site=3)
                if d.thread() < 32:
                    tl.warp_wait(ctx, b_arrived[b_source, i], "epoch", step, peer=b_source, site=4)
                T.copy(a[row * m.rows, i * m.depth], a_tile)
                T.copy(b[i * m.depth, col * m.cols], b_tile)
                T.gemm(a_tile, b_tile, total)
            T.copy(total, c[row * m.rows, col * m.cols])

    return multiply_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel("send", send(d, 4, 8, 64, 512)), Kernel("multiply", multiply(d, 4, 512, 512, 512))]


class Matrix:
    """What a rank keeps for A or for B: the two slots, the flags, and the kernel that sends."""

    def __init__(self, world: World, pieces: int, rows: int, width: int) -> None:
        self.slots = world.group.tensor((2, pieces * rows, width), world.dtype)
        self.arrived, self.free = (world.group.tensor((world.size, pieces), torch.int32) for _ in range(2))
        self.send = world.compile(send(world.dialect, world.size, pieces, rows, width))


class MeshMatmul:
    """C[i, j] of C = A @ B, call after call.

    Args:
        routes: how blocks move.
        m, n, k: sizes of the whole matrices.
    """

    def __init__(self, world: World, routes: Routes, m: int, n: int, k: int) -> None:
        self.side, self.group, self.routes = math.isqrt(world.size), world.group, routes
        self.i, self.j = divmod(world.rank, self.side)
        tile, (rows, cols, depth) = world.matmul, (size // self.side for size in (m, n, k))
        if rows % tile.rows or cols % tile.cols or depth % tile.depth:
            sides = f"{tile.rows}, {tile.cols} and {tile.depth}"
            raise ValueError(f"--m, --n and --k must be multiples of {self.side} x {sides}")
        self.a = Matrix(world, rows // tile.rows, tile.rows, depth)
        self.b = Matrix(world, depth // tile.depth, tile.depth, cols)
        self.multiply = world.compile(multiply(world.dialect, world.size, rows, depth, cols))
        self.c = torch.empty(rows, cols, dtype=torch.float32, device=world.device)
        self.stream = torch.cuda.Stream(priority=-1) if world.device.type == "cuda" else None
        self.step = 0  # of all calls so far

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.c.zero_()
        sent = self._send(a, b, 0)
        for number in range(self.side):
            self.step += 1
            following = self._send(a, b, number + 1) if number + 1 < self.side else None
            if sent is not None:
                # Blocks that wait could fill this GPU before what others wait for has begun. So this rank has sent everything for
                # the step before it waits for any of it.
                torch.cuda.current_stream().wait_event(sent)
            a_route, b_route = self.routes(self.side, self.i, self.j, number)
            self.multiply(
                self.group.context,
                self.a.slots[self.step % 2],
                self.b.slots[self.step % 2],
                self.c,
                self.a.arrived,
                self.b.arrived,
                a_route.source,
                b_route.source,
                self.step,
            )
            sent = following
        return self.c

    def _send(self, a: torch.Tensor, b: torch.Tensor, number: int) -> torch.cuda.Event | None:
        """Take part in moving the blocks for step `number` of this call; the event is recorded when that is done."""
        step = self.step + 1
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())  # the slots were read by the step before the last
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            routes = zip((self.a, self.b), (a, b), self.routes(self.side, self.i, self.j, number), strict=True)
            before = self.routes(self.side, self.i, self.j, max(number - 1, 0))
            for (matrix, own, route), last in zip(routes, before, strict=True):
                matrix.send(
                    self.group.context,
                    matrix.slots[(step - 1) % 2] if route.forward else own,
                    matrix.slots[step % 2],
                    matrix.arrived,
                    matrix.free,
                    route.source,
                    route.to.start,
                    route.to.step,
                    len(route.to),
                    last.source,
                    step - 1 if route.forward else 0,
                    step,
                )
            return None if self.stream is None else self.stream.record_event()


def allowed(ranks: int) -> str:
    """Why this does not work with so many ranks, "" if it does."""
    if math.isqrt(ranks) ** 2 == ranks <= tl.MAX_RANKS:
        return ""
    return f"{ranks} ranks are no square mesh: --ranks 4 is one"


def check(world: World, routes: Routes) -> str:
    """Multiply random matrices over the mesh and compare with torch, a few times."""
    args, group = world.args, world.group
    op = MeshMatmul(world, routes, args.m, args.n, args.k)
    shapes = [(args.m // op.side, args.k // op.side), (args.k // op.side, args.n // op.side)]

    def whole(block: torch.Tensor) -> torch.Tensor:
        blocks = world.gather(block)
        return torch.cat([torch.cat(blocks[i : i + op.side], 1) for i in range(0, world.size, op.side)]).float()

    calls = []
    for _ in world.rounds():
        a, b = (world.random(*shape, dtype=world.dtype) for shape in shapes)
        calls.append((a, b, op(a, b).clone()))
    group.check()
    for a, b, product in calls:
        want = whole(a) @ whole(b)
        assert_close("C", product, want.chunk(op.side, 0)[op.i].chunk(op.side, 1)[op.j])
    return f"C [{args.m}, {args.n}] of k = {args.k} over {op.side} x {op.side} ranks as torch has it"
