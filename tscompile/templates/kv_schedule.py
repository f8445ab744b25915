"""Which keys each tile of queries needs, where they lie once gathered, and in which order: the schedule of attention whose sequences
are cut over the ranks of a group. Pure arithmetic: no tensors, no devices, so every rank can work out what any other does.

Several sequences are packed into one tensor. Each is cut into chunks of equal length but for rounding:

    contiguous, R chunks     rank r holds chunk r
    zig-zag, 2 R chunks      rank r holds chunks r and 2 R - 1 - r, which gives all ranks the same work under a causal mask

A *run* is what a rank holds of one sequence in one chunk. A *slab* is what one rank holds in one of its chunks, of all sequences: it
travels as a whole and has a flag. Gathered keys lie slab by slab, in the order of ranks; within a slab each run begins at a multiple of
`tile_keys` rows, so a tile of keys never holds keys of two runs: what follows the end of a run is filling, which must be finite.

A tile of queries takes its keys in *steps* of one tile of keys each: first those of its own rank, then those of rank + 1, rank + 2 and
so on, which is the order in which they arrive if each rank sends to rank - 1 first. Steps of which the mask leaves nothing are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class Run:
    """Positions [start, stop) of a sequence, in chunk `part` of their rank; `row` is where they begin in its packed tensor."""

    sequence: int
    part: int
    start: int
    stop: int
    row: int


@dataclass(frozen=True)
class Cut:
    """How packed sequences are cut over ranks.

    Args:
        lengths: of the sequences, whole, each at least 1.
        ranks: how many hold them.
        zigzag: whether each holds an early and a late chunk.

    Raises:
        ValueError: there is no sequence, an empty one, or no rank.
    """

    lengths: tuple[int, ...]
    ranks: int
    zigzag: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths {self.lengths}: at least one sequence, and none of them empty")
        if self.ranks < 1:
            raise ValueError(f"{self.ranks} ranks: there must be one")

    @property
    def parts(self) -> int:
        """Chunks that a rank holds of each sequence."""
        return 2 if self.zigzag else 1

    def span(self, rank: int, part: int, sequence: int) -> tuple[int, int]:
        """Positions [start, stop) of a sequence that a rank holds in its chunk `part`; they may be none."""
        chunks = self.parts * self.ranks
        chunk = rank if part == 0 else chunks - 1 - rank
        length = self.lengths[sequence]
        return length * chunk // chunks, length * (chunk + 1) // chunks

    def runs(self, rank: int) -> tuple[Run, ...]:
        """What a rank holds, in the order of its packed tensor: sequence by sequence, in each the early chunk first."""
        return self._runs[rank]

    @cached_property
    def _runs(self) -> tuple[tuple[Run, ...], ...]:
        return tuple(tuple(self._runs_of(rank)) for rank in range(self.ranks))

    def _runs_of(self, rank: int) -> Iterator[Run]:
        row = 0
        for sequence in range(len(self.lengths)):
            for part in range(self.parts):
                start, stop = self.span(rank, part, sequence)
                if start < stop:
                    yield Run(sequence, part, start, stop, row)
                    row += stop - start

    def rows(self, rank: int) -> int:
        """Rows of a rank's packed tensor."""
        return sum(run.stop - run.start for run in self.runs(rank))


