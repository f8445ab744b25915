"""Barriers among the blocks of one GPU.

The state is one uint64 in this GPU's memory, zeroed once when it is allocated (`torch.zeros(1, dtype=torch.int64)`) and never reset:
its high half counts the epochs that are over, its low half the arrivals of the next one. So it serves launch after launch and replays
of a captured graph. A wait that was given up leaves it behind: like the group, it is not to be used again.

These are calls of CUDA kernels only: on the C target blocks run one after another, so one that waits for a later one would never end.
"""

from __future__ import annotations

from typing import Any

from .addresses import Expr, Operand, address, call, cast, succeeded
from .dialects import only_cuda

_WHY = "blocks run one after another, and none may wait for a later one: make it two kernels"


def gpu_arrive(word: Operand, arrivals: Expr, index: Expr) -> Expr:
    """Arrive at a barrier without waiting, by one thread: the epoch (uint32) that is over when all have arrived, for `gpu_wait`.

    Release at gpu scope: what this thread wrote, and what others of its block wrote before a barrier with it (`T.sync_threads()`),
    is visible to who waits for the epoch. TMA needs `bulk_wait()` in the thread that issued it first. Lowers to
    `atom.release.gpu.global.add.u64`.

    Whoever arrives twice must wait in between (or otherwise know that the epoch is over): arrivals are counted, not told apart.

    Args:
        word: the barrier, 64 bits in this GPU's memory.
        arrivals: how many arrive in this epoch, uint32; the same for all of them.
        index: which of them this is, int32, 0 <= index < arrivals, each once: usually the number of the block.

    Raises:
        ValueError: on the C target.
    """
    only_cuda("gpu_arrive", _WHY)
    return call("gpu_arrive", "uint32", address(word), cast(arrivals, "uint32"), cast(index, "int32"))


def gpu_wait(ctx: Any, word: Operand, epoch: Expr, *, site: Expr = 0) -> Expr:
    """Wait until an epoch is over, by one thread: true when it is, false when the wait was given up.

    Acquire at gpu scope (polls `ld.acquire.gpu.global.u64`); other threads need a barrier with this one, TMA that reads the data
    `fence_async()`. Bounded and recorded as `wait`, with this rank as the one that was waited for. It returns at once where a later
    epoch is over already.

    Args:
        ctx: the context.
        word: as in `gpu_arrive`.
        epoch: what `gpu_arrive` returned, uint32. Who waits without having arrived counts: 1 for the first use of a zeroed word.
        site: for the record, as in `wait`.

    Raises:
        ValueError: on the C target.
    """
    only_cuda("gpu_wait", _WHY)
    return succeeded(
        call("gpu_wait", "int32", address(ctx), address(word), cast(epoch, "uint32"), cast(site, "uint32"))
    )


def grid_sync(ctx: Any, word: Operand, blocks: Expr, block: Expr, *, site: Expr = 0) -> Expr:
    """All blocks of the kernel meet, by one warp of each (all its lanes): true when all came, false when the wait was given up.

        T.sync_threads()
        if thread < 32:
            tl.grid_sync(ctx, word[0], blocks, block)
        T.sync_threads()

    With block barriers around it as here, what any thread of any block wrote before is visible to all threads afterwards
    (`gpu_arrive`, then `gpu_wait`, in lane 0). Any number of times in a kernel, with the same word.

    All blocks must be resident at once, or those that run wait for those that cannot start until the time-out. So launch at most
    (blocks that fit on one SM) x (SMs): with one block per SM, `torch.cuda.get_device_properties(device).multi_processor_count`,
    which every kernel fits that compiles; less what other kernels hold that do not end before this one does. `T.sync_grid` of TileLang
    makes the launch check this, and waits without bound.

    Args:
        ctx: the context.
        word: as in `gpu_arrive`; nothing else may arrive at it.
        blocks: of the whole grid, uint32.
        block: number of the calling block, int32, 0 <= block < blocks, over all axes of the grid.
        site: for the record, as in `wait`.

    Raises:
        ValueError: on the C target.
    """
    only_cuda("grid_sync", _WHY)
    numbers = (cast(blocks, "uint32"), cast(block, "int32"), cast(site, "uint32"))
    return succeeded(call("grid_sync", "int32", address(ctx), address(word), *numbers))
