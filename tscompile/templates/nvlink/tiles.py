"""Tables of tiles: which tile a kernel takes next, whom it waits for, where its result goes. Pure functions of sizes and rank.

A table is a list of rows of eight numbers, in the order in which the tiles are claimed. Words (tile.h has the same enum):
ROW, COL: first row and column of the tile in the operands. ROWS: how many of its rows are stored. OWNER: 1 if the tile is this
rank's own matter (its rows lie in its own shard; it sums the tile). INDEX: place of a travelling tile. OUT_ROW: first row in the
output. MASK: ranks whose data the tile needs, or the part that it travels in. GROUP: number of the weight, or of the tile among all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TILE_M = 128
_BAND = 8  # tile rows that are walked together along the columns, so that their operands stay in L2
_MAX_WASTE = 1.1  # rows computed over rows needed, above which tiles may span the shards of several ranks

Row = tuple[int, int, int, int, int, int, int, int]


@dataclass(frozen=True)
class Gather:
    """Tiles of all_gather_matmul.

    rows: the table. spans: some tile has rows of this rank and of others, so this rank's shard must lie in the slot as well.
    """

    rows: list[Row]
    spans: bool


def _walk(bands: Sequence[tuple[int, ...]], columns: int) -> list[tuple[int, int]]:
    """(tile row, tile column) band by band: within a band column by column."""
    return [(row, column) for band in bands for column in range(columns) for row in band]


def _bands(count: int) -> list[tuple[int, ...]]:
    return [tuple(range(first, min(first + _BAND, count))) for first in range(0, count, _BAND)]


def gather_tiles(rank: int, ranks: int, pieces: int, inner: int, widths: Sequence[int], tile_n: int) -> Gather:
    """Tiles of a gathered matrix of (pieces, ranks, inner) rows times weights of `widths` columns each.

    The own shard comes first, then those of the next ranks, which is the order of their arrival.
    """
    columns = [(group, col) for group, width in enumerate(widths) for col in range(0, width, tile_n)]
    tile_rows = -(-inner // TILE_M)
    if tile_rows * TILE_M <= inner * _MAX_WASTE:
        rows: list[Row] = []
        for step in range(ranks):
            source = (rank + step) % ranks
            blocks = [(piece, i) for piece in range(pieces) for i in range(tile_rows)]
            for t, c in _walk(_bands(len(blocks)), len(columns)):
                piece, i = blocks[t]
                group, col = columns[c]
                start = (piece * ranks + source) * inner + i * TILE_M
                first = piece * inner + i * TILE_M if step == 0 else start
                stored = min(TILE_M, inner - i * TILE_M)
                mask = 0 if step == 0 else 1 << source
                rows.append((first, col, stored, int(step == 0), 0, start, mask, group))
        return Gather(rows, False)
    total = pieces * ranks * inner
    starts = []
    spans = False
    for start in range(0, total, TILE_M):
        blocks_of = range(start // inner, (min(start + TILE_M, total) - 1) // inner + 1)
        sources = {block % ranks for block in blocks_of}
        spans |= rank in sources
        mask = sum(1 << source for source in sources if source != rank)
        last = max((source - rank) % ranks for source in sources)
        starts.append((last, start, mask))
    starts.sort()
    rows = []
    for t, c in _walk(_bands(len(starts)), len(columns)):
        _, start, mask = starts[t]
        group, col = columns[c]
        rows.append((start, col, min(TILE_M, total - start), 0, 0, start, mask, group))
    return Gather(rows, spans)


@dataclass(frozen=True)
class Part:
    """Tiles that travel together to one peer: from staging tile `first` on, `count` tiles, to `place` in the peer's slot."""

    peer: int
    part: int
    counter: int
    first: int
    count: int
    place: int