@dataclass(frozen=True)
class Gathered:
    """Where keys lie in the buffer that every rank gathers into.

    Args:
        keys: how they are cut.
        tile_keys: rows of a tile of keys.
    """

    keys: Cut
    tile_keys: int

    @cached_property
    def _slots(self) -> tuple[dict[tuple[int, int, int], int], tuple[int, ...]]:
        """(rank, part, sequence) -> first row; and the rows at which slabs end."""
        slots: dict[tuple[int, int, int], int] = {}
        at, ends = 0, []
        for slab in range(self.slabs):
            rank, part = divmod(slab, self.keys.parts)
            for run in self.keys.runs(rank):
                if run.part == part:
                    slots[rank, part, run.sequence] = at
                    at += -(-(run.stop - run.start) // self.tile_keys) * self.tile_keys
            ends.append(at)
        return slots, tuple(ends)

    @property
    def slabs(self) -> int:
        """How many there are. Slab `rank * parts + part` is the rank's chunk `part`."""
        return self.keys.ranks * self.keys.parts

    @property
    def rows(self) -> int:
        """Rows of the buffer, the same on every rank."""
        return self._slots[1][-1]

    def row(self, rank: int, part: int, sequence: int) -> int:
        """Where the run of a sequence in a rank's chunk `part` begins; it must not be empty."""
        return self._slots[0][rank, part, sequence]

    def slab(self, slab: int) -> tuple[int, int]:
        """Rows [begin, end) of a slab."""
        ends = self._slots[1]
        return (ends[slab - 1] if slab else 0), ends[slab]


@dataclass(frozen=True)
class Step:
    """One tile of keys for one tile of queries. Query i of the tile sees key j of the step if `j < valid and j <= i + diagonal`.

    Attributes:
        row: where the keys begin in the gathered buffer.
        slab: whose flag says that they are there.
        valid: how many of `tile_keys` rows are keys.
        diagonal: at least `tile_keys` - 1 if the mask takes nothing.
    """

    row: int
    slab: int
    valid: int
    diagonal: int


@dataclass(frozen=True)
class Tile:
    """`rows` queries from `row` of the rank's packed tensor on, all of one run, and their steps, of which there is at least one."""

    row: int
    rows: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class KvSchedule:
    """The schedule of one attention.

    Args:
        queries: how queries are cut.
        keys: how keys and values are cut, over the same ranks, with the same sequences; they may have other lengths.
        causal: whether a query sees only the keys up to its own position, where the last query and the last key of a sequence stand at
            the same position (as flash attention has it).
        tile_rows, tile_keys: queries of a tile, keys of a step.

    Raises:
        ValueError: the cuts do not go together, a causal sequence has queries before its first key, or a tile is empty.
    """

    queries: Cut
    keys: Cut
    causal: bool
    tile_rows: int
    tile_keys: int

    def __post_init__(self) -> None:
        if self.queries.ranks != self.keys.ranks:
            raise ValueError(f"queries on {self.queries.ranks} ranks, keys on {self.keys.ranks}: they must be the same")
        if len(self.queries.lengths) != len(self.keys.lengths):
            raise ValueError(f"{len(self.queries.lengths)} sequences of queries, {len(self.keys.lengths)} of keys")
        if min(self.tile_rows, self.tile_keys) < 1:
            raise ValueError(f"tiles of {self.tile_rows} queries and {self.tile_keys} keys: both must be positive")
        for sequence, (rows, keys) in enumerate(zip(self.queries.lengths, self.keys.lengths, strict=True)):
            if self.causal and rows > keys:
                raise ValueError(f"sequence {sequence}: {rows} queries, {keys} keys: the first ones would see no key")

    @cached_property
    def gathered(self) -> Gathered:
        """Where the keys lie."""
        return Gathered(self.keys, self.tile_keys)

    def slabs_in_order(self, rank: int) -> list[int]:
        """All slabs in the order in which a rank uses them: its own first, then as they arrive."""
        ranks, parts = self.keys.ranks, self.keys.parts
        return [(rank + i) % ranks * parts + part for i in range(ranks) for part in range(parts)]

    def needs(self, rank: int, slab: int) -> bool:
        """Whether any query of a rank sees any key of a slab."""
        owner, part = divmod(slab, self.keys.parts)
        firsts = {run.sequence: run.start for run in self.keys.runs(owner) if run.part == part}
        return any(
            run.sequence in firsts and (not self.causal or firsts[run.sequence] < run.stop + self._shift(run.sequence))
            for run in self.queries.runs(rank)
        )

    def sends(self, rank: int) -> list[tuple[int, int]]:
        """(peer, slab) for what a rank sends, in order: to the previous rank first, and nothing that the peer does not use."""
        ranks, parts = self.keys.ranks, self.keys.parts
        peers = ((rank - i) % ranks for i in range(1, ranks))
        own = range(rank * parts, (rank + 1) * parts)
        return [(peer, slab) for peer in peers for slab in own if self.needs(peer, slab)]

    def tiles(self, rank: int) -> list[Tile]:
        """The tiles of a rank's queries, those with most steps first, so that none of them ends long after the others."""
        made = [
            Tile(run.row + at, rows, tuple(self._steps(rank, run, at, rows)))
            for run in self.queries.runs(rank)
            for at in range(0, run.stop - run.start, self.tile_rows)
            for rows in (min(self.tile_rows, run.stop - run.start - at),)
        ]
        return sorted(made, key=lambda tile: -len(tile.steps))

    def _shift(self, sequence: int) -> int:
        """The position of a query among the keys, less its own number."""
        return self.keys.lengths[sequence] - self.queries.lengths[sequence]

    def _steps(self, rank: int, run: Run, at: int, rows: int) -> Iterator[Step]:
        first = run.start + at + self._shift(run.sequence)  # what the tile's first query sees last, if causal
        for slab in self.slabs_in_order(rank):
            owner, part = divmod(slab, self.keys.parts)
            start, stop = self.keys.span(owner, part, run.sequence)
            for key in range(start, min(stop, first + rows) if self.causal else stop, self.tile_keys):
                row = self.gathered.row(owner, part, run.sequence) + key - start
                diagonal = min(first - key, self.tile_keys) if self.causal else self.tile_keys
                yield Step(row, slab, min(self.tile_keys, stop - key), diagonal)


def tables(tiles: Sequence[Tile]) -> tuple[list[list[int]], list[list[int]]]:
    """What kernels read: a row (row, rows, first step, steps) for each tile, and a row (row, slab, valid, diagonal) for each step."""
    firsts = accumulate((len(tile.steps) for tile in tiles), initial=0)
    return (
        [[tile.row, tile.rows, first, len(tile.steps)] for tile, first in zip(tiles, firsts, strict=False)],
        [[step.row, step.slab, step.valid, step.diagonal] for tile in tiles for step in tile.steps],
    )
