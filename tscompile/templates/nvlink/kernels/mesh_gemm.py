"""Kernel of mesh_matmul: a GEMM whose operands are both gathered, each in a group of its own.

Like gather_blocks.py, but for the operand that is local there: it comes from peers, too. A tile adds up panels of k, and waits at each
one for the chunks of either operand that it takes (mesh_tiles.py has the table and says what a chunk is).
"""

from typing import Any

import tilelang.language as T

from .config import DTYPE_CODES, SMS, MeshConfig
from .gather_blocks import blocked, load_block
from .gemm import (
    GROUP,
    INDEX,
    MASK,
    OUT_ROW,
    OWNER,
    ROW,
    ROWS,
    THREADS,
    call,
    loads_issued,
    multiply,
    pass_end,
    prelude,
    ref,
    value,
    word,
)

AT, SIZE, CHUNK = ROW, ROWS, GROUP  # what these words of the table are called here


@T.macro
def load_panel(
    A: Any,
    B: Any,
    block: Any,
    other_block: Any,
    row: Any,
    col: Any,
    k: Any,
    other_k: Any,
    steps: Any,
    As: Any,
    Bs: Any,
    full: Any,
    empty: Any,
    stage: T.Ref,
    phase: T.Ref,
    config: Any,
) -> None:
    """Loading warp: `steps` steps of a block of A from `k` on and of one of B from `other_k` on, stage by stage."""
    for i in T.serial(steps):
        T.barrier_wait(empty[stage], phase ^ 1)
        load_block(
            A,
            block,
            row,
            k + i * config.tile_k,
            As,
            full,
            stage,
            config.k_first[0],
            config.contracts[0],
            config.tile_m,
            config,
        )
        load_block(
            B,
            other_block,
            col,
            other_k + i * config.tile_k,
            Bs,
            full,
            stage,
            config.k_first[1],
            config.contracts[1],
            config.tile_n,
            config,
        )
        loads_issued(full, stage, phase, config)


