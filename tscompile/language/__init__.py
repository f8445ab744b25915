"""Communication between GPUs inside TileLang kernels, used beside mainline `tilelang.language`:

    import tilelang.language as T
    import tscompile.language as tl

    @T.prim_func
    def push(ctx: T.Tensor((tl.WORDS,), "int64"), x: T.Tensor((1024,), "float32"), to: T.int32, epoch: T.uint32):
        with T.Kernel(1, threads=128, prelude=tl.prelude("cuda")) as _:
            thread = T.get_thread_binding()
            there = tl.peer(ctx, to, 0, (1024,), "float32")
            tl.put_block(there[0], x[0], 4096, thread, 128)
            T.sync_threads()
            if thread == 0:
                tl.signal(tl.peer(ctx, to, 0, (1,), "uint32", region="flags")[0], epoch)

Every call lowers to one inlined device function of cuda*.h (or to a function of cpu.c on TileLang's C target). None of them uses
`__syncthreads`, `blockDim` or `threadIdx`, so they may stand in any branch of a warp-specialised kernel, but for the block forms of
`tl.nvshmem`, which say so. Every wait is bounded.

`tl.nvshmem` has NVSHMEM's device calls.

Importing the package is quick: its functions import tilelang when the first of them is looked up.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .context import MAX_RANKS, RECORD_WORDS, WORDS
from .context import fill as fill_context
from .toolchain import load_tilelang

if TYPE_CHECKING:
    from . import nvshmem as nvshmem
    from .addresses import epoch, num_ranks, peer, peer_address, pointer, rank, remote
    from .bulk import bulk_get, bulk_put, bulk_wait, bulk_wait_read, mbarrier_init, mbarrier_wait
    from .compile import CudaArtifact, compile_cuda, compile_cuda_all
    from .dialects import Dialect, Target, dialect, prelude
    from .grid import gpu_arrive, gpu_wait, grid_sync
    from .group import SymmetricGroup
    from .host import dist_print, perf_fn
    from .memory import atomic_add, fence, fence_async, get_block, get_warp, put_block, put_warp, red_add
    from .nodes import Nodes
    from .sync import (
        aborted,
        barrier,
        barrier_blocks,
        block_arrive,
        block_sync,
        elect,
        lane,
        shuffle,
        signal,
        sync_blocks,
        wait,
        wait_eq,
        wait_ge,
        wait_gt,
        wait_le,
        wait_lt,
        wait_ne,
        warp_all,
        warp_any,
        warp_ballot,
        warp_sync,
        warp_wait,
    )
    from .toolchain import ToolchainError, nvcc, use_wheels
    from .topology import has_fullmesh_nvlink, supports_p2p_native_atomic
    from .words import ld, ld128, st, st128

_MODULES = {
    "addresses": "epoch num_ranks peer peer_address pointer rank remote",
    "bulk": "bulk_get bulk_put bulk_wait bulk_wait_read mbarrier_init mbarrier_wait",
    "compile": "CudaArtifact compile_cuda compile_cuda_all",
    "dialects": "Dialect Target dialect prelude",
    "grid": "gpu_arrive gpu_wait grid_sync",
    "group": "SymmetricGroup",
    "host": "dist_print perf_fn",
    "memory": "atomic_add fence fence_async get_block get_warp put_block put_warp red_add",
    "nodes": "Nodes",
    "sync": "aborted barrier barrier_blocks block_arrive block_sync elect lane shuffle signal sync_blocks wait wait_eq wait_ge"
    " wait_gt wait_le wait_lt wait_ne warp_all warp_any warp_ballot warp_sync warp_wait",
    "topology": "has_fullmesh_nvlink supports_p2p_native_atomic",
    "toolchain": "ToolchainError nvcc use_wheels",
    "words": "ld ld128 st st128",
}
_LIGHT = {
    "group",
    "host",
    "nodes",
    "toolchain",
    "topology",
}  # do not import tilelang, which use_wheels() must come before
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "MAX_RANKS",
    "RECORD_WORDS",
    "WORDS",
    "CudaArtifact",
    "Dialect",
    "Nodes",
    "SymmetricGroup",
    "Target",
    "ToolchainError",
    "aborted",
    "atomic_add",
    "barrier",
    "barrier_blocks",
    "block_arrive",
    "block_sync",
    "bulk_get",
    "bulk_put",
    "bulk_wait",
    "bulk_wait_read",
    "compile_cuda",
    "compile_cuda_all",
    "dialect",
    "dist_print",
    "elect",
    "epoch",
    "fence",
    "fence_async",
    "fill_context",
    "get_block",
    "get_warp",
    "gpu_arrive",
    "gpu_wait",
    "grid_sync",
    "has_fullmesh_nvlink",
    "lane",
    "ld",
    "ld128",
    "mbarrier_init",
    "mbarrier_wait",
    "num_ranks",
    "nvcc",
    "peer",
    "peer_address",
    "perf_fn",
    "pointer",
    "prelude",
    "put_block",
    "put_warp",
    "rank",
    "red_add",
    "remote",
    "shuffle",
    "signal",
    "st",
    "st128",
    "supports_p2p_native_atomic",
    "sync_blocks",
    "use_wheels",
    "wait",
    "wait_eq",
    "wait_ge",
    "wait_gt",
    "wait_le",
    "wait_lt",
    "wait_ne",
    "warp_all",
    "warp_any",
    "warp_ballot",
    "warp_sync",
    "warp_wait",
]


def __getattr__(name: str) -> Any:
    if name != "nvshmem" and name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _EXPORTS.get(name) not in _LIGHT:
        load_tilelang()
    if name == "nvshmem":
        return import_module(".nvshmem", __name__)
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "nvshmem"})
