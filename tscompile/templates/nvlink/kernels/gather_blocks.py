"""Kernel of all_gather_matmul for a gathered operand on any side, whose ranks are summed over or lie in the result.

all_gather.py has the kernel for gathered rows on the left: it takes several weights, and its tiles may span ranks. Here the
gathered operand is a row of blocks, one per piece and rank. TMA reads them through maps of three dimensions, so that what a
stage takes beyond the end of a block is zero and not the next rank's.
"""

from typing import Any

import tilelang.language as T

from .config import DTYPE_CODES, SMS, BlocksConfig
from .gemm import (
    COL,
    GROUP,
    INDEX,
    MASK,
    OUT_ROW,
    OWNER,
    ROW,
    ROWS,
    THREADS,
    bounded,
    call,
    loads_issued,
    multiply,
    pass_end,
    prelude,
    ref,
    value,
    word,
)

BLOCK, PLACE, COLS = INDEX, OUT_ROW, GROUP  # what these words of the table are called here (tiles.py)


def blocked(k_first: bool, along_k: bool, blocks: Any, inner: Any, width: Any) -> tuple[Any, Any, Any]:
    """Shape of an operand whose blocks of `inner` rows or columns lie along k or along its other axis."""
    return (blocks, inner, width) if k_first == along_k else (width, blocks, inner)


