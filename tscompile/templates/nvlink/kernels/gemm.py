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


def prelude(*more: str) -> str:
    """Text of the device functions, which stands in each kernel: those that all use, and the files `more`."""
    texts = (files(__package__).joinpath(name).read_text() for name in ("tile.h", *more))
    return (language_prelude("cuda") or "") + "".join(texts)


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


def bounded(stage: Any, config: Any) -> Any:
    """A stage's index into its buffers. TileLang folds a swizzled buffer's address only where it knows bounds: for a variable without
    any it computes quotients and remainders at every load, which makes the loading warp, and so narrow tiles, a third slower."""
    return T.max(T.min(stage, config.stages - 1), 0)


# A macro's code is expanded into the kernel that calls it; its arguments are TileLang buffers, variables and Python constants.


@T.macro
def advance(stage: T.Ref, phase: T.Ref, config: Any) -> None:
    """Go to the next stage of the ring; `phase` is the parity of the rounds. Counters, since a remainder takes longer than a load."""
    stage = stage + 1
    if stage == config.stages:
        stage = 0
        phase = phase ^ 1


@T.macro
def loads_issued(full: Any, stage: T.Ref, phase: T.Ref, config: Any) -> None:
    """Loading warp: the stage is full once its loads have landed; the next one is next."""
    if T.shuffle_elect(32):
        T.barrier_arrive(full[stage])
    advance(stage, phase, config)


@T.macro
def pass_end(full: Any, empty: Any, turn: Any, stage: Any, phase: Any) -> None:
    """Loading warp: there are no more tiles."""
    T.barrier_wait(empty[stage], phase ^ 1)
    call("tsk_pass", turn, -1)
    if T.shuffle_elect(32):
        T.barrier_arrive(full[stage])


@T.macro
def load_tile(
    A: Any, B: Any, row: Any, col: Any, As: Any, Bs: Any, full: Any, empty: Any, stage: T.Ref, phase: T.Ref, config: Any
) -> None:
    """Loading warp: rows [row, row + rows) of A and columns [col, col + tile_n) of B, all of k, stage by stage."""
    load_steps(A, B, row, col, 0, T.ceildiv(A.shape[1], config.tile_k), As, Bs, full, empty, stage, phase, config)


@T.macro
def load_steps(
    A: Any,
    B: Any,
    row: Any,
    col: Any,
    first: Any,
    steps: Any,
    As: Any,
    Bs: Any,
    full: Any,
    empty: Any,
    stage: T.Ref,
    phase: T.Ref,
    config: Any,
) -> None:
    """The same for `steps` steps of k, from step `first` on."""
    for i in T.serial(steps):
        k = first + i
        T.barrier_wait(empty[stage], phase ^ 1)
        T.tma_copy(
            A[row : row + config.rows, k * config.tile_k : (k + 1) * config.tile_k],
            As[bounded(stage, config), 0 : config.rows, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )
        if config.transposed:
            T.tma_copy(
                B[col : col + config.tile_n, k * config.tile_k : (k + 1) * config.tile_k],
                Bs[bounded(stage, config), :, :],
                barrier=full[stage],
                leader_scope_threads=32,
            )
        else:
            T.tma_copy(
                B[k * config.tile_k : (k + 1) * config.tile_k, col : col + config.tile_n],
                Bs[bounded(stage, config), :, :],
                barrier=full[stage],
                leader_scope_threads=32,
            )
        loads_issued(full, stage, phase, config)


@T.macro
def multiply(
    As: Any, Bs: Any, Cl: Any, full: Any, empty: Any, stage: T.Ref, phase: T.Ref, steps: Any, config: Any
) -> None:
    """Cl = the product of `steps` stages from `stage` on; one wgmma group stays in flight."""
    before = T.alloc_var("int32", init=0)
    T.clear(Cl)
    for k in T.serial(steps):
        T.barrier_wait(full[stage], phase)
        T.wgmma_gemm(
            As[bounded(stage, config), :, :],
            Bs[bounded(stage, config), :, :],
            Cl,
            transpose_A=config.left_transposed,
            transpose_B=config.transposed,
            policy=T.GemmWarpPolicy.FullRow,
        )
        if k > 0:
            T.wait_wgmma(1)
            T.barrier_arrive(empty[before])
        before = stage
        advance(stage, phase, config)
    T.wait_wgmma(0)
    T.barrier_arrive(empty[before])
