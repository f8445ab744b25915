"""Kernel of small matmul_reduce_scatter and matmul_all_reduce: warps send their rows of a tile to the peers straight from registers.

Where a GEMM has no more tiles than there are SMs, nothing is left to compute while partial tiles travel. Then it counts how soon they
leave and how few steps they take: no staging, no signalling warp, no pull. And a tile may have rows of several owners, which those
of kernels/reduce.py have not, so results of few rows are not padded to a tile for each rank.
"""

from typing import Any

import tilelang.language as T

from .config import DTYPE_CODES, SMS, SUM_FORMS, GemmConfig
from .gemm import (
    COL,
    GROUP,
    INDEX,
    ROW,
    ROWS,
    THREADS,
    call,
    load_tile,
    multiply,
    pass_end,
    prelude,
    value,
    word,
)

# No postponed annotations here: TileLang evaluates those of a prim_func where it stands.


def sum_push_kernel(config: GemmConfig, form: str) -> Any:
    """prim_func of the sum over terms and ranks of A_t @ B_t (+ V on the terms' sum), scattered or to all.

    Args:
        config: layout and tile; `operands` is the number of terms.
        form: one of SUM_FORMS; sum_push.h says what each does.

    Arguments of the kernel: A_t [M, K_t]; B_t [N, K_t] if transposed else [K_t, N]; then addresses and sizes: V of the bias [N]; C of
    the output [rows, N]; the tile table (tiles.py); `inner` rows of an owner's run; `columns` tiles of a tile row; `share` stripes that
    a rank sums; the context; the counters; `scale` a factor on the sum.
    """
    dtype, transposed, terms = config.dtype, config.transposed, config.operands
    bM, bN, bK, S = config.tile_m, config.tile_n, config.tile_k, config.stages
    NF, DT = config.registers, DTYPE_CODES[config.dtype]
    M, N = T.dynamic("M"), T.dynamic("N")
    K0, K1, K2 = T.dynamic("K0"), T.dynamic("K1"), T.dynamic("K2")
    B_shapes = [(N, k) if transposed else (k, N) for k in (K0, K1, K2)]
    text = prelude("sum_push.h")
    numbers = tuple(range(terms))  # loops never bind a tensor: all_gather.py says why

    @T.prim_func
    def gemm_sum_push(
        A0: T.Tensor((M, K0), dtype),
        A1: T.Tensor((M, K1), dtype),
        A2: T.Tensor((M, K2), dtype),
        B0: T.Tensor(B_shapes[0], dtype),
        B1: T.Tensor(B_shapes[1], dtype),
        B2: T.Tensor(B_shapes[2], dtype),
        V: T.int64,
        C: T.int64,
        rows: T.int32,
        table: T.int64,
        table_entries: T.int32,
        inner: T.int32,
        columns: T.int32,
        share: T.int32,
        context: T.int64,
        counters: T.int64,
        scale: T.float32,
        epoch: T.int32,
        site: T.int32,
        ack: T.int32,
    ):
        with T.Kernel(SMS, threads=THREADS, prelude=text):
            As = T.alloc_shared((S, bM, bK), dtype)
            Bs = T.alloc_shared((S, bN, bK) if transposed else (S, bK, bN), dtype)
            Cl = T.alloc_fragment((bM, bN), "float32")
            full = T.alloc_barrier([1] * S)
            empty = T.alloc_barrier([256] * S)
            thread = T.get_thread_binding()
            stage = T.alloc_var("int32")
            phase = T.alloc_var("int32")
            turn = T.alloc_var("int32")
            tile = T.alloc_var("int32")
            row = T.alloc_var("int32")
            col = T.alloc_var("int32")
            steps = T.alloc_var("int32")
            stage = 0
            phase = 0
            turn = 0
            steps = 0
            for t in numbers:
                steps = steps + T.ceildiv((K0, K1, K2)[t], bK)
            if thread < 32:
                tile = value("tsk_claim", counters, table_entries)
                while tile >= 0:
                    row = word(table, tile, ROW)
                    col = word(table, tile, COL)
                    T.barrier_wait(empty[stage], phase ^ 1)
                    call("tsk_pass", turn, tile)
                    for t in numbers:
                        load_tile((A0, A1, A2)[t], (B0, B1, B2)[t], row, col, As, Bs, full, empty, stage, phase, config)
                    turn = turn + 1
                    # Not sooner: a CTA that holds a tile which it cannot start yet keeps it from the others.
                    tile = value("tsk_claim", counters, table_entries)
                pass_end(full, empty, turn, stage, phase)
            elif thread >= 128:
                T.barrier_wait(full[0], 0)
                tile = value("tsk_passed", 0)
                while tile >= 0:
                    multiply(As, Bs, Cl, full, empty, stage, phase, steps, config)
                    if config.bias:
                        call("TSK_BIAS", NF, DT, V, word(table, tile, COL), N)
                    call(
                        "TSK_EXCHANGE",
                        NF,
                        DT,
                        SUM_FORMS.index(form),
                        context,
                        C,
                        word(table, tile, ROW),
                        word(table, tile, COL),
                        word(table, tile, ROWS),
                        word(table, tile, INDEX),
                        word(table, tile, GROUP),
                        columns,
                        inner,
                        share,
                        N,
                        scale,
                        epoch,
                        site,
                    )
                    turn = turn + 1
                    T.barrier_wait(full[stage], phase)
                    tile = value("tsk_passed", turn)
                if value("tsk_last", counters) != 0:
                    if value("tsk_aborted", context) != 0:
                        call("tsk_report", context)
                        call("tsk_fill_nan", C, T.cast(rows, "int64") * N * 2)
                    call("tsk_finish", context, counters, epoch, ack)

    return gemm_sum_push