@T.macro
def load_block(
    A: Any,
    block: Any,
    at: Any,
    k: Any,
    Ss: Any,
    full: Any,
    stage: Any,
    k_first: Any,
    along_k: Any,
    size: Any,
    config: Any,
) -> None:
    """Load rows or columns [at, at + size), steps [k, k + tile_k) of an operand that consists of blocks into a stage of Ss.

    A is [blocks, k, rows] (k_first) or [rows, blocks, k] if the blocks lie along k: then `k` counts from the start of the block.
    Otherwise it is [k, blocks, rows] (k_first) or [blocks, rows, k], and `at` does. What lies beyond the block is loaded as zeros.
    """
    if k_first and along_k:
        T.tma_copy(
            A[block, k : k + config.tile_k, at : at + size],
            Ss[bounded(stage, config), :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )
    elif k_first:
        T.tma_copy(
            A[k : k + config.tile_k, block, at : at + size],
            Ss[bounded(stage, config), :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )
    elif along_k:
        T.tma_copy(
            A[at : at + size, block, k : k + config.tile_k],
            Ss[bounded(stage, config), :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )
    else:
        T.tma_copy(
            A[block, at : at + size, k : k + config.tile_k],
            Ss[bounded(stage, config), :, :],
            barrier=full[stage],
            leader_scope_threads=32,
        )


@T.macro
def load_steps(
    A: Any,
    B: Any,
    block: Any,
    local_block: Any,
    at: Any,
    local_at: Any,
    steps: Any,
    Gs: Any,
    Ls: Any,
    full: Any,
    empty: Any,
    stage: T.Ref,
    phase: T.Ref,
    config: Any,
) -> None:
    """Loading warp: all of k of a block of the gathered operand A and of one of the local operand B, stage by stage."""
    for k in T.serial(steps):
        T.barrier_wait(empty[stage], phase ^ 1)
        load_block(
            A,
            block,
            at,
            k * config.tile_k,
            Gs,
            full,
            stage,
            config.k_first[0],
            config.contracts,
            config.tiles[0],
            config,
        )
        load_block(
            B,
            local_block,
            local_at,
            k * config.tile_k,
            Ls,
            full,
            stage,
            config.k_first[1],
            True,
            config.tiles[1],
            config,
        )
        loads_issued(full, stage, phase, config)


def gather_blocks_kernel(config: BlocksConfig, collects: bool) -> Any:
    """prim_func of C = L @ R (+ V), L or R gathered.

    Args:
        config: layouts and tile.
        collects: idle warps copy the gathered tensor to an output of its own.

    Arguments of the kernel: X the own shard and A the slot that the peers write, of shapes blocked(..., pieces or pieces * ranks,
    inner, width); B the local operand, blocked along k, in one block unless the ranks are summed over; then addresses: C of [M, N],
    V of a bias [N], the gathered tensor, the table of `tiles` rows (if the ranks are summed over, then a row for each block), the
    context, the counters; the rest as in all_gather.py.
    """
    dtype, bias, contracts = config.dtype, config.bias, config.contracts
    bM, bN, bK, S = config.tile_m, config.tile_n, config.tile_k, config.stages
    NF, DT = config.registers, DTYPE_CODES[config.dtype]
    in_rows, in_columns = config.gathered_left and not contracts, not config.gathered_left and not contracts
    blocks, own_blocks, inner, width = (
        T.dynamic("blocks"),
        T.dynamic("own_blocks"),
        T.dynamic("inner"),
        T.dynamic("width"),
    )
    k_blocks, k_inner, free = T.dynamic("k_blocks"), T.dynamic("k_inner"), T.dynamic("free")
    span = width if contracts else blocks * inner  # of the gathered operand in the result
    N = free if config.gathered_left else span
    gathered_first, local_first = config.k_first
    text = prelude()

    @T.prim_func
    def gather_blocks_gemm(
        X: T.Tensor(blocked(gathered_first, contracts, own_blocks, inner, width), dtype),
        A: T.Tensor(blocked(gathered_first, contracts, blocks, inner, width), dtype),
        B: T.Tensor(blocked(local_first, True, k_blocks, k_inner, free), dtype),
        C: T.int64,
        V: T.int64,
        gathered: T.int64,
        table: T.int64,
        tiles: T.int32,
        context: T.int64,
        counters: T.int64,
        pieces: T.int32,
        shard_bytes: T.int64,
        epoch: T.int32,
        site: T.int32,
        ack: T.int32,
    ):
        with T.Kernel(SMS, threads=THREADS, prelude=text):
            As = T.alloc_shared((S, bK, bM) if config.left_transposed else (S, bM, bK), dtype)
            Bs = T.alloc_shared((S, bN, bK) if config.transposed else (S, bK, bN), dtype)
            Cl = T.alloc_fragment((bM, bN), "float32")
            full = T.alloc_barrier([1] * S)
            empty = T.alloc_barrier([256] * S)
            thread = T.get_thread_binding()
            stage = T.alloc_var("int32")
            phase = T.alloc_var("int32")
            turn = T.alloc_var("int32")
            tile = T.alloc_var("int32")
            ready = T.alloc_var("int32")
            row = T.alloc_var("int32")
            col = T.alloc_var("int32")
            at = T.alloc_var("int32")
            own = T.alloc_var("int32")
            block = T.alloc_var("int32")
            place = T.alloc_var("int32")
            steps = T.ceildiv(k_inner, bK)
            stage = 0
            phase = 0
            turn = 0
            ready = 0
            if thread < 32:
                tile = value("tsk_claim", counters, tiles)
                while tile >= 0:
                    row = word(table, tile, ROW)
                    col = word(table, tile, COL)
                    for j in T.serial(k_blocks):
                        at = word(table, tile, BLOCK) + j if contracts else tile
                        own = word(table, at, OWNER)
                        block = word(table, at, BLOCK)
                        place = word(table, at, PLACE) if contracts else 0
                        T.barrier_wait(empty[stage], phase ^ 1)
                        if j == 0:
                            call("tsk_pass", turn, tile)
                        ready = value("tsk_wait_ranks", context, word(table, at, MASK), ready, epoch, site)
                        # Two loops, as in all_gather.py.
                        if config.gathered_left:
                            if own != 0:
                                load_steps(
                                    X, B, block, place, row, col, steps, As, Bs, full, empty, stage, phase, config
                                )
                            else:
                                load_steps(
                                    A, B, block, place, row, col, steps, As, Bs, full, empty, stage, phase, config
                                )
                        elif own != 0:
                            load_steps(X, B, block, place, col, row, steps, Bs, As, full, empty, stage, phase, config)
                        else:
                            load_steps(A, B, block, place, col, row, steps, Bs, As, full, empty, stage, phase, config)
                    turn = turn + 1
                    # Not sooner: a CTA that holds a tile which it cannot start yet keeps it from the others.
                    tile = value("tsk_claim", counters, tiles)
                pass_end(full, empty, turn, stage, phase)
            elif thread >= 128:
                T.barrier_wait(full[0], 0)
                tile = value("tsk_passed", 0)
                while tile >= 0:
                    multiply(As, Bs, Cl, full, empty, stage, phase, k_blocks * steps, config)
                    row = word(table, tile, PLACE if in_rows else ROW)
                    col = word(table, tile, PLACE if in_columns else COL)
                    if bias:
                        call("TSK_BIAS", NF, DT, V, col, N)
                    call(
                        "TSK_STORE_BLOCK",
                        NF,
                        DT,
                        C,
                        row,
                        col,
                        word(table, tile, ROWS),
                        col + word(table, tile, COLS),
                        N,
                    )
                    turn = turn + 1
                    T.barrier_wait(full[stage], phase)
                    tile = value("tsk_passed", turn)
                if collects:
                    call("tsk_join")
                if value("tsk_last", counters) != 0:
                    if value("tsk_aborted", context) != 0:
                        call("tsk_report", context)
                        call("tsk_fill_nan", C, T.cast(span, "int64") * free * 2)
                        if collects:
                            call("tsk_fill_nan", gathered, T.cast(blocks, "int64") * inner * width * 2)
                    call("tsk_finish", context, counters, epoch, ack)
            elif thread >= 64:
                if collects:
                    call(
                        "tsk_collect_shards",
                        context,
                        gathered,
                        ref(X[0, 0, 0]),
                        shard_bytes,
                        pieces,
                        epoch,
                        site,
                    )
                    call("tsk_join")

    return gather_blocks_gemm
