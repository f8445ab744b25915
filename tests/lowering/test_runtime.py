"""Votes, downgrades, errors and bounded waits of real ranks: whatever happens, every rank ends with a result or an error."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case, all_gather, manifest, reduction, row
from tests.worlds import run_world, segments_left
from tscompile.errors import HeapError, PeerError, TscompileError
from tscompile.lowering import group as group_module
from tscompile.lowering import runtime, vote
from tscompile.nvshmem import shm
from tscompile.observe import ledger
from tscompile.problem import Plan
from tscompile.templates import find_template

pytestmark = pytest.mark.slow
PREFIX = "tscompile-"


class Life:
    """One life of the process group on one rank, and what a test does in it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.name = dist.group.WORLD.group_name
        self.references = 0

    @property
    def state(self) -> group_module.GroupState:
        return runtime._world.by_name[self.name, "shm"]

    def begin(self, digest: str = "d", *, sites: int = 1, scratch_bytes: int = 4096, **options: Any) -> None:
        rows = [row(self.name, f"{digest}/site")] if sites else []
        runtime.begin(manifest({self.name: sites}, digest=digest, scratch_bytes=scratch_bytes, rows=rows, **options))

    def call(self, case: Case) -> list[torch.Tensor]:
        """Launch the case; the reference is an all-reduce of what the truth is made of, so it needs all ranks too."""

        def reference() -> list[torch.Tensor]:
            self.references += 1
            together = torch.ones(1)
            dist.all_reduce(together)
            assert together.item() == self.size
            return [plain.clone() for plain in case.plain[self.rank]]

        outputs = runtime.launch(case.plan, self.name, case.args[self.rank], reference)
        case.check(self.rank, outputs)
        return outputs

    def gather(self, seed: int = 1, inner: int = 6) -> list[torch.Tensor]:
        return self.call(all_gather(self.size, seed, "float32", [("lhs", False, "rows")], inner=inner))

    def kept(self) -> str:
        """The reason in the ledger; every row of the group has the same."""
        (reason,) = {f"{r.code}: {r.reason}" for r in ledger.rows() if r.group == self.name}
        assert all(r.decision == "kept" for r in ledger.rows() if r.group == self.name)
        return reason


def lives(rank: int, size: int, scenarios: list[str]) -> dict[str, Any]:
    """Run scenarios one after the other, each in a process group of its own; the group of the worker itself is the first."""
    logging.disable(logging.WARNING)
    store = dist.distributed_c10d._get_default_store()
    results = {}
    for index, scenario in enumerate(scenarios):
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore(f"life{index}", store), rank=rank, world_size=size)
        ledger.clear()
        print("scenario", scenario, flush=True)
        results[scenario] = SCENARIOS[scenario](Life(rank, size))
    return results


def other_digest(life: Life) -> str:
    life.begin(f"plan{life.rank}")
    life.gather()
    assert life.references == 1
    life.begin("later")  # nobody waits: the group has been refused
    life.gather()
    return life.kept()


def other_options(life: Life) -> str:
    life.begin(verify=life.rank == 1)
    life.gather()
    assert life.references == 1
    return life.kept()


def nothing_to_fuse_on_one_rank(life: Life) -> str:
    life.begin("a", sites=1 if life.rank == 0 else 0)
    if life.rank == 0:
        life.gather()
        life.begin("b")
    else:
        dist.all_reduce(torch.ones(1))
        life.begin("b")
    life.gather()
    assert life.references == (2 if life.rank == 0 else 1)
    return life.kept()


def nothing_to_fuse_at_first(life: Life) -> None:
    life.begin("a", sites=0)
    life.begin("b", sites=0)
    life.begin("c")
    life.gather()
    assert life.references == 0


def lone_recompile(life: Life) -> str:
    life.begin("first")
    for seed in range(5):
        life.gather(seed)
    assert life.references == 0
    if life.rank == life.size - 1:
        time.sleep(0.2)
        life.begin("second")
    for seed in range(3):
        life.gather(seed)
    assert life.references == 3
    return life.kept()


def lone_recompile_before_a_plain_collective(life: Life) -> str:
    """The peers wait for the lone rank outside fused ops, where its vote cannot see them enter an epoch."""
    for step in range(4):
        life.begin("second" if step == 3 and life.rank == 0 else "first")
        dist.all_reduce(torch.ones(1))
        life.gather(step)
    assert life.references == 1
    return life.kept()


