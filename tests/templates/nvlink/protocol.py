"""What kernels do with the tables of tiles.py, in plain Python: all ranks of a group under a random scheduler, on tensors of the CPU.

A CTA is a worker, which claims rows of the table, and two pullers, which claim rows of the lists of pulls. A worker claims ahead, as
the loading warp does, and computes in the order of its claims. Whatever it may do next is left to a random number generator, so a run
that ends says that no order of events can hold it up for ever; one that cannot go on raises Stuck.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from tscompile.templates.nvlink import tiles
from tscompile.templates.nvlink.tiles import Gather, Reduction, Row

NEVER = -(10**6)  # what memory holds that nobody has written: a sum that took it in is far from the right one


class Stuck(Exception):
    """Nobody can go on, and somebody is not done."""


class Claims:
    """The counter of a kernel: rows in their order, each once."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: Iterator[Row] = iter(rows)

    def __call__(self) -> Row | None:
        return next(self._rows, None)


class Actor:
    """Does one row after the other. `perform` returns False as long as it has to wait."""

    def __init__(self, claims: Claims, ahead: int, perform: Callable[[Row], bool]) -> None:
        self._claims, self._ahead, self._perform = claims, ahead, perform
        self._held: deque[Row] = deque()
        self._drained = False

    @property
    def done(self) -> bool:
        return self._drained and not self._held

    def step(self) -> bool:
        """One event; False if there is none."""
        if not self._drained and len(self._held) < self._ahead:
            row = self._claims()
            if row is None:
                self._drained = True
            else:
                self._held.append(row)
            return True
        if self._held and self._perform(self._held[0]):
            self._held.popleft()
            return True
        return False


class Puller(Actor):
    """Does the rows of one list, and when none is left those of a second one."""

    def __init__(
        self, first: Claims, perform: Callable[[Row], bool], then: Claims, perform_then: Callable[[Row], bool]
    ) -> None:
        super().__init__(first, 1, perform)
        self._then: tuple[Claims, Callable[[Row], bool]] | None = (then, perform_then)

    @property
    def done(self) -> bool:
        return super().done and self._then is None

    def step(self) -> bool:
        if super().done and self._then is not None:
            self._claims, self._perform = self._then
            self._then, self._drained = None, False
        return super().step()


def run_all(actors: Sequence[Actor], seed: int, after: Callable[[], None] = lambda: None) -> None:
    """Let the actors act until all are done; `after` is called after every event."""
    dice = random.Random(seed)
    while waiting := [actor for actor in actors if not actor.done]:
        dice.shuffle(waiting)
        # Some get several turns where others get none: ranks are at different places of their tables for long.
        moved = False
        for actor in waiting:
            for _ in range(dice.choice((0, 1, 1, 5))):
                if not actor.step():
                    break
                moved = True
                after()
        if not moved and not any(actor.step() for actor in waiting):
            raise Stuck(f"{len(waiting)} of {len(actors)} actors wait for ever")


class Reducer:
    """One rank of matmul_reduce_scatter or matmul_all_reduce. `world` has all ranks."""

    def __init__(
        self, world: list[Reducer], rank: int, table: Reduction, product: torch.Tensor, rows: int, tile_n: int
    ) -> None:
        self.world, self.rank, self.table, self.tile_n = world, rank, table, tile_n
        self.shape = (tiles.TILE_M, tile_n)
        n = product.shape[1]
        # TMA fills what lies beyond the operands with zeros.
        self.product = torch.nn.functional.pad(product, (0, tile_n, 0, tiles.TILE_M))
        self.slot: dict[int, torch.Tensor] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.landing: dict[int, torch.Tensor] = {}
        self.flags: set[int] = set()
        self.out = torch.full((rows, n), NEVER, dtype=product.dtype)
        self.written = torch.zeros((rows, n), dtype=torch.int64)
        self.begun = False

    def signal(self, owner: int, flag: int) -> None:
        assert flag not in self.world[owner].flags, "two tiles share a flag"
        self.world[owner].flags.add(flag)

    def store(self, tile: torch.Tensor, row: int, col: int, rows: int) -> None:
        n = self.out.shape[1]
        assert 0 < rows <= tiles.TILE_M and row + rows <= len(self.out) and col < n
        self.out[row : row + rows, col : col + self.tile_n] = tile[:rows, : n - col]
        self.written[row : row + rows, col : col + self.tile_n] += 1

    def compute(self, entry: Row) -> bool:
        """As the multiplying and the signalling warps do."""
        row, col, stored, own, index, out_row, peer, flag = entry
        count, size = self.table.tiles, len(self.world)
        self.begun = True
        tile = self.product[row : row + self.shape[0], col : col + self.shape[1]].clone()
        if not own:
            assert index not in self.slot, "a tile in the slot is overwritten before its owner has it"
            assert 0 <= index < (size - 1) * count
            self.slot[index] = tile
            self.signal(peer, flag)
            return True
        places = [(self.rank + i) % size * count + index for i in range(1, size)]
        if not all(place in self.landing for place in places):
            return False
        for place in places:
            tile += self.landing[place]
        self.store(tile, out_row, col, stored)
        assert index not in self.sums and 0 <= index < count
        self.sums[index] = tile
        for other in range(size):
            if other != self.rank and self.world[other].table.results:
                self.signal(other, flag)
        return True

    def pull(self, entry: Row) -> bool:
        """As a pulling warp does with a partial tile."""
        peer, flag, source, to, *_ = entry
        assert peer != self.rank
        if flag not in self.flags:
            return False
        assert to not in self.landing and 0 <= to < len(self.world) * self.table.tiles
        self.landing[to] = self.world[peer].slot[source]
        return True

    def pull_sum(self, entry: Row) -> bool:
        """The same with a sum."""
        peer, flag, source, to, col, stored, *_ = entry
        assert peer != self.rank
        if flag not in self.flags:
            return False
        self.store(self.world[peer].sums[source], to, col, stored)
        return True