@dataclass(frozen=True)
class Reduction:
    """Tiles of matmul_reduce_scatter and matmul_all_reduce.

    rows: the table. tiles: tiles that a rank sums (the largest number of any rank). parts: pieces per peer. copies: in the order in
    which they become ready. order: all_reduce only: (row, column, rows, owner) of every tile, alike on all ranks.
    """

    rows: list[Row]
    tiles: int
    parts: int
    copies: list[Part]
    order: list[tuple[int, int, int, int]]


# (row, column, stored rows, output row, number among all) of a tile
_Place = tuple[int, int, int, int, int]


def _reduction(
    rank: int, ranks: int, places: list[list[_Place]], parts: int, lag: bool
) -> tuple[list[Row], int, int, list[Part]]:
    """Table, tiles, parts and copies from each owner's tiles in the order of their computation.

    lag: own tiles of a part come one part after those of the peers, so that results leave early; otherwise they come last.
    """
    tiles = max(1, *(len(owned) for owned in places))
    parts = max(1, min(parts, tiles))
    size = -(-tiles // parts)
    parts = -(-tiles // size)
    rows: list[Row] = []
    copies: list[Part] = []

    def own(part: int) -> None:
        for index, (row, col, stored, out, number) in enumerate(
            places[rank][part * size : (part + 1) * size], part * size
        ):
            rows.append((row, col, stored, 1, index, out, part, number))

    steps = [(part, step) for part in range(parts) for step in range(1, ranks)]
    if not lag:
        steps.sort(key=lambda item: (item[1], item[0]))
    for position, (part, step) in enumerate(steps):
        peer = (rank + step) % ranks
        owned = places[peer][part * size : (part + 1) * size]
        counter = (step - 1) * parts + part
        first = (step - 1) * tiles + part * size
        for index, (row, col, stored, out, number) in enumerate(owned, first):
            rows.append((row, col, stored, 0, index, out, counter, number))
        copies.append(Part(peer, part, counter, first, len(owned), rank * tiles + part * size))
        if lag and (position + 1) % (ranks - 1) == 0 and part > 0:
            own(part - 1)
    for part in range(parts - 1 if lag and parts > 1 else 0, parts):
        own(part)
    return rows, tiles, parts, copies


def scatter_tiles(rank: int, ranks: int, outer: int, inner: int, n: int, tile_n: int, parts: int) -> Reduction:
    """Tiles of a result [(outer, ranks, inner), n] that is scattered to [(outer, inner), n]; the next rank's tiles come first."""
    tile_rows = -(-inner // TILE_M)
    columns = -(-n // tile_n)
    places: list[list[_Place]] = []
    for owner in range(ranks):
        blocks = [(o, i * TILE_M) for o in range(outer) for i in range(tile_rows)]
        walk = _walk(_bands(len(blocks)), columns)
        owned = []
        for t, c in walk:
            o, start = blocks[t]
            row = (o * ranks + owner) * inner + start
            owned.append((row, c * tile_n, min(TILE_M, inner - start), o * inner + start, 0))
        places.append(owned)
    rows, tiles, parts, copies = _reduction(rank, ranks, places, parts, lag=False)
    return Reduction(rows, tiles, parts, copies, [])


def all_reduce_tiles(rank: int, ranks: int, m: int, n: int, tile_n: int, parts: int) -> Reduction:
    """Tiles of a result [m, n] that every rank gets; each rank sums a run of tiles of equal length."""
    walk = _walk(_bands(-(-m // TILE_M)), -(-n // tile_n))
    share = -(-len(walk) // ranks)
    order: list[tuple[int, int, int, int]] = []
    places: list[list[_Place]] = [[] for _ in range(ranks)]
    for index in range(share):
        for owner in range(ranks):
            position = owner * share + index
            if position < len(walk):
                t, c = walk[position]
                row, col = t * TILE_M, c * tile_n
                stored = min(TILE_M, m - row)
                places[owner].append((row, col, stored, row, len(order)))
                order.append((row, col, stored, owner))
    rows, tiles, parts, copies = _reduction(rank, ranks, places, parts, lag=True)
    return Reduction(rows, tiles, parts, copies, order)
