"""How wide tiles are. Pure functions of sizes: all ranks choose alike, and the cost model predicts the same kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...problem import Gemm
from .kernels.config import DATA_FLAGS, ITEM_BYTES, SMS
from .tiles import TILE_M

# TMA swizzles the columns of a right operand [K, N] by 64, and wgmma takes multiples of 8 of one [N, K]; epilogues want 16.
SWIZZLED_WIDTHS = (256, 192, 128)
DENSE_WIDTHS = tuple(range(256, 127, -16))
SUM_WIDTHS = SWIZZLED_WIDTHS
WIDEST = 256
# A tile of 128 rows takes an SM as long as if it had that many columns more; a column takes so long per unit of k, and there is a pause
# before the next tile. [measured 2026-11-20, H200, bfloat16, all SMs busy: GEMMs of 512 to 8192 rows, tiles of 128 to 256 columns]
_EXTRA_COLUMNS = 18
_COLUMN_US_PER_K = 4.45e-5
_PAUSE_US = 1.0
PASS_US = 10.0
PULL_US_PER_MIB = 3.1  # of what one rank receives over NVLink; measured as above
_MOST_TILES = 4096  # of the narrower widths: they gain where waves are few, and each tile takes flags


def tile_us(width: int, k: int) -> float:
    """Time of a tile of 128 rows, `width` columns and `k` products on one SM, all SMs busy."""
    return (width + _EXTRA_COLUMNS) * k * _COLUMN_US_PER_K + _PAUSE_US


def tile_width(
    tile_rows: int, widths: Sequence[int], k: int, transposed: bool, transport: float = 0.0, ranks: int = 1
) -> int:
    """Columns of a tile for `tile_rows` rows of tiles over matrices of these widths: the least time, then the widest.

    Args:
        transport: us until the last rank's rows are there, whose tiles then follow.
    """

    def us(tile: int) -> tuple[float, int]:
        tiles = tile_rows * sum(math.ceil(width / tile) for width in widths)
        wave = tile_us(tile, k)
        return max(math.ceil(tiles / SMS) * wave, transport + math.ceil(tiles / ranks / SMS) * wave), -tile

    return min(DENSE_WIDTHS if transposed else SWIZZLED_WIDTHS, key=us)


def gather_width(tile_rows: int, widths: Sequence[int], k: int, ranks: int, transposed: bool) -> int:
    """`tile_width` for gathered rows of `k` elements of 2 bytes."""
    transport = transport_us(tile_rows * TILE_M * k * ITEM_BYTES * (ranks - 1) / ranks)
    return tile_width(tile_rows, widths, k, transposed, transport, ranks)


def transport_us(nbytes: float) -> float:
    """Time of one pass over NVLink, in which one rank receives `nbytes`: by copy engines or by warps."""
    return PASS_US + nbytes / (1 << 20) * PULL_US_PER_MIB


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
        return max(waves * tile_us(choice.width, k) + transport / waves, transport), -choice.width

    narrower = (tiling(width) for width in SUM_WIDTHS if width < WIDEST)
    return min((tiling(WIDEST), *(choice for choice in narrower if choice.tiles <= _MOST_TILES)), key=us)


def terms_tiling(gemms: Sequence[Gemm], ranks: int, outer: int, all_reduce: bool) -> Tiling:
    """The tiling of a sum of matmuls; a scattered result has `outer` runs of rows for each rank."""
    k = sum(gemm.k for gemm in gemms)
    return sum_tiling(gemms[0].m, gemms[0].n, k, ranks, 1 if all_reduce else ranks * outer, all_reduce)
