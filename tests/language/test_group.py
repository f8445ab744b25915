"""Symmetric memory for a program's own kernels, on CPU ranks: tensors, peers, two groups at once, and every way to fail."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tscompile.language as tl
from tests.worlds import run_world
from tscompile.errors import HeapError, PeerError
from tscompile.nvshmem import native

pytestmark = pytest.mark.slow


def use(rank: int, size: int) -> list[object]:
    """Host writes to peers and a kernel that addresses them, in a group of all ranks and in one whose order is another."""
    from . import kernels  # loads TileLang

    pair = dist.new_group([2, 0])
    put = tl.dialect("cpu").compile(kernels.put_remote(tl.dialect("cpu"), 100))
    seen: list[object] = []
    with tl.SymmetricGroup(nbytes=1 << 16) as everybody:
        odd, x = everybody.tensor((3,), torch.int16), everybody.tensor((100,), torch.float32)
        assert not odd.any() and not x.any() and x.data_ptr() % 256 == 0
        everybody.barrier()
        everybody.peers(odd)[(rank + 1) % size].fill_(rank)
        everybody.barrier()
        assert odd.tolist() == [(rank - 1) % size] * 3
        put(everybody.context, torch.full((100,), 1.0 + rank), x, (rank + 1) % size)
        everybody.barrier()
        assert x.tolist() == [1.0 + (rank - 1) % size] * 100
        if rank != 1:
            with tl.SymmetricGroup(pair, nbytes=1 << 16) as two:
                assert (two.rank, two.size) == (dist.get_group_rank(pair, rank), 2)
                y = two.tensor((100,), torch.float32)
                put(two.context, torch.full((100,), 10.0 + rank), y, 1 - two.rank)
                two.barrier()
                seen.append(y.unique().tolist())
        with pytest.raises(HeapError, match="not symmetric"):
            everybody.peers(x[1:])
        with pytest.raises(HeapError, match="make the group with a larger nbytes"):
            everybody.tensor((1 << 14,), torch.float32)
    return seen


def test_tensors_and_kernels() -> None:
    assert run_world(3, use) == [[[12.0]], [], [[10.0]]]


def wait_for(group: tl.SymmetricGroup, value: int) -> None:
    """What a kernel does that waits until the first flag is `value`, for the other rank."""
    folder = Path(tl.__file__).parent  # the library alone: no need to load TileLang
    library = ctypes.CDLL(str(native.build(folder / "cpu.c", headers=tuple(sorted(folder.glob("cpu*.h"))))))
    address, flag = ctypes.c_uint64(group.context.data_ptr()), ctypes.c_uint64(group.flags.data_ptr())
    library.tsl_x_wait_s32(address, flag, 2, value, 1 - group.rank, 7)
    group.check()


def one_raises(rank: int, size: int) -> tuple[float, int, str]:
    start = time.monotonic()
    with pytest.raises((PeerError, ZeroDivisionError)) as raised, tl.SymmetricGroup(nbytes=4096) as group:
        if rank == 1:
            time.sleep(0.5)
            raise ZeroDivisionError("on purpose")
        wait_for(group, 5)
    return time.monotonic() - start, getattr(raised.value, "rank", -1), str(raised.value)


def test_a_rank_that_raises_ends_the_waits_of_the_others() -> None:
    (waited, guilty, said), _ = run_world(2, one_raises)
    assert 0.4 < waited < 20 and guilty == 1
    assert said == "rank 1 failed: ZeroDivisionError: on purpose"


def one_is_silent(rank: int, size: int) -> tuple[int, str, str]:
    group = tl.SymmetricGroup(nbytes=4096, timeout_s=0.5 if rank == 0 else 30.0)
    with pytest.raises(PeerError) as raised:
        wait_for(group, 5)
    return raised.value.rank, raised.value.site, str(raised.value)


def test_a_wait_that_is_given_up() -> None:
    (guilty, site, said), other = run_world(2, one_is_silent)
    assert (guilty, site) == (1, "7") and "waited for rank 1 at site 7 until its flag is 5; it is 0" in said
    assert other[0] == 0 and "rank 0 gave up a wait" in other[2]


def one_stays_away(rank: int, size: int) -> str:
    group = tl.SymmetricGroup(nbytes=4096, timeout_s=1.0)
    if rank == 1:
        time.sleep(2.0)
        return ""
    with pytest.raises(PeerError) as raised:
        group.barrier()
    return str(raised.value)


def test_a_rank_that_does_not_come() -> None:
    said = run_world(2, one_stays_away)[0]
    assert said.startswith("rank 1 did not come within 1 s: look for the first error in its log")


def one_has_no_room(rank: int, size: int) -> str:
    with pytest.raises(HeapError) as raised:
        tl.SymmetricGroup(nbytes=4096 if rank == 0 else 1 << 50)
    return str(raised.value)


def test_a_rank_without_memory_refuses_for_all() -> None:
    for said in run_world(2, one_has_no_room):
        assert said.startswith("rank 1 has no symmetric memory: no room in /dev/shm")


def nodes_of_one(rank: int, size: int) -> str:
    with tl.SymmetricGroup(nbytes=4096, ranks_per_node=1) as group:
        assert group.nodes == tl.Nodes(rank, size, 1)
    return "done"


def test_nodes_of_a_group() -> None:
    assert run_world(2, nodes_of_one) == ["done", "done"]


def disagree(rank: int, size: int) -> str:
    with pytest.raises(ValueError, match="2 ranks are no nodes of 3: pass a divisor of 2"):
        tl.SymmetricGroup(nbytes=4096, ranks_per_node=3)
    with pytest.raises(HeapError) as raised:
        tl.SymmetricGroup(nbytes=4096, ranks_per_node=1 + rank)
    return str(raised.value)


def test_nodes_that_ranks_do_not_agree_on() -> None:
    for said in run_world(2, disagree):
        assert said == "ranks_per_node must be the same on all ranks; they passed [1, 2]"
