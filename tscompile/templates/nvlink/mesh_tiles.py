"""Sizes and tables of mesh_matmul: how its operands travel, which tile comes next, and whom it waits for. Pure functions.

Either operand is gathered in a group of its own: it is a row of blocks, one per piece and rank, along k or along the other axis
(gather_blocks.py). A shard travels in a few chunks, cut along the axis that is not k: a tile then needs the first chunks of all ranks
and not all of a few shards, so multiplying may begin when a part of either operand is there, also where the ranks are summed over.

The table has two rows of eight numbers for each tile, in the order of the claims, then two for each panel of k, in the order in which
every tile adds them; the first one of a pair is of the left operand, the second one of the right operand. Words (kernels/mesh_gemm.py):

    AT      tile: first row (left) or column (right), from the start of the block. Panel: first k, from the start of the block
    SIZE    tile: how many rows or columns are stored. Panel: steps of k
    OWNER   1 if the block is this rank's, and read where the shard lies
    INDEX   the block, in the own shard or in the slot
    OUT_ROW tile: first row or column in the result
    MASK    rank of the operand's group whose block it is, as a bit; 0 if this rank's
    CHUNK   tile: the last chunk that it takes something of

Where the blocks lie along k, OWNER, INDEX and MASK stand in the rows of the panels, else in those of the tiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...problem import GatherUse
from . import widths
from .kernels.config import ITEM_BYTES, SMS, TILE_K, TILE_M
from .refusal import block_sizes
from .tiles import BAND, Row

MAX_CHUNKS = 4  # a first wave of tiles needs a quarter to a half of either operand (16384^3, 8192^3 on 2 x 2 ranks)
_CHUNK_BYTES = 4 << 20  # at least: a copy and its flag take the copy engine as long as 2 MiB
_ROW_BYTES = 2 << 10  # of a copy of rows, at least
_ALIGNED = 8  # elements: 16 bytes


@dataclass(frozen=True)
class Operand:
    """A gathered operand.

    ranks: of its group. pieces, inner, width: it has `pieces` blocks per rank, of `inner` rows or columns, `width` across.
    contracts: the blocks lie along k. k_first: k is the slower axis.
    """

    ranks: int
    pieces: int
    inner: int
    width: int
    contracts: bool
    k_first: bool

    @staticmethod
    def of(use: GatherUse, ranks: int, shard: Sequence[int], k: int) -> Operand:
        """What a use makes of shards [P, Q]."""
        sizes = block_sizes(use, ranks, shard, k)
        return Operand(ranks, *sizes, use.contracts_ranks, (use.rank_axis == "rows") == use.contracts_ranks)

    @property
    def blocks(self) -> int:
        return self.ranks * self.pieces

    @property
    def free(self) -> int:
        """Rows or columns of the result."""
        return self.width if self.contracts else self.blocks * self.inner

    @property
    def k(self) -> int:
        return self.blocks * self.inner if self.contracts else self.width

    @property
    def cut(self) -> int:
        """Size of a block along the axis that is not k, which chunks cut."""
        return self.width if self.contracts else self.inner

    @property
    def shard_bytes(self) -> int:
        return self.pieces * self.inner * self.width * ITEM_BYTES

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Bounds of the chunks of a shard. Ranks of a group must cut alike, so this depends on nothing but the shard."""
        count = max(1, min(MAX_CHUNKS, self.shard_bytes // _CHUNK_BYTES, self.cut // TILE_M))
        if self.k_first:
            count = max(1, min(count, self.cut * ITEM_BYTES // _ROW_BYTES))
            if self.contracts and self.pieces > 1:  # no copy of rows has the shape of such a chunk
                count = 1
        length = -(-self.cut // count // _ALIGNED) * _ALIGNED
        return list(pairwise([*range(0, self.cut, length), self.cut]))


@dataclass(frozen=True)
class Rectangle:
    """A copy of rows, in bytes: from `source` in the shard to `target` in a slot, whose pitch is `target_pitch`."""

    source: int
    target: int
    rows: int
    width: int
    pitch: int
    target_pitch: int


def chunk_copies(operand: Operand, rank: int) -> list[Rectangle]:
    """The copy of each chunk of the shard of `rank`, to its place in a slot [P, R, Q]."""
    pieces, inner, width, ranks = operand.pieces, operand.inner, operand.width, operand.ranks
    copies = []
    for first, last in operand.chunks:
        size = last - first
        # source, target, rows, width, pitch, target pitch in elements
        if operand.contracts and operand.k_first and size == width:  # [pieces, inner, width]
            found = (0, rank * inner * width, pieces, inner * width, inner * width, ranks * inner * width)
        elif operand.contracts and operand.k_first:
            found = (first, rank * inner * width + first, inner, size, width, width)
        elif operand.contracts:  # [width, pieces, inner]
            skipped = first * pieces
            found = (skipped * inner, (skipped * ranks + rank) * inner, size * pieces, inner, inner, ranks * inner)
        elif operand.k_first:  # [width, pieces, inner]
            found = (first, rank * inner + first, width * pieces, size, inner, ranks * inner)
        else:  # [pieces, inner, width]
            block = inner * width
            found = (first * width, (rank * inner + first) * width, pieces, size * width, block, ranks * block)
        source, target, rows, length, pitch, target_pitch = (number * ITEM_BYTES for number in found)
        copies.append(Rectangle(source, target, rows // ITEM_BYTES, length, pitch, target_pitch))
    return copies


@dataclass(frozen=True)
class _Strip:
    """Rows or columns of a tile. copies: of this operand's that arrive until it is there, this one included. row: of the table."""

    copies: int
    row: Row


def _strips(operand: Operand, rank: int, size: int) -> list[_Strip]:
    """Strips of `size` rows or columns, in the order of their arrival."""
    peers, strips = operand.ranks - 1, []
    for step in range(1 if operand.contracts else operand.ranks):
        source = (rank + step) % operand.ranks
        for chunk, (_, end) in enumerate(operand.chunks):
            for piece in range(1 if operand.contracts else operand.pieces):
                for at in range(0, operand.cut, size):
                    stored = min(size, operand.cut - at)
                    if not operand.chunks[chunk][0] < at + stored <= end:
                        continue
                    if operand.contracts:
                        strips.append(_Strip((chunk + 1) * peers, (at, 0, stored, 0, 0, at, 0, chunk)))
                        continue
                    whole, own = piece * operand.ranks + source, step == 0
                    row = (at, 0, stored, int(own), piece if own else whole, whole * operand.inner + at)
                    copies = 0 if own else chunk * peers + step
                    strips.append(_Strip(copies, (*row, 0 if own else 1 << source, chunk)))
    return sorted(strips, key=lambda strip: strip.copies)


def _arrival(operand: Operand, strip: _Strip) -> int:
    """Bytes of the operand that have come by then. Both operands come at the same time, and share the links evenly."""
    return strip.copies * operand.shard_bytes // len(operand.chunks)


def panel_bounds(left: Operand, right: Operand) -> list[tuple[int, int]]:
    """k cut where a block of either operand ends."""
    cuts = {0, left.k}
    for operand in (left, right):
        if operand.contracts:
            cuts |= set(range(0, operand.k, operand.inner))
    return list(pairwise(sorted(cuts)))


def _panel_row(operand: Operand, rank: int, start: int, steps: int) -> tuple[int, Row]:
    """How far the block's rank is from this one, and the row of the table."""
    if not operand.contracts:
        return 0, (start, 0, steps, 0, 0, 0, 0, 0)
    whole, at = divmod(start, operand.inner)
    piece, source = divmod(whole, operand.ranks)
    step = (source - rank) % operand.ranks
    own = step == 0
    return step, (at, 0, steps, int(own), piece if own else whole, 0, 0 if own else 1 << source, 0)


@dataclass(frozen=True)
class MeshTable:
    """rows: as the module says. tiles, panels: how many. steps: of k, of all panels."""

    rows: list[Row]
    tiles: int
    panels: int
    steps: int


def mesh_table(left: Operand, right: Operand, ranks: tuple[int, int], tile_n: int) -> MeshTable:
    """The table of the rank that is number `ranks` in the left operand's group and in the right one's.

    A tile comes when both of its strips are there, so those of this rank's own come first. The panels of k that this rank holds of both
    operands come first, then by the distance of the ranks that hold them: on a square mesh rank (i, j) takes them as Cannon's algorithm
    does, and no two ranks of a group want the same shard first.
    """
    strips = [
        _strips(operand, rank, size) for operand, rank, size in zip((left, right), ranks, (TILE_M, tile_n), strict=True)
    ]
    arrivals = [
        [_arrival(operand, strip) for strip in found] for operand, found in zip((left, right), strips, strict=True)
    ]
    order = sorted(
        (max(arrivals[0][r], arrivals[1][c]), r // BAND, c, r)
        for r in range(len(strips[0]))
        for c in range(len(strips[1]))
    )
    rows = [row for _, _, c, r in order for row in (strips[0][r].row, strips[1][c].row)]
    panels = []
    for start, stop in panel_bounds(left, right):
        steps = -(-(stop - start) // TILE_K)
        pair = [_panel_row(operand, rank, start, steps) for operand, rank in zip((left, right), ranks, strict=True)]
        panels.append((max(step for step, _ in pair), start, [row for _, row in pair], steps))
    panels.sort(key=lambda panel: panel[:2])
    rows += [row for panel in panels for row in panel[2]]
    return MeshTable(rows, len(order), len(panels), sum(panel[3] for panel in panels))


def operands_refusal(left: Operand, right: Operand) -> str | None:
    """Why the kernel cannot take these operands."""
    if min(*(min(each.pieces, each.inner, each.width) for each in (left, right)), left.k) < 1 or left.k != right.k:
        return "a matrix is empty"
    if any(
        (each.cut if each.k_first else each.inner if each.contracts else each.width) % _ALIGNED
        for each in (left, right)
    ):
        return "a gathered operand has rows of a rank that are no multiple of 16 bytes"
    if right.cut % _ALIGNED:
        return "the result has columns of a rank that are no multiple of 16 bytes"
    for start, stop in panel_bounds(left, right):
        # What a step loads beyond the end of a panel must be zeros of both operands, not the next panel.
        ends = all(stop % each.inner == 0 if each.contracts else stop == each.k for each in (left, right))
        if (stop - start) % TILE_K and not ends:
            return f"the contracted dim is cut into parts that are no multiple of {TILE_K}"
    return None


def tile_width(left: Operand, right: Operand, transposed: bool) -> int:
    """Columns of a tile. transposed: the right operand lies as [N, K]."""
    tile_rows = -(-left.cut // TILE_M) * (1 if left.contracts else left.blocks)
    columns = [right.cut] * (1 if right.contracts else right.blocks)
    return widths.tile_width(tile_rows, columns, left.k, transposed)


def mesh_us(left: Operand, right: Operand) -> float:
    """Time of both gathers and the matmul in one kernel, in us.

    Whatever part of the tiles is looked at, those that come last: it cannot be done sooner than the first of them is there, and they
    take their waves.
    """
    tile_n = tile_width(left, right, not right.k_first)
    wave = widths.tile_us(
        tile_n, sum(-(-(stop - start) // TILE_K) * TILE_K for start, stop in panel_bounds(left, right))
    )
    counts = [
        Counter((_arrival(operand, strip), strip.copies) for strip in _strips(operand, 0, size))
        for operand, size in ((left, TILE_M), (right, tile_n))
    ]
    tiles = counts[0].total() * counts[1].total()
    longest = 0.0
    for other, found in ((right, counts[0]), (left, counts[1])):
        for nbytes, copies in found:
            others = min(nbytes, (other.ranks - 1) * other.shard_bytes)
            there = widths.copied_us((nbytes + others) / (1 << 20), copies) if copies else 0.0
            earlier = [sum(n for (came, _), n in count.items() if came < nbytes) for count in counts]
            longest = max(longest, there + -(-(tiles - earlier[0] * earlier[1]) // SMS) * wave)
    return widths.LAUNCH_US + longest + widths.COPIED_TAIL_US
