"""The provider over torch's symmetric memory, as far as it goes without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symm_mem

from tscompile.errors import HeapError
from tscompile.nvshmem import p2p

from .fakes import CPU, together


def exchange(store: dist.Store, count: int, rank: int, size: int, value: bytes) -> list[bytes]:
    """What torch does in a rendezvous: an all-gather whose keys carry the process's own count of exchanges."""
    keys = [f"CUDASymmetricMemory/{count}/{peer}" for peer in range(size)]
    outer = dist.PrefixStore("", store)  # through C++, as torch calls it
    outer.set(keys[rank], value)
    outer.wait(keys)
    return [outer.get(key) for key in keys]


def test_ranks_that_count_their_exchanges_differently_meet() -> None:
    inner = dist.HashStore()
    counts = [0, 5, 17]
    stores = [p2p.ExchangeStore(inner, "one", 5.0) for _ in counts]

    def run(rank: int) -> list[list[bytes]]:
        return [exchange(stores[rank], counts[rank] + turn, rank, 3, b"%d/%d" % (rank, turn)) for turn in range(3)]

    found = together([lambda rank=rank: run(rank) for rank in range(3)])
    assert found == [[[b"%d/%d" % (rank, turn) for rank in range(3)] for turn in range(3)]] * 3


def test_a_peer_that_does_not_come_is_waited_for_in_bounds() -> None:
    store = p2p.ExchangeStore(dist.HashStore(), "one", 0.1)
    with pytest.raises(RuntimeError):
        exchange(store, 3, 0, 2, b"x")


@pytest.mark.parametrize(
    ("backend", "words"), [(None, "no symmetric memory for CUDA"), ("NVSHMEM", 'set to "NVSHMEM"'), ("CUDA", "")]
)
def test_the_users_backend_is_respected(monkeypatch: pytest.MonkeyPatch, backend: str | None, words: str) -> None:
    monkeypatch.setattr(symm_mem, "get_backend", lambda device: backend)
    refusal = p2p.backend_refusal()
    assert words in refusal
    assert bool(words) == bool(refusal)


class OnCpu(p2p.SymmMemProvider):
    allocated: list[int]
    room = 1 << 30

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.room:
            raise HeapError("no room")
        self.allocated = [*getattr(self, "allocated", []), nbytes]
        return torch.zeros(nbytes + 4096, dtype=torch.uint8)


def test_life_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symm_mem, "get_backend", lambda device: "CUDA")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    seen: list[tuple[Any, ...]] = []

    def rendezvous(buffer: torch.Tensor, name: str, rank: int, size: int, store: Any) -> tuple[Any, Any]:
        seen.append((name, rank, size))
        return SimpleNamespace(buffer_ptrs=[buffer.data_ptr()] * size), None

    monkeypatch.setattr(p2p, "_rendezvous", rendezvous)
    first, second = (OnCpu((8, 3), rank, CPU, dist.HashStore) for rank in range(2))
    posts = [first.prepare(8192, True), second.prepare(8192, False)]
    assert first.allocated == [8192]
    assert not hasattr(second, "allocated")
    region = first.connect(posts, 8192)
    assert region.addresses[0] % 4096 == 0
    assert region.nbytes == 8192
    region.view(0, 8188, (4,), torch.uint8).fill_(3)  # the last bytes are inside the buffer
    second.connect(posts, 4096)
    assert (first.allocated, second.allocated) == ([8192], [4096])
    assert seen == [(seen[0][0], 0, 2), (seen[0][0], 1, 2)]
    region.release()
    other = [first.prepare(8192, False), {}]
    first.connect(other, 8192)
    assert seen[2][0] != seen[0][0]  # a rendezvous of its own
    second.room = 0
    assert second.prepare(4096, True) == {"refusal": "no room"}

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("Failed to bind socket")

    monkeypatch.setattr(p2p, "_rendezvous", fails)
    with pytest.raises(HeapError, match=r"Failed to bind socket.*ranks \[8, 3\].*TMPDIR"):
        first.connect(other, 8192)


def test_torch_resolves_the_group_that_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._C import _distributed_c10d as bindings

    store = p2p.ExchangeStore(dist.HashStore(), "one", 1.0)

    def rendezvous(buffer: torch.Tensor, name: str) -> str:
        group = bindings._resolve_process_group(name)  # type: ignore[arg-type]
        assert (group.rank(), group.size()) == (1, 3)
        return "handle"

    monkeypatch.setattr(bindings, "_SymmetricMemory", SimpleNamespace(rendezvous=rendezvous))
    handle, group = p2p._rendezvous(torch.empty(0), "tscompile/test", 1, 3, store)
    assert handle == "handle"
    with pytest.raises(RuntimeError):
        bindings._resolve_process_group("tscompile/test")  # type: ignore[arg-type]
    assert group.size() == 3


def test_an_old_torch_is_given_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._C import _distributed_c10d as bindings

    told: list[Any] = []

    def rendezvous(buffer: torch.Tensor, name: str) -> str:
        if not told:
            raise RuntimeError("get_group_info: no group info associated with the group name x")
        return "handle"

    fake = SimpleNamespace(rendezvous=rendezvous, set_group_info=lambda *arguments: told.append(arguments))
    monkeypatch.setattr(bindings, "_SymmetricMemory", fake)
    store = p2p.ExchangeStore(dist.HashStore(), "one", 1.0)
    assert p2p._rendezvous(torch.empty(0), "tscompile/old", 0, 2, store)[0] == "handle"
    assert told == [("tscompile/old", 0, 2, store)]
