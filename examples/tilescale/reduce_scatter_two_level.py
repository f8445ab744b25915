"""Reduce-scatter over nodes: a node adds up what its ranks have for another node, and sends one sum instead of all of it.

A rank collects from its node the blocks for its counterparts (the ranks with its own number in the other nodes) and for itself. Sums
for other nodes come first and travel piece by piece while later ones are added up. All sums are float32 and in one order: within a node
the order of its ranks, then the order of nodes. So the result does not depend on what arrives when, to the last bit.
"""

import tilelang.language as T
import torch
from common import CTX, MATMUL, Example, Kernel, World, assert_close, assert_equal
from two_level import PIECES, THREADS, ranks_per_node, send_off_node, send_piece

import tscompile.language as tl
from tscompile.language.dialects import Dialect


def reduce_scatter(d: Dialect, count: int, width: int, items: int):
    """For `count` nodes of `width` ranks. In the order of their numbers, blocks send to the node, add up for a counterpart and send it
    the sum, or add up for this rank. None waits for one of a higher number, so it does not matter how many run at once.

    Two halves alternate. They are enough: a rank writes into memory of its node and of its counterparts, each of which has sent it
    something in the epoch before, and had done with the one before that by then.
    """
    m, threads, pieces = MATMUL[d.name], THREADS[d.name], PIECES[d.name]
    piece_items = items // pieces
    ranks, others = count * width, max(width - 1, 1)

    @T.macro
    def wait_for_node(ctx, shared, node, local, for_node, piece, epoch):
        """Until the pieces for a node have come from all ranks of this one."""
        for other in T.serial(width):
            if other != local:
                peer = node * width + other
                tl.wait(ctx, shared[for_node * width + other, piece], "epoch", epoch, peer=peer, site=1)

    @T.macro
    def add_node(x, inbox, local, half, for_node, item, part):
        """Add up what the ranks of this node have for a counterpart, or for this rank itself."""
        part[0] = 0.0
        for other in T.serial(width):
            if other == local:
                part[0] = part[0] + T.cast(x[0, for_node * width + other, item], "float32")
            else:
                part[0] = part[0] + T.cast(inbox[half, for_node * width + other, item], "float32")

    @T.prim_func
    def reduce_scatter_kernel(
        ctx: CTX,
        x: T.Tensor((1, ranks, items), m.dtype),
        out: T.Tensor((items,), m.dtype),
        inbox: T.Tensor((2, ranks, items), m.dtype),
        sums: T.Tensor((2, count, items), "float32"),
        partials: T.Tensor((2, count, items), "float32"),
        shared: T.Tensor((ranks, pieces), "int32"),
        arrived: T.Tensor((count, pieces), "int32"),
        node: T.int32,
        local: T.int32,
        half: T.int32,
        epoch: T.int32,
    ):
        with T.Kernel(pieces * ranks, threads=threads, prelude=d.prelude) as block:
            thread = d.thread()
            piece = block % pieces
            turn = block // pieces
            total = T.alloc_local((1,), "float32")
            part = T.alloc_local((1,), "float32")
            if turn < ranks - count:
                for_node = (node + turn // others + 1) % count  # the own one last
                neighbour = (local + turn % others + 1) % width
                to = node * width + neighbour
                from_block = for_node * width + neighbour
                to_block = for_node * width + local
                send_piece(d, ctx, x, 0, from_block, inbox, half, to_block, shared, piece, m.item_bytes, to, epoch)
            elif turn < ranks - 1:
                for_node = (node + turn - (ranks - count) + 1) % count
                if thread == 0:
                    wait_for_node(ctx, shared, node, local, for_node, piece, epoch)
                d.sync()
                for i in T.serial(piece_items // threads):
                    item = piece * piece_items + i * threads + thread
                    add_node(x, inbox, local, half, for_node, item, part)
                    sums[half, for_node, item] = part[0]
                d.sync()
                to = for_node * width + local
                send_off_node(d, ctx, sums, half, for_node, partials, half, node, arrived, piece, 4, to, epoch)
            else:
                if thread == 0:
                    wait_for_node(ctx, shared, node, local, node, piece, epoch)
                    for other in T.serial(count):
                        if other != node:
                            peer = other * width + local
                            tl.wait(ctx, arrived[other, piece], "epoch", epoch, peer=peer, site=2)
                d.sync()
                for i in T.serial(piece_items // threads):
                    item = piece * piece_items + i * threads + thread
                    total[0] = 0.0
                    for other in T.serial(count):
                        if other == node:
                            add_node(x, inbox, local, half, node, item, part)
                        else:
                            part[0] = partials[half, other, item]
                        total[0] = total[0] + part[0]
                    out[item] = total[0]

    return reduce_scatter_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel("reduce_scatter", reduce_scatter(d, 2, 2, 1 << 16))]


def in_order(blocks: list[torch.Tensor], width: int) -> torch.Tensor:
    """The sum of one block of every rank, as the kernel orders it."""
    total = torch.zeros_like(blocks[0], dtype=torch.float32)
    for first in range(0, len(blocks), width):
        part = torch.zeros_like(total)
        for block in blocks[first : first + width]:
            part += block.float()
        total += part
    return total


def run(world: World) -> str:
    args, group, nodes = world.args, world.group, world.group.nodes
    pieces = PIECES[world.dialect.name]
    unit = pieces * THREADS[world.dialect.name]
    if args.items % unit:
        raise ValueError(f"--items {args.items} must be a multiple of {unit}")
    kernel = world.compile(reduce_scatter(world.dialect, nodes.count, nodes.ranks_per_node, args.items))
    inbox = group.tensor((2, world.size, args.items), world.dtype)
    sums, partials = (group.tensor((2, nodes.count, args.items), torch.float32) for _ in range(2))
    shared = group.tensor((world.size, pieces), torch.int32)
    arrived = group.tensor((nodes.count, pieces), torch.int32)
    out = torch.empty(args.items, dtype=world.dtype, device=world.device)

    def scatter(x: torch.Tensor, epoch: int) -> torch.Tensor:
        kernel(
            group.context,
            x[None],
            out,
            inbox,
            sums,
            partials,
            shared,
            arrived,
            nodes.node,
            nodes.local,
            epoch % 2,
            epoch,
        )
        return out

    calls = []
    for epoch in world.rounds():
        x = world.random(world.size, args.items, dtype=world.dtype)
        calls.append((x, world.keep(scatter(x, epoch))))
    group.check()
    theirs = torch.empty(args.items, device=world.device)
    for x, got in calls:
        blocks = [everything[world.rank] for everything in world.gather(x)]
        assert_equal("sum in order", got, in_order(blocks, nodes.ranks_per_node).to(got.dtype))
        world.reduce_scatter(theirs, x.float().flatten())
        assert_close("sum", got, theirs)
    numbers = iter(range(args.rounds + 1, 1 << 30))
    ours_ms = world.milliseconds(lambda: scatter(x, next(numbers)))
    there = torch.empty_like(out)
    theirs_ms = world.milliseconds(lambda: world.reduce_scatter(there, x.flatten()))
    group.check()
    return (
        f"{nodes.count} nodes of {nodes.ranks_per_node}, [{args.items}] of each rank's sum, in order and as {world.rival} has it; "
        f"{ours_ms:.2f} ms, {world.rival} {theirs_ms:.2f} ms"
    )


EXAMPLE = Example(run, kernels, {"items": (1 << 13, 12 << 20)}, ranks=4, ranks_per_node=ranks_per_node)

if __name__ == "__main__":
    EXAMPLE.main()