def lone_recompile_of_the_same_plans(life: Life) -> None:
    life.begin("first")
    if life.rank == 0:
        life.begin("first", sites=1, scratch_bytes=8192)  # another manifest, the same digest
    life.gather()
    assert life.references == 0


def no_room(life: Life) -> str:
    keep = shm._allocate
    if life.rank == 1:
        shm._allocate = _full
    life.begin(scratch_bytes=5 << 20)
    shm._allocate = keep
    life.gather()
    assert life.references == 1
    assert not _own_segments()
    return life.kept()


def no_room_to_grow(life: Life) -> str:
    life.begin(scratch_bytes=64)
    life.gather()
    keep = shm._allocate
    if life.rank == 0:
        shm._allocate = _full
    life.gather(inner=9000)
    shm._allocate = keep
    life.gather()
    assert life.references == 2
    return life.kept()


def _full(fd: int, nbytes: int) -> None:
    if nbytes > 1 << 17:
        raise OSError(errno.ENOSPC, "No space left on device")
    os.ftruncate(fd, nbytes)  # control words fit everywhere


def _own_segments() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(PREFIX) and f"-{os.getpid()}-" in name]


def growth(life: Life) -> int:
    life.begin(scratch_bytes=64)
    for inner in (6, 500, 7, 5000, 20000, 6):
        life.gather(inner=inner)
    life.begin("larger", scratch_bytes=4 << 20)
    life.gather(inner=6)
    assert life.references == 0
    assert not _own_segments()
    assert life.state.heap is not None
    return life.state.heap.half_bytes


def other_hints(life: Life) -> int:
    life.begin("a", scratch_bytes=4096 * (1 + life.rank))
    assert life.state.heap is not None and life.state.heap.half_bytes == 4096
    life.begin("b", scratch_bytes=4096 * (1 + life.rank))
    assert life.state.heap.half_bytes == 4096
    life.gather(inner=900)
    assert life.references == 0
    assert not _own_segments()
    return life.state.heap.half_bytes


def heap_limit(life: Life) -> None:
    life.begin(scratch_bytes=64, heap_bytes=64 << 10)
    life.gather(inner=5)
    life.gather(inner=5000)
    life.gather(inner=500)
    assert life.references == 1
    assert life.state.heap is not None and 2 * life.state.heap.half_bytes <= 64 << 10


def late_vote(life: Life) -> str:
    start = time.monotonic()
    if life.rank == 1:
        time.sleep(1.0)
    life.begin(timeout_s=0.4)
    assert time.monotonic() - start < 3
    life.gather()
    assert life.references == 1
    return life.kept()


def late_call(life: Life) -> str:
    life.begin(timeout_s=0.5)
    life.gather()
    start = time.monotonic()
    if life.rank == 1:
        time.sleep(1.0)
    with pytest.raises(PeerError) as caught:
        life.gather()
    assert time.monotonic() - start < 4
    assert (caught.value.rank, caught.value.site) == (1, "ag1")
    with pytest.raises(PeerError, match="stay refused until the process group is initialised again"):
        life.gather()
    return str(caught.value)


def after_an_error(life: Life) -> None:
    life.begin()
    life.gather()
    assert life.references == 0


def other_site(life: Life) -> str:
    life.begin()
    life.gather()
    with pytest.raises(PeerError) as caught:
        life.gather(seed=10 + life.rank)
    return str(caught.value)


def other_size(life: Life) -> str:
    life.begin()
    with pytest.raises(PeerError) as caught:
        life.gather(inner=10 + life.rank)
    return str(caught.value)


def local_error(life: Life) -> str:
    life.begin()
    life.gather()
    case = all_gather(life.size, 1, "float32", [("lhs", False, "rows")])
    if life.rank == 0:
        shard, others, biases = case.args[0]
        case.args[0] = (shard, [other[:, 0] for other in others], biases)
        with pytest.raises((IndexError, RuntimeError)):
            life.call(case)
    else:
        with contextlib.suppress(PeerError):  # rank 0 may have published its part before it failed
            life.call(case)
    with pytest.raises(PeerError) as later:
        life.gather()
    assert later.value.rank == 0
    return str(later.value)


def no_compiler(life: Life) -> str:
    keep = shm.signals.load

    def missing() -> Any:
        raise HeapError("no C compiler: install gcc, or set CC to one")

    if life.rank == 1:
        shm.signals.load = missing  # type: ignore[assignment]
    life.begin()
    shm.signals.load = keep
    life.gather()
    return life.kept()


