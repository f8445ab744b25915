"""Every call of `tl.nvshmem` between GPUs: random data, sizes and alignments, waits and collectives of many rounds, streams and graphs.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest tests/gpu/test_language_nvshmem.py -x -q -s

The kernels go through `tl.dialect("cuda", nvshmem=...).compile`, as a user's do: TVM loads their modules and passes them to the hook.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import tscompile.language as tl
from benchmarks.bench_language import issue
from tests.gpu.conftest import World
from tests.gpu.language_group import agree
from tests.language import nvshmem_checks as checks
from tests.language import nvshmem_kernels as k
from tscompile.errors import PeerError
from tscompile.language import context
from tscompile.language.compile import build_cubin, parse
from tscompile.nvshmem import stream
from tscompile.templates.nvlink.launch import Kernel

ROOM = 8 << 20


@pytest.fixture(scope="module", autouse=True)
def kernels(world: World) -> None:
    """All kernels, compiled at once; ranks wait for each other at the store, not in a time-out of a group."""
    begin = time.monotonic()
    with tl.SymmetricGroup(nbytes=ROOM, timeout_s=240) as group:
        if world.cuda:
            assert group.provider == "nvshmem", group._heap.provider_reason
        checks.compile_all(group, workers=7 if world.cuda else 1)
        group.barrier()
    world.say(f"kernels compiled in {time.monotonic() - begin:.1f} s")


@pytest.fixture
def symmetric(world: World) -> Iterator[tl.SymmetricGroup]:
    with tl.SymmetricGroup(nbytes=ROOM, timeout_s=30) as group:
        yield group


@pytest.mark.parametrize("scope", k.SCOPES)
def test_copies(symmetric: tl.SymmetricGroup, world: World, scope: str) -> None:
    agree(checks.check_moves(symmetric, scope, 120 if world.cuda else 12, seed=len(scope)))


def test_signals(symmetric: tl.SymmetricGroup, world: World) -> None:
    agree(checks.check_signals(symmetric, 50 if world.cuda else 5, 2000))


@pytest.mark.parametrize("scope", k.SCOPES)
@pytest.mark.parametrize("count", [1, 250, 1024])
def test_collectives(symmetric: tl.SymmetricGroup, world: World, scope: str, count: int) -> None:
    agree(checks.check_collectives(symmetric, scope, 40 if world.cuda else 4, count, launches=5))


def test_streams(symmetric: tl.SymmetricGroup, world: World) -> None:
    agree(checks.check_stream(symmetric, 50 if world.cuda else 5))


def test_a_group_of_some_ranks(world: World) -> None:
    """All but rank 0, so that the ranks of the group are not NVSHMEM's PEs; of two, one that talks to itself."""
    members, problems = dist.new_group(list(range(1, world.size))), []
    if world.rank:
        with tl.SymmetricGroup(members, nbytes=ROOM, device=world.device) as group:
            problems += checks.check_moves(group, "_block", 24, seed=9) + checks.check_signals(group, 5, 100)
            problems += checks.check_collectives(group, "_warp", 10, 100)
    agree(problems)


def test_a_pe_that_is_not_there(world: World) -> None:
    group = tl.SymmetricGroup(nbytes=4096, timeout_s=30)
    dst, src = group.tensor((16,), torch.int32), torch.full((16,), 7, dtype=torch.int32, device=group.device)
    run = checks.kernel(group, "refused")
    group.barrier()
    if group.rank == 0:
        run(group.nvshmem(), dst, src, world.size)
    world.synchronize()
    group._exchange(None)
    with pytest.raises(PeerError, match="no such PE in the group" if group.rank == 0 else "rank 0 gave up"):
        group.check()
    assert not dst.any()


def test_a_rank_that_does_not_come(world: World) -> None:
    """A collective without rank 1 ends on all others after the time-out, and says whom it waited for."""
    group = tl.SymmetricGroup(nbytes=ROOM)
    words = [group.tensor((number,), torch.int32) for number in (k.WORDS, k.WORDS, 8 * k.WORDS, 8)]
    run, bad = (
        checks.kernel(group, "collectives", "_block"),
        torch.zeros(3, 128, dtype=torch.int32, device=group.device),
    )
    group.barrier()
    group.context[context.TIMEOUT_NS] = int(1e9)
    begin = time.monotonic()
    if group.rank != 1:
        run(group.nvshmem(), *words, 2, 10, bad)
        with pytest.raises(PeerError) as raised:
            group.check()
        assert time.monotonic() - begin < 15
        assert int(bad[1, 0]) > 0
        if group.rank == 0 and world.size == 2:
            assert "waited for rank 1 at site 1" in str(raised.value)


