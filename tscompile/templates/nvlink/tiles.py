"""Tables of tiles: which tile a kernel takes next, whom it waits for, where its result goes. Pure functions of sizes and rank.

A table is a list of rows of eight numbers, in the order in which the tiles are claimed. Words (tile.h has the same enum):
ROW, COL: first row and column of the tile in the operands. ROWS: how many of its rows are stored. OWNER: 1 if the tile is this
rank's own matter (its rows lie in its own shard; it sums the tile). INDEX: place of a travelling tile. OUT_ROW: first row in the
output. MASK: ranks whose data the tile needs, or the peer that it goes to. GROUP: number of the weight, or a flag, or a tile's place in
its tile row. A mask may have the rank itself: then its own copies are waited for (`joined`).

Where the gathered operand is a row of blocks (gather_blocks.py), INDEX is the block in the own shard or in the slot, or where the
tile's walk over the blocks begins; OUT_ROW is the tile's first row or column in the output on the gathered side, and GROUP the
number of its columns that are stored.

A list of pulls has rows of eight numbers too: peer, its flag at this rank, number of the tile in the peer's slot, then the number of a
partial tile in the landing zone, or row, column and rows of a sum in the output; the rest is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...language.context import MAX_RANKS
from .kernels.config import TILE_M

BAND = 8  # tile rows that are walked together along the columns, so that their operands stay in L2
_SHARED_BAND = 4  # of an all_reduce, whose tables walk a band of each rank at the same time
_MAX_WASTE = 1.1  # rows computed over rows needed, above which tiles may span the shards of several ranks

Row = tuple[int, int, int, int, int, int, int, int]


@dataclass(frozen=True)
class Gather:
    """Tiles of all_gather_matmul.

    rows: the table. spans: some tile has rows of this rank and of others, so this rank's shard must be copied to its slot as well.
    """

    rows: list[Row]
    spans: bool


def _walk(bands: Sequence[tuple[int, ...]], columns: int) -> list[tuple[int, int]]:
    """(tile row, tile column) band by band: within a band column by column."""
    return [(row, column) for band in bands for column in range(columns) for row in band]


def _bands(count: int, height: int) -> list[tuple[int, ...]]:
    return [tuple(range(first, min(first + height, count))) for first in range(0, count, height)]


def gather_tiles(
    rank: int, ranks: int, pieces: int, inner: int, widths: Sequence[int], tile_n: int, *, pushed: bool = False
) -> Gather:
    """Tiles of a gathered matrix of (pieces, ranks, inner) rows times weights of `widths` columns each.

    The own shard comes first, then those of the next ranks, which is the order of their arrival.

    Args:
        pushed: the kernel pushes the own shard, too: tiles read it from the slot and wait for it.
    """
    columns = [(group, col) for group, width in enumerate(widths) for col in range(0, width, tile_n)]
    tile_rows = -(-inner // TILE_M)
    if tile_rows * TILE_M <= inner * _MAX_WASTE:
        rows: list[Row] = []
        for step in range(ranks):
            source = (rank + step) % ranks
            blocks = [(piece, i) for piece in range(pieces) for i in range(tile_rows)]
            for t, c in _walk(_bands(len(blocks), BAND), len(columns)):
                piece, i = blocks[t]
                group, col = columns[c]
                start = (piece * ranks + source) * inner + i * TILE_M
                local = step == 0 and not pushed
                first = piece * inner + i * TILE_M if local else start
                stored = min(TILE_M, inner - i * TILE_M)
                mask = 0 if local else 1 << source
                rows.append((first, col, stored, int(local), 0, start, mask, group))
        return Gather(rows, False)
    total = pieces * ranks * inner
    starts = []
    spans = False
    for start in range(0, total, TILE_M):
        blocks_of = range(start // inner, (min(start + TILE_M, total) - 1) // inner + 1)
        sources = {block % ranks for block in blocks_of}
        spans |= rank in sources
        mask = sum(1 << source for source in sources if pushed or source != rank)
        last = max((source - rank) % ranks for source in sources)
        starts.append((last, start, mask))
    starts.sort()
    rows = []
    for t, c in _walk(_bands(len(starts), BAND), len(columns)):
        _, start, mask = starts[t]
        group, col = columns[c]
        rows.append((start, col, min(TILE_M, total - start), 0, 0, start, mask, group))
    return Gather(rows, spans and not pushed)


def joined(rows: Sequence[Row], rank: int, walk: int = 0) -> list[Row]:
    """The table of a gather whose kernel does not end before this rank's own copies have ended: behind them stands its own flag.

    The last tile waits for it and no other one does, so copies that end late hold up nothing else.

    Args:
        walk: rows of a walk, if the table ends in walks. The last tile gets one of its own, which waits where it ends.
    """
    found = list(rows)
    last = sum(row[2] > 0 for row in rows) - 1
    if walk:
        first = found[last][4]
        found[last] = (*found[last][:4], len(rows), *found[last][5:])
        found += rows[first : first + walk]
        last = len(found) - 1
    found[last] = (*found[last][:6], found[last][6] | 1 << rank, found[last][7])
    return found


def block_tiles(
    rank: int, ranks: int, pieces: int, inner: int, free: int, gathered_left: bool, tile_n: int
) -> list[Row]:
    """Tiles of a result whose rows (if `gathered_left`, else columns) are gathered in blocks of `inner`, and `free` the other way.

    A tile has rows or columns of one block. Blocks come in the order of their arrival.
    """
    size = TILE_M if gathered_left else tile_n
    rows: list[Row] = []
    for step in range(ranks):
        source = (rank + step) % ranks
        starts = [(piece, at) for piece in range(pieces) for at in range(0, inner, size)]
        if gathered_left:
            walk = _walk(_bands(len(starts), BAND), -(-free // tile_n))
        else:
            walk = _walk(_bands(-(-free // TILE_M), BAND), len(starts))
        for t, c in walk:
            piece, at = starts[t if gathered_left else c]
            whole = piece * ranks + source
            row, col = (at, c * tile_n) if gathered_left else (t * TILE_M, at)
            height, width = (inner - row, free - col) if gathered_left else (free - row, inner - col)
            own, block, mask = (1, piece, 0) if step == 0 else (0, whole, 1 << source)
            rows.append((row, col, min(TILE_M, height), own, block, whole * inner + at, mask, min(tile_n, width)))
    return rows


def contraction_tiles(rank: int, ranks: int, pieces: int, m: int, n: int, tile_n: int) -> list[Row]:
    """Table of a result [m, n] that sums over the gathered blocks: its tiles, then `ranks` walks over all blocks.

    Walk s adds the blocks of rank s first, then those of the next ranks. Tiles are dealt out to the walks alike on all ranks, so a
    sum has the same order, and the same bits, wherever it is computed; but each rank takes the tiles first whose walk begins with
    its own blocks. INDEX of a tile is the first row of its walk. A row of a walk has OWNER, INDEX and MASK of a tile that
    needs the block, and the block's number among all as OUT_ROW.
    """
    walk = _walk(_bands(-(-m // TILE_M), BAND), -(-n // tile_n))
    order = sorted(range(len(walk)), key=lambda i: ((i * ranks // len(walk) - rank) % ranks, i))
    rows: list[Row] = []
    for i in order:
        row, col = walk[i][0] * TILE_M, walk[i][1] * tile_n
        first = len(walk) + i * ranks // len(walk) * ranks * pieces
        rows.append((row, col, min(TILE_M, m - row), 0, first, row, 0, min(tile_n, n - col)))
    for start in range(ranks):
        rows += _blocks_walk(rank, ranks, pieces, start)
    return rows


def panel_tiles(
    rank: int, ranks: int, pieces: int, chunks: Sequence[tuple[int, int]], n: int, tile_n: int, placed: bool
) -> list[Row]:
    """Table of a result of `n` columns whose left operand is another one on every rank: its tiles, then a walk over all blocks for each
    chunk.

    The operand arrives in chunks of rows, and tiles come in their order. Every tile begins with this rank's own blocks. The flags of a
    chunk, and its bits of a MASK, are those of the ranks of a gather for the last one, the next MAX_RANKS for the one before it.

    Args:
        chunks: first row of each, and that behind its last; tiles do not span them. placed: the own blocks are in the slot, too.
    """
    places = [
        (row * TILE_M, column * tile_n, number, end)
        for number, (start, end) in enumerate(chunks)
        for row, column in _walk(
            [tuple(start // TILE_M + i for i in band) for band in _bands(-(-(end - start) // TILE_M), BAND)],
            -(-n // tile_n),
        )
    ]
    count = pieces * ranks
    rows: list[Row] = [
        (row, col, min(TILE_M, end - row), 0, len(places) + chunk * count, row, 0, min(tile_n, n - col))
        for row, col, chunk, end in places
    ]
    for chunk in reversed(range(len(chunks))):
        rows += _blocks_walk(rank, ranks, pieces, rank, placed, chunk * MAX_RANKS)
    return rows


def _blocks_walk(rank: int, ranks: int, pieces: int, start: int, placed: bool = False, first_bit: int = 0) -> list[Row]:
    """The blocks of rank `start`, then those of the next ranks. placed: this rank's own are read in the slot."""
    rows: list[Row] = []
    for source in ((start + step) % ranks for step in range(ranks)):
        mask = 0 if source == rank else _int32(1 << (first_bit + source))
        for piece in range(pieces):
            whole = piece * ranks + source
            own = source == rank and not placed
            rows.append((0, 0, 0, int(own), piece if own else whole, whole, mask, 0))
    return rows