def reduce_all(
    tables: list[Reduction], products: list[torch.Tensor], rows: int, tile_n: int, workers: list[int], seed: int
) -> list[Reducer]:
    """Run the protocol; `rows` are those of each rank's output, `workers` the CTAs of each rank."""
    world: list[Reducer] = []
    for rank, (table, product) in enumerate(zip(tables, products, strict=True)):
        world.append(Reducer(world, rank, table, product, rows, tile_n))
    dice = random.Random(seed)
    actors: list[Actor] = []
    of_rank: list[list[Actor]] = []
    for rank in world:
        claims, pulls, results = (Claims(rows) for rows in (rank.table.rows, rank.table.pulls, rank.table.results))
        mine = []
        for _ in range(workers[rank.rank]):
            mine.append(Actor(claims, dice.randint(1, 4), rank.compute))
            second = Actor(results, 1, rank.pull_sum) if rank.table.results else Actor(pulls, 1, rank.pull)
            mine += [Puller(pulls, rank.pull, results, rank.pull_sum), second]
        actors += mine
        of_rank.append(mine)

    def exchanged() -> None:
        """Two slots suffice since a rank ends its op only after every peer has begun its own (docs/dev/gpu.md)."""
        if any(all(actor.done for actor in mine) for mine in of_rank):
            assert all(rank.begun for rank in world)

    run_all(actors, seed, exchanged)
    return world


class Gatherer:
    """One rank of all_gather_matmul. Results are row and column themselves, so that what is stored says where it comes from."""

    def __init__(
        self, rank: int, ranks: int, pieces: int, inner: int, made: Gather, widths: Sequence[int], tile_n: int
    ):
        self.rank, self.ranks, self.tile_n, self.widths = rank, ranks, tile_n, widths
        total = pieces * ranks * inner
        self.whole = torch.arange(total).view(pieces, ranks, inner)
        self.shard = self.whole[:, rank].reshape(-1)
        self.slot = torch.full((pieces, ranks, inner), NEVER)
        if made.spans:
            self.slot[:, rank] = self.whole[:, rank]
        self.arrived: set[int] = set()
        self.outs = [torch.full((total, width), NEVER) for width in widths]
        self.written = [torch.zeros((total, width), dtype=torch.int64) for width in widths]

    def arrive(self, source: int) -> None:
        """The copy engine of a peer: data, then the flag."""
        self.slot[:, source] = self.whole[:, source]
        self.arrived.add(source)

    def compute(self, entry: Row) -> bool:
        row, col, stored, own, _, out_row, mask, group = entry
        needed = {source for source in range(self.ranks) if mask >> source & 1}
        assert mask < 1 << self.ranks
        if not needed <= self.arrived:
            return False
        rows = (self.shard if own else self.slot.view(-1))[row : row + stored]
        assert len(rows) == stored and 0 < stored <= tiles.TILE_M and 0 <= col < self.widths[group]
        columns = torch.arange(col, min(col + self.tile_n, self.widths[group]))
        at = (slice(out_row, out_row + stored), slice(col, col + self.tile_n))
        self.outs[group][at] = rows[:, None] * 1000 + columns
        self.written[group][at] += 1
        return True

    def check(self) -> None:
        for out, written, width in zip(self.outs, self.written, self.widths, strict=True):
            assert torch.equal(written, torch.ones_like(written))
            assert torch.equal(out, self.whole.view(-1, 1) * 1000 + torch.arange(width))


def tile_count(rows: int, n: int, tile_n: int) -> int:
    return math.ceil(rows / tiles.TILE_M) * math.ceil(n / tile_n)
