"""What an exchange in front of a matmul sends: panels of the left operand `[M, K]`, and their places in a slot `[M, panels, R, Q]`.

An exchange `[R, M, O, Q]` has O panels of Q columns for each rank; those of several exchanges lie one behind the other. Pure functions
of sizes and strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


def parcels_of(shapes: Sequence[Sequence[int]], steps: Sequence[int], rank: int, item_bytes: int) -> list[Parcel]:
    """The parcels of exchanges `[R, M, O, Q]` with equal Q, of `rank`.

    Args:
        shapes: of each exchange. steps: elements from what goes to one rank to what goes to the next; each part is contiguous.
    """
    panels = sum(shape[2] for shape in shapes)
    parcels, first = [], 0
    for number, ((ranks, rows, outer, columns), step) in enumerate(zip(shapes, steps, strict=True)):
        width = columns * item_bytes
        line = ranks * width  # a panel of every rank
        start = first * line + rank * width
        if len(shapes) == 1:
            parcels.append(Parcel(0, 0, step * item_bytes, rows * outer, width, width, start, line))
        else:
            parcels += [
                Parcel(
                    number,
                    piece * width,
                    step * item_bytes,
                    rows,
                    width,
                    outer * width,
                    start + piece * line,
                    panels * line,
                )
                for piece in range(outer)
            ]
        first += outer
    return parcels
