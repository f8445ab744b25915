"""What the fused GEMM kernels share: the shape of a kernel and its compiled form.

A kernel is one persistent CTA per SM. Warp 0 claims tiles from a counter in the order of a table and loads their stages by TMA; two
warpgroups multiply; warp 1 signals finished tiles; warps 2 and 3 copy what arrives to outputs. Sizes are run-time arguments, so one
compiled kernel serves every shape of its layout. The design and its measurements: docs/dev/gpu.md.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import tilelang.language as T

from ....language import prelude as language_prelude

THREADS = 384
ROW, COL, ROWS, OWNER, INDEX, OUT_ROW, MASK, GROUP = range(8)  # words of a row in the tile table: tiles.py
PASS_CONFIGS = {
    # All synchronisation is explicit (warp-specialised by hand), and all tile copies are TMA, which checks bounds.
    "tl.disable_thread_storage_sync": True,
    "tl.disable_safe_memory_legalize": True,
}


def prelude() -> str:
    """Text of the device functions, which stands in each kernel."""
    return (language_prelude("cuda") or "") + files(__package__).joinpath("tile.h").read_text()


def call(name: str, *args: Any) -> Any:
    """Call a device function of the prelude."""
    return T.call_extern("handle", name, *args)


def value(name: str, *args: Any) -> Any:
    """The int that a device function of the prelude returns."""
    return T.call_extern("int32", name, *args)


def word(table: Any, tile: Any, which: int) -> Any:
    """A word of a tile's row in the table."""
    return value("tsk_word", table, tile, which)


def ref(element: Any) -> Any:
    """Address of an element. Always for writing, too: what is only read becomes `const __restrict__`, and then the read-only cache
    serves it, although peers write it while the kernel runs."""
    return T.access_ptr(element, "rw")


# A macro's code is expanded into the kernel that calls it; its arguments are TileLang buffers, variables and Python constants.


@T.macro
def load_rows(A: Any, row: Any, k: Any, As: Any, full: Any, stage: Any, config: Any) -> None:
    """Load rows [row, row + tile_m) of columns [k, k + tile_k) of A into a stage."""
    T.tma_copy(
        A[row : row + config.tile_m, k : k + config.tile_k],
        As[stage, :, :],
        barrier=full[stage],
        leader_scope_threads=32,
    )


@T.macro
def load_columns(B: Any, col: Any, k: Any, Bs: Any, full: Any, stage: Any, config: Any) -> None:
    """Load columns [col, col + tile_n) of the right operand, steps [k, k + tile_k), into a stage."""
    if config.transposed:
        T.tma_copy(
            B[col : col + config.tile_n, k : k + config.tile_k],
            Bs[stage, :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )
    else:
        T.tma_copy(
            B[k : k + config.tile_k, col : col + config.tile_n],
            Bs[stage, :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )


@T.macro
def load_block(
    A: Any,
    block: Any,
    at: Any,
    k: Any,
    As: Any,
    full: Any,
    stage: Any,
    k_first: Any,
    along_k: Any,
    size: Any,
    config: Any,
) -> None:
    """Load rows or columns [at, at + size), steps [k, k + tile_k) of an operand that consists of blocks into a stage.

    A is [blocks, k, rows] (k_first) or [rows, blocks, k] if the blocks lie along k: then `k` counts from the start of the block.
    Otherwise it is [k, blocks, rows] (k_first) or [blocks, rows, k], and `at` does. What lies beyond the block is loaded as zeros.
    """
    if k_first and along_k:
        T.tma_copy(
            A[block, k : k + config.tile_k, at : at + size],
            As[stage, :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )
    elif k_first:
        T.tma_copy(
            A[k : k + config.tile_k, block, at : at + size],
            As[stage, :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )
    elif along_k:
        T.tma_copy(
            A[at : at + size, block, k : k + config.tile_k],
            As[stage, :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )
    else:
        T.tma_copy(
            A[block, at : at + size, k : k + config.tile_k],
            As[stage, :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )


@T.macro
def multiply(As: Any, Bs: Any, Cl: Any, full: Any, empty: Any, first: Any, steps: Any, config: Any) -> None:
    """Cl = the product of `steps` stages from stage number `first` on; one wgmma group stays in flight."""
    T.clear(Cl)
    for k in T.serial(steps):
        T.barrier_wait(full[(first + k) % config.stages], ((first + k) // config.stages) & 1)
        T.wgmma_gemm(
            As[(first + k) % config.stages, :, :],
            Bs[(first + k) % config.stages, :, :],
            Cl,
            transpose_A=config.left_transposed,
            transpose_B=config.transposed,
            policy=T.GemmWarpPolicy.FullRow,
        )
        if k > 0:
            T.wait_wgmma(1)
            T.barrier_arrive(empty[(first + k - 1) % config.stages])
    T.wait_wgmma(0)
    T.barrier_arrive(empty[(first + steps - 1) % config.stages])
