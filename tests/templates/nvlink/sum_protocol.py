"""What kernels/sum_push.h does with a table, in plain Python: all ranks of a group under the random scheduler of protocol.py.

A CTA claims a tile, and its warps exchange their stripes of it, each for itself. It goes on to the next tile when all of them are done.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from tscompile.templates.nvlink.kernels.config import STRIPE_ROWS, STRIPES, TILE_M
from tscompile.templates.nvlink.sums import SumPlan
from tscompile.templates.nvlink.tiles import Row

from .protocol import NEVER, Claims, run_all


class Pusher:
    """One rank. `world` has all ranks; `product` is its part of the sum [m, n]."""

    def __init__(
        self, world: list[Pusher], rank: int, plan: SumPlan, product: torch.Tensor, inner: int, rows: int
    ) -> None:
        self.world, self.rank, self.plan, self.inner = world, rank, plan, inner
        n = product.shape[1]
        self.columns = -(-n // plan.width)
        self.product = torch.nn.functional.pad(product, (0, plan.width, 0, TILE_M))
        self.slot: dict[int, torch.Tensor] = {}
        self.flags: set[int] = set()
        self.out = torch.full((rows, n), NEVER, dtype=product.dtype)
        self.written = torch.zeros((rows, n), dtype=torch.int64)

    def _send(self, owner: int, place: int, stripe: torch.Tensor) -> None:
        other = self.world[owner]
        assert 0 <= place < min(self.plan.places, self.plan.flags)
        assert place not in other.flags, "two stripes share a place"
        other.slot[place] = stripe
        other.flags.add(place)

    def exchange(self, entry: Row, warp: int) -> Iterator[bool]:
        """tsk_exchange of a warp: yields True after an event, False where it waits."""
        row, col, rows, _, number, _, _, column = entry
        size, rank, share, first = len(self.world), self.rank, self.plan.share, warp * STRIPE_ROWS
        if first >= rows:
            return
        own = self.product[row + first :][:STRIPE_ROWS, col : col + self.plan.width].clone()
        at, owner = row + first, rank
        if self.plan.form == "scatter":
            run = at // self.inner
            owner, at = run % size, run // size * self.inner + at % self.inner
            index = at // STRIPE_ROWS * self.columns + column
        elif self.plan.form == "two_shot":
            owner, index = (warp + column) % size, number * -(-STRIPES // size) + warp // size
        else:
            index = number * STRIPES + warp
        assert 0 <= index < share
        peers = [(rank + i) % size for i in range(1, size)]
        total = size * share + number * STRIPES + warp
        for receiver in peers if self.plan.form == "one_shot" else [owner]:
            if receiver != rank:
                self._send(receiver, rank * share + index, own)
                yield True
        if owner == rank:
            while not all(peer * share + index in self.flags for peer in peers):
                yield False
            for peer in peers:
                own = own + self.slot[peer * share + index]
            for peer in peers if self.plan.form == "two_shot" else []:
                self._send(peer, total, own)
                yield True
        elif self.plan.form == "two_shot":
            while total not in self.flags:
                yield False
            own = self.slot[total]
        else:
            return
        stored = min(STRIPE_ROWS, rows - first)
        self.out[at : at + stored, col : col + self.plan.width] = own[:stored, : self.out.shape[1] - col]
        self.written[at : at + stored, col : col + self.plan.width] += 1


class Cta:
    """An actor: one tile after the other, the warps of a tile in any order."""

    def __init__(self, pusher: Pusher, claims: Claims, dice: random.Random) -> None:
        self._pusher, self._claims, self._dice = pusher, claims, dice
        self._warps: list[Iterator[bool]] = []
        self.done = False

    def step(self) -> bool:
        """One event; False if all warps wait."""
        if not self._warps:
            entry = self._claims()
            self.done = entry is None
            self._warps = [self._pusher.exchange(entry, warp) for warp in range(STRIPES)] if entry else []
            return True
        for warp in self._dice.sample(self._warps, len(self._warps)):
            event = next(warp, None)
            if event is None:
                self._warps.remove(warp)
            if event is not False:
                return True
        return False


def push_all(
    plan: SumPlan,
    table: Sequence[Row],
    products: list[torch.Tensor],
    inner: int,
    rows: int,
    workers: list[int],
    seed: int,
) -> list[Pusher]:
    """Run the protocol; `workers` are the CTAs of each rank that are resident."""
    world: list[Pusher] = []
    for rank, product in enumerate(products):
        world.append(Pusher(world, rank, plan, product, inner, rows))
    dice, actors = random.Random(seed), []
    for pusher, count in zip(world, workers, strict=True):
        claims = Claims(table)
        actors += [Cta(pusher, claims, dice) for _ in range(count)]
    run_all(actors, seed)
    return world
