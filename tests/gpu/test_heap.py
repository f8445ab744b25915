"""Memory of GPU groups on real GPUs. Every rank runs this file: torchrun --nproc-per-node 4 -m pytest tests/gpu/test_heap.py"""

from __future__ import annotations

import itertools
import json
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tscompile.nvshmem.device import CONTROL_BYTES, SLOTS, NvlinkHeap, needed_bytes
from tscompile.nvshmem.p2p import SymmMemProvider
from tscompile.nvshmem.provider import NvshmemProvider
from tscompile.nvshmem.region import Provider
from tscompile.nvshmem.world import current_world

from .conftest import World

WORLD = int(os.environ.get("WORLD_SIZE", "0"))
RANK = int(os.environ.get("RANK", "0"))
PROVIDERS = ("nvshmem", "symm_mem")
HALF = 1 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(WORLD < 2, reason="run under torchrun with two ranks or more (WORLD_SIZE)"),
]

_turn = itertools.count()


@pytest.fixture(scope="module")
def device(world: World) -> torch.device:
    return world.device


def swap(ranks: tuple[int, ...], value: object) -> list:
    """All-gather over the store, for any order of ranks; every rank calls this, also one that is not in `ranks`."""
    turn = next(_turn)
    store = dist.PrefixStore("tests", distributed_c10d._get_default_store())
    if RANK not in ranks:
        return []
    store.set(f"{turn}/{ranks}/{RANK}", json.dumps(value))
    return [json.loads(store.get(f"{turn}/{ranks}/{rank}")) for rank in ranks]


def barrier() -> None:
    torch.cuda.synchronize()
    swap(tuple(range(WORLD)), 0)


def make(ranks: tuple[int, ...], provider: str, device: torch.device) -> NvlinkHeap | None:
    if RANK not in ranks:
        return None
    index = ranks.index(RANK)
    chosen: Provider = (
        NvshmemProvider(ranks, index, device, lambda: current_world(device))
        if provider == "nvshmem"
        else SymmMemProvider(ranks, index, device)
    )
    return NvlinkHeap(index, len(ranks), device, ranks=ranks, providers=[chosen])


def connect_all(heaps: dict[tuple[int, ...], NvlinkHeap | None], half_bytes: int) -> None:
    """As votes do: every rank prepares in all its groups before it connects in any."""
    posts = {ranks: heap.prepare(half_bytes) if heap else None for ranks, heap in heaps.items()}
    for ranks, heap in heaps.items():
        found = swap(ranks, posts[ranks])
        if heap:
            heap.connect(found)
    barrier()
    for heap in heaps.values():
        if heap:
            heap.release_names()


def release_all(heaps: dict[tuple[int, ...], NvlinkHeap | None]) -> None:
    barrier()
    for heap in heaps.values():
        if heap:
            heap.release()
    barrier()


def pattern(seed: int, device: torch.device, count: int = HALF // 4) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, device=device, generator=generator)


def ring(heap: NvlinkHeap, seed: int, slot: int) -> None:
    """Write random data into the next rank's slot; `check_ring` reads it there, and through every peer's mapping."""
    target = (heap.rank + 1) % heap.size
    offset = CONTROL_BYTES + slot * heap.half_bytes
    view = heap.memory.view(target, offset, (HALF // 4,), torch.int32)
    assert view.device == heap.device
    view.copy_(pattern(seed + target, heap.device))


def check_ring(heap: NvlinkHeap, seed: int, slot: int) -> None:
    offset = CONTROL_BYTES + slot * heap.half_bytes
    for owner in range(heap.size):
        found = heap.memory.view(owner, offset, (HALF // 4,), torch.int32)
        assert torch.equal(found, pattern(seed + owner, heap.device)), (heap.ranks, owner)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ring_growth_and_reuse(device: torch.device, provider: str) -> None:
    ranks = tuple(range(WORLD))
    heap = make(ranks, provider, device)
    assert heap is not None
    connect_all({ranks: heap}, HALF)
    assert (heap.provider, heap.half_bytes, heap.memory.nbytes) == (provider, HALF, needed_bytes(HALF))
    assert not heap.memory.view(heap.rank, 0, (CONTROL_BYTES,), torch.uint8).any()
    for slot in range(SLOTS):
        ring(heap, 10 * slot, slot)
    barrier()
    for slot in range(SLOTS):
        check_ring(heap, 10 * slot, slot)
    barrier()
    before = heap.memory.addresses
    connect_all({ranks: heap}, 8 * HALF)
    heap.retire()
    assert heap.half_bytes == 8 * HALF
    assert heap.memory.addresses != before
    with torch.inference_mode():
        ring(heap, 99, 3)
    barrier()
    check_ring(heap, 99, 3)
    release_all({ranks: heap})
    connect_all({ranks: heap}, HALF)
    ring(heap, 7, 0)
    barrier()
    check_ring(heap, 7, 0)
    if provider == "nvshmem":
        assert heap.memory.addresses == before  # the lowest offset is free again
    release_all({ranks: heap})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_groups_that_overlap(device: torch.device, provider: str) -> None:
    groups = [(0, 1), (1, 2), tuple(range(WORLD)), (2, 0)] if WORLD > 2 else [(0, 1), (1, 0)]
    heaps = {ranks: make(ranks, provider, device) for ranks in groups}
    for half in (HALF, 2 * HALF):
        connect_all(heaps, half)
        for heap in heaps.values():
            if heap:
                heap.retire()
        for number, heap in enumerate(heaps.values()):
            if heap:
                ring(heap, 1000 * number + half, 1)
        barrier()
        for number, heap in enumerate(heaps.values()):
            if heap:
                check_ring(heap, 1000 * number + half, 1)
        barrier()
    release_all(heaps)


def test_the_better_provider_is_chosen(device: torch.device) -> None:
    ranks = tuple(range(WORLD))
    heap = NvlinkHeap(RANK, WORLD, device, ranks=ranks)
    connect_all({ranks: heap}, HALF)
    reasons = swap(ranks, heap.provider_reason)
    assert len(set(reasons)) == 1
    assert heap.provider in PROVIDERS
    if not current_world(device).enter():
        assert heap.provider == "nvshmem"
    release_all({ranks: heap})


def test_a_full_arena_falls_back(device: torch.device) -> None:
    ranks = tuple(range(WORLD))
    if current_world(device).enter():
        pytest.skip("NVSHMEM cannot be entered here: " + current_world(device).enter())
    heap = NvlinkHeap(RANK, WORLD, device, ranks=ranks)
    connect_all({ranks: heap}, 300 << 20)  # four slots of it exceed the arena
    assert heap.provider == "symm_mem"
    assert "MiB free" in heap.provider_reason
    ring(heap, 5, 2)
    barrier()
    check_ring(heap, 5, 2)
    release_all({ranks: heap})
