"""Kernel of matmul_reduce_scatter and matmul_all_reduce: partial tiles for peers first, the own tiles last.

A tile that a peer sums goes to this rank's slot, in the order of the registers, and a flag at the peer tells that it is there. An idle
warp of the peer pulls it by bulk copies through shared memory; the epilogue of the peer's own tile adds it in float32 to
its accumulator: there is no reduce kernel, no barrier and no work for the host. For an all_reduce the sum is also left in the
slot, and another idle warp of every peer pulls it into the output.
"""

from typing import Any

import tilelang.language as T

from .config import DTYPE_CODES, SMS, GemmConfig, piece_rows, pulled_rows
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
    call,
    load_tile,
    multiply,
    pass_end,
    prelude,
    ref,
    value,
    word,
)

# No postponed annotations here: TileLang evaluates those of a prim_func where it stands.


def reduce_kernel(config: GemmConfig, all_reduce: bool) -> Any:
    """prim_func of the sum over terms and ranks of A_t @ B_t (+ V on the terms' sum), scattered or to all.

    Arguments of the kernel: A_t [M, K_t]; B_t [N, K_t] if transposed else [K_t, N]; then addresses and sizes: V of the bias [N]; C of
    the output [rows, N]; slot, of this rank: first the tiles for peers, `result_offset` bytes behind its start the sums of an
    all_reduce; landing: room for the peers' tiles [ranks, tiles, tile], and their epochs in `landed`; the tile table and the lists of
    pulls and results (tiles.py); the context; the counters; `tiles` a rank's number of tiles; `scale` a factor on the sum.
    """
    dtype, transposed, terms = config.dtype, config.transposed, config.operands
    bM, bN, bK, S = config.tile_m, config.tile_n, config.tile_k, config.stages
    NF, DT = config.registers, DTYPE_CODES[config.dtype]
    M, N = T.dynamic("M"), T.dynamic("N")
    K0, K1, K2 = T.dynamic("K0"), T.dynamic("K1"), T.dynamic("K2")
    B_shapes = [(N, k) if transposed else (k, N) for k in (K0, K1, K2)]
    text = prelude()
    numbers = tuple(range(terms))  # loops never bind a tensor: all_gather.py says why

    @T.prim_func
    def gemm_reduce(
        A0: T.Tensor((M, K0), dtype),
        A1: T.Tensor((M, K1), dtype),
        A2: T.Tensor((M, K2), dtype),
        B0: T.Tensor(B_shapes[0], dtype),
        B1: T.Tensor(B_shapes[1], dtype),
        B2: T.Tensor(B_shapes[2], dtype),
        V: T.int64,
        C: T.int64,
        rows: T.int32,
        slot: T.int64,
        landing: T.int64,
        landed: T.int64,
        table: T.int64,
        table_entries: T.int32,
        pulls: T.int64,
        pulls_entries: T.int32,
        results: T.int64,
        results_entries: T.int32,
        context: T.int64,
        counters: T.int64,
        tiles: T.int32,
        scale: T.float32,
        result_offset: T.int64,
        epoch: T.int32,
        site: T.int32,
        ack: T.int32,
    ):
        with T.Kernel(SMS, threads=THREADS, prelude=text):
            As = T.alloc_shared((S, bM, bK), dtype)
            Bs = T.alloc_shared((S, bN, bK) if transposed else (S, bK, bN), dtype)
            pieces = T.alloc_shared((pulled_rows(bN) * bN,), dtype)
            Cl = T.alloc_fragment((bM, bN), "float32")
            full = T.alloc_barrier([1] * S)
            empty = T.alloc_barrier([256] * S)
            noted = T.alloc_barrier([256])
            taken = T.alloc_barrier([32])
            thread = T.get_thread_binding()
            stage = T.alloc_var("int32")
            phase = T.alloc_var("int32")
            turn = T.alloc_var("int32")
            tile = T.alloc_var("int32")
            row = T.alloc_var("int32")
            col = T.alloc_var("int32")
            notes = T.alloc_var("int32")
            kind = T.alloc_var("int32")
            steps = T.alloc_var("int32")
            stage = 0
            phase = 0
            turn = 0
            notes = 0
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
                    if word(table, tile, OWNER) == 0:
                        call("TSK_STAGE", NF, DT, slot + T.cast(word(table, tile, INDEX), "int64") * (bM * bN * 2))
                        T.barrier_wait(taken[0], (notes & 1) ^ 1)
                        call("tsk_leave_note", 1, word(table, tile, MASK), word(table, tile, GROUP))
                        T.barrier_arrive(noted[0])
                        notes = notes + 1
                    else:
                        call("tsk_wait_landed", context, landed, word(table, tile, INDEX), tiles, epoch, site)
                        call(
                            "TSK_ADD_PARTS",
                            NF,
                            DT,
                            context,
                            landing,
                            T.cast(word(table, tile, INDEX), "int64"),
                            T.cast(tiles, "int64"),
                        )
                        if scale != T.float32(1):
                            call("TSK_SCALE", NF, scale)
                        if all_reduce:
                            call(
                                "TSK_STORE_TWICE",
                                NF,
                                DT,
                                C,
                                word(table, tile, OUT_ROW),
                                word(table, tile, COL),
                                word(table, tile, ROWS),
                                N,
                                slot + result_offset + T.cast(word(table, tile, INDEX), "int64") * (bM * bN * 2),
                            )
                            T.barrier_wait(taken[0], (notes & 1) ^ 1)
                            call("tsk_leave_note", 2, 0, word(table, tile, GROUP))
                            T.barrier_arrive(noted[0])
                            notes = notes + 1
                        else:
                            call(
                                "TSK_STORE",
                                NF,
                                DT,
                                C,
                                word(table, tile, OUT_ROW),
                                word(table, tile, COL),
                                word(table, tile, ROWS),
                                N,
                            )
                    turn = turn + 1
                    T.barrier_wait(full[stage], phase)
                    tile = value("tsk_passed", turn)
                T.barrier_wait(taken[0], (notes & 1) ^ 1)
                call("tsk_leave_note", 0, 0, 0)
                T.barrier_arrive(noted[0])
                call("tsk_join")
                if value("tsk_last", counters) != 0:
                    if value("tsk_aborted", context) != 0:
                        call("tsk_report", context)
                        call("tsk_fill_nan", C, T.cast(rows, "int64") * N * 2)
                    call("tsk_finish", context, counters, epoch, ack)
            elif thread < 64:
                kind = 1
                while kind > 0:
                    T.barrier_wait(noted[0], notes & 1)
                    kind = value("tsk_note_kind")
                    row = value("tsk_note_peer")
                    tile = value("tsk_note_flag")
                    T.barrier_arrive(taken[0])
                    notes = notes + 1
                    if kind == 1:
                        call("tsk_signal_peer", context, row, tile, epoch)
                    if kind == 2:
                        call("tsk_signal_peers", context, tile, epoch)
            else:
                call(
                    "TSK_PULL",
                    NF,
                    piece_rows(bN),
                    int(all_reduce),
                    context,
                    counters,
                    pulls,
                    pulls_entries,
                    results,
                    results_entries,
                    ref(pieces[0]),
                    landing,
                    landed,
                    C,
                    result_offset,
                    N,
                    epoch,
                    site,
                )
                call("tsk_join")

    return gemm_reduce
