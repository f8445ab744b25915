"""Kernels in which the threads of a warp or of a block tell each other something; for CUDA, where there is more than one."""

import tilelang.language as T

import tscompile.language as tl
from tscompile.language.dialects import Dialect

PART = 0x00FFFF00  # lanes 8 to 23
VOTES = 8  # any, all, ballot, elect, lane, and any, all, ballot of the lanes of PART


def votes(d: Dialect, warps: int = 4):
    """Row i of out: what thread i heard in the votes on bit l of bits[warp], l being its lane."""

    @T.prim_func
    def votes_kernel(bits: T.Tensor((warps,), "int32"), out: T.Tensor((32 * warps, VOTES), "int32")):
        with T.Kernel(1, threads=32 * warps, prelude=d.prelude) as _:
            thread = d.thread()
            mine = T.alloc_var("int32")
            mine = T.bitwise_and(bits[thread // 32] >> tl.lane(), 1)
            out[thread, 0] = T.cast(tl.warp_any(mine), "int32")
            out[thread, 1] = T.cast(tl.warp_all(mine), "int32")
            out[thread, 2] = T.cast(tl.warp_ballot(mine), "int32")
            out[thread, 3] = T.cast(tl.elect(), "int32")
            out[thread, 4] = tl.lane()
            if thread % 32 >= 8 and thread % 32 < 24:
                tl.warp_sync(PART)
                out[thread, 5] = T.cast(tl.warp_any(mine, PART), "int32")
                out[thread, 6] = T.cast(tl.warp_all(mine, PART), "int32")
                out[thread, 7] = T.cast(tl.warp_ballot(mine, PART), "int32")

    return votes_kernel


SHUFFLES = [
    ("idx", lambda lane: (7 * lane + 3) % 32),
    ("xor", lambda lane: 5),
    ("up", lambda lane: 3),
    ("down", lambda lane: 6),
]


def shuffles(d: Dialect, dtype: str):
    """Row m of out: x shuffled by mode m; the last row by "idx" in the lanes of PART alone, mirrored."""
    modes = list(enumerate(SHUFFLES))

    @T.prim_func
    def shuffles_kernel(x: T.Tensor((32,), dtype), out: T.Tensor((len(SHUFFLES) + 1, 32), dtype)):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            thread = d.thread()
            for m, (mode, by) in modes:
                out[m, thread] = tl.shuffle(x[thread], by(thread), mode)
            if thread >= 8 and thread < 24:
                out[len(SHUFFLES), thread] = tl.shuffle(x[thread], 31 - thread, mask=PART)

    return shuffles_kernel


def handovers(d: Dialect):
    """One half of the block writes and arrives, the other syncs and reads, round after round; wrong[0] counts what was stale."""

    @T.prim_func
    def handovers_kernel(cells: T.Tensor((64,), "int32"), rounds: T.int32, wrong: T.Tensor((1,), "int32")):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            thread = d.thread()
            for step in T.serial(rounds):
                if thread < 64:
                    cells[thread] = step + 1
                    tl.block_arrive(10, 128)
                    tl.block_sync(11, 128)
                else:
                    tl.block_sync(10, 128)
                    if cells[127 - thread] != step + 1:
                        tl.red_add(wrong[0], 1, "relaxed", "gpu")
                    tl.block_arrive(11, 128)

    return handovers_kernel
