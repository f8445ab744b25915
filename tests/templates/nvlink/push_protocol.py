"""A gather whose kernels push, in plain Python: all ranks of a group under a random scheduler (see protocol.py).

A CTA is a worker, which waits slice by slice for the rows of its tile, and two pushers, which claim units of the shard. What is stored
where, and which numbers say so, is that of kernels/push.h; test_push.py runs that text itself, too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tscompile.templates.nvlink.tiles import Gather, Row

from .protocol import NEVER, Claims, run_all


@dataclass(frozen=True)
class Sizes:
    """A shard of pieces * inner rows of `words` words goes out in slices of `slice_words`, in units of `unit` words."""

    ranks: int
    pieces: int
    inner: int
    words: int
    slice_words: int
    unit: int

    @property
    def slices(self) -> int:
        return -(-self.words // self.slice_words)

    def columns(self, index: int) -> slice:
        return slice(index * self.slice_words, min((index + 1) * self.slice_words, self.words))

    def units(self, index: int) -> int:
        """Of a slice."""
        columns = self.columns(index)
        return -(-self.pieces * self.inner * (columns.stop - columns.start) // self.unit)


class PushingRank:
    """One rank. `world` has all ranks."""

    def __init__(self, world: list[PushingRank], rank: int, sizes: Sizes, made: Gather, outs: Sequence[int]) -> None:
        self.world, self.rank, self.sizes, self.begun = world, rank, sizes, False
        shape = (sizes.pieces, sizes.ranks, sizes.inner, sizes.words)
        self.whole = torch.arange(torch.Size(shape).numel()).view(shape)
        self.shard = self.whole[:, rank].reshape(-1, sizes.words)
        self.slot = torch.full_like(self.whole, NEVER)
        self.flags: set[tuple[int, int]] = set()  # slice and source
        self.sent = [0] * sizes.slices
        self.tiles = Claims(made.rows)
        every = [(index, unit) for index in range(sizes.slices) for unit in range(sizes.units(index))]
        self.units = Claims(every)  # type: ignore[arg-type]
        self.written = [torch.zeros(sizes.pieces * sizes.ranks * sizes.inner, out, dtype=torch.int64) for out in outs]

    def store(self, index: int, unit: int, owner: int) -> None:
        """A unit, to the slot of one rank."""
        columns, sizes = self.sizes.columns(index), self.sizes
        width = columns.stop - columns.start
        word = torch.arange(unit * sizes.unit, min((unit + 1) * sizes.unit, len(self.shard) * width))
        row, column = word // width, columns.start + word % width
        target, place = self.world[owner].slot[:, self.rank], (row // sizes.inner, row % sizes.inner, column)
        assert (target[place] == NEVER).all(), "stored twice"
        target[place] = self.shard[row, column]

    def count(self, index: int) -> None:
        self.sent[index] += 1
        if self.sent[index] == self.sizes.units(index):
            for other in self.world:
                other.flags.add((index, self.rank))


class Pusher:
    """One event at a time: a claim, the stores to one rank, the count."""

    def __init__(self, rank: PushingRank, dice: random.Random) -> None:
        self._rank, self._dice, self.done = rank, dice, False
        self._unit: tuple[int, int] | None = None
        self._owners: list[int] = []

    def step(self) -> bool:
        self._rank.begun = True
        if self._unit is None:
            self._unit = self._rank.units()  # type: ignore[assignment]
            self.done = self._unit is None
            self._owners = self._dice.sample(range(self._rank.sizes.ranks), self._rank.sizes.ranks)
        elif self._owners:
            self._rank.store(*self._unit, self._owners.pop())
        else:
            self._rank.count(self._unit[0])
            self._unit = None
        return True


class Worker:
    """One event at a time: a claim, or a slice of the tile's rows."""

    def __init__(self, rank: PushingRank, tile_n: int) -> None:
        self._rank, self._tile_n, self.done = rank, tile_n, False
        self._tile: Row | None = None
        self._next = 0

    def step(self) -> bool:
        rank, sizes = self._rank, self._rank.sizes
        if self._tile is None:
            self._tile, self._next = rank.tiles(), 0
            self.done = self._tile is None
            return True
        row, col, stored, own, _, out_row, mask, group = self._tile
        needed = {(self._next, source) for source in range(sizes.ranks) if mask >> source & 1}
        if not needed <= rank.flags:
            return False
        assert not own and row == out_row
        columns = sizes.columns(self._next)
        read = rank.slot.view(-1, sizes.words)[row : row + stored, columns]
        assert torch.equal(read, rank.whole.view(-1, sizes.words)[row : row + stored, columns])
        self._next += 1
        if self._next == sizes.slices:
            rank.written[group][row : row + stored, col : col + self._tile_n] += 1
            self._tile = None
        return True


def gather_all(
    tables: list[Gather], sizes: Sizes, outs: Sequence[int], tile_n: int, workers: list[int], seed: int
) -> list[PushingRank]:
    """Run the protocol; `outs` are the columns of each result, `workers` the CTAs of each rank."""
    world: list[PushingRank] = []
    for rank, made in enumerate(tables):
        world.append(PushingRank(world, rank, sizes, made, outs))
    dice = random.Random(seed)
    of_rank: list[list[Pusher | Worker]] = []
    for rank in world:
        ctas = range(workers[rank.rank])
        of_rank.append([*(Pusher(rank, dice) for _ in ctas for _ in range(2)), *(Worker(rank, tile_n) for _ in ctas)])

    def exchanged() -> None:
        """Two slots suffice since a rank ends its op only after every peer has begun its own (docs/dev/gpu.md)."""
        if any(all(actor.done for actor in mine) for mine in of_rank):
            assert all(rank.begun for rank in world)

    run_all([actor for mine in of_rank for actor in mine], seed, exchanged)  # type: ignore[arg-type]
    return world
