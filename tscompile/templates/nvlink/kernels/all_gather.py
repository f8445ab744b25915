"""Kernel of all_gather_matmul: a GEMM over gathered rows that waits for each peer's shard where it first needs it."""

from typing import Any

import tilelang.language as T

from .config import DTYPE_CODES, SMS, GemmConfig
from .gemm import (
    COL,
    GROUP,
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


def all_gather_kernel(config: GemmConfig, collects: bool) -> Any:
    """prim_func of C_g = gathered @ B_g (+ V_g) for the weights g of one gather.

    Args:
        config: layout and tile; `operands` is the number of weights.
        collects: idle warps copy the gathered tensor to an output of its own.

    Arguments of the kernel: X [MR, K] the own shard; A [M, K] the slot that the peers write; B_g [N_g, K] if transposed else
    [K, N_g]; then addresses: C_g of [M, N_g], V_g of a bias [N_g], the gathered tensor [M, K], the tile table of `tiles` rows, the
    context, the counters; `pieces` and `shard_bytes` as the shard lies in the gathered tensor [pieces, ranks, shard_bytes]; `epoch`,
    `site` and `ack` as tile.h says. What the config does not use may be anything, a tensor of the right rank where it is one.
    """
    dtype, transposed, weights, bias = config.dtype, config.transposed, config.operands, config.bias
    bM, bN, bK, S = config.tile_m, config.tile_n, config.tile_k, config.stages
    NF, DT = config.registers, DTYPE_CODES[config.dtype]
    M, MR, K = T.dynamic("M"), T.dynamic("MR"), T.dynamic("K")
    N0, N1, N2 = T.dynamic("N0"), T.dynamic("N1"), T.dynamic("N2")
    B_shapes = [(n, K) if transposed else (K, n) for n in (N0, N1, N2)]
    text = prelude()
    # Python loops over numbers, never over the tensors: binding a parameter to another name renames it, and TileLang 0.1.15 then
    # reads the shape of one parameter for all of that name.
    numbers = tuple(range(weights))

    @T.prim_func
    def all_gather_gemm(
        X: T.Tensor((MR, K), dtype),
        A: T.Tensor((M, K), dtype),
        B0: T.Tensor(B_shapes[0], dtype),
        B1: T.Tensor(B_shapes[1], dtype),
        B2: T.Tensor(B_shapes[2], dtype),
        C0: T.int64,
        C1: T.int64,
        C2: T.int64,
        V0: T.int64,
        V1: T.int64,
        V2: T.int64,
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
            ready = T.alloc_var("int32")
            row = T.alloc_var("int32")
            col = T.alloc_var("int32")
            group = T.alloc_var("int32")
            own = T.alloc_var("int32")
            steps = T.ceildiv(K, bK)
            stage = 0
            phase = 0
            turn = 0
            ready = 0
            if thread < 32:
                tile = value("tsk_claim", counters, tiles)
                while tile >= 0:
                    row = word(table, tile, ROW)
                    col = word(table, tile, COL)
                    own = word(table, tile, OWNER)
                    group = word(table, tile, GROUP)
                    T.barrier_wait(empty[stage], phase ^ 1)
                    call("tsk_pass", turn, tile)
                    ready = value("tsk_wait_ranks", context, word(table, tile, MASK), ready, epoch, site)
                    # A loop for each source and weight: a choice at every stage would take as long as the loads.
                    for g in numbers:
                        if group == g:
                            if own != 0:
                                load_tile(X, (B0, B1, B2)[g], row, col, As, Bs, full, empty, stage, phase, config)
                            else:
                                load_tile(A, (B0, B1, B2)[g], row, col, As, Bs, full, empty, stage, phase, config)
                    turn = turn + 1
                    # Not sooner: a CTA that holds a tile which it cannot start yet keeps it from the others.
                    tile = value("tsk_claim", counters, tiles)
                pass_end(full, empty, turn, stage, phase)
            elif thread >= 128:
                T.barrier_wait(full[0], 0)
                tile = value("tsk_passed", 0)
                while tile >= 0:
                    multiply(As, Bs, Cl, full, empty, stage, phase, steps, config)
                    for g in numbers:
                        if word(table, tile, GROUP) == g:
                            if bias:
                                call("TSK_BIAS", NF, DT, (V0, V1, V2)[g], word(table, tile, COL), (N0, N1, N2)[g])
                            call(
                                "TSK_STORE",
                                NF,
                                DT,
                                (C0, C1, C2)[g],
                                word(table, tile, OUT_ROW),
                                word(table, tile, COL),
                                word(table, tile, ROWS),
                                (N0, N1, N2)[g],
                            )
                    turn = turn + 1
                    T.barrier_wait(full[stage], phase)
                    tile = value("tsk_passed", turn)
                if collects:
                    call("tsk_join")
                if value("tsk_last", counters) != 0:
                    if value("tsk_aborted", context) != 0:
                        call("tsk_report", context)
                        for g in numbers:
                            call("tsk_fill_nan", (C0, C1, C2)[g], T.cast(M, "int64") * (N0, N1, N2)[g] * 2)
                        if collects:
                            call("tsk_fill_nan", gathered, T.cast(M, "int64") * K * 2)
                    call("tsk_finish", context, counters, epoch, ack)
            elif thread >= 64:
                if collects:
                    call(
                        "tsk_collect_shards",
                        context,
                        gathered,
                        ref(X[0, 0]),
                        shard_bytes,
                        pieces,
                        epoch,
                        site,
                    )
                    call("tsk_join")

    return all_gather_gemm