def _int32(bits: int) -> int:
    """The number that has these 32 bits."""
    return bits - (bits >> 31 << 32)


@dataclass(frozen=True)
class Reduction:
    """Tiles of matmul_reduce_scatter and matmul_all_reduce.

    rows: the table. pulls: partial tiles that this rank sums, from the peers. results: sums of the peers, for an all_reduce.
    tiles: tiles that a rank sums (the largest number of any rank).
    """

    rows: list[Row]
    pulls: list[Row]
    results: list[Row]
    tiles: int

    @property
    def flags(self) -> int:
        """Flags that the lists of pulls use."""
        return 1 + max((pull[1] for pull in (*self.pulls, *self.results)), default=0)


# (row, column, stored rows, output row) of a tile
_Place = tuple[int, int, int, int]


def _reduction(rank: int, places: list[list[_Place]], part: int, lag: int, gathers: bool) -> Reduction:
    """Table and pulls, from each owner's tiles in the order of their computation.

    Tiles go in parts of `part` of each owner. In a part the peers' tiles come first, the next rank's before all; the own tiles of
    a part come `lag` parts after those of the peers, so that sums leave early, but do not wait for their landing.

    Flags of a rank: `source * tiles + index` for partial tiles, behind them `owner * tiles + index` for sums.
    """
    ranks = len(places)
    tiles = max(1, *(len(owned) for owned in places))
    bounds = [(first, min(first + part, tiles)) for first in range(0, tiles, part)]
    rows: list[Row] = []
    pulls: list[Row] = []
    results: list[Row] = []
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
                pulls.append((source, flag, (step - 1) * tiles + index, flag, 0, 0, 0, 0))

    def collect(first: int, stop: int) -> None:
        for index in range(first, stop):
            for step in range(1, ranks):
                owner = (rank + step) % ranks
                if index < len(places[owner]):
                    row, col, stored, _ = places[owner][index]
                    results.append((owner, sums + owner * tiles + index, index, row, col, stored, 0, 0))

    for number, (first, stop) in enumerate(bounds):
        for step in range(1, ranks):
            compute(first, stop, step)
        land(first, stop)
        if number >= lag:
            compute(*bounds[number - lag], 0)
        if gathers:
            collect(first, stop)
    for bound in bounds[max(0, len(bounds) - lag) :]:
        compute(*bound, 0)
    return Reduction(rows, pulls, results, tiles)