def mesh_gemm_kernel(config: MeshConfig, collects: tuple[bool, bool]) -> Any:
    """prim_func of C = L @ R (+ V), both gathered.

    Args:
        config: layouts and tile.
        collects: idle warps copy the gathered left operand to an output of its own, and the right one.

    Arguments of the kernel: of the left operand, X the own shard and A the slot that the peers write, of shapes blocked(..., own blocks
    or all, inner, width); Y and B likewise of the right one; then addresses: C of [M, N], V of a bias [N], the gathered operands, the
    table of `tiles` tiles and `panels` panels of `steps` steps of k in all, the contexts of both groups, the counters; `pieces`,
    `shard_bytes` and `chunks` of either operand as tsk_collect_slices takes them (a chunk has the flags of a slice); `epoch` of either
    group; `site` and `ack` as tile.h says.
    """
    dtype, bias, (left_contracts, right_contracts) = config.dtype, config.bias, config.contracts
    bM, bN, bK, S = config.tile_m, config.tile_n, config.tile_k, config.stages
    NF, DT = config.registers, DTYPE_CODES[config.dtype]
    own_blocks, blocks, inner, width = (
        T.dynamic("own_blocks"),
        T.dynamic("blocks"),
        T.dynamic("inner"),
        T.dynamic("width"),
    )
    r_own_blocks, r_blocks = T.dynamic("r_own_blocks"), T.dynamic("r_blocks")
    r_inner, r_width = T.dynamic("r_inner"), T.dynamic("r_width")
    M = width if left_contracts else blocks * inner
    N = r_width if right_contracts else r_blocks * r_inner
    left_first, right_first = config.k_first
    text = prelude("push.h")

    @T.prim_func
    def mesh_gemm(
        X: T.Tensor(blocked(left_first, left_contracts, own_blocks, inner, width), dtype),
        A: T.Tensor(blocked(left_first, left_contracts, blocks, inner, width), dtype),
        Y: T.Tensor(blocked(right_first, right_contracts, r_own_blocks, r_inner, r_width), dtype),
        B: T.Tensor(blocked(right_first, right_contracts, r_blocks, r_inner, r_width), dtype),
        C: T.int64,
        V: T.int64,
        gathered: T.int64,
        r_gathered: T.int64,
        table: T.int64,
        tiles: T.int32,
        panels: T.int32,
        steps: T.int32,
        context: T.int64,
        r_context: T.int64,
        counters: T.int64,
        pieces: T.int32,
        r_pieces: T.int32,
        shard_bytes: T.int64,
        r_shard_bytes: T.int64,
        chunks: T.int32,
        r_chunks: T.int32,
        epoch: T.int32,
        r_epoch: T.int32,
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
            ready = T.alloc_var("int64")
            r_ready = T.alloc_var("int64")
            row = T.alloc_var("int32")
            col = T.alloc_var("int32")
            panel = T.alloc_var("int32")
            at = T.alloc_var("int32")
            r_at = T.alloc_var("int32")
            own = T.alloc_var("int32")
            block = T.alloc_var("int32")
            r_block = T.alloc_var("int32")
            k = T.alloc_var("int32")
            r_k = T.alloc_var("int32")
            count = T.alloc_var("int32")
            broken = T.alloc_var("int32")
            stage = 0
            phase = 0
            turn = 0
            ready = T.int64(0)
            r_ready = T.int64(0)
            if thread < 32:
                tile = value("tsk_claim", counters, tiles)
                while tile >= 0:
                    row = word(table, 2 * tile, AT)
                    col = word(table, 2 * tile + 1, AT)
                    for j in T.serial(panels):
                        panel = 2 * (tiles + j)
                        at = panel if left_contracts else 2 * tile
                        r_at = (panel if right_contracts else 2 * tile) + 1
                        own = word(table, at, OWNER) + 2 * word(table, r_at, OWNER)
                        block = word(table, at, INDEX)
                        r_block = word(table, r_at, INDEX)
                        k = word(table, panel, AT)
                        r_k = word(table, panel + 1, AT)
                        count = word(table, panel, SIZE)
                        T.barrier_wait(empty[stage], phase ^ 1)
                        if j == 0:
                            call("tsk_pass", turn, tile)
                        ready = T.call_extern(
                            "int64",
                            "tsk_wait_slice",
                            context,
                            word(table, at, MASK),
                            word(table, 2 * tile, CHUNK),
                            ready,
                            epoch,
                            site,
                        )
                        r_ready = T.call_extern(
                            "int64",
                            "tsk_wait_slice",
                            r_context,
                            word(table, r_at, MASK),
                            word(table, 2 * tile + 1, CHUNK),
                            r_ready,
                            r_epoch,
                            site,
                        )
                        # Four loops, as there are two in all_gather.py.
                        if own == 0:
                            load_panel(
                                A, B, block, r_block, row, col, k, r_k, count, As, Bs, full, empty, stage, phase, config
                            )
                        elif own == 1:
                            load_panel(
                                X, B, block, r_block, row, col, k, r_k, count, As, Bs, full, empty, stage, phase, config
                            )
                        elif own == 2:
                            load_panel(
                                A, Y, block, r_block, row, col, k, r_k, count, As, Bs, full, empty, stage, phase, config
                            )
                        else:
                            load_panel(
                                X, Y, block, r_block, row, col, k, r_k, count, As, Bs, full, empty, stage, phase, config
                            )
                    turn = turn + 1
                    # Not sooner: a CTA that holds a tile which it cannot start yet keeps it from the others.
                    tile = value("tsk_claim", counters, tiles)
                pass_end(full, empty, turn, stage, phase)
            elif thread >= 128:
                T.barrier_wait(full[0], 0)
                tile = value("tsk_passed", 0)
                while tile >= 0:
                    multiply(As, Bs, Cl, full, empty, stage, phase, steps, config)
                    row = word(table, 2 * tile, OUT_ROW)
                    col = word(table, 2 * tile + 1, OUT_ROW)
                    if bias:
                        call("TSK_BIAS", NF, DT, V, col, N)
                    call(
                        "TSK_STORE_BLOCK",
                        NF,
                        DT,
                        C,
                        row,
                        col,
                        word(table, 2 * tile, SIZE),
                        col + word(table, 2 * tile + 1, SIZE),
                        N,
                    )
                    turn = turn + 1
                    T.barrier_wait(full[stage], phase)
                    tile = value("tsk_passed", turn)
                if collects[0] or collects[1]:
                    call("tsk_join")
                if value("tsk_last", counters) != 0:
                    broken = 0
                    if value("tsk_aborted", context) != 0:
                        call("tsk_report", context)
                        broken = 1
                    if value("tsk_aborted", r_context) != 0:
                        call("tsk_report", r_context)
                        broken = 1
                    if broken != 0:
                        call("tsk_fill_nan", C, T.cast(M, "int64") * N * 2)
                        if collects[0]:
                            call("tsk_fill_nan", gathered, T.cast(blocks, "int64") * inner * width * 2)
                        if collects[1]:
                            call("tsk_fill_nan", r_gathered, T.cast(r_blocks, "int64") * r_inner * r_width * 2)
                    call("tsk_finish", context, counters, epoch, ack)
                    call("tsk_finish", r_context, counters, r_epoch, ack)
            elif thread >= 64:
                if collects[0]:
                    call(
                        "tsk_collect_slices",
                        context,
                        gathered,
                        ref(X[0, 0, 0]),
                        shard_bytes,
                        pieces,
                        chunks,
                        epoch,
                        site,
                    )
                if collects[1]:
                    call(
                        "tsk_collect_slices",
                        r_context,
                        r_gathered,
                        ref(Y[0, 0, 0]),
                        r_shard_bytes,
                        r_pieces,
                        r_chunks,
                        r_epoch,
                        site,
                    )
                if collects[0] or collects[1]:
                    call("tsk_join")

    return mesh_gemm
