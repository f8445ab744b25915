"""Every call of `tl.nvshmem`, and what the host issues on streams, on CPU ranks: results, refusals, waits that end."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

import tscompile.language as tl
from tests.worlds import run_world
from tscompile.errors import HeapError, PeerError
from tscompile.language import context
from tscompile.nvshmem.device import NvlinkHeap

pytestmark = pytest.mark.slow

ROOM = 1 << 20


def moves(rank: int, size: int) -> list[str]:
    from . import nvshmem_checks as checks

    with tl.SymmetricGroup(nbytes=ROOM) as group:
        return [p for seed, scope in enumerate(checks.k.SCOPES) for p in checks.check_moves(group, scope, 36, seed)]


def the_rest(rank: int, size: int) -> list[str]:
    from . import nvshmem_checks as checks

    problems = []
    with tl.SymmetricGroup(nbytes=ROOM) as group:
        problems += checks.check_signals(group, 20, 1000)
        for count, scope in zip((1, 257, 1024), checks.k.SCOPES, strict=True):
            problems += checks.check_collectives(group, scope, 40, count)
        problems += checks.check_stream(group, 20)
    return problems


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", [moves, the_rest])
def test_calls(size: int, check: Callable) -> None:
    assert run_world(size, check, timeout_s=250) == [[]] * size


def one_is_missing(rank: int, size: int, call: str) -> tuple[float, str]:
    """Rank 1 makes no call; the others give up, and say whom they waited for."""
    from tscompile.language import stream_kernels

    from . import nvshmem_checks as checks

    group = tl.SymmetricGroup(nbytes=ROOM, timeout_s=60)
    words = [group.tensor((number,), torch.int32) for number in (*(checks.k.WORDS,) * 2, 1 << 13, 8)]
    word = group.tensor((checks.k.SLOTS,), torch.int32)
    signals = group.tensor((16,), torch.int64)
    run = checks.kernel(group, "signals") if call == "signal" else checks.kernel(group, "collectives", "_warp")
    bad, out = torch.zeros(3, 128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    stream_kernels.kernel("cpu", "meet")
    group.barrier()  # all have compiled
    group.context[context.TIMEOUT_NS] = int(0.5e9)
    start = time.monotonic()
    if rank != 1 and call == "signal":
        run(group.nvshmem(), word, signals, 1, 1, 5, 0, out)
    elif rank != 1 and call == "stream":
        group.on_stream().barrier_all(site=9)
    elif rank != 1:
        run(group.nvshmem(), *words, 3, 10, bad)
    else:
        time.sleep(2)
    took = time.monotonic() - start
    with pytest.raises(PeerError) as raised:
        group.check()
    if rank != 1 and call == "collectives":
        assert bad[1, 0] > 0
    return took, str(raised.value)


@pytest.mark.parametrize(("call", "site"), [("signal", 0), ("collectives", 1), ("stream", 9)])
def test_waits_for_a_rank_that_does_not_come(call: str, site: int) -> None:
    (took, said), (_, other), (_, third) = run_world(3, one_is_missing, call, timeout_s=250)
    assert 0.4 < took < 20
    told = [said, third]
    assert any(f"the kernel waited for rank 1 at site {site} until its flag is" in text for text in told), told
    assert "ended those of all ranks" in other


def refusals(rank: int, size: int) -> list[str]:
    """Calls that cannot be made when the kernel runs: nothing moves, and the group says why."""
    from . import nvshmem_checks as checks

    said = []
    for pe, change in ((size, None), (-1, None), (0, "team"), (0, "pes")):
        group = tl.SymmetricGroup(nbytes=4096)
        run = checks.kernel(group, "refused")
        dst, src = group.tensor((16,), torch.int32), torch.full((16,), 7, dtype=torch.int32)
        if change == "pes":
            group._view(group.rank, 256 + 8, (1,), torch.int64).zero_()
        if change == "team":
            group.context[context.TEAM] = 0
        group._exchange(None)
        if rank == 0:
            run(group.nvshmem(), dst, src, pe)
        group._exchange(None)
        with pytest.raises(PeerError) as raised:
            group.check()
        assert not dst.any()
        said.append(str(raised.value))
    return said


def test_calls_that_are_refused_at_run_time() -> None:
    first, second = run_world(2, refusals, timeout_s=250)
    head = "a kernel of rank 0 made a call that cannot be: "
    assert first[0] == f"{head}there is no such PE in the group (2)"
    assert first[1] == f"{head}there is no such PE in the group (-1)"
    assert first[2].startswith(f"{head}the context has no team: pass that of a SymmetricGroup")
    assert first[3].startswith(f"{head}NVSHMEM cannot address the memory of the group: SymmetricGroup.nvshmem() says")
    assert all(text.startswith("rank 0 gave up a wait") for text in second)


def host_side(rank: int, size: int) -> None:
    with tl.SymmetricGroup(nbytes=1 << 16) as group:
        assert group.provider == "shm" and group.nvshmem() is group.context
        x, other = group.tensor((4, 100), torch.float32), torch.zeros(100)
        group.remote(x[2], 1 - rank).fill_(3.0 + rank)
        group.barrier()
        assert x[2].unique().tolist() == [4.0 - rank] and not x[1].any() and not x[3].any()
        with pytest.raises(HeapError, match="not symmetric: pass a contiguous part"):
            group.remote(other, 0)
        with pytest.raises(HeapError, match="not symmetric: pass a contiguous part"):
            group.remote(x[:, 1], 0)
        with pytest.raises(HeapError, match="rank 2 of a group of 2"):
            group.remote(x, 2)
        ops = group.on_stream()
        with pytest.raises(HeapError, match="both must be contiguous, and of as many bytes"):
            ops.putmem(x[0], other[:50], 0)
        with pytest.raises(HeapError, match="a flag is one element of int32, uint32, int64, uint64"):
            ops.signal_op(x[0, :1], 1, 0)
        with pytest.raises(HeapError, match="op 'max': set or add"):
            ops.signal_op(group.tensor((1,), torch.int32), 1, 0, "max")  # type: ignore[arg-type]
        flag = group.tensor((1,), torch.uint32)
        ops.write_value(flag, -1)
        ops.wait_value(flag, "eq", 2**32 - 1)
        with pytest.raises(ValueError, match="compare 'never'"):
            ops.wait_value(flag, "never", 1)  # type: ignore[arg-type]
        group.barrier()

        group.provider = "symm_mem"  # as on GPUs where NVSHMEM cannot be entered
        group._heap, kept = _SymmMem(), group._heap
        with pytest.raises(HeapError, match=r"torch's symmetric memory .not nvshmem: rank 1: on another host"):
            group.nvshmem()
        assert group._pes() == 0
        group.provider, group._heap = "shm", kept


class _SymmMem(NvlinkHeap):
    def __init__(self) -> None:
        self.provider_reason = "not nvshmem: rank 1: on another host"


def test_memory_and_its_refusals() -> None:
    run_world(2, host_side, timeout_s=250)


def test_pes_in_a_word() -> None:
    assert context.pack_pes([0, 1, 5]) == 1 | 2 << 8 | 6 << 16
    assert context.pack_pes([254] * 8) == -1
    with pytest.raises(ValueError, match="PEs"):
        context.pack_pes([255])
    with pytest.raises(ValueError, match="at most 8"):
        context.pack_pes(range(9))
