"""What an exchange in front of a matmul sends: panels of the left operand `[M, K]`, and their places in a slot `[M, panels, R, Q]`.

An exchange `[R, M, O, Q]` has O panels of Q columns for each rank; those of several exchanges lie one behind the other. Every tile
needs panels of all ranks, so it would wait for all of the transport if they travelled whole. They travel in chunks of rows. Pure
functions of sizes and strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...problem import GatherUse
from . import widths
from .kernels.config import ITEM_BYTES, SMS, TILE_M

_CHUNKS = (1, 2, 3, 4)  # of which the fastest is taken: MASK of a tile has 32 bits, for 8 ranks each


@dataclass(frozen=True)
class Parcel:
    """Rows that go to each rank, in bytes.

    tensor: number of the call's tensor that they lie in. source: where they start there. step: to those of the next rank.
    rows, width, pitch: how many, how long, how far apart. target, target_pitch: their place in a slot.
    """

    tensor: int
    source: int
    step: int
    rows: int
    width: int
    pitch: int
    target: int
    target_pitch: int


def copies_of(panels: Sequence[tuple[int, int]]) -> int:
    """Parcels of each destination. panels: (O, Q) of each exchange."""
    return 1 if len(panels) == 1 else sum(outer for outer, _ in panels)


def chunk_rows(rows: int, count: int) -> list[tuple[int, int]]:
    """First row of each chunk, and that behind its last; whole tiles, so there may be fewer than `count`."""
    tile_rows = -(-rows // TILE_M)
    height = -(-tile_rows // count) * TILE_M
    return [(first, min(first + height, rows)) for first in range(0, rows, height)]


def panels_us(tiles: int, wave_us: float, ranks: int, mib: float, copies: int, chunks: int) -> float:
    """Time of a matmul whose operand arrives in chunks of rows, tile by tile in their order; launch included.

    Args:
        tiles: of the result. wave_us: of a wave of them. copies: that a peer sends of each chunk.
        mib: MiB that a rank receives, as if in one piece.
    """
    peers, now = ranks - 1, widths.LAUNCH_US
    for wave in range(widths.waves_of(tiles)):
        chunk = (min((wave + 1) * SMS, tiles) - 1) * chunks // tiles  # of its last tile
        before = chunk * peers  # parts that arrive before that chunk
        first, last = (
            widths.copied_us(mib * part / (chunks * peers), copies * part) for part in (before + 1, before + peers)
        )
        # What is there is multiplied while the rest is on its way, the own panels first.
        now = max(now + wave_us, first + wave_us * peers / ranks, last + wave_us / ranks)
    return now + widths.COPIED_TAIL_US


def chunk_count(
    rows: int, columns: int, k: int, panels: Sequence[tuple[int, int]], ranks: int, use: GatherUse
) -> tuple[int, float]:
    """In how many chunks an operand [rows, k] should travel for a matmul [rows, columns], and the time of that.

    Asked of sizes alone: ranks must choose alike. panels: (O, Q) of each exchange.
    """
    pieces = sum(outer for outer, _ in panels)
    blocks = (pieces, k // (pieces * ranks), rows)
    tiling, steps = widths.blocks_tiling(use, ranks, blocks, columns, transposed=True)
    wave_us = widths.tile_us(tiling.width, steps)
    mib = rows * k * ITEM_BYTES * (ranks - 1) / ranks / (1 << 20) * widths.row_factor(blocks[1] * ITEM_BYTES)

    def us(count: int) -> float:
        chunks = len(chunk_rows(rows, count))
        return panels_us(tiling.tiles, wave_us, ranks, mib, copies_of(panels), chunks)

    best = min(_CHUNKS, key=us)
    return best, us(best)


def parcels_of(
    shapes: Sequence[Sequence[int]], steps: Sequence[int], rank: int, item_bytes: int, chunk: tuple[int, int]
) -> list[Parcel]:
    """The parcels of a chunk of exchanges `[R, M, O, Q]` with equal Q, of `rank`.

    Args:
        chunk: its first row, and that behind its last.
        shapes: of each exchange. steps: elements from what goes to one rank to what goes to the next; each part is contiguous.
    """
    above, height = chunk[0], chunk[1] - chunk[0]
    width = shapes[0][3] * item_bytes
    line = shapes[0][0] * width  # a panel of every rank
    row = sum(shape[2] for shape in shapes) * line  # of the slot
    parcels, target = [], above * row + rank * width
    for number, (shape, step) in enumerate(zip(shapes, steps, strict=True)):
        outer = shape[2]
        source, pitch = above * outer * width, outer * width
        if len(shapes) == 1:  # panels of a row lie as far apart as those of the next
            return [Parcel(0, source, step * item_bytes, height * outer, width, width, target, line)]
        for piece in range(outer):
            start = source + piece * width
            parcels.append(Parcel(number, start, step * item_bytes, height, width, pitch, target, row))
            target += line
    return parcels
