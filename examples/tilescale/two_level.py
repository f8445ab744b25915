"""What allgather_two_level.py and reduce_scatter_two_level.py share: ranks in nodes, and the one function that crosses between them.

`--ranks-per-node N` groups the ranks of one machine into virtual nodes (tscompile.language.Nodes says what those cannot show). Tensors
are [2, blocks, items]: two halves that alternate with the epoch, one block for each rank or node. A block moves in pieces, each with a
flag, so that what has arrived goes on while the rest is on its way.
"""

import tilelang.language as T

import tscompile.language as tl

PIECES = {"cuda": 64, "cpu": 8}
THREADS = {"cuda": 256, "cpu": 1}


@T.macro
def send_piece(d, ctx, source, from_half, from_block, into, half, block, arrived, piece, item_bytes, to, epoch):
    """By all threads of a block: a piece of `source[from_half, from_block]` to `into[half, block]` of rank `to`, then its flag."""
    items = source.shape[2] // PIECES[d.name]
    there = tl.remote(ctx, into[half, block, piece * items], to)
    tl.put_block(there, source[from_half, from_block, piece * items], items * item_bytes, d.thread(), THREADS[d.name])
    d.sync()
    if d.thread() == 0:
        tl.signal(tl.remote(ctx, arrived[block, piece], to), epoch, dtype="int32")


@T.macro
def send_off_node(d, ctx, source, from_half, from_block, into, half, block, arrived, piece, item_bytes, to, epoch):
    """`send_piece` to a rank of another node. All that leaves a node leaves here, from symmetric memory to symmetric memory and with
    its flag behind it. Where nodes are machines, a put with a signal over the network takes its place, as NVSHMEM has it."""
    send_piece(d, ctx, source, from_half, from_block, into, half, block, arrived, piece, item_bytes, to, epoch)


def ranks_per_node(ranks: int) -> int:
    """Unless the option says it: two nodes, or nodes of one rank if their number is odd."""
    return 1 if ranks % 2 else ranks // 2