def other_host(life: Life) -> str:
    keep = group_module.host_facts
    if life.rank == 1:
        group_module.host_facts = lambda: {**keep(), "host": "elsewhere"}  # type: ignore[assignment]
    life.begin()
    group_module.host_facts = keep
    life.gather()
    return life.kept()


def verify(life: Life) -> str:
    case = reduction("matmul_all_reduce", life.size, 3, "float32", inner=8)
    rows = [row(life.name, case.plan.site)]
    runtime.begin(manifest({life.name: 1}, rows=rows, verify=True))
    life.call(case)
    assert life.references == 1
    (kept,) = ledger.rows()
    assert kept.decision == "fused" and kept.measured_us is not None and kept.measured_us > 0
    template = find_template("matmul_all_reduce", "shm")
    original = type(template).run

    def wrong(self: Any, *args: Any) -> list[torch.Tensor]:
        (out,) = original(self, *args)
        return [out + 1]

    type(template).run = wrong  # type: ignore[method-assign, union-attr]
    with pytest.raises(
        TscompileError, match=r"site matmul_all_reduce3 .* differs from the original ops: largest error"
    ) as caught:
        life.call(case)
    type(template).run = original  # type: ignore[method-assign, union-attr]
    return str(caught.value)


def unknown_template(life: Life) -> None:
    life.begin()
    plan = Plan("all_gather_matmul", "s", "abacus", "float32")
    with pytest.raises(TscompileError, match="clear the Inductor cache"):
        runtime.launch(plan, life.name, (), list)
    assert runtime.launch(Plan("all_gather_matmul", "s", "reference", "float32"), life.name, (), list) == []
    life.gather()
    assert life.references == 0


def a_fork(life: Life) -> None:
    """A forked child, as a data loader's, leaves the parent's group alone."""
    life.begin()
    life.gather()
    child = os.fork()
    if child == 0:
        os._exit(0 if runtime.launch(Plan("k", "s", "shm", "float32"), life.name, (), list) == [] else 1)
    assert os.waitpid(child, 0)[1] == 0
    life.gather()
    assert life.references == 0


SCENARIOS: dict[str, Callable[[Life], Any]] = {
    function.__name__: function
    for function in (
        other_digest,
        other_options,
        nothing_to_fuse_on_one_rank,
        nothing_to_fuse_at_first,
        lone_recompile,
        lone_recompile_before_a_plain_collective,
        lone_recompile_of_the_same_plans,
        no_room,
        no_room_to_grow,
        growth,
        other_hints,
        heap_limit,
        late_vote,
        late_call,
        after_an_error,
        other_site,
        other_size,
        local_error,
        no_compiler,
        other_host,
        verify,
        unknown_template,
        a_fork,
    )
}


def test_two_ranks_that_disagree_or_fail() -> None:
    first, second = run_world(2, lives, list(SCENARIOS), timeout_s=90)
    assert first["other_digest"] == second["other_digest"]
    assert "other-sites: rank 1 planned other sites: 1 (digest plan1) where rank 0 planned 1" in first["other_digest"]
    assert "rank 1 has verify = True where rank 0 has False" in first["other_options"]
    assert "no-sites: rank 1 has no fused sites" in first["nothing_to_fuse_on_one_rank"]
    assert first["nothing_to_fuse_on_one_rank"] == second["nothing_to_fuse_on_one_rank"]
    assert "lone-compile: rank 1 started a new graph while rank 0 ran one" in first["lone_recompile"]
    assert first["lone_recompile"] == second["lone_recompile"]
    assert first["lone_recompile_before_a_plain_collective"].startswith("lone-compile: rank 0 started a new graph")
    assert "no-heap: rank 1: no room in /dev/shm: needs 10 MiB, has " in first["no_room"]
    assert first["no_room"] == second["no_room"]
    assert "no-room: rank 0: no room in /dev/shm: needs" in second["no_room_to_grow"]
    assert first["growth"] == second["growth"] == 4 << 20
    assert first["other_hints"] == second["other_hints"] == 36864
    assert "vote-timeout: rank 1 did not vote within 0.4 s" in first["late_vote"]
    assert first["late_vote"] == second["late_vote"]
    assert "rank 1 did not answer within 0.5 s" in first["late_call"]
    assert "rank 1 did not answer within 0.5 s" in second["late_call"]
    assert any(
        "rank 1 runs site ag11 where rank 0 runs ag10" in result["other_site"] for result in (first, second)
    ) or any("rank 0 runs site ag10 where rank 1 runs ag11" in result["other_site"] for result in (first, second))
    assert "sends another number of bytes" in first["other_size"]
    assert "rank 0 raised" in second["local_error"]
    assert "rank 1: no C compiler: install gcc" in first["no_compiler"]
    assert "other-host: rank 1 is on another host than rank 0" in first["other_host"]


