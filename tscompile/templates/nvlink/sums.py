"""How a sum of matmuls over the ranks runs: which kernel, how wide its tiles are, how long it takes, what it needs of a slot.

Pure functions of sizes, so all ranks choose alike; the planner asks the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...problem import FusionProblem, Gemm
from .kernels.config import DATA_FLAGS, ITEM_BYTES, SMS, STRIPE_ROWS, STRIPES, TILE_M, loaded_rows
from .widths import SWIZZLED_WIDTHS, gemm_us, tile_us, waves_of

PULL = "pull"  # by kernels/reduce.py; the forms of kernels/sum_push.py are SUM_FORMS
PULL_WIDTHS = SWIZZLED_WIDTHS  # in both layouts: whoever predicts a sum knows its sizes alone
PUSH_WIDTHS = (*PULL_WIDTHS, 64)
_MIB = float(1 << 20)
_MOST_TILES = 4096  # of the narrower widths: they gain where waves are few, and each tile takes flags
# Pulls over NVLink: us until the first byte, and per MiB that one rank receives: of partial tiles alone; of partial tiles and of sums
# at the same time. [measured 2026-11-20, 4x H200, bfloat16: benchmarks/results/gpu-ops-4xh200-2026-11-28.json]
_PASS_US = 10.0
_PULL_US_PER_MIB = 4.1
_PULL_BOTH_US_PER_MIB = 3.3
_TAIL_US_PER_MIB = 3.1  # of what follows the last wave, as far as widths are compared
_SCATTER_TAIL_US = 15.0
_GEMM_FACTOR = 1.04  # of an all_reduce: its GEMM adds, signals and writes results twice
_PULL_WAVES = 1.2  # waves whose transport follows the last one
_LATENCY_US = 22.0  # from a tile's last product to its sum at every rank
_TAIL_US = 10.0
# Pushes from registers: us for fences, flags and sums, of two ranks and for each further one, and per MiB that one rank sends.
# [measured 2026-11-28, 2x and 4x H200, 16 to 1024 rows: benchmarks/results/gpu-forms-*; within 10 %, on 4x H200 up to 20 % for 16 to
# 512 rows]
_WAY_US = {"scatter": (6.5, 1.3), "one_shot": (7.0, 0.8), "two_shot": (9.0, 1.5)}
_SEND_US_PER_MIB = 4.3


@dataclass(frozen=True)
class SumPlan:
    """
    form: PULL, or one of SUM_FORMS.
    tiles: of the whole result; of a PULL, of all ranks together. width: columns of a tile. rows: of a tile that are loaded.
    share: tiles (PULL) or stripes of tiles (otherwise) that a rank sums, at most.
    places: tiles or stripes that a slot has room for. flags: that a slot needs.
    us: predicted time.
    """

    form: str
    tiles: int
    width: int
    rows: int
    share: int
    places: int
    flags: int
    us: float

    @property
    def has_flags(self) -> bool:
        """The flags of a slot suffice."""
        return self.flags <= DATA_FLAGS

    @property
    def scratch_bytes(self) -> int:
        """Bytes of a slot; negative if there are not enough flags."""
        rows = TILE_M if self.form == PULL else STRIPE_ROWS
        return self.places * rows * self.width * ITEM_BYTES if self.has_flags else -1


def plan_sum(m: int, n: int, k: int, ranks: int, outer: int, all_reduce: bool) -> SumPlan:
    """The form and tiling of the least predicted time for a sum [m, n] of 2-byte elements.

    Args:
        k: of all terms together.
        outer: runs of rows that a scattered result has for each rank.
    """
    pulled = pull_plan(m, n, k, ranks, 1 if all_reduce else ranks * outer, all_reduce)
    return min((pulled, *push_plans(m, n, k, ranks, outer, all_reduce)), key=lambda plan: plan.us)


def terms_plan(gemms: Sequence[Gemm], ranks: int, outer: int, all_reduce: bool) -> SumPlan:
    """The same for a sum of matmuls."""
    return plan_sum(gemms[0].m, gemms[0].n, sum(gemm.k for gemm in gemms), ranks, outer, all_reduce)


def problem_plan(problem: FusionProblem) -> SumPlan:
    """The same for the planner's problem."""
    return terms_plan(problem.gemms, problem.group_size, problem.pieces, problem.kind == "matmul_all_reduce")


