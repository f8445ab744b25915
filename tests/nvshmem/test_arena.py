"""Free lists, agreement between them, and the ledger, against a model that marks single grains."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tscompile.errors import HeapError
from tscompile.nvshmem.arena import GRAIN, Arena, Interval, Ledger, agree, grains, intersect

GRAINS = 40
sizes = st.integers(1, 12 * GRAIN)
intervals = st.lists(st.integers(0, GRAINS * GRAIN), max_size=12, unique=True).map(
    lambda cuts: list(zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False))
)


def points(free: list[Interval]) -> set[int]:
    return {point for start, end in free for point in range(start, end, 512)}


@given(st.lists(st.tuples(st.booleans(), sizes, st.integers(0, 10**6)), max_size=60))
def test_leases_never_overlap_and_freed_room_comes_back(steps: list[tuple[bool, int, int]]) -> None:
    arena = Arena(GRAINS * GRAIN + 100)
    leases: list[tuple[int, int]] = []
    for take, nbytes, pick in steps:
        if take:
            offset = arena.first_offset(nbytes)
            used = {g for low, n in leases for g in range(low // GRAIN, (low + grains(n)) // GRAIN)}
            need = grains(nbytes) // GRAIN
            fits = [g for g in range(GRAINS - need + 1) if not used & set(range(g, g + need))]
            assert offset == (fits[0] * GRAIN if fits else None)
            if offset is not None:
                arena.take(offset, nbytes)
                leases.append((offset, nbytes))
        elif leases:
            arena.give(*leases.pop(pick % len(leases)))
        free = arena.free()
        assert all(low < high for low, high in free)
        assert all(before[1] < after[0] for before, after in pairwise(free))  # coalesced
        assert sum(high - low for low, high in free) == GRAINS * GRAIN - sum(grains(n) for _, n in leases)
    for lease in leases:
        arena.give(*lease)
    assert arena.free() == [(0, GRAINS * GRAIN)]


@given(intervals, intervals)
def test_intersection(first: list[Interval], second: list[Interval]) -> None:
    common = intersect(first, second)
    assert all(low < high for low, high in common)
    for point in random.Random(0).sample(range(GRAINS * GRAIN), 200):
        inside = [any(low <= point < high for low, high in free) for free in (first, second, common)]
        assert inside[2] == (inside[0] and inside[1])


@given(st.lists(intervals, min_size=1, max_size=4), sizes)
def test_the_agreed_offset_is_free_on_all_ranks_and_the_lowest(free: list[list[Interval]], nbytes: int) -> None:
    def fits(offset: int) -> bool:
        return all(any(low <= offset and offset + grains(nbytes) <= high for low, high in rank) for rank in free)

    lowest = next((grain * GRAIN for grain in range(GRAINS) if fits(grain * GRAIN)), None)
    # touching intervals of one rank are one piece of room to `fits` only if they are merged, as an arena's always are
    if all(before[1] < after[0] for rank in free for before, after in pairwise(rank)):
        assert agree(free, nbytes) == lowest
    assert agree([*free, []], nbytes) is None


def test_wrong_use_is_an_error() -> None:
    arena = Arena(4 * GRAIN)
    assert agree([], 1) is None
    assert Arena(100).first_offset(1) is None
    arena.take(GRAIN, 1)
    with pytest.raises(HeapError, match="not free"):
        arena.take(0, 2 * GRAIN)
    with pytest.raises(HeapError, match="not leased"):
        arena.give(0, 1)
    with pytest.raises(HeapError, match="not leased"):
        arena.give(4 * GRAIN, 1)


@given(st.data())
def test_ledger_keeps_the_regions_of_each_rank_apart(data: st.DataObject) -> None:
    store = dist.HashStore()
    ledgers = [Ledger(store, rank, GRAINS * GRAIN) for rank in range(4)]
    held: list[list[int]] = [[] for _ in ledgers]  # per rank: offsets that it has not left
    for _ in range(data.draw(st.integers(0, 15))):
        if data.draw(st.booleans()):
            ranks = tuple(data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=4, unique=True)))
            offset = ledgers[ranks[0]].lease(data.draw(sizes), ranks)
            if offset is not None:
                for rank in ranks:
                    held[rank].append(offset)
        else:
            rank = data.draw(st.integers(0, 3))
            if held[rank]:
                ledgers[rank].leave(held[rank].pop())
        leases = ledgers[0].leases()
        for rank in range(4):
            mine = sorted((lease.offset, lease.offset + lease.nbytes) for lease in leases if rank in lease.holders)
            assert [low for low, _ in mine] == sorted(held[rank])
            assert all(before[1] <= after[0] for before, after in pairwise(mine))
    for rank in range(4):
        for offset in held[rank]:
            ledgers[rank].leave(offset)
    assert ledgers[0].leases() == []


def test_disjoint_groups_share_an_offset_and_a_cancelled_lease_is_gone() -> None:
    store = dist.HashStore()
    ledgers = [Ledger(store, rank, 4 * GRAIN) for rank in range(4)]
    assert ledgers[0].lease(2 * GRAIN, (0, 1)) == 0
    assert ledgers[2].lease(2 * GRAIN, (2, 3)) == 0
    assert ledgers[1].lease(2 * GRAIN, (1, 2)) == 2 * GRAIN
    assert ledgers[3].lease(4 * GRAIN, (3, 0)) is None
    ledgers[2].cancel(0)
    assert {lease.holders for lease in ledgers[0].leases()} == {(0, 1), (1, 2)}


def test_ledger_with_ranks_that_write_at_once() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(4)]
    ledgers = [Ledger(stores[rank], rank, 64 * GRAIN) for rank in range(4)]
    found: list[list[int | None]] = [[], [], [], []]

    def run(rank: int) -> None:
        for _ in range(8):
            found[rank].append(ledgers[rank].lease(GRAIN, (0, 1, 2, 3)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    offsets = [offset for rank in found for offset in rank if offset is not None]
    assert sorted(offsets) == [grain * GRAIN for grain in range(32)]