def test_three_ranks_of_which_one_compiles_alone() -> None:
    names = [
        "lone_recompile",
        "lone_recompile_before_a_plain_collective",
        "growth",
        "lone_recompile_of_the_same_plans",
        "nothing_to_fuse_at_first",
    ]
    results = run_world(3, lives, names, timeout_s=60)
    assert len({result["lone_recompile"] for result in results}) == 1
    assert "rank 2 started a new graph while rank" in results[0]["lone_recompile"]


def death_in_an_op(rank: int, size: int) -> tuple[int, str, float]:
    life = Life(rank, size)
    life.begin()
    for seed in range(10):
        life.gather(seed)
    if rank == 1:  # published for nobody, died in the middle of the op
        runtime_channel = group_module.Channel
        runtime_channel.signal_all = lambda self, flag=0: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        life.gather(77)
    took = time.monotonic() - start
    return caught.value.rank, f"{caught.value.site}: {caught.value}", took


def test_a_rank_that_dies_in_an_op() -> None:
    results = run_world(3, death_in_an_op, dying=(1,), timeout_s=40)
    for rank in (0, 2):
        guilty, text, took = results[rank]
        assert guilty == 1
        assert text.startswith("ag77: ") and "the process of rank 1 has ended" in text
        assert took < 5
    assert not segments_left()


def death_in_a_vote(rank: int, size: int) -> str:
    life = Life(rank, size)
    if rank == 1:
        shm.ShmHeap.connect = lambda self, peers: os._exit(3)  # type: ignore[method-assign, assignment]
    life.begin()
    return life.kept()


def test_a_rank_that_dies_in_a_vote() -> None:
    results = run_world(3, death_in_a_vote, dying=(1,), timeout_s=40)
    assert results[0] == results[2]
    assert "peer-ended: rank 1 ended during the vote" in results[0]
    shm.remove_stale()  # what rank 1 left, unless another process has done so
    assert not segments_left()


def test_a_fake_world_runs_the_reference() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        ledger.clear()
        name = dist.group.WORLD.group_name
        text = manifest({name: 1}, rows=[row(name, "s")])
        runtime.begin(text)
        runtime.begin(text)
        plan = Plan("all_gather_matmul", "s", "shm", "float32")
        assert runtime.launch(plan, name, (), list) == []
        (kept,) = ledger.rows()
        assert (kept.decision, kept.code) == ("kept", "no-peers")
    finally:
        dist.destroy_process_group()


def test_a_manifest_of_another_version() -> None:
    with pytest.raises(TscompileError, match="clear the Inductor cache"):
        runtime.begin(json.dumps({"version": 99}))


def test_begin_without_a_process_group() -> None:
    ledger.clear()
    runtime.begin(manifest({"0": 1}, rows=[row("0", "lonely")]))
    assert [kept.site for kept in ledger.rows()] == ["lonely"]


def test_verdicts_are_decided_once() -> None:
    store = dist.HashStore()
    ballots = [vote.Ballot(store, (0, 1), rank, "vote1") for rank in (0, 1)]
    assert ballots[0].verdict(0) is None
    assert ballots[0].decide(0, vote.Verdict(False, "late", "rank 1")) == vote.Verdict(False, "late", "rank 1")
    ballots[0].post(0, {})
    ballots[1].post(0, {})
    verdict, _ = ballots[1].settle(0, vote.judge_ready("code", (0, 1)), lambda missing: None)
    assert verdict.reason == "rank 1"


def test_comparison() -> None:
    plan = Plan("all_gather_matmul", "s", "shm", "float32")
    good = torch.tensor([1.0, float("inf"), float("nan")])
    runtime.compare(plan, [good.clone()], [good])
    for wrong in (torch.tensor([1.1, float("inf"), float("nan")]), torch.tensor([1.0, 1.0, 1.0]), torch.ones(2)):
        with pytest.raises(TscompileError, match="verify: output 0 of site s"):
            runtime.compare(plan, [wrong], [good])
