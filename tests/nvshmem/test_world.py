"""The world's entry into NVSHMEM, with a fake library and ranks that are threads."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tscompile.errors import HeapError
from tscompile.nvshmem import host
from tscompile.nvshmem.world import current_world

from ..worlds import run_world
from .fakes import CPU, CpuProvider, FakeLibrary, make_worlds, together


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "set_environment", lambda: None)


def test_all_enter_and_the_smallest_arena_counts() -> None:
    worlds, libraries = make_worlds(3, heap_bytes=[8 << 20, 4 << 20, 1 << 30])
    assert together([world.enter for world in worlds]) == [""] * 3
    assert [world.ledger.nbytes for world in worlds if world.ledger] == [4 << 20] * 3
    assert worlds[0].address(2, 4096) == libraries[0].network.bases[2] + 4096
    assert [world.enter() for world in worlds] == [""] * 3
    assert all(library.nvshmemx_hostlib_init_attr.calls == 1 for library in libraries)  # type: ignore[attr-defined]


def test_a_second_life_keeps_the_arena() -> None:
    worlds, libraries = make_worlds(2)
    together([world.enter for world in worlds])
    again = [
        type(world)(
            store,
            world.rank,
            2,
            CPU,
            load=world._load,
            facts=world._facts,
            touch=world._touch,
        )
        for store in [dist.HashStore()]
        for world in worlds
    ]
    assert together([world.enter for world in again]) == ["", ""]
    assert all(library.nvshmem_align.calls == 1 for library in libraries)  # type: ignore[attr-defined]
    assert all(library.nvshmemx_hostlib_init_attr.calls == 1 for library in libraries)  # type: ignore[attr-defined]


def _no_library(worlds: list, libraries: list[FakeLibrary]) -> None:
    def load() -> host.Nvshmem:
        raise HeapError("there is no NVSHMEM library: install one")

    worlds[1]._load = load


def _other_place(worlds: list, libraries: list[FakeLibrary]) -> None:
    libraries[1].status, libraries[1].place = 2, (0, 1)


def _started_by_one(worlds: list, libraries: list[FakeLibrary]) -> None:
    libraries[1].status = 2


def _other_host(worlds: list, libraries: list[FakeLibrary]) -> None:
    worlds[1]._facts = lambda device: {"host": "there", "gpu": "GPU-1"}


def _same_gpu(worlds: list, libraries: list[FakeLibrary]) -> None:
    worlds[1]._facts = lambda device: {"host": "here", "gpu": "GPU-0"}


def _broken_gpu(worlds: list, libraries: list[FakeLibrary]) -> None:
    def facts(device: torch.device) -> dict[str, str]:
        raise RuntimeError("CUDA error: device busy")

    worlds[1]._facts = facts


def _init_fails(worlds: list, libraries: list[FakeLibrary]) -> None:
    libraries[1].init_code = 7
    libraries[0].hangs.clear()  # the others wait for it inside the library


def _no_room(worlds: list, libraries: list[FakeLibrary]) -> None:
    libraries[1].room = 0


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_no_library, "rank 1: there is no NVSHMEM library"),
        (_other_place, "rank 1: this program uses NVSHMEM already, as PE 0 of 1 in a world of 2"),
        (_started_by_one, "ranks 0 and 1 do not both start"),
        (_other_host, "ranks 0 and 1 are on different hosts"),
        (_same_gpu, "ranks 0 and 1 share one GPU"),
        (_broken_gpu, "rank 1: CUDA error"),
        (_init_fails, "rank 1: NVSHMEM does not start"),
        (_no_room, "rank 1: NVSHMEM has no room"),
    ],
)
def test_the_world_declines_together(break_it, reason: str) -> None:
    worlds, libraries = make_worlds(2)
    break_it(worlds, libraries)
    first, second = together([world.enter for world in worlds])
    assert first == second == worlds[0].enter()
    assert reason in first
    libraries[0].hangs.set()


def test_a_rank_that_never_comes() -> None:
    worlds, _ = make_worlds(2, muster_s=0.2)
    assert worlds[0].enter() == "rank 1 did not answer within 0.2 s"
    start = time.monotonic()
    assert worlds[1].enter() == "rank 1 did not answer within 0.2 s"
    assert time.monotonic() - start < 0.2


def test_a_library_that_hangs() -> None:
    worlds, libraries = make_worlds(2, init_s=0.5)
    for library in libraries:
        library.hangs.clear()
    found = together([world.enter for world in worlds])
    errors = [entry for entry in found if isinstance(entry, HeapError)]
    assert errors, found
    assert "logs of the other ranks" in str(errors[0])
    assert all("did not start" in str(entry) for entry in found)
    assert all("did not start" in world.enter() for world in worlds)
    for library in libraries:
        library.hangs.set()


def test_regions_of_groups_that_ask_at_once() -> None:
    worlds, _ = make_worlds(3, heap_bytes=[16 << 12] * 3)
    together([world.enter for world in worlds])
    groups = [(0, 1), (1, 2), (2, 0), (0, 1, 2)]
    nbytes = 4 << 12

    def providers(group: tuple[int, ...]) -> list[CpuProvider]:
        return [CpuProvider(group, index, CPU, lambda r=rank: worlds[r]) for index, rank in enumerate(group)]

    members = [providers(group) for group in groups]
    posts = [[provider.prepare(nbytes, True) for provider in group] for group in members]  # all before any connects
    regions = [
        [provider.connect(post, nbytes) for provider in group] for group, post in zip(members, posts, strict=True)
    ]
    for number, region in enumerate(regions):
        for owner in range(len(region)):
            region[0].view(owner, 0, (nbytes,), torch.uint8).fill_(10 * number + owner)
    for number, region in enumerate(regions):
        for mine in region:
            assert mine.view(mine.rank, 0, (nbytes,), torch.uint8).unique().tolist() == [10 * number + mine.rank]
            assert mine.view(0, 4096, (2, 4), torch.bfloat16).stride() == (4, 1)
    late = providers((1, 0))
    refused = late[0].prepare(5 << 12, True)
    assert "no 0 MiB free" in str(refused["refusal"])
    for region in regions[:2]:
        for mine in region:
            mine.release()
            mine.release()
            with pytest.raises(HeapError, match="released"):
                mine.view(0, 0, (1,), torch.uint8)
    assert late[0].prepare(4 << 12, True) == {"offset": 0}  # reused: the two groups have left it
    late[0].discard()
    late[0].discard()
    assert worlds[0].ledger is not None
    assert len(worlds[0].ledger.leases()) == 2


def test_memory_that_is_not_mapped() -> None:
    worlds, libraries = make_worlds(2)
    together([world.enter for world in worlds])
    libraries[0].nvshmem_ptr.body = lambda address, pe: None  # type: ignore[attr-defined]
    provider = CpuProvider((0, 1), 0, CPU, lambda: worlds[0])
    with pytest.raises(HeapError, match="maps no memory of rank 1"):
        provider.connect([provider.prepare(4096, True), {}], 4096)
    assert worlds[0].ledger is not None
    assert [lease.holders for lease in worlds[0].ledger.leases()] == [(1,)]


def _two_lives(rank: int, size: int) -> list[str]:
    store = distributed_c10d._get_default_store()
    found = []
    for life in range(2):
        if life:
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        world = current_world(CPU)
        assert current_world(CPU) is world
        world._load = _missing
        found.append(world.enter())
    dist.barrier()  # a rank that leaves while its peer still connects would make that fail
    return found


def _missing() -> host.Nvshmem:
    raise HeapError("no library")


@pytest.mark.slow
def test_each_life_of_the_process_group_has_its_own_world() -> None:
    first, second = run_world(2, _two_lives)
    assert first == second
    assert all(reason.endswith(": no library") for reason in first)
