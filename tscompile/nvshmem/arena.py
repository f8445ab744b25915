"""Who may use which part of the arena: free lists, agreement between them, and the ledger that the ranks share.

Not for memory: offsets only, in plain Python. Every rank has one arena of the same size, and a region lies at the same offset
in the arenas of all ranks of its group. Groups overlap, so the ranks of a group may have different free lists, and a rank
may ask for regions of several groups at once. So there is one ledger for the whole world, in the store that it shares: a
lease is written with a compare-and-set by one rank of the group, after which nobody can be given what overlaps it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import HeapError

GRAIN = 4096  # offsets and sizes in an arena are multiples of this, in bytes

Interval = tuple[int, int]  # [start, end) in bytes
_EMPTY = '{"leases": []}'


def grains(nbytes: int) -> int:
    """`nbytes` rounded up to whole grains, at least one."""
    return max(GRAIN, -(-nbytes // GRAIN) * GRAIN)


def intersect(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """What lies in both; both are sorted and disjoint, and so is the result."""
    common = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def agree(free_of_ranks: Sequence[Sequence[Interval]], nbytes: int) -> int | None:
    """Lowest offset where `nbytes` are free on all ranks, None if there is none. Offsets are multiples of GRAIN.

    Args:
        free_of_ranks: for each rank the sorted, disjoint intervals that are free in its arena.
        nbytes: size of the region.
    """
    if not free_of_ranks:
        return None
    common = list(free_of_ranks[0])
    for free in free_of_ranks[1:]:
        common = intersect(common, free)
    for start, end in common:
        offset = -(-start // GRAIN) * GRAIN
        if offset + grains(nbytes) <= end:
            return offset
    return None


class Arena:
    """Free list of one rank's arena of `nbytes` (rounded down to whole grains)."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes // GRAIN * GRAIN
        self._free: list[Interval] = [(0, self.nbytes)] if self.nbytes else []

    def free(self) -> list[Interval]:
        """The free intervals, sorted, disjoint, never adjacent."""
        return list(self._free)

    def first_offset(self, nbytes: int) -> int | None:
        """Lowest offset where `nbytes` fit, None if they fit nowhere."""
        return agree([self._free], nbytes)

    def take(self, offset: int, nbytes: int) -> None:
        """Lease `nbytes`, rounded up to whole grains, at `offset`.

        Raises:
            HeapError: a part of that is not free.
        """
        start, end = offset, offset + grains(nbytes)
        for index, (low, high) in enumerate(self._free):
            if low <= start and end <= high:
                left, right = (low, start), (end, high)
                self._free[index : index + 1] = [part for part in (left, right) if part[0] < part[1]]
                return
        raise HeapError(f"bytes {start} to {end} of the arena are not free: run the same tscompile on every rank")

    def give(self, offset: int, nbytes: int) -> None:
        """End the lease of `nbytes` at `offset`.

        Raises:
            HeapError: a part of that is free already, or outside the arena.
        """
        start, end = offset, offset + grains(nbytes)
        if start < 0 or end > self.nbytes or intersect(self._free, [(start, end)]):
            raise HeapError(f"bytes {start} to {end} of the arena are not leased: run the same tscompile on every rank")
        merged: list[Interval] = []
        for low, high in sorted([*self._free, (start, end)]):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self._free = merged


class KeyStore(Protocol):
    """What this module needs of a torch.distributed.Store."""

    def compare_set(self, key: str, expected_value: str, desired_value: str, /) -> bytes:
        """Set the key if it holds `expected_value` ("": if it does not exist); returns what it holds afterwards."""
        ...


@dataclass(frozen=True)
class Lease:
    """A region and the global ranks that have not left it yet. Sizes in bytes."""

    offset: int
    nbytes: int
    holders: tuple[int, ...]


def place(leases: Iterable[Lease], arena_bytes: int, ranks: Iterable[int], nbytes: int) -> int | None:
    """Lowest offset where `nbytes` are free in the arenas of all `ranks`, given the leases of the world."""
    arenas = {rank: Arena(arena_bytes) for rank in ranks}
    for lease in leases:
        for rank in lease.holders:
            if rank in arenas:
                arenas[rank].take(lease.offset, lease.nbytes)
    return agree([arena.free() for arena in arenas.values()], nbytes)


class Ledger:
    """The leases of all groups of the world, in a store. Any rank may write at any time; nobody waits for a rank.

    Args:
        store: shared by all ranks of the world, and by nobody who writes other arenas' leases.
        rank: this rank (global).
        nbytes: size of each rank's arena.
    """

    _KEY = "leases"

    def __init__(self, store: KeyStore, rank: int, nbytes: int) -> None:
        self._store = store
        self._rank = rank
        self.nbytes = nbytes

    def _read(self) -> str:
        return self._store.compare_set(self._KEY, "", _EMPTY).decode()

    @staticmethod
    def _parse(text: str) -> list[Lease]:
        return [Lease(offset, nbytes, tuple(holders)) for offset, nbytes, holders in json.loads(text)["leases"]]

    def _replace(self, old: str, leases: Iterable[Lease]) -> bool:
        rows = [(lease.offset, lease.nbytes, lease.holders) for lease in leases]
        # The mark tells this write from another rank's of the same leases: compare_set answers with the value that stands.
        new = json.dumps({"mark": secrets.token_hex(8), "leases": rows})
        return self._store.compare_set(self._KEY, old, new).decode() == new

    def leases(self) -> list[Lease]:
        """What is leased now."""
        return self._parse(self._read())

    def lease(self, nbytes: int, ranks: tuple[int, ...]) -> int | None:
        """Lease a region for all `ranks`; returns its offset, None if there is no room. One rank of the group calls this."""
        while True:
            old = self._read()
            leases = self._parse(old)
            offset = place(leases, self.nbytes, ranks, nbytes)
            if offset is None or self._replace(old, [*leases, Lease(offset, grains(nbytes), ranks)]):
                return offset

    def _drop(self, offset: int, whole: bool) -> None:
        while True:
            old = self._read()
            kept = []
            for lease in self._parse(old):
                holders = lease.holders
                if lease.offset == offset and self._rank in holders:  # one lease: a rank's regions do not overlap
                    holders = () if whole else tuple(rank for rank in holders if rank != self._rank)
                if holders:
                    kept.append(Lease(lease.offset, lease.nbytes, holders))
            if self._replace(old, kept):
                return

    def leave(self, offset: int) -> None:
        """This rank no longer uses the region at `offset`, nor does a peer through this rank's arena."""
        self._drop(offset, whole=False)

    def cancel(self, offset: int) -> None:
        """End the lease for all its ranks: none of them has used it."""
        self._drop(offset, whole=True)
