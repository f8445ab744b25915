"""The primitives one by one: every rank sends to the next one of a ring, or fetches from it.

    python examples/tilescale/primitives.py             # all of them
    python examples/tilescale/primitives.py --only 2    # number 2 of the list below

1 put_block, 2 put_warp, 3 get_block, 4 get_warp: `count` numbers in pieces of 4096, each by one block or warp.
5 st: the same, one store per number. 6 sync: host writes to a peer's memory, then a barrier of all ranks inside a kernel.
"""

import tilelang.language as T
import torch
from common import CTX, Example, Kernel, World, assert_equal

import tscompile.language as tl
from tscompile.language.dialects import Dialect

PIECE = 4096
NAMES = ("put_block", "put_warp", "get_block", "get_warp", "st", "sync")


def put(d: Dialect, count: int, how: str):
    """Each block sends its piece to the next rank, once that rank has said that its inbox is free."""
    pieces, threads = count // PIECE, 32 if how == "put_warp" else 128
    stores = PIECE // threads if d.name == "cuda" else PIECE  # on the C target a block is one thread

    @T.prim_func
    def put_kernel(
        ctx: CTX,
        x: T.Tensor((count,), "float32"),
        inbox: T.Tensor((count,), "float32"),
        free: T.Tensor((pieces,), "int32"),
        arrived: T.Tensor((pieces,), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(pieces, threads=threads, prelude=d.prelude) as piece:
            thread = d.thread()
            ranks = tl.num_ranks(ctx)
            to = (tl.rank(ctx) + 1) % ranks
            source = (tl.rank(ctx) + ranks - 1) % ranks
            if thread == 0:
                tl.signal(tl.remote(ctx, free[piece], source), epoch, dtype="int32")
                tl.wait(ctx, free[piece], "epoch", epoch, peer=to, site=1)
            d.sync()
            if how == "put_block":
                tl.put_block(tl.remote(ctx, inbox[piece * PIECE], to), x[piece * PIECE], 4 * PIECE, thread, threads)
            if how == "put_warp":
                tl.put_warp(tl.remote(ctx, inbox[piece * PIECE], to), x[piece * PIECE], 4 * PIECE)
            if how == "st":
                for i in T.serial(stores):
                    at = piece * PIECE + i * (PIECE // stores) + thread
                    tl.st(tl.remote(ctx, inbox[at], to), x[at], "relaxed", dtype="float32")
            d.sync()  # all threads have written before one of them tells
            if thread == 0:
                tl.signal(tl.remote(ctx, arrived[piece], to), epoch, dtype="int32")
                tl.wait(ctx, arrived[piece], "epoch", epoch, peer=source, site=2)

    return put_kernel


def get(d: Dialect, count: int, how: str):
    """Each block fetches its piece from the next rank, which must not change it before it was told that it was read."""
    pieces, threads = count // PIECE, 32 if how == "get_warp" else 128

    @T.prim_func
    def get_kernel(
        ctx: CTX,
        shown: T.Tensor((count,), "float32"),
        out: T.Tensor((count,), "float32"),
        ready: T.Tensor((pieces,), "int32"),
        was_read: T.Tensor((pieces,), "int32"),
        epoch: T.int32,
    ):
        with T.Kernel(pieces, threads=threads, prelude=d.prelude) as piece:
            thread = d.thread()
            ranks = tl.num_ranks(ctx)
            owner = (tl.rank(ctx) + 1) % ranks
            reader = (tl.rank(ctx) + ranks - 1) % ranks
            if thread == 0:
                tl.signal(tl.remote(ctx, ready[piece], reader), epoch, dtype="int32")
                tl.wait(ctx, ready[piece], "epoch", epoch, peer=owner, site=1)
            d.sync()
            if how == "get_block":
                tl.get_block(
                    out[piece * PIECE], tl.remote(ctx, shown[piece * PIECE], owner), 4 * PIECE, thread, threads
                )
            if how == "get_warp":
                tl.get_warp(out[piece * PIECE], tl.remote(ctx, shown[piece * PIECE], owner), 4 * PIECE)
            d.sync()
            if thread == 0:
                tl.signal(tl.remote(ctx, was_read[piece], owner), epoch, dtype="int32")
                tl.wait(ctx, was_read[piece], "epoch", epoch, peer=reader, site=2)

    return get_kernel


def meet(d: Dialect):
    """Each rank leaves a number with all others, all meet, each looks at what it was left. Two halves of `cells` alternate."""

    @T.prim_func
    def meet_kernel(
        ctx: CTX, cells: T.Tensor((2, tl.MAX_RANKS), "int32"), out: T.Tensor((tl.MAX_RANKS,), "int32"), epoch: T.int32
    ):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            thread = d.thread()
            me = tl.rank(ctx)
            if thread == 0:
                for to in T.serial(tl.num_ranks(ctx)):
                    tl.st(tl.remote(ctx, cells[epoch % 2, me], to), 100 * epoch + me, "relaxed", dtype="int32")
            d.sync()
            tl.barrier(ctx, 0, epoch, site=3)
            d.sync()
            if thread == 0:
                for source in T.serial(tl.num_ranks(ctx)):
                    out[source] = tl.ld(cells[epoch % 2, source], "relaxed")

    return meet_kernel


def kernels(d: Dialect, count: int = 1 << 16) -> list[Kernel]:
    puts = [Kernel(how, put(d, count, how)) for how in ("put_block", "put_warp", "st")]
    return [*puts, *(Kernel(how, get(d, count, how)) for how in ("get_block", "get_warp")), Kernel("sync", meet(d))]


def run(world: World) -> str:
    only = world.args.only
    if not 0 <= only <= len(NAMES):
        raise ValueError(f"--only {only}: there are 1 to {len(NAMES)}, and 0 for all")
    names = NAMES if only == 0 else NAMES[only - 1 : only]
    for name in names:
        if name == "sync":
            run_sync(world)
        else:
            run_copy(world, name)
    return f"{', '.join(names)}: what the next rank sent or showed arrived"


def run_copy(world: World, name: str) -> None:
    """One way to move `count` numbers along the ring."""
    count, group = world.args.count, world.group
    if count % PIECE:
        raise ValueError(f"--count {count} must be a multiple of {PIECE}")
    pushes = name in ("put_block", "put_warp", "st")
    kernel = world.compile((put if pushes else get)(world.dialect, count, name))
    shared = group.tensor((count,), torch.float32)  # the inbox, or what the others may look at
    begin, end = (group.tensor((count // PIECE,), torch.int32) for _ in range(2))
    calls = []
    for epoch in world.rounds():
        mine = world.random(count)
        if pushes:
            kernel(group.context, mine, shared, begin, end, epoch)
            out = world.keep(shared)
        else:
            out = torch.empty_like(mine)
            shared.copy_(mine)
            kernel(group.context, shared, out, begin, end, epoch)
        calls.append((mine, out))
    group.check()
    sender = (world.rank - 1 if pushes else world.rank + 1) % world.size
    for mine, out in calls:
        assert_equal(name, out, world.gather(mine)[sender])


def run_sync(world: World) -> None:
    """Writes of the host to a peer, then the barrier of the kernel."""
    group, ranks = world.group, torch.arange(world.size, dtype=torch.int32, device=world.device)
    cells, inbox = group.tensor((2, tl.MAX_RANKS), torch.int32), group.tensor((1000,), torch.float32)
    out = torch.zeros(tl.MAX_RANKS, dtype=torch.int32, device=world.device)
    kernel = world.compile(meet(world.dialect))
    for epoch in world.rounds():
        mine = world.random(1000)
        group.peers(inbox)[(world.rank + 1) % world.size].copy_(mine)
        group.barrier()
        assert_equal("a peer's tensor", inbox, world.gather(mine)[world.rank - 1])
        group.barrier()  # before anybody writes again
        kernel(group.context, cells, out, epoch)
        group.check()
        assert_equal("sync", out[: world.size], 100 * epoch + ranks)


EXAMPLE = Example(run, kernels, {"count": (1 << 16, 1 << 16), "only": (0, 0)})

if __name__ == "__main__":
    EXAMPLE.main()