def pull_plan(m: int, n: int, k: int, ranks: int, pieces: int, all_reduce: bool) -> SumPlan:
    """The tiling of kernels/reduce.py.

    Narrow tiles cost more per column, but keep more SMs busy in a small sum, and leave less behind the last wave, whose tiles travel
    when nothing is left to compute.

    Args:
        pieces: runs of rows in which tiles start anew; a scattered result has some for each rank.
    """
    tile_rows = pieces * -(-m // (pieces * TILE_M))
    received = m * n * ITEM_BYTES / _MIB * (ranks - 1) / ranks
    tail = received * (2 if all_reduce else 1) * _TAIL_US_PER_MIB

    def compared(width: int) -> tuple[float, int]:
        waves = waves_of(tile_rows * -(-n // width))
        return max(waves * tile_us(width, k) + tail / waves, tail), -width

    widest, *narrower = PULL_WIDTHS
    width = min((widest, *(w for w in narrower if tile_rows * -(-n // w) <= _MOST_TILES)), key=compared)
    tiles = tile_rows * -(-n // width)
    rows = loaded_rows(m // pieces)
    gemm, waves = gemm_us(tiles, width, k, n, rows), waves_of(tiles)
    if all_reduce:
        transport = _PASS_US + _PULL_BOTH_US_PER_MIB * 2 * received
        exposed = min(1.0, _PULL_WAVES / waves) * transport
        us = max(_GEMM_FACTOR * gemm + exposed, transport + tile_us(width, k) + _LATENCY_US) + _TAIL_US
    else:
        transport = _PASS_US + _PULL_US_PER_MIB * received
        us = max(gemm + transport / waves, transport + _SCATTER_TAIL_US) + _SCATTER_TAIL_US
    return pulled(tiles, width, ranks, all_reduce, us, rows)


def pulled(tiles: int, width: int, ranks: int, all_reduce: bool, us: float, rows: int = TILE_M) -> SumPlan:
    """The plan for so many tiles: those of the peers travel, and for an all_reduce the own sums; the flags of both have places."""
    share = -(-tiles // ranks)
    return SumPlan(PULL, tiles, width, rows, share, (ranks - 1 + all_reduce) * share, 2 * ranks * share, us)


def push_plans(m: int, n: int, k: int, ranks: int, outer: int, all_reduce: bool) -> Iterator[SumPlan]:
    """What kernels/sum_push.py can do in one wave of tiles: in a second one its multiplying warps would wait for peers."""
    whole, rows = m * n * ITEM_BYTES / _MIB, loaded_rows(m)
    for width in PUSH_WIDTHS:
        columns = -(-n // width)
        tiles = -(-m // TILE_M) * columns
        if not 0 < tiles <= SMS:
            continue
        gemm = gemm_us(tiles, width, k, n, rows)
        if all_reduce:
            share = tiles * -(-STRIPES // ranks)
            sent = 2 * whole * (ranks - 1) / ranks
            us = gemm + _way_us("two_shot", ranks) + _SEND_US_PER_MIB * sent
            places = ranks * share + tiles * STRIPES
            yield SumPlan("two_shot", tiles, width, rows, share, places, places, us)
            share, sent = tiles * STRIPES, whole * (ranks - 1)
            us = gemm + _way_us("one_shot", ranks) + _SEND_US_PER_MIB * sent
            yield SumPlan("one_shot", tiles, width, rows, share, ranks * share, ranks * share, us)
        elif m // (ranks * outer) % STRIPE_ROWS == 0:
            share = m // ranks // STRIPE_ROWS * columns
            us = gemm + _way_us("scatter", ranks) + _SEND_US_PER_MIB * whole * (ranks - 1) / ranks
            yield SumPlan("scatter", tiles, width, rows, share, ranks * share, ranks * share, us)


def _way_us(form: str, ranks: int) -> float:
    two, further = _WAY_US[form]
    return two + further * (ranks - 2)
