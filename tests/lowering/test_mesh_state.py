"""A mesh whose ops cannot be taken back: all its ranks run them, or none does, or all raise. Real ranks, whose ops do nothing."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import row
from tests.lowering.test_mesh import PANELS, Life
from tests.mesh_cases import mesh_case
from tests.worlds import run_world
from tscompile.errors import PeerError, TscompileError
from tscompile.lowering import executors, mesh, runtime
from tscompile.lowering.executors import Memo, ShmExecutor
from tscompile.lowering.mesh_state import MeshState
from tscompile.observe import ledger
from tscompile.problem import Plan
from tscompile.templates import Template
from tscompile.templates.mesh_gemm import ShmMeshGemm

pytestmark = pytest.mark.slow


class Ahead(ShmExecutor):
    """Ops that return before they have met their peers, as those of GPUs do."""

    runs_ahead = True

    def __init__(self) -> None:
        self.enqueued = 0
        self.joined: set[Any] = set()

    def run_joined(
        self, other: Any, template: Template, plan: Plan, args: tuple[Any, ...], memo: Memo
    ) -> list[torch.Tensor]:
        self.enqueued += 1
        return [torch.ones(1)]

    def join(self, other: Any) -> None:
        self.joined.add(other)


class AheadLife(Life):
    """One rank of a mesh, with both groups and what joins them."""

    def begin(self, digests: tuple[str, str] = ("d", "d"), joins: bool = True, **options: Any) -> None:  # type: ignore[override]
        names = [name for name, digest in zip((self.row, self.column), digests, strict=True) if digest]
        entry = {"executor": "shm", "sites": 1, "scratch_bytes": 1 << 16}
        groups = dict(zip((self.row, self.column), ({**entry, "digest": digest} for digest in digests), strict=True))
        runtime.begin(
            json.dumps(
                {
                    "version": 1,
                    "graph": "g",
                    "groups": {name: groups[name] for name in names},
                    "meshes": [{"groups": [self.row, self.column], "sites": ["mesh0"]}] if joins else [],
                    "rows": [row(self.row, "mesh0")],
                    "runtime": {"timeout_s": 20.0, **options},
                }
            )
        )

    @property
    def state(self) -> MeshState:
        return runtime.current_world().meshes[self.row, self.column]

    def run(self, scale: int = 1) -> bool:
        """Whether an op of the mesh ran fused."""
        case = mesh_case(*self.shape, *PANELS, scale=scale)
        args = (*case.args[self.place], self.column)
        (out,) = mesh.launch(case.plan, self.row, args, lambda: [torch.zeros(1)])
        return bool(out.item())

    def refused(self) -> str:
        """Why the mesh runs the original ops; it does so for good."""
        assert self.state.refusal is not None
        assert self.kept("mesh0") == self.state.refusal.code
        assert not self.run() and not self.run()
        return self.state.refusal.code


def all_agree(life: AheadLife) -> None:
    life.begin()
    rows, columns = life.shape
    assert life.state.ranks == tuple(range(rows * columns))
    assert all(life.run() for _ in range(3))
    left, right = (state.executor for state in life.state.states)
    assert isinstance(left, Ahead) and left.joined == {right} and left.enqueued == 3
    life.begin(("e", "e"))
    life.begin()  # known: nobody waits
    assert life.run()


def one_row_has_not_agreed(life: AheadLife) -> str:
    life.begin(("other" if life.rank == 0 else "d", "d"))
    return life.refused()


def one_column_has_not_agreed(life: AheadLife) -> str:
    life.begin(("d", "other" if life.rank == 1 else "d"))
    return life.refused()


def one_rank_has_agreed_in_no_group(life: AheadLife) -> str:
    life.begin(("other", "other") if life.rank == 1 else ("d", "d"))
    return life.refused()


def nobody_has_agreed(life: AheadLife) -> str:
    life.begin((f"{life.rank}", f"{life.rank}"))
    return life.refused()


def a_group_without_room(life: AheadLife) -> str:
    """Options must be the same on all ranks of a group, not only of the mesh."""
    life.begin(heap_bytes=1 << 20 if life.rank == 3 else None)
    return life.refused()


def a_later_graph_of_both_groups(life: AheadLife) -> str:
    """A graph without ops that join them, on which one row does not agree: ranks across the mesh hear of it, and nobody raises."""
    life.begin()
    assert life.run()
    life.begin(("f0" if life.rank == 0 else "f", "g"), joins=False)
    return life.refused()


def a_graph_of_one_row_alone(life: AheadLife) -> None:
    """The ranks across the mesh do not run it, and nobody waits for them."""
    life.begin()
    start = time.monotonic()
    if life.place[0] == 0:
        life.begin(("f", ""), joins=False)
    assert time.monotonic() - start < 5
    assert life.run() and life.state.refusal is None


def a_refused_graph_of_one_row_alone(life: AheadLife) -> str:
    """The ranks across the mesh cannot know, and have enqueued ops: all raise."""
    life.begin()
    life.run()
    dist.barrier()
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        if life.place[0] == 0:
            life.begin(("f0" if life.rank == 0 else "f", ""), joins=False)
        while time.monotonic() - start < 10:
            life.run()
            time.sleep(0.01)
    return str(caught.value)


def a_group_that_was_refused_before(life: AheadLife) -> str:
    life.begin(("f0" if life.rank == 0 else "f", ""), joins=False)
    life.begin()
    return life.refused()


def one_rank_compiles_alone(life: AheadLife) -> str:
    """What the others have enqueued waits for it."""
    life.begin()
    life.run()
    dist.barrier()
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        if life.rank == 1:
            time.sleep(0.3)
            life.begin(("new", "new"))
        while time.monotonic() - start < 10:
            life.run()
            time.sleep(0.01)
    assert time.monotonic() - start < 8
    with pytest.raises(PeerError):
        life.run()
    return str(caught.value)


def sizes_that_were_not_agreed_on(life: AheadLife) -> str:
    life.begin()
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TscompileError) as caught:
        if life.rank == 2:
            patch.setattr(ShmMeshGemm, "scratch_bytes", lambda *_: -1)
        for _ in range(1000):
            life.run(scale=2)
            time.sleep(0.01)
    return str(caught.value)


SCENARIOS: dict[str, Callable[[AheadLife], Any]] = {
    function.__name__: function
    for function in (
        all_agree,
        one_row_has_not_agreed,
        one_column_has_not_agreed,
        one_rank_has_agreed_in_no_group,
        nobody_has_agreed,
        a_group_without_room,
        a_later_graph_of_both_groups,
        a_graph_of_one_row_alone,
        a_refused_graph_of_one_row_alone,
        a_group_that_was_refused_before,
        one_rank_compiles_alone,
        sizes_that_were_not_agreed_on,
    )
}
CODES = {
    "one_row_has_not_agreed": "other-sites",
    "one_column_has_not_agreed": "other-sites",
    "one_rank_has_agreed_in_no_group": "other-sites",
    "nobody_has_agreed": "other-sites",
    "a_group_without_room": "other-options",
    "a_later_graph_of_both_groups": "other-sites",
    "a_group_that_was_refused_before": "other-sites",
}


def live(rank: int, size: int, rows: int, names: list[str]) -> dict[str, Any]:
    """Scenarios one after the other, each in a life of its own of the process group."""
    logging.disable(logging.WARNING)
    executors.make_executor = lambda name: Ahead()
    store = dist.distributed_c10d._get_default_store()
    results = {}
    for name in names:
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=size)
        ledger.clear()
        print("scenario", name, flush=True)
        results[name] = SCENARIOS[name](AheadLife(rank, rows, size // rows))
    return results


@pytest.mark.timeout(180)
def test_scenarios() -> None:
    results = run_world(4, live, 2, list(SCENARIOS), timeout_s=170)
    for name, code in CODES.items():
        assert [said[name] for said in results] == [code] * 4, name
    for said in results:
        assert "rank 1" in said["one_rank_compiles_alone"]
        assert "planned other sites" in said["a_refused_graph_of_one_row_alone"]
        assert "other sizes than its graph was compiled for" in said["sizes_that_were_not_agreed_on"]


def test_a_mesh_that_is_not_square() -> None:
    names = ["all_agree", "one_row_has_not_agreed", "one_column_has_not_agreed", "one_rank_has_agreed_in_no_group"]
    results = run_world(6, live, 2, names, timeout_s=100)
    for name in names[1:]:
        assert [said[name] for said in results] == ["other-sites"] * 6


def one_rank_is_missing(rank: int, size: int, dies: bool) -> str:
    executors.make_executor = lambda name: Ahead()
    life = AheadLife(rank, 2, 2)
    if rank == 3:
        if dies:  # after it has voted in its groups, perhaps
            mesh_cast = MeshState.cast
            MeshState.cast = lambda self, elections: os._exit(1)  # type: ignore[method-assign, assignment]
            life.begin()
            MeshState.cast = mesh_cast  # type: ignore[method-assign]
        time.sleep(30)
    start = time.monotonic()
    life.begin(timeout_s=4.0)
    assert time.monotonic() - start < 15
    assert life.state.refusal is not None and not life.run()
    return life.state.refusal.code


@pytest.mark.parametrize(("dies", "code"), [(False, "vote-timeout"), (True, "peer-ended")])
def test_a_rank_that_does_not_vote(dies: bool, code: str) -> None:
    results = run_world(4, one_rank_is_missing, dies, dying=(3,), timeout_s=50)
    assert results[:3] == [code] * 3
