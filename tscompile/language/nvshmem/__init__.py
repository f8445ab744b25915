"""NVSHMEM's device calls inside TileLang kernels, with bounds: `tl.nvshmem.putmem_block(...)`.

    d = tl.dialect("cuda", nvshmem="inline")

    @T.prim_func
    def push(ctx: T.Tensor((tl.WORDS,), "int64"), dst: T.Tensor((1024,), "float32"), src: T.Tensor((1024,), "float32"),
             arrived: T.Tensor((1,), "int64"), to: T.int32, epoch: T.int64):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            tl.nvshmem.putmem_signal_block(ctx, dst[0], src[0], 4096, arrived[0], epoch, tl.nvshmem.Amo.SIGNAL_SET, to)
            if T.get_thread_binding() == 0:
                tl.nvshmem.signal_wait_until(ctx, arrived[0], tl.nvshmem.CmpType.GE, epoch)

    with tl.SymmetricGroup() as group:
        dst, arrived = group.tensor((1024,), torch.float32), group.tensor((1,), torch.int64)
        d.compile(push)(group.nvshmem(), dst, src, arrived, (group.rank + 1) % group.size, 1)
        group.check()

Transfers and signals go through NVSHMEM; what waits is the language's own and ends. A PE is a rank of the context's group. With
`tl.dialect("cpu")` the same text runs on CPU ranks. Linking and limits: docs/language.md.
"""

from __future__ import annotations

from .collectives import (
    barrier,
    barrier_all,
    barrier_all_block,
    barrier_all_warp,
    barrier_block,
    barrier_warp,
    broadcast,
    broadcast_block,
    broadcast_warp,
    broadcastmem_block,
    fcollect,
    fcollect_block,
    fcollect_warp,
    sync,
    sync_all,
    sync_all_block,
    sync_all_warp,
    sync_block,
    sync_warp,
)
from .enums import Amo, CmpType, Team
from .signals import fence, get_pe, get_pe_num, quiet, signal_op, signal_wait_until
from .transfers import (
    getmem,
    getmem_block,
    getmem_nbi,
    getmem_nbi_block,
    getmem_nbi_warp,
    getmem_warp,
    int_p,
    putmem,
    putmem_block,
    putmem_nbi,
    putmem_nbi_block,
    putmem_nbi_warp,
    putmem_signal,
    putmem_signal_block,
    putmem_signal_nbi,
    putmem_signal_nbi_block,
    putmem_signal_nbi_warp,
    putmem_signal_warp,
    putmem_warp,
)

__all__ = [
    "Amo",
    "CmpType",
    "Team",
    "barrier",
    "barrier_all",
    "barrier_all_block",
    "barrier_all_warp",
    "barrier_block",
    "barrier_warp",
    "broadcast",
    "broadcast_block",
    "broadcast_warp",
    "broadcastmem_block",
    "fcollect",
    "fcollect_block",
    "fcollect_warp",
    "fence",
    "get_pe",
    "get_pe_num",
    "getmem",
    "getmem_block",
    "getmem_nbi",
    "getmem_nbi_block",
    "getmem_nbi_warp",
    "getmem_warp",
    "int_p",
    "putmem",
    "putmem_block",
    "putmem_nbi",
    "putmem_nbi_block",
    "putmem_nbi_warp",
    "putmem_signal",
    "putmem_signal_block",
    "putmem_signal_nbi",
    "putmem_signal_nbi_block",
    "putmem_signal_nbi_warp",
    "putmem_signal_warp",
    "putmem_warp",
    "quiet",
    "signal_op",
    "signal_wait_until",
    "sync",
    "sync_all",
    "sync_all_block",
    "sync_all_warp",
    "sync_block",
    "sync_warp",
]