@pytest.mark.gpu
def test_kernels_in_a_graph(symmetric: tl.SymmetricGroup) -> None:
    """The turns of collectives are counted on the device, so replays need no new arguments."""
    group, ops = symmetric, symmetric.on_stream()
    words = [group.tensor((number,), torch.int32) for number in (k.WORDS, k.WORDS, 8 * k.WORDS, 8)]
    run, bad = checks.kernel(group, "collectives", "_warp"), torch.zeros(3, 128, dtype=torch.int32, device=group.device)
    total = torch.zeros(3, 128, dtype=torch.int32, device=group.device)
    inbox, data = group.tensor((1000,), torch.float32), torch.zeros(1000, device=group.device)
    arrived = group.tensor((1,), torch.int32)
    to = (group.rank + 1) % group.size

    def step() -> None:
        words[3].zero_()
        ops.barrier_all()
        run(group.nvshmem(), *words, 3, 64, bad)
        total.add_(bad)
        data.add_(1.0)
        ops.barrier_all()
        ops.putmem_signal(inbox, data, arrived, 1, to)
        ops.wait_value(arrived, "eq", 1)
        ops.barrier_all()

    step()
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for replay in range(20):
        graph.replay()
        if replay % 5 == 0:
            group.check()
            assert inbox.unique().tolist() == [replay + 2.0]
            group.barrier()
    group.check()
    assert total[:, :32].unique(dim=1).tolist() == [[0], [0], [21 * 30]]


@pytest.mark.gpu
def test_linked_kernels(symmetric: tl.SymmetricGroup) -> None:
    """Relocatable code, linked with the device library."""
    dst = symmetric.tensor((16,), torch.int32)
    src = torch.full((16,), 100 + symmetric.rank, dtype=torch.int32, device=symmetric.device)
    run = checks.kernel(symmetric, "refused", way="rdc")
    symmetric.barrier()
    run(symmetric.nvshmem(), dst, src, (symmetric.rank + 1) % symmetric.size)
    symmetric.barrier()
    assert dst.unique().tolist() == [100 + (symmetric.rank - 1) % symmetric.size]


def through_the_driver() -> Kernel:
    d = tl.dialect("cuda", nvshmem="inline")
    cubin, spec = build_cubin(parse(lambda: k.refused(d)))
    return Kernel(spec, stream.load().load_kernel(cubin, spec.kernel, spec.shared_bytes))


@pytest.mark.gpu
def test_kernels_launched_through_the_driver(symmetric: tl.SymmetricGroup) -> None:
    """As those of the fused ops are: stream.c loads the module and initialises its state."""
    kernel = through_the_driver()
    dst = symmetric.tensor((16,), torch.int32)
    src = torch.full((16,), 50 + symmetric.rank, dtype=torch.int32, device=symmetric.device)
    to = (symmetric.rank + 1) % symmetric.size
    known = {"ctx": symmetric.nvshmem().data_ptr(), "dst": dst.data_ptr(), "src": src.data_ptr(), "pe": to}
    values = kernel.values(known)
    symmetric.barrier()
    issue(stream.steps_of(kernel.step(values, 0)))
    symmetric.barrier()
    assert dst.unique().tolist() == [50 + (symmetric.rank - 1) % symmetric.size]


@pytest.mark.gpu
def test_a_module_whose_state_was_not_initialised(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel finds out by itself, moves nothing and ends the waits of the group."""
    group = tl.SymmetricGroup(nbytes=4096, timeout_s=30)
    monkeypatch.setattr(stream.Driver, "initialize_module", lambda self, module: False)
    kernel = through_the_driver()
    dst, src = group.tensor((16,), torch.int32), torch.ones(16, dtype=torch.int32, device=group.device)
    values = kernel.values({"ctx": group.nvshmem().data_ptr(), "dst": dst.data_ptr(), "src": src.data_ptr(), "pe": 0})
    group.barrier()
    if group.rank == 0:
        issue(stream.steps_of(kernel.step(values, 0)))
    torch.cuda.synchronize()
    group._exchange(None)
    with pytest.raises(PeerError, match="loaded without NVSHMEM" if group.rank == 0 else "rank 0 gave up"):
        group.check()
    assert not dst.any()
