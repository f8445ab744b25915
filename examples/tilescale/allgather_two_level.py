"""All-gather over nodes: each shard crosses to another node once, and is handed on there while the rest of it is on its way.

A rank sends its shard to its counterparts, the ranks with its own number in the other nodes, and to the ranks of its node. What comes
from a counterpart it hands on to its node piece by piece. A hierarchy of links is used this way: the slow ones between nodes carry each
byte once, by all ranks at the same time, and hide behind the fast ones.
"""

import tilelang.language as T
import torch
from common import CTX, Example, Kernel, World, assert_equal
from two_level import PIECES, THREADS, ranks_per_node, send_off_node, send_piece

import tscompile.language as tl
from tscompile.language.dialects import Dialect


def all_gather(d: Dialect, count: int, width: int, items: int):
    """For `count` nodes of `width` ranks. In the order of their numbers, blocks send to counterparts, send the own shard to the node,
    or hand on. The latter two also wait for what the same block of another rank sends them, so when the kernel ends, all is there.

    A block waits only for blocks of lower numbers, or of its own number that send before they wait, so it does not matter how many
    blocks run at once. Two halves are enough: who has finished an epoch has heard of all ranks in it, so all have finished the last.
    """
    pieces = PIECES[d.name]
    ranks = count * width
    to_counterparts = pieces * (count - 1)
    to_node = to_counterparts + pieces * (width - 1)

    @T.prim_func
    def all_gather_kernel(
        ctx: CTX,
        gathered: T.Tensor((2, ranks, items), "float32"),
        arrived: T.Tensor((ranks, pieces), "int32"),
        node: T.int32,
        local: T.int32,
        half: T.int32,
        epoch: T.int32,
    ):
        with T.Kernel(to_node + to_counterparts * width, threads=THREADS[d.name], prelude=d.prelude) as block:
            thread = d.thread()
            me = node * width + local
            if block < to_counterparts:
                step = block // pieces + 1
                to = (node + step) % count * width + local
                piece = block % pieces
                send_off_node(d, ctx, gathered, half, me, gathered, half, me, arrived, piece, 4, to, epoch)
            elif block < to_node:
                number = block - to_counterparts
                step = number // pieces + 1
                piece = number % pieces
                to = node * width + (local + step) % width
                send_piece(d, ctx, gathered, half, me, gathered, half, me, arrived, piece, 4, to, epoch)
                if thread == 0:
                    source = node * width + (local + width - step) % width
                    tl.wait(ctx, arrived[source, piece], "epoch", epoch, peer=source, site=1)
            else:
                number = block - to_node
                there = (node + count - (number // (pieces * width) + 1)) % count  # the node that the piece comes from
                piece = number // width % pieces
                step = number % width
                if thread == 0:
                    counterpart = there * width + local
                    tl.wait(ctx, arrived[counterpart, piece], "epoch", epoch, peer=counterpart, site=2)
                d.sync()
                if step > 0:
                    owner = there * width + local
                    to = node * width + (local + step) % width
                    send_piece(d, ctx, gathered, half, owner, gathered, half, owner, arrived, piece, 4, to, epoch)
                    if thread == 0:
                        neighbour = (local + width - step) % width  # hands on what its own counterpart sent
                        source = there * width + neighbour
                        tl.wait(ctx, arrived[source, piece], "epoch", epoch, peer=node * width + neighbour, site=3)

    return all_gather_kernel


def kernels(d: Dialect) -> list[Kernel]:
    return [Kernel("all_gather", all_gather(d, 2, 2, 1 << 16))]


def run(world: World) -> str:
    items, group, nodes = world.args.items, world.group, world.group.nodes
    pieces = PIECES[world.dialect.name]
    if items % pieces:
        raise ValueError(f"--items {items} must be a multiple of {pieces}")
    kernel = world.compile(all_gather(world.dialect, nodes.count, nodes.ranks_per_node, items))
    gathered = group.tensor((2, world.size, items), torch.float32)
    arrived = group.tensor((world.size, pieces), torch.int32)

    def gather(shard: torch.Tensor, epoch: int) -> torch.Tensor:
        gathered[epoch % 2, world.rank].copy_(shard)
        kernel(group.context, gathered, arrived, nodes.node, nodes.local, epoch % 2, epoch)
        return gathered[epoch % 2]

    calls = []
    for epoch in world.rounds():
        shard = world.random(items)
        calls.append((shard, world.keep(gather(shard, epoch))))
    group.check()
    want = torch.empty(world.size, items, device=world.device)
    for shard, got in calls:
        world.gather_into(want.flatten(), shard)
        assert_equal("gathered", got, want)
    numbers = iter(range(world.args.rounds + 1, 1 << 30))
    ours = world.milliseconds(lambda: gather(shard, next(numbers)))
    theirs = world.milliseconds(lambda: world.gather_into(want.flatten(), shard))
    group.check()
    return (
        f"{nodes.count} nodes of {nodes.ranks_per_node}, {list(want.shape)} as {world.rival} has it; "
        f"{ours:.2f} ms, {world.rival} {theirs:.2f} ms"
    )


EXAMPLE = Example(run, kernels, {"items": (1 << 14, 12 << 20)}, ranks=4, ranks_per_node=ranks_per_node)

if __name__ == "__main__":
    EXAMPLE.main()
