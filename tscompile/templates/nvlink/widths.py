"""How wide tiles are. Pure functions of sizes: all ranks choose alike, and the cost model predicts the same kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...problem import Gemm
from .kernels.config import DATA_FLAGS, SMS
from .tiles import TILE_M

# Of a gather; narrower ones lose more in the tensor cores than they win in waves.
TILE_WIDTHS = (256, 240, 224)
# The same for a right operand [K, N]: TMA swizzles columns by 64, and loads a ragged rest in many small boxes.
SWIZZLED_WIDTHS = (256,)
# Time of a tile of 128 rows on one SM per unit of k, all SMs busy, by its columns, us. [measured 2026-11-20, H200, bfloat16: a GEMM
# [8192, 7168, 4096] with tiles of 256, sums of 512 to 2048 rows with each width]
TILE_US_PER_K = {256: 0.0122, 192: 0.0112, 128: 0.0093}
WIDEST = max(TILE_US_PER_K)
PULL_US_PER_MIB = 3.1  # of what one rank receives over NVLink; measured as above
_MOST_TILES = 4096  # of the narrower widths: they gain where waves are few, and each tile takes flags


def tile_width(rows: int, widths: Sequence[int], choices: Sequence[int] = TILE_WIDTHS) -> int:
    """Columns of a tile for `rows` tile rows over matrices of these widths: fewest wave-columns, then the widest."""
    if max(widths) <= 128:
        return 128

    def cost(tile: int) -> tuple[int, int]:
        waves = math.ceil(rows * sum(math.ceil(width / tile) for width in widths) / SMS)
        return waves * tile, -tile

    return min(choices, key=cost)


@dataclass(frozen=True)
class Tiling:
    """tiles: of a sum, of all ranks together. width: columns of a tile."""

    tiles: int
    width: int


def has_flags(tiling: Tiling, ranks: int) -> bool:
    """True if the flags of a slot suffice for a sum."""
    return 2 * ranks * -(-tiling.tiles // ranks) <= DATA_FLAGS


def sum_tiling(m: int, n: int, k: int, ranks: int, pieces: int, all_reduce: bool) -> Tiling:
    """The tiling of a sum [m, n] of 2-byte elements.

    Narrow tiles cost more per column, but keep more SMs busy in a small sum, and leave less behind the last wave, whose tiles travel
    when nothing is left to compute.

    Args:
        k: of all terms together.
        pieces: runs of rows in which tiles start anew; a scattered result has some for each rank.
    """
    tile_rows = pieces * -(-m // (pieces * TILE_M))
    received = m * n * 2 / (1 << 20) * (ranks - 1) / ranks * (2 if all_reduce else 1)
    transport = received * PULL_US_PER_MIB

    def tiling(width: int) -> Tiling:
        return Tiling(tile_rows * -(-n // width), width)

    def us(choice: Tiling) -> tuple[float, int]:
        waves = max(1, -(-choice.tiles // SMS))
        return max(waves * k * TILE_US_PER_K[choice.width] + transport / waves, transport), -choice.width

    narrower = (tiling(width) for width in TILE_US_PER_K if width < WIDEST)
    return min((tiling(WIDEST), *(choice for choice in narrower if choice.tiles <= _MOST_TILES)), key=us)


def terms_tiling(gemms: Sequence[Gemm], ranks: int, outer: int, all_reduce: bool) -> Tiling:
    """The tiling of a sum of matmuls; a scattered result has `outer` runs of rows for each rank."""
    k = sum(gemm.k for gemm in gemms)
    return sum_tiling(gemms[0].m, gemms[0].n, k, ranks, 1 if all_reduce else ranks * outer, all_reduce)
