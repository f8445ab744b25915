"""The heap of a GPU group: choice of the provider, life cycle, growth, delegation; on memory of the CPU."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from tscompile.errors import HeapError
from tscompile.nvshmem.device import CONTROL_BYTES, SLOTS, Choice, NvlinkHeap, decide, needed_bytes
from tscompile.nvshmem.region import Provider, Region, bytes_at

from .fakes import CPU, CpuProvider, make_worlds, together
from .test_shm import own_segments

ORDER = ("nvshmem", "symm_mem")
RANKS = (4, 6, 9)


def post(rank: int, nvshmem: str = "", symm_mem: str = "", **more: Any) -> dict[str, Any]:
    reach = {f"GPU-{other}": True for other in range(3) if other != rank}
    providers = {"nvshmem": {"refusal": nvshmem}, "symm_mem": {"refusal": symm_mem}}
    return {"gpu": f"GPU-{rank}", "reach": reach, "providers": providers, **more}


@pytest.mark.parametrize(
    ("posts", "choice"),
    [
        ([post(0), post(1), post(2)], Choice("nvshmem", "nvshmem: all ranks can use it")),
        (
            [post(0), post(1, nvshmem="no library"), post(2, nvshmem="late")],
            Choice("symm_mem", "not nvshmem: rank 6: no library; symm_mem: all ranks can use it"),
        ),
        ([post(0, symm_mem="other backend"), post(1), post(2)], Choice("nvshmem", "nvshmem: all ranks can use it")),
        ([post(0, reach={}), post(1, reach={}), post(2)], Choice("nvshmem", "nvshmem: all ranks can use it")),
    ],
)
def test_the_best_provider_that_all_ranks_can_use(posts: list[dict[str, Any]], choice: Choice) -> None:
    assert decide(posts, RANKS, ORDER) == choice


@pytest.mark.parametrize(
    ("posts", "words"),
    [
        ([post(0, nvshmem="a", symm_mem="b"), post(1), post(2)], "not nvshmem: rank 4: a; not symm_mem: rank 4: b"),
        ([post(0, nvshmem="a"), post(1), post(2, symm_mem="b")], "not nvshmem: rank 4: a; not symm_mem: rank 9: b"),
        ([post(0), post(1), post(2, gpu="GPU-0")], "ranks 4 and 9 share one GPU"),
        (
            [post(0), post(1, reach={"GPU-2": False}), post(2)],
            "GPU of rank 6 cannot address the memory of that of rank 9",
        ),
    ],
)
def test_no_provider(posts: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(HeapError, match=words):
        decide(posts, RANKS, ORDER)


class FakeProvider:
    """Regions in memory of this process; `shared` holds those of all ranks."""

    def __init__(self, name: str, rank: int, size: int, shared: dict[int, torch.Tensor]) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self.shared = shared
        self.refusal = ""
        self.claims: list[bool] = []
        self.discarded = 0
        self.released: list[int] = []
        self.synchronized = 0
        self.fails: Exception | None = None

    def prepare(self, nbytes: int, claim: bool) -> dict[str, object]:
        self.claims.append(claim)
        return {"refusal": self.refusal} if self.refusal else {"from": self.rank}

    def connect(self, posts: list[dict[str, object]], nbytes: int) -> Region:
        assert [row["from"] for row in posts] == list(range(self.size))
        if self.fails:
            raise self.fails
        memory = self.shared.setdefault(nbytes, torch.full((self.size * nbytes + 4096,), 7, dtype=torch.uint8))
        base = -(-memory.data_ptr() // 4096) * 4096
        addresses = tuple(base + rank * nbytes for rank in range(self.size))
        return Region(self.name, self.rank, CPU, addresses, nbytes, lambda: self.released.append(nbytes))

    def discard(self) -> None:
        self.discarded += 1

    def synchronize(self) -> None:
        if self.fails:
            raise RuntimeError("device gone")
        self.synchronized += 1


def fake_heaps(size: int = 2) -> tuple[list[NvlinkHeap], list[list[FakeProvider]]]:
    shared: dict[str, dict[int, torch.Tensor]] = {name: {} for name in ORDER}
    providers = [[FakeProvider(name, rank, size, shared[name]) for name in ORDER] for rank in range(size)]
    heaps = [
        NvlinkHeap(
            rank,
            size,
            CPU,
            ranks=tuple(range(size)),
            providers=providers[rank],
            facts=lambda device, rank=rank: {"gpu": f"GPU-{rank}", "reach": {}},
        )
        for rank in range(size)
    ]
    return heaps, providers


def grow(heaps: list[NvlinkHeap], half_bytes: list[int]) -> None:
    posts = [json.loads(json.dumps(heap.prepare(half))) for heap, half in zip(heaps, half_bytes, strict=True)]
    for heap in heaps:
        heap.connect(posts)
    for heap in heaps:
        heap.release_names()


def test_life_cycle_and_layout() -> None:
    heaps, providers = fake_heaps()
    assert not heaps[0].connected
    with pytest.raises(HeapError, match="no GPU memory yet"):
        _ = heaps[0].memory
    grow(heaps, [10000, 5000])
    first, second = heaps
    assert [heap.connected for heap in heaps] == [True, True]
    assert [heap.half_bytes for heap in heaps] == [8192, 8192]  # the smaller, in whole pages
    assert first.memory.nbytes == needed_bytes(5000) == CONTROL_BYTES + SLOTS * 8192
    assert (first.provider, first.provider_reason) == ("nvshmem", "nvshmem: all ranks can use it")
    for heap in heaps:
        assert not heap.memory.view(heap.rank, 0, (CONTROL_BYTES,), torch.uint8).any()
        assert (
            heap.memory.view(heap.rank, CONTROL_BYTES, (4,), torch.uint8).tolist() == [7] * 4
        )  # only control is cleared
        assert providers[heap.rank][0].synchronized == 1
        assert [p.claims for p in providers[heap.rank]] == [[True], [False]]  # the second takes nothing
    assert second.slot(0, 2) == second.memory.addresses[0] + CONTROL_BYTES + 2 * 8192
    first.memory.view(1, CONTROL_BYTES + 8192, (2, 3), torch.float32).copy_(torch.arange(6.0).view(2, 3))
    assert second.memory.view(1, CONTROL_BYTES + 8192, (6,), torch.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert not own_segments()


def test_growth_keeps_host_words_and_releases_the_old_region_when_told() -> None:
    heaps, providers = fake_heaps()
    grow(heaps, [4096] * 2)
    old = heaps[0].memory
    heaps[0].enter(7, "site")
    grow(heaps, [1 << 20] * 2)
    assert heaps[1].entered(0) == 7
    assert heaps[1].site_of(0, 7) == "site"
    assert heaps[0].half_bytes == 1 << 20
    assert old.view(0, CONTROL_BYTES, (1,), torch.uint8).item() == 7  # still there
    assert providers[0][0].released == []
    heaps[0].retire()
    heaps[0].retire()
    assert providers[0][0].released == [needed_bytes(4096)]
    heaps[0].release()
    assert providers[0][0].released == [needed_bytes(4096), needed_bytes(1 << 20)]
    assert not heaps[0].connected
    assert not own_segments()


def test_fallback() -> None:
    heaps, providers = fake_heaps()
    providers[1][0].refusal = "no library"
    grow(heaps, [4096] * 2)
    assert [heap.provider for heap in heaps] == ["symm_mem"] * 2
    assert heaps[0].provider_reason == heaps[1].provider_reason
    assert "not nvshmem: rank 1: no library" in heaps[0].provider_reason
    assert [p.claims for p in providers[1]] == [[True], [True]]  # this rank knows that it needs the second
    assert providers[0][0].discarded >= 2  # before and after: what the unused provider held is given back


def test_a_failed_growth_keeps_the_old_region() -> None:
    heaps, providers = fake_heaps()
    grow(heaps, [4096] * 2)
    old = heaps[0].memory
    providers[0][0].fails = HeapError("no mapping")
    with pytest.raises(HeapError, match="no mapping"):
        grow(heaps, [1 << 20] * 2)
    assert heaps[0].memory is old
    assert heaps[0].half_bytes == 4096
    heaps[0].release_names()
    heaps[1].release_names()
    assert not own_segments()


def test_a_device_that_fails_is_a_heap_error(monkeypatch: pytest.MonkeyPatch) -> None:
    heaps, providers = fake_heaps()
    posts = [heap.prepare(4096) for heap in heaps]

    def gone() -> None:
        raise RuntimeError("device gone")

    monkeypatch.setattr(providers[0][0], "synchronize", gone)
    with pytest.raises(HeapError, match="rank 0 cannot be written: device gone"):
        heaps[0].connect(posts)
    assert providers[0][0].released == [needed_bytes(4096)]
    monkeypatch.setattr(heaps[1], "_facts", lambda device: gone())
    with pytest.raises(HeapError, match="doctor"):
        heaps[1].prepare(4096)
    for heap in heaps:
        heap.release_names()
    assert not own_segments()


def test_host_words() -> None:
    heaps, _ = fake_heaps(3)
    grow(heaps, [1] * 3)
    heaps[2].start(3)
    assert heaps[0].started(2) == 3
    assert heaps[0].alive(1)
    assert heaps[0].downgraded() is None
    heaps[1].downgrade(4, "because")
    assert heaps[2].downgraded() == (4, "because")
    assert heaps[0].aborted() is None
    heaps[0].abort(2, "gone")
    record = heaps[1].aborted()
    assert record is not None
    assert (record.guilty, record.writer, record.text) == (2, 0, "gone")


def test_groups_that_overlap_over_one_nvshmem() -> None:
    """The whole stack but the library: groups in any rank order, growth, reuse of what was released."""
    worlds, _ = make_worlds(4)
    groups = [(0, 1), (1, 2), (0, 1, 2, 3), (2, 0)]

    def heap(group: tuple[int, ...], index: int) -> NvlinkHeap:
        rank = group[index]
        provider: Provider = CpuProvider(group, index, CPU, lambda: worlds[rank])
        facts = {"gpu": f"GPU-{rank}", "reach": {}}
        return NvlinkHeap(index, len(group), CPU, ranks=group, providers=[provider], facts=lambda device: dict(facts))

    heaps = {group: [heap(group, index) for index in range(len(group))] for group in groups}

    def prepare(rank: int) -> dict[tuple[int, ...], dict[str, object]]:
        return {group: heaps[group][group.index(rank)].prepare(4096) for group in groups if rank in group}

    for half in (4096, 40960):
        if half == 4096:  # the first one enters the world: all ranks at once
            found = together([lambda rank=rank: prepare(rank) for rank in range(4)])
        else:
            found = [
                {group: heaps[group][group.index(rank)].prepare(half) for group in groups if rank in group}
                for rank in range(4)
            ]
        for group in groups:
            posts = [found[rank][group] for rank in group]
            for member in heaps[group]:
                member.connect(posts)
        for group in groups:
            for member in heaps[group]:
                member.release_names()
                member.retire()
        spans = {
            rank: [
                (heaps[group][group.index(rank)].memory.addresses[group.index(rank)], needed_bytes(half))
                for group in groups
                if rank in group
            ]
            for rank in range(4)
        }
        for mine in spans.values():
            assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(sorted(mine)))
        for number, group in enumerate(groups):
            for member in heaps[group]:
                for owner in range(len(group)):
                    member.memory.view(owner, CONTROL_BYTES + 8 * member.rank, (1,), torch.int64).fill_(
                        100 * number + 10 * owner + member.rank
                    )
        for number, group in enumerate(groups):
            for member in heaps[group]:
                words = member.memory.view(member.rank, CONTROL_BYTES, (len(group),), torch.int64).tolist()
                assert words == [100 * number + 10 * member.rank + writer for writer in range(len(group))]
    assert worlds[0].ledger is not None
    assert len(worlds[0].ledger.leases()) == len(groups)
    for group in groups:
        for member in heaps[group]:
            member.release()
    assert worlds[0].ledger.leases() == []


def test_views_in_and_out_of_inference_mode() -> None:
    memory = torch.zeros(3 * 4096, dtype=torch.uint8)
    base = -(-memory.data_ptr() // 4096) * 4096
    region = Region("fake", 0, CPU, (base,), 4096, lambda: None)
    with torch.inference_mode():
        inside = region.view(0, 64, (4, 4), torch.float32)
        torch.mm(torch.ones(4, 4), torch.ones(4, 4), out=inside)
    outside = region.view(0, 64, (4, 4), torch.float32)
    assert outside.sum() == 64
    outside.fill_(1)
    assert not outside.is_inference()
    kept = bytes_at(base, 4096, CPU)
    region.release()
    assert kept.view(torch.float32)[16:20].tolist() == [1] * 4
    with pytest.raises(HeapError, match="whole pages"):
        Region("fake", 0, CPU, (base + 8,), 4096, lambda: None)
