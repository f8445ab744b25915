"""Kernel of all_gather_matmul that sends the shard itself: for gathers that the copy engine's time per copy would dominate."""

from importlib.resources import files
from typing import Any

import tilelang.language as T

from .config import DTYPE_CODES, SMS, GemmConfig
from .gemm import (
    COL,
    GROUP,
    MASK,
    OUT_ROW,
    ROW,
    ROWS,
    THREADS,
    call,
    load_steps,
    multiply,
    pass_end,
    prelude,
    value,
    word,
)


def gather_push_kernel(config: GemmConfig, collects: bool) -> Any:
    """prim_func of C_g = gathered @ B_g (+ V_g) for the weights g of one gather, whose warps 2 and 3 push the shard to all ranks.

    Args:
        config: layout and tile; `operands` is the number of weights.
        collects: when they have pushed, these warps copy the gathered tensor to an output of its own.

    Arguments of the kernel: X the address of the own shard, of `rows` rows of K elements in pieces of `inner` rows; A [M, K] the slot
    that all ranks write, this one too; `slices` (MAX_SLICES at most) of `slice_steps` steps of k, of which the last may be shorter; the
    rest as in all_gather.py.
    """
    dtype, transposed, weights, bias = config.dtype, config.transposed, config.operands, config.bias
    bM, bN, bK, S = config.tile_m, config.tile_n, config.tile_k, config.stages
    NF, DT = config.registers, DTYPE_CODES[config.dtype]
    M, K = T.dynamic("M"), T.dynamic("K")
    N0, N1, N2 = T.dynamic("N0"), T.dynamic("N1"), T.dynamic("N2")
    B_shapes = [(n, K) if transposed else (K, n) for n in (N0, N1, N2)]
    text = prelude() + files(__package__).joinpath("push.h").read_text()
    numbers = tuple(range(weights))  # as in all_gather.py

    @T.prim_func
    def gather_push_gemm(
        X: T.int64,
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
        rows: T.int32,
        inner: T.int32,
        slices: T.int32,
        slice_steps: T.int32,
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
            ready = T.alloc_var("int64")
            row = T.alloc_var("int32")
            col = T.alloc_var("int32")
            group = T.alloc_var("int32")
            mask = T.alloc_var("int32")
            steps = T.ceildiv(K, bK)
            stage = 0
            phase = 0
            turn = 0
            ready = T.int64(0)
            if thread < 32:
                tile = value("tsk_claim", counters, tiles)
                while tile >= 0:
                    row = word(table, tile, ROW)
                    col = word(table, tile, COL)
                    mask = word(table, tile, MASK)
                    group = word(table, tile, GROUP)
                    T.barrier_wait(empty[stage], phase ^ 1)
                    call("tsk_pass", turn, tile)
                    for s in T.serial(slices):
                        ready = T.call_extern("int64", "tsk_wait_slice", context, mask, s, ready, epoch, site)
                        for g in numbers:  # a loop for each weight, as in all_gather.py
                            if group == g:
                                load_steps(
                                    A,
                                    (B0, B1, B2)[g],
                                    row,
                                    col,
                                    s * slice_steps,
                                    T.min(slice_steps, steps - s * slice_steps),
                                    As,
                                    Bs,
                                    full,
                                    empty,
                                    stage,
                                    phase,
                                    config,
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
                # Before this CTA counts as done: the last one resets the counters from which warps 2 and 3 claim.
                call("tsk_join")
                if value("tsk_last", counters) != 0:
                    if value("tsk_aborted", context) != 0:
                        call("tsk_report", context)
                        for g in numbers:
                            call("tsk_fill_nan", (C0, C1, C2)[g], T.cast(M, "int64") * (N0, N1, N2)[g] * 2)
                        if collects:
                            call("tsk_fill_nan", gathered, T.cast(M, "int64") * K * 2)
                    call("tsk_finish_push", context, counters, epoch, ack)
            elif thread >= 64:
                call("tsk_push", context, counters, X, rows, inner, K, slices, slice_steps * bK, epoch)
                if collects:
                    call(
                        "tsk_collect_slices",
                        context,
                        gathered,
                        X,
                        shard_bytes,
                        pieces,
                        slices,
                        epoch,
                        site,
                    )
                call("tsk_join")

    return gather_push_gemm