def scatter_tiles(rank: int, ranks: int, outer: int, inner: int, n: int, tile_n: int, part: int) -> Reduction:
    """Tiles of a result [(outer, ranks, inner), n] that is scattered to [(outer, inner), n]. The own tiles come last.

    `part` tiles of all ranks together make a part: in small ones tiles leave for all peers, and arrive from all, at any time.
    """
    tile_rows = -(-inner // TILE_M)
    blocks = [(o, i * TILE_M) for o in range(outer) for i in range(tile_rows)]
    walk = _walk(_bands(len(blocks), BAND), -(-n // tile_n))
    places: list[list[_Place]] = []
    for owner in range(ranks):
        owned = []
        for t, c in walk:
            o, start = blocks[t]
            row = (o * ranks + owner) * inner + start
            owned.append((row, c * tile_n, min(TILE_M, inner - start), o * inner + start))
        places.append(owned)
    after_all = len(places[0])  # there are no more parts than tiles
    return _reduction(rank, places, max(1, part // ranks), after_all, False)


def all_reduce_tiles(rank: int, ranks: int, m: int, n: int, tile_n: int, part: int, lag: int) -> Reduction:
    """Tiles of a result [m, n] that every rank gets; each rank sums a run of tiles of equal length.

    `part` tiles of all ranks together make a part.
    """
    walk = _walk(_bands(-(-m // TILE_M), _SHARED_BAND), -(-n // tile_n))
    share = -(-len(walk) // ranks)
    places: list[list[_Place]] = [[] for _ in range(ranks)]
    for position, (t, c) in enumerate(walk):
        row = t * TILE_M
        places[position // share].append((row, c * tile_n, min(TILE_M, m - row), row))
    return _reduction(rank, places, max(1, part // ranks), lag, True)


def whole_tiles(m: int, n: int, tile_n: int) -> list[Row]:
    """Tiles of a small sum [m, n], each the matter of all ranks: INDEX is the tile's number, GROUP its place in its tile row."""
    walk = _walk(_bands(-(-m // TILE_M), BAND), -(-n // tile_n))
    return [(t * TILE_M, c * tile_n, min(TILE_M, m - t * TILE_M), 0, i, 0, 0, c) for i, (t, c) in enumerate(walk)]
