"""Columns of a tile: what wastes least of the last wave of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .kernels.config import SMS

TILE_WIDTHS = (256, 240, 224)  # narrower ones lose more in the tensor cores than they win in waves
SWIZZLED_WIDTHS = (
    256,
)  # of a right operand [K, N]: TMA swizzles columns by 64, and loads a ragged rest in many small boxes


def tile_width(rows: int, widths: Sequence[int], choices: Sequence[int] = TILE_WIDTHS) -> int:
    """Columns of a tile for `rows` tile rows over matrices of these widths: fewest wave-columns, then the widest."""
    if max(widths) <= 128:
        return 128

    def cost(tile: int) -> tuple[int, int]:
        waves = math.ceil(rows * sum(math.ceil(width / tile) for width in widths) / SMS)
        return waves * tile, -tile

    return min(choices, key=cost)
