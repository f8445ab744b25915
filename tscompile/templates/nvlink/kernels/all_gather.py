"""Kernel of all_gather_matmul: a GEMM over gathered rows whose idle warps gather them.

One warp of each CTA first publishes pieces of this rank's shard in its slot and then fetches the peers' pieces into the gathered
tensor, by bulk copies through shared memory. The loading warp waits for the rows of a tile where it first needs them; tiles of the
own shard come first and are read where the shard lies.
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

PIECE_BYTES = 16384  # of a bulk copy through shared memory; two fit beside four stages


def all_gather_kernel(config: GemmConfig, gathers: bool) -> Any:
    """prim_func of C_g = gathered @ B_g (+ V_g) for the weights g of one gather.

    Args:
        config: layout and tile; `operands` is the number of weights.
        gathers: whether this kernel also gathers; if not, the gathered tensor is complete.

    Arguments of the kernel: X [MR, K] the own shard; A [M, K] the gathered tensor; B_g [N_g, K] if transposed else [K, N_g];
    C_g [M, N_g]; V_g [N_g] bias; landed counts; the tile table; the list of pieces; the context; counters; `slice_steps` k steps of a
    slice that is waited for on its own; `counts` number of counts; `epoch`, `site` and `ack` as tile.h says. What the config does not
    use may be any tensor of the right shape.
    """
    dtype, transposed, bias = config.dtype, config.transposed, config.bias
    bM, bN, bK, S = config.tile_m, config.tile_n, config.tile_k, config.stages
    NF, DT = config.registers, DTYPE_CODES[config.dtype]
    M, MR, K, NT, NP, NC = (T.dynamic(name) for name in ("M", "MR", "K", "NT", "NP", "NC"))
    N0, N1, N2 = T.dynamic("N0"), T.dynamic("N1"), T.dynamic("N2")
    B_shapes = [(n, K) if transposed else (K, n) for n in (N0, N1, N2)]
    text = prelude()
    # Python loops over numbers, never over the tensors: binding a parameter to another name renames it, and TileLang 0.1.15 then
    # reads the shape of one parameter for all of that name.
    numbers = tuple(range(config.operands))

    @T.prim_func
    def all_gather_gemm(
        X: T.Tensor((MR, K), dtype),
        A: T.Tensor((M, K), dtype),
        B0: T.Tensor(B_shapes[0], dtype),
        B1: T.Tensor(B_shapes[1], dtype),
        B2: T.Tensor(B_shapes[2], dtype),
        C0: T.Tensor((M, N0), dtype),
        C1: T.Tensor((M, N1), dtype),
        C2: T.Tensor((M, N2), dtype),
        V0: T.Tensor((N0,), dtype),
        V1: T.Tensor((N1,), dtype),
        V2: T.Tensor((N2,), dtype),
        landed: T.Tensor((NC,), "int32"),
        table: T.Tensor((NT, TABLE_WORDS), "int32"),
        pieces: T.Tensor((NP, TABLE_WORDS), "int32"),
        context: T.Tensor((32,), "int64"),
        counters: T.Tensor((16,), "int32"),
        slice_steps: T.int32,
        counts: T.int32,
        epoch: T.int32,
        site: T.int32,
        ack: T.int32,
    ):
        with T.Kernel(SMS, threads=THREADS, prelude=text):
            As = T.alloc_shared((S, bM, bK), dtype)
            Bs = T.alloc_shared((S, bN, bK) if transposed else (S, bK, bN), dtype)
            room = T.alloc_shared((PIECE_BYTES,), dtype)  # two pieces of 16-bit elements
            Cl = T.alloc_fragment((bM, bN), "float32")
            full = T.alloc_barrier([1] * S)
            empty = T.alloc_barrier([256] * S)
            thread = T.get_thread_binding()
            it = T.alloc_var("int32")
            turn = T.alloc_var("int32")
            tile = T.alloc_var("int32")
            row = T.alloc_var("int32")
            col = T.alloc_var("int32")
            group = T.alloc_var("int32")
            own = T.alloc_var("int32")
            steps = T.ceildiv(K, bK)
            it = 0
            turn = 0
            if thread < 32:
                tile = value("tsk_claim", ref(counters[0]), NT)
                while tile >= 0:
                    row = table[tile, 0]
                    col = table[tile, 1]
                    own = table[tile, 3]
                    group = table[tile, 7]
                    for k in T.serial(steps):
                        T.barrier_wait(empty[it % S], ((it // S) & 1) ^ 1)
                        if k == 0:
                            call("tsk_pass", turn, tile)
                        if gathers:
                            if own == 0:
                                if k % slice_steps == 0:
                                    call(
                                        "tsk_wait_count",
                                        ref(context[0]),
                                        ref(landed[table[tile, 6] + k // slice_steps]),
                                        table[tile, 4],
                                        site,
                                    )
                        if own != 0:
                            load_rows(X, row, k * bK, As, full, it % S, config)
                        else:
                            load_rows(A, row, k * bK, As, full, it % S, config)
                        for g in numbers:
                            if group == g:
                                load_columns((B0, B1, B2)[g], col, k * bK, Bs, full, it % S, config)
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
                    row = table[tile, 5]
                    col = table[tile, 1]
                    for g in numbers:
                        if table[tile, 7] == g:
                            if bias:
                                call("TSK_BIAS", NF, DT, ref((V0, V1, V2)[g][0]), col, (N0, N1, N2)[g])
                            call(
                                "TSK_STORE",
                                NF,
                                DT,
                                ref((C0, C1, C2)[g][0, 0]),
                                row,
                                col,
                                table[tile, 2],
                                (N0, N1, N2)[g],
                            )
                    turn = turn + 1
                    T.barrier_wait(full[it % S], (it // S) & 1)
                    tile = value("tsk_passed", turn)
                if gathers:
                    call("tsk_join")
                if value("tsk_last", ref(counters[0]), SMS) != 0:
                    if value("tsl_aborted", ref(context[0])) != 0:
                        for g in numbers:
                            call("tsk_fill_nan", ref((C0, C1, C2)[g][0, 0]), T.cast(M, "int64") * (N0, N1, N2)[g] * 2)
                        call("tsk_fill_nan", ref(A[0, 0]), T.cast(M, "int64") * K * 2)
                    call("tsk_clear", ref(landed[0]), counts)
                    call("tsk_finish", ref(context[0]), ref(counters[0]), epoch, ack)
            elif thread >= 64:
                if gathers:
                    if thread < 96:
                        call(
                            "tsk_gather",
                            ref(context[0]),
                            ref(counters[2]),
                            ref(pieces[0, 0]),
                            NP,
                            ref(room[0]),
                            PIECE_BYTES,
                            ref(X[0, 0]),
                            ref(A[0, 0]),
                            ref(landed[0]),
                            T.cast(K, "int64") * 2,
                            epoch,
                            site,
                        )
                    call("tsk_join")

    return all_gather_gemm
