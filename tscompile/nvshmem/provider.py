"""Regions of the NVSHMEM arenas for one group. A region costs a lease in the ledger, and frees one when all its ranks left it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from ..errors import HeapError
from .region import Region
from .world import World


class NvshmemProvider:
    """Provider over the arenas of a world.

    Args:
        ranks: global ranks of the group, in its order.
        rank: index of this rank in the group.
        device: the local GPU, with its index.
        world: gives the world; called when memory is first asked for.
    """

    name = "nvshmem"

    def __init__(self, ranks: tuple[int, ...], rank: int, device: torch.device, world: Callable[[], World]) -> None:
        self._ranks = ranks
        self._rank = rank
        self._device = device
        self._world = world
        self._offset: int | None = None

    def prepare(self, nbytes: int, claim: bool) -> dict[str, object]:
        del claim  # a lease costs nothing
        self.discard()
        world = self._world()
        refusal = world.enter()
        if refusal:
            return {"refusal": refusal}
        if self._rank:  # one rank leases for the group
            return {}
        assert world.ledger is not None
        self._offset = world.ledger.lease(nbytes, self._ranks)
        if self._offset is None:
            room = world.ledger.nbytes >> 20
            return {"refusal": f"the arena of {room} MiB has no {nbytes >> 20} MiB free on all ranks of the group"}
        return {"offset": self._offset}

    def connect(self, posts: list[dict[str, object]], nbytes: int) -> Region:
        world = self._world()
        assert world.ledger is not None
        self._offset = None  # from here on each rank leaves the lease for itself
        offset, ledger = int(str(posts[0]["offset"])), world.ledger

        def leave() -> None:
            with contextlib.suppress(RuntimeError):  # the store has gone: so has the world, and nobody leases any more
                ledger.leave(offset)

        try:
            addresses = tuple(world.address(rank, offset) for rank in self._ranks)
            if 0 in addresses:
                rank = self._ranks[addresses.index(0)]
                raise HeapError(
                    f"NVSHMEM maps no memory of rank {rank} here: check peer access between the GPUs with nvidia-smi topo -m"
                )
            return Region(self.name, self._rank, self._device, addresses, nbytes, leave)
        except HeapError:
            leave()
            raise

    def discard(self) -> None:
        if self._offset is not None:
            ledger = self._world().ledger
            assert ledger is not None
            with contextlib.suppress(RuntimeError):
                ledger.cancel(self._offset)
            self._offset = None

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)
