"""How wide tiles are. Pure functions of sizes, so all ranks choose alike, and the cost model asks them, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...problem import GatherUse
from .kernels.config import ITEM_BYTES, SMS, TILE_K, TILE_M

# TMA swizzles the columns of a right operand [K, N] by 64, and wgmma takes multiples of 8 of one [N, K]; epilogues want 16.
SWIZZLED_WIDTHS = (256, 192, 128)
DENSE_WIDTHS = tuple(range(256, 127, -16))
WIDEST = 256
# A tile of 128 rows takes an SM as long as if it had that many columns more; a column takes so long per unit of k, and there is a pause
# before the next tile. [measured 2026-11-20, H200, bfloat16, all SMs busy: GEMMs of 512 to 8192 rows, tiles of 128 to 256 columns]
_EXTRA_COLUMNS = 18
_COLUMN_US_PER_K = 4.45e-5
_PAUSE_US = 1.0
# Of memory that is read: us per MiB. [measured 2026-11-28, H200: cuBLAS, 128 rows]
_READ_US_PER_MIB = 0.27
LAUNCH_US = 6.0
# One pass over NVLink by copy engine: us until the first byte, for each copy and its flag, and per MiB that one rank receives.
# [measured 2026-11-20, 4 GPUs]
_PASS_US = 10.0
_COPY_US = 8.0
_PUSH_US_PER_MIB = 3.1


def tile_us(width: int, k: int) -> float:
    """Time of a tile of 128 rows, `width` columns and `k` products on one SM, all SMs busy."""
    return (width + _EXTRA_COLUMNS) * k * _COLUMN_US_PER_K + _PAUSE_US


def waves_of(tiles: int) -> int:
    """Waves of that many tiles over the SMs; the last one takes as long as a full one."""
    return max(1, -(-tiles // SMS))


def read_us(k: int, n: int) -> float:
    """Reading a right operand [k, n] of 2-byte elements, without which no GEMM ends however few rows it has."""
    return k * n * ITEM_BYTES / (1 << 20) * _READ_US_PER_MIB


def gemm_us(tiles: int, width: int, k: int, n: int) -> float:
    """Time of a GEMM by one of the kernels, launch included."""
    return LAUNCH_US + max(waves_of(tiles) * tile_us(width, k), read_us(k, n))


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
    received = tile_rows * TILE_M * k * ITEM_BYTES * (ranks - 1) / ranks / (1 << 20)
    return tile_width(tile_rows, widths, k, transposed, push_us(received, ranks), ranks)


def push_us(mib: float, ranks: int) -> float:
    """Until the shards of all peers are there, `mib` MiB in all."""
    return _PASS_US + _COPY_US * (ranks - 1) + _PUSH_US_PER_MIB * mib


@dataclass(frozen=True)
class Tiling:
    """tiles: of the whole result. width: columns of a tile."""

    tiles: int
    width: int


def blocks_tiling(
    use: GatherUse, ranks: int, blocks: tuple[int, int, int], free: int, transposed: bool
) -> tuple[Tiling, int]:
    """The tiling of a use in the kernel of blocks, and its k with every block rounded up to whole steps.

    Args:
        blocks: (pieces, inner, width) as refusal.block_sizes has them. free: size of the local operand beside k.
        transposed: the right operand lies as [N, K].
    """
    pieces, inner, width = blocks
    count = pieces * ranks
    k = count * -(-inner // TILE_K) * TILE_K if use.contracts_ranks else width
    across = width if use.contracts_ranks else inner
    if use.side == "lhs":
        tile_rows, columns = -(-across // TILE_M), [free]
        tile_rows *= 1 if use.contracts_ranks else count
    else:
        tile_rows, columns = -(-free // TILE_M), [across] * (1 if use.contracts_ranks else count)
    chosen = tile_width(tile_rows, columns, k, transposed)
    return Tiling(tile_rows * sum(-(-column // chosen) for column in columns), chosen), k
