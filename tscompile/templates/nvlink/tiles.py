"""Tables of tiles: which tile a kernel takes next, whom it waits for, where its result goes. Pure functions of sizes and rank.

A table is a list of rows of eight numbers, in the order in which the tiles are claimed. Words (tile.h has the same enum):
ROW, COL: first row and column of the tile in the operands. ROWS: how many of its rows are stored. OWNER: 1 if the tile is this
rank's own matter (its rows lie in its own shard; it sums the tile). INDEX: place of a travelling tile. OUT_ROW: first row in the
output. MASK: first counter of the tile's rows, or the peer that it goes to. GROUP: number of the weight, or a flag. In a gather's
table INDEX is the number of pieces that the tile's rows come in.

A list of pulls has rows of eight numbers too: kind (0: a partial tile lands, 1: a sum goes to the output), peer, its flag at this
rank, number of the tile in the peer's slot, then the tile's number in the landing zone, or row, column and rows in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TILE_M = 128
_BAND = 8  # tile rows that are walked together along the columns, so that their operands stay in L2
_MAX_WASTE = 1.1  # rows computed over rows needed, above which tiles may span the shards of several ranks

Row = tuple[int, int, int, int, int, int, int, int]


def _walk(bands: Sequence[tuple[int, ...]], columns: int) -> list[tuple[int, int]]:
    """(tile row, tile column) band by band: within a band column by column."""
    return [(row, column) for band in bands for column in range(columns) for row in band]


def _bands(count: int) -> list[tuple[int, ...]]:
    return [tuple(range(first, min(first + _BAND, count))) for first in range(0, count, _BAND)]


@dataclass(frozen=True)
class Gather:
    """Tiles and pieces of all_gather_matmul.

    rows: the tile table. pieces: what the gathering warps copy. counts: number of counters. slice_steps: k steps of a slice.
    """

    rows: list[Row]
    pieces: list[Row]
    counts: int
    slice_steps: int


PUBLISH, FETCH = 0, 1
_STEP = 64  # elements of a k step
_ITEM = 2  # bytes of an element


@dataclass(frozen=True)
class _Block:
    """Rows of one shard in one tile row: `start` in the shard, `to` in the gathered tensor."""

    source: int
    start: int
    to: int
    rows: int
    tile_row: int


def gather_tiles(
    rank: int,
    ranks: int,
    pieces: int,
    inner: int,
    k: int,
    widths: Sequence[int],
    tile_n: int,
    piece_bytes: int,
    whole: bool,
) -> Gather:
    """Tiles of a gathered matrix of (pieces, ranks, inner) rows of k elements times weights of `widths` columns each.

    The own shard comes first, then those of the next ranks, which is the order of their arrival. With few rows a piece is a part
    of k, so that a tile can start before its rows are complete.

    Args:
        piece_bytes: room of a piece.
        whole: the own shard must lie in the gathered tensor, too.
    """
    columns = [(group, col) for group, width in enumerate(widths) for col in range(0, width, tile_n)]
    slices, slice_steps = _slices(pieces * ranks * inner, k, piece_bytes)
    blocks, tiles, apart = _blocks(rank, ranks, pieces, inner)
    whole = whole or not apart
    expected: dict[int, int] = {}  # tile row -> pieces of one slice
    publish: list[Row] = []
    fetch: list[Row] = []
    for s in range(slices):
        first, last = s * slice_steps * _STEP, min((s + 1) * slice_steps * _STEP, k)
        width = (last - first) * _ITEM
        height = max(1, min(32, piece_bytes // (slice_steps * _STEP * _ITEM)))
        numbers = dict.fromkeys(range(ranks), 0)
        for block in sorted(blocks, key=lambda block: ((block.source - rank) % ranks, block.tile_row)):
            own = block.source == rank
            for at in range(0, block.rows, height):
                rows = min(height, block.rows - at)
                flag = (block.source * slices + s) * _most_pieces(pieces, inner, height) + numbers[block.source]
                numbers[block.source] += 1
                counter = block.tile_row * slices + s
                start, to = block.start + at, block.to + at
                if own:
                    to, counter = to if whole else -1, -1 if apart else counter
                    publish.append((PUBLISH, flag, start, to, rows, first * _ITEM, width, counter))
                else:
                    kind = FETCH | block.source << 8
                    fetch.append((kind, flag, start, to, rows, first * _ITEM, width, counter))
                if s == 0 and counter >= 0:
                    expected[block.tile_row] = expected.get(block.tile_row, 0) + 1
    table: list[Row] = []
    for bunch in tiles:
        for t, c in _walk(_bands(len(bunch)), len(columns)):
            tile_row, row, stored, own_tile, out = bunch[t]
            group, col = columns[c]
            table.append((row, col, stored, own_tile, expected.get(tile_row, 0), out, tile_row * slices, group))
    counts = (1 + max(block.tile_row for block in blocks)) * slices
    return Gather(table, [*publish, *fetch], counts, slice_steps)


def _slices(rows: int, k: int, piece_bytes: int) -> tuple[int, int]:
    """Slices of k, and k steps of one. A row of a slice fits into a piece; a GEMM of one or two waves takes more slices, since it
    cannot hide the arrival of whole rows."""
    steps = -(-k // _STEP)
    slices = max(-(-k * _ITEM // piece_bytes), min(steps, 8) if rows <= 512 else 1)
    slice_steps = min(-(-steps // slices), piece_bytes // (_STEP * _ITEM))
    return -(-steps // slice_steps), slice_steps


def gather_flags(ranks: int, pieces: int, inner: int, k: int, piece_bytes: int) -> int:
    """At least the number of flags and of counters that a gather uses."""
    slices, slice_steps = _slices(pieces * ranks * inner, k, piece_bytes)
    height = max(1, min(32, piece_bytes // (slice_steps * _STEP * _ITEM)))
    return ranks * slices * _most_pieces(pieces, inner, height)


def _most_pieces(pieces: int, inner: int, height: int) -> int:
    """At least the number of pieces of one slice of a shard, however tile rows cut it."""
    return pieces * (-(-inner // height) + 2 * (-(-inner // TILE_M) + 1))


# (tile row, row of the left operand, stored rows, own, output row)
_Tile = tuple[int, int, int, int, int]


def _blocks(rank: int, ranks: int, pieces: int, inner: int) -> tuple[list[_Block], list[list[_Tile]], bool]:
    """Blocks of rows, the tiles by their time of arrival, and whether each tile has rows of one shard only."""
    blocks: list[_Block] = []
    tile_rows = -(-inner // TILE_M)
    if tile_rows * TILE_M <= inner * _MAX_WASTE:
        tiles: list[list[_Tile]] = []
        for step in range(ranks):
            source = (rank + step) % ranks
            bunch = []
            for piece in range(pieces):
                for i in range(tile_rows):
                    tile_row = (piece * ranks + source) * tile_rows + i
                    start = piece * inner + i * TILE_M
                    to = (piece * ranks + source) * inner + i * TILE_M
                    stored = min(TILE_M, inner - i * TILE_M)
                    blocks.append(_Block(source, start, to, stored, tile_row))
                    bunch.append((tile_row, start if step == 0 else to, stored, int(step == 0), to))
            tiles.append(bunch)
        return blocks, tiles, True
    total = pieces * ranks * inner
    late: dict[int, int] = {}  # tile row -> steps until its last shard
    for first in range(0, total, inner):
        piece, source = divmod(first // inner, ranks)
        at = first
        while at < first + inner:
            tile_row = at // TILE_M
            stop = min(first + inner, (tile_row + 1) * TILE_M)
            blocks.append(_Block(source, piece * inner + at - first, at, stop - at, tile_row))
            late[tile_row] = max(late.get(tile_row, 0), (source - rank) % ranks)
            at = stop
    bunch = [(t, t * TILE_M, min(TILE_M, total - t * TILE_M), 0, t * TILE_M) for t in range(-(-total // TILE_M))]
    return blocks, [sorted(bunch, key=lambda tile: late[tile[0]])], False


LAND, RESULT = 0, 1


@dataclass(frozen=True)
class Reduction:
    """Tiles of matmul_reduce_scatter and matmul_all_reduce.

    rows: the table. pulls: the list of pulls. tiles: tiles that a rank sums (the largest number of any rank).
    """

    rows: list[Row]
    pulls: list[Row]
    tiles: int

    @property
    def flags(self) -> int:
        """Flags that the list of pulls uses."""
        return 1 + max((pull[2] for pull in self.pulls), default=0)


# (row, column, stored rows, output row) of a tile
_Place = tuple[int, int, int, int]


def _reduction(rank: int, places: list[list[_Place]], parts: int, gathers: bool) -> Reduction:
    """Table and pulls, from each owner's tiles in the order of their computation.

    The peers' tiles come first, the next rank's before all; with several parts the own tiles of a part come one part after those of
    the peers, so that sums leave early.

    Flags of a rank: `source * tiles + index` for partial tiles, behind them `owner * tiles + index` for sums.
    """
    ranks = len(places)
    tiles = max(1, *(len(owned) for owned in places))
    size = -(-tiles // parts)
    bounds = [(first, min(first + size, tiles)) for first in range(0, tiles, size)]
    rows: list[Row] = []
    pulls: list[Row] = []
    sums = ranks * tiles  # first flag of the sums

    def compute(first: int, stop: int, step: int) -> None:
        owner = (rank + step) % ranks
        for index, (row, col, stored, out) in enumerate(places[owner][first:stop], first):
            if step:
                rows.append((row, col, stored, 0, (step - 1) * tiles + index, out, owner, rank * tiles + index))
            else:
                rows.append((row, col, stored, 1, index, out, 0, sums + rank * tiles + index))

    def land(first: int, stop: int) -> None:
        for step in range(1, ranks):  # the rank `step` before this one computes for this one in its step `step`
            source = (rank - step) % ranks
            for index in range(first, min(stop, len(places[rank]))):
                flag = source * tiles + index
                pulls.append((LAND, source, flag, (step - 1) * tiles + index, flag, 0, 0, 0))

    def collect(first: int, stop: int) -> None:
        for index in range(first, stop):
            for step in range(1, ranks):
                owner = (rank + step) % ranks
                if index < len(places[owner]):
                    row, col, stored, _ = places[owner][index]
                    pulls.append((RESULT, owner, sums + owner * tiles + index, index, row, col, stored, 0))

    for number, (first, stop) in enumerate(bounds):
        for step in range(1, ranks):
            compute(first, stop, step)
        land(first, stop)
        if number:
            compute(*bounds[number - 1], 0)
        if gathers and number > 1:
            collect(*bounds[number - 2])
    compute(*bounds[-1], 0)
    if gathers:
        for bound in bounds[-2:]:
            collect(*bound)
    return Reduction(rows, pulls, tiles)


def scatter_tiles(rank: int, ranks: int, outer: int, inner: int, n: int, tile_n: int) -> Reduction:
    """Tiles of a result [(outer, ranks, inner), n] that is scattered to [(outer, inner), n]."""
    tile_rows = -(-inner // TILE_M)
    blocks = [(o, i * TILE_M) for o in range(outer) for i in range(tile_rows)]
    walk = _walk(_bands(len(blocks)), -(-n // tile_n))
    places: list[list[_Place]] = []
    for owner in range(ranks):
        owned = []
        for t, c in walk:
            o, start = blocks[t]
            row = (o * ranks + owner) * inner + start
            owned.append((row, c * tile_n, min(TILE_M, inner - start), o * inner + start))
        places.append(owned)
    return _reduction(rank, places, 1, False)


def all_reduce_tiles(rank: int, ranks: int, m: int, n: int, tile_n: int, parts: int) -> Reduction:
    """Tiles of a result [m, n] that every rank gets; each rank sums a run of tiles of equal length."""
    walk = _walk(_bands(-(-m // TILE_M)), -(-n // tile_n))
    share = -(-len(walk) // ranks)
    places: list[list[_Place]] = [[] for _ in range(ranks)]
    for position, (t, c) in enumerate(walk):
        row = t * TILE_M
        places[position // share].append((row, c * tile_n, min(TILE_M, m - row), row))
    return _reduction(rank, places, max(1, min(parts, share)), True)
