"""Kernel of matmul_reduce_scatter and matmul_all_reduce: partial tiles for peers first, the own tiles last.

A tile that a peer sums goes to this rank's slot, in the order of the registers, and a flag at the peer tells that it is there. An idle
warp of the peer pulls it by bulk copies through shared memory; the epilogue of the peer's own tile adds it in float32 to
its accumulator: there is no reduce kernel, no barrier and no work for the host. For an all_reduce the sum is also left in the
slot, and the same warp of every peer pulls it into the output.
"""

from typing import Any

import tilelang.language as T

from .gemm import (
    DTYPE_CODES,
    SMS,
    TABLE_WORDS,
    THREADS,
    GemmConfig,
    call,
    load_columns,
    load_rows,
    multiply,
    prelude,
    ref,
    value,
)

# No postponed annotations here: TileLang evaluates those of a prim_func where it stands.


def reduce_kernel(config: GemmConfig, all_reduce: bool) -> Any:
    """prim_func of the sum over terms and ranks of A_t @ B_t (+ V on the terms' sum), scattered or to all.

    Arguments of the kernel: A_t [M, K_t]; B_t [N, K_t] if transposed else [K_t, N]; V [N] the bias; C [MO, N] the output; slot: this
    rank's slot, first the tiles for peers, at `result_offset` (in elements) the sums of an all_reduce; landing: room for the
    peers' tiles [ranks, tiles, tile], and their epochs in `landed`; the tile table and the list of pulls (tiles.py); `tiles` a rank's
    number of tiles; `scale` a factor on the sum.
    """
    dtype, transposed, terms = config.dtype, config.transposed, config.operands
    bM, bN, bK, S = config.tile_m, config.tile_n, config.tile_k, config.stages
    NF, DT = config.registers, DTYPE_CODES[config.dtype]
    M, MO, N, NT, NS, NC = (T.dynamic(name) for name in ("M", "MO", "N", "NT", "NS", "NC"))
    NP, NL = T.dynamic("NP"), T.dynamic("NL")
    K0, K1, K2 = T.dynamic("K0"), T.dynamic("K1"), T.dynamic("K2")
    B_shapes = [(N, k) if transposed else (k, N) for k in (K0, K1, K2)]
    text = prelude()
    numbers = tuple(range(terms))  # loops never bind a tensor: all_gather_kernel.py says why

    @T.prim_func
    def gemm_reduce(
        A0: T.Tensor((M, K0), dtype),
        A1: T.Tensor((M, K1), dtype),
        A2: T.Tensor((M, K2), dtype),
        B0: T.Tensor(B_shapes[0], dtype),
        B1: T.Tensor(B_shapes[1], dtype),
        B2: T.Tensor(B_shapes[2], dtype),
        V: T.Tensor((N,), dtype),
        C: T.Tensor((MO, N), dtype),
        slot: T.Tensor((NS,), dtype),
        landing: T.Tensor((NL,), dtype),
        landed: T.Tensor((NC,), "int32"),
        table: T.Tensor((NT, TABLE_WORDS), "int32"),
        pulls: T.Tensor((NP, TABLE_WORDS), "int32"),
        context: T.Tensor((32,), "int64"),
        counters: T.Tensor((16,), "int32"),
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
            pieces = T.alloc_shared((2 * bM * bN // 4,), dtype)
            Cl = T.alloc_fragment((bM, bN), "float32")
            full = T.alloc_barrier([1] * S)
            empty = T.alloc_barrier([256] * S)
            noted = T.alloc_barrier([256])
            taken = T.alloc_barrier([32])
            thread = T.get_thread_binding()
            it = T.alloc_var("int32")
            turn = T.alloc_var("int32")
            tile = T.alloc_var("int32")
            row = T.alloc_var("int32")
            col = T.alloc_var("int32")
            notes = T.alloc_var("int32")
            kind = T.alloc_var("int32")
            steps = T.alloc_var("int32")
            it = 0
            turn = 0
            notes = 0
            steps = 0
            for t in numbers:
                steps = steps + T.ceildiv((K0, K1, K2)[t], bK)
            if thread < 32:
                tile = value("tsk_claim", ref(counters[0]), NT)
                while tile >= 0:
                    row = table[tile, 0]
                    col = table[tile, 1]
                    T.barrier_wait(empty[it % S], ((it // S) & 1) ^ 1)
                    call("tsk_pass", turn, tile)
                    for t in numbers:
                        for k in T.serial(T.ceildiv((K0, K1, K2)[t], bK)):
                            T.barrier_wait(empty[it % S], ((it // S) & 1) ^ 1)
                            load_rows((A0, A1, A2)[t], row, k * bK, As, full, it % S, config)
                            load_columns((B0, B1, B2)[t], col, k * bK, Bs, full, it % S, config)
                            if T.shuffle_elect(32):
                                T.barrier_arrive(full[it % S])
                            it = it + 1
                    turn = turn + 1
                    # Not sooner: a CTA that holds a tile which it cannot start yet keeps it from the others.
                    tile = value("tsk_claim", ref(counters[0]), NT)
                T.barrier_wait(empty[it % S], ((it // S) & 1) ^ 1)
                call("tsk_pass", turn, -1)
                if T.shuffle_elect(32):
                    T.barrier_arrive(full[it % S])
            elif thread >= 128:
                T.barrier_wait(full[0], 0)
                tile = value("tsk_passed", 0)
                while tile >= 0:
                    multiply(As, Bs, Cl, full, empty, it, steps, config)
                    it = it + steps
                    if config.bias:
                        call("TSK_BIAS", NF, DT, ref(V[0]), table[tile, 1], N)
                    if table[tile, 3] == 0:
                        call("TSK_STAGE", NF, DT, ref(slot[T.cast(table[tile, 4], "int64") * (bM * bN)]))
                        T.barrier_wait(taken[0], (notes & 1) ^ 1)
                        call("tsk_leave_note", 1, table[tile, 6], table[tile, 7])
                        T.barrier_arrive(noted[0])
                        notes = notes + 1
                    else:
                        call("tsk_wait_landed", ref(context[0]), ref(landed[0]), table[tile, 4], tiles, epoch, site)
                        call(
                            "TSK_ADD_PARTS",
                            NF,
                            DT,
                            ref(context[0]),
                            ref(landing[0]),
                            T.cast(table[tile, 4], "int64"),
                            T.cast(tiles, "int64"),
                        )
                        if scale != T.float32(1):
                            call("TSK_SCALE", NF, scale)
                        if all_reduce:
                            call(
                                "TSK_STORE_TWICE",
                                NF,
                                DT,
                                ref(C[0, 0]),
                                table[tile, 5],
                                table[tile, 1],
                                table[tile, 2],
                                N,
                                ref(slot[result_offset + T.cast(table[tile, 4], "int64") * (bM * bN)]),
                            )
                            T.barrier_wait(taken[0], (notes & 1) ^ 1)
                            call("tsk_leave_note", 2, 0, table[tile, 7])
                            T.barrier_arrive(noted[0])
                            notes = notes + 1
                        else:
                            call("TSK_STORE", NF, DT, ref(C[0, 0]), table[tile, 5], table[tile, 1], table[tile, 2], N)
                    turn = turn + 1
                    T.barrier_wait(full[it % S], (it // S) & 1)
                    tile = value("tsk_passed", turn)
                T.barrier_wait(taken[0], (notes & 1) ^ 1)
                call("tsk_leave_note", 0, 0, 0)
                T.barrier_arrive(noted[0])
                call("tsk_join")
                if value("tsk_last", ref(counters[0]), SMS) != 0:
                    if value("tsl_aborted", ref(context[0])) != 0:
                        call("tsk_fill_nan", ref(C[0, 0]), T.cast(MO, "int64") * N * 2)
                    call("tsk_finish", ref(context[0]), ref(counters[0]), epoch, ack)
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
                        call("tsk_signal_peer", ref(context[0]), row, tile, epoch)
                    if kind == 2:
                        call("tsk_signal_peers", ref(context[0]), tile, epoch)
            else:
                if thread < 96:
                    call(
                        "TSK_PULL",
                        NF,
                        ref(context[0]),
                        ref(counters[2]),
                        ref(pulls[0, 0]),
                        NP,
                        ref(pieces[0]),
                        ref(landing[0]),
                        ref(landed[0]),
                        ref(C[0, 0]),
                        result_offset * 2,
                        N,
                        epoch,
                        site,
                    )
                call("tsk_join")

    return gemm_reduce
