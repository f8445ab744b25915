"""What kernels do with the tables of tiles.py, in plain Python: all ranks of a group under a random scheduler, on tensors of the CPU.

A CTA is a worker, which claims rows of the table, and pullers, which claim rows of the lists of pulls. A worker claims ahead, as
the loading warp does, and computes in the order of its claims. A puller moves pieces as tsk_bring does; what it stores is written no
sooner than it waits for that. Who acts next is left to a random number generator, so a run that ends says that no order of events can
hold it up for ever; one that cannot go on raises Stuck.
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


class Puller:
    """Moves the tiles of one list, and then those of the next one, as tsk_bring does, with `slots` pieces of shared memory.

    A piece is a row of a tile. In a tile's last pieces the next tile is claimed, and it follows without a pause if its flag is set.
    """

    def __init__(self, lists: Sequence[tuple[Claims, Pulled]], slots: int) -> None:
        self._slots: list[torch.Tensor | None] = [None] * slots
        self._groups: deque[Copy] = deque()  # on their way, the oldest first
        self._events = (event for claims, pulled in lists for event in self._bring(claims, pulled))
        self.done = False

    def step(self) -> bool:
        """One event; False if there is none."""
        event = next(self._events, None)
        self.done = event is None
        return event is not False

    def _bring(self, claims: Claims, pulled: Pulled) -> Iterator[bool]:
        pieces, slots = tiles.TILE_M, len(self._slots)
        storing = int(slots > 2)
        loading = slots - storing
        coming, last, there, ahead = claims(), None, False, 0
        yield True
        while coming is not None:
            row = coming
            while not there and not pulled.is_there(row):
                yield False
            for piece in range(ahead, loading):
                self._load(pulled, row, piece)
            there, ahead = False, 0
            for piece in range(pieces):
                yield True
                follows = piece + loading
                self._groups.append(Copy(self._slots, pulled, row, piece))
                self.wait_until_read(storing)
                if follows < pieces:
                    self._load(pulled, row, follows)
                if last is not None:
                    yield True
                    self._tell(pulled, last, 1)
                    last = None
                if follows == pieces:
                    coming = claims()
                if follows >= pieces and coming is not None:
                    yield True
                    there = there or pulled.is_there(coming)
                    while there and ahead <= follows - pieces:
                        self._load(pulled, coming, ahead)
                        ahead += 1
            yield True
            if self.may_tell_later(there, coming):
                last = row
            else:
                self._tell(pulled, row, 0)
        self.wait_until_written(0)

    def may_tell_later(self, there: bool, coming: Row | None) -> bool:
        return there

    def wait_until_read(self, newer: int) -> None:
        """All groups of copies but the `newer` last ones: their slots are free."""
        for group in list(self._groups)[: len(self._groups) - newer]:
            group.read()

    def wait_until_written(self, newer: int) -> None:
        while len(self._groups) > newer:
            self._groups.popleft().write()

    def _tell(self, pulled: Pulled, row: Row, newer: int) -> None:
        if pulled.tells:
            self.wait_until_written(newer)
            pulled.tell(row)

    def _load(self, pulled: Pulled, row: Row, piece: int) -> None:
        slot = piece % len(self._slots)
        assert self._slots[slot] is None, "a piece is loaded over one that has not been stored"
        assert pulled.is_there(row)
        self._slots[slot] = pulled.fetch(row, piece)


class Copy:
    """A group of copies from a slot: it reads the slot and writes its piece as late as the waits allow."""

    def __init__(self, slots: list[torch.Tensor | None], pulled: Pulled, row: Row, piece: int) -> None:
        self._slots, self._pulled, self._row, self._piece = slots, pulled, row, piece
        self._data: torch.Tensor | None = None

    def read(self) -> None:
        if self._data is None:
            slot = self._piece % len(self._slots)
            self._data, self._slots[slot] = self._slots[slot], None

    def write(self) -> None:
        self.read()
        assert self._data is not None
        self._pulled.store(self._row, self._piece, self._data)


def run_all(actors: Sequence[Actor | Puller], seed: int, after: Callable[[], None] = lambda: None) -> None:
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
        self.landed: set[int] = set()
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
        if not self.landed.issuperset(places):
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


class Pulled:
    """A list of partial tiles, as a pulling warp of `reducer` moves them, in pieces of a row."""

    tells = True

    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer

    def is_there(self, entry: Row) -> bool:
        return entry[1] in self.reducer.flags

    def fetch(self, entry: Row, piece: int) -> torch.Tensor:
        return self.source(entry[0])[entry[2]][piece].clone()

    def source(self, peer: int) -> dict[int, torch.Tensor]:
        assert peer != self.reducer.rank
        return self.reducer.world[peer].slot

    def store(self, entry: Row, piece: int, data: torch.Tensor) -> None:
        to, reducer = entry[3], self.reducer
        assert 0 <= to < len(reducer.world) * reducer.table.tiles
        assert to not in reducer.landed, "a tile is written after the word that it has landed"
        reducer.landing.setdefault(to, torch.full(reducer.shape, NEVER))[piece] = data

    def tell(self, entry: Row) -> None:
        assert entry[3] not in self.reducer.landed
        self.reducer.landed.add(entry[3])
        self.reducer.landing.setdefault(entry[3], torch.full(self.reducer.shape, NEVER))


class PulledSums(Pulled):
    """The same of sums, which nobody of the rank waits for."""

    tells = False

    def source(self, peer: int) -> dict[int, torch.Tensor]:
        assert peer != self.reducer.rank
        return self.reducer.world[peer].sums

    def store(self, entry: Row, piece: int, data: torch.Tensor) -> None:
        _, _, _, to, col, stored, *_ = entry
        if piece < stored:
            self.reducer.store(data[None], to + piece, col, 1)


def reduce_all(
    tables: list[Reduction],
    products: list[torch.Tensor],
    rows: int,
    tile_n: int,
    workers: list[int],
    seed: int,
    puller: type[Puller] = Puller,
) -> list[Reducer]:
    """Run the protocol; `rows` are those of each rank's output, `workers` the CTAs of each rank."""
    world: list[Reducer] = []
    for rank, (table, product) in enumerate(zip(tables, products, strict=True)):
        world.append(Reducer(world, rank, table, product, rows, tile_n))
    dice = random.Random(seed)
    actors: list[Actor | Puller] = []
    of_rank: list[list[Actor | Puller]] = []
    for rank in world:
        claims, pulls, results = (Claims(rows) for rows in (rank.table.rows, rank.table.pulls, rank.table.results))
        partials, sums = (pulls, Pulled(rank)), (results, PulledSums(rank))
        mine: list[Actor | Puller] = []
        for _ in range(workers[rank.rank]):
            slots = dice.choice((1, 2, 4))
            mine.append(Actor(claims, dice.randint(1, 4), rank.compute))
            if rank.table.results:
                mine += [puller([partials, sums], slots), puller([sums], slots)]
            else:
                mine.append(puller([partials], slots))
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
