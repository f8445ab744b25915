"""mesh_matmul on real ranks of a mesh: each group agrees, falls back and fails by itself, and no rank waits for ever."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.cases import all_gather, manifest, row
from tests.mesh_cases import LHS, RHS, MeshCase, mesh_case
from tests.worlds import run_world
from tscompile.errors import PeerError, TscompileError
from tscompile.fx_passes.mesh_matmul import reference
from tscompile.lowering import mesh, runtime
from tscompile.observe import ledger

pytestmark = pytest.mark.slow
PANELS, BLOCKS = (LHS["panels"], RHS["panels"]), (LHS["rows"], RHS["columns"])


class Life:
    """One rank (i, j) of a mesh, with its two groups."""

    def __init__(self, rank: int, rows: int, columns: int) -> None:
        self.shape = (rows, columns)
        self.rank, self.place = rank, divmod(rank, columns)
        self.references = 0
        for i in range(rows):
            self._keep(dist.new_group([i * columns + j for j in range(columns)]), i == self.place[0], "row")
        for j in range(columns):
            self._keep(dist.new_group([i * columns + j for i in range(rows)]), j == self.place[1], "column")

    def _keep(self, group: Any, mine: bool, which: str) -> None:
        if mine:
            setattr(self, which, group.group_name)

    row: str
    column: str

    def begin(self, digests: tuple[str, str] = ("d", "d"), scratch_bytes: int = 1 << 16, **options: Any) -> None:
        """Start a graph; `digests` of the plans on the row and on the column, "" if the graph has none there."""
        names = [name for name, digest in zip((self.row, self.column), digests, strict=True) if digest]
        rows = [row(self.row, f"mesh{seed}") for seed in range(20)]
        text = json.loads(manifest(dict.fromkeys(names, 1), scratch_bytes=scratch_bytes, rows=rows, **options))
        for name, digest in zip((self.row, self.column), digests, strict=True):
            if digest:
                text["groups"][name]["digest"] = digest
        runtime.begin(json.dumps(text))

    def call(self, case: MeshCase) -> None:
        def original(*raw: Tensor) -> list[Tensor]:
            self.references += 1
            return reference(case.plan, self.row, *case.args[self.place], self.column, *raw)

        args = (*case.args[self.place], self.column)
        outputs = mesh.launch(case.plan, self.row, args, original)
        case.check(self.place, outputs)
        for output in outputs:  # it is nobody else's memory
            output.fill_(float("nan"))

    def mesh(self, seed: int = 0, layouts: Any = PANELS, **more: Any) -> None:
        self.call(mesh_case(*self.shape, *layouts, seed=seed, **more))

    def gather(self, name: str, index: int, seed: int) -> None:
        """An op of one of the two groups."""
        size = self.shape[1] if name == self.row else self.shape[0]
        case = all_gather(size, seed, "float32", [("lhs", False, "rows")])
        case.check(index, runtime.launch(case.plan, name, case.args[index], lambda: pytest.fail("not fused")))

    def kept(self, site: str) -> str:
        return next(r.code for r in ledger.rows() if r.site == site)


def all_layouts(life: Life) -> None:
    life.begin()
    delays = random.Random(life.rank)
    cases = [
        mesh_case(*life.shape, lhs, rhs, seed=seed, schedule=schedule, dtype=dtype, returned=(seed % 2 == 0, seed % 3 == 0))
        for seed, (lhs, rhs) in enumerate(product(LHS.values(), RHS.values()))
        for schedule, dtype in (("summa", "float32"), ("cannon", "float64"), ("stream", "bfloat16"))
    ]  # fmt: skip
    random.Random(0).shuffle(cases)
    i, j = life.place
    for seed, case in enumerate(cases):
        if delays.random() < 0.2:
            time.sleep(delays.random() * 0.003)
        life.call(case)
        if seed % 4 == 0:
            life.gather(life.row, j, seed)
        if seed % 4 == 1:
            life.gather(life.column, i, seed)
    assert life.references == 0


def one_row_has_not_agreed(life: Life) -> None:
    """Ranks of the first row run their gather as it was, and still exchange along the columns through memory."""
    life.begin(("other" if life.rank == 0 else "d", "d"))
    for seed in range(5):
        life.mesh(seed, returned=(True, True))
    assert life.references == (5 if life.place[0] == 0 else 0)
    assert (life.kept("mesh0") == "other-sites") == (life.place[0] == 0)


def one_column_has_not_agreed(life: Life) -> None:
    life.begin(("d", "other" if life.rank == 1 else "d"))
    for seed in range(5):
        life.mesh(seed, BLOCKS, schedule="stream")
    assert life.references == (5 if life.place[1] == 1 else 0)
    assert (life.kept("mesh0") == "other-sites") == (life.place[1] == 1), "the report says so for the second group too"


def lone_recompiles_in_two_groups(life: Life) -> None:
    """Rank 1 leaves its row in the middle, rank 2 its column: every rank but rank 3 falls back on one side or both."""
    life.begin()
    for seed in range(4):
        life.mesh(seed)
    assert life.references == 0
    if life.rank == 1:
        time.sleep(0.1)
        life.begin(("second", ""))
    if life.rank == 2:
        life.begin(("", "second"))
    for seed in range(6):
        life.mesh(seed, BLOCKS if seed % 2 else PANELS)
    assert life.references == (0 if life.rank == 3 else 6)


def both_groups_at_once(life: Life) -> None:
    life.begin()
    life.mesh()
    if life.rank in (0, 3):
        life.begin(("second", "second"))
    for seed in range(6):
        life.mesh(seed)
    assert life.references == 6


def growth(life: Life) -> None:
    life.begin(scratch_bytes=64)
    wide = mesh_case(*life.shape, *PANELS, seed=1, scale=32)
    for _ in range(3):
        life.mesh()
        life.call(wide)
    assert life.references == 0


def no_room(life: Life) -> None:
    """A call that needs more than the option allows runs as it was; the next one is fused again."""
    life.begin(scratch_bytes=64, heap_bytes=8192)
    life.mesh()
    life.call(mesh_case(*life.shape, *PANELS, seed=1, scale=32))
    life.mesh()
    assert life.references == 1
    assert life.kept("mesh1") == "no-room"


def verified(life: Life) -> None:
    """Ranks that run fused and ranks that fell back compare with the same collectives."""
    life.begin(("other" if life.rank == 0 else "d", "d"), verify=True)
    for seed in range(4):
        life.mesh(seed, returned=(True, False))
    assert life.references == 4


def wrong_result(life: Life) -> None:
    life.begin(verify=True)
    case = mesh_case(*life.shape, *PANELS)
    with pytest.raises(TscompileError) as caught:
        mesh.launch(
            case.plan,
            life.row,
            (*case.args[life.place], life.column),
            lambda *raw: [reference(case.plan, life.row, *case.args[life.place], life.column, *raw)[0] + 1],
        )
    assert "verify: output 0" in str(caught.value)
    life.mesh(1)  # the groups themselves are sound


def one_rank_raises(life: Life) -> str:
    """The rank across the mesh has no group with the one at fault: it hears of it through those that have."""
    life.begin()
    life.mesh()
    case = mesh_case(*life.shape, *PANELS)
    start = time.monotonic()
    with pytest.raises((PeerError, RuntimeError)) as caught:
        for step in range(200):
            if life.rank == 3 and step == 3:
                lhs, rhs, bias, contracted = case.args[life.place]
                mesh.launch(case.plan, life.row, (lhs[:, :1], rhs, bias, contracted, life.column), list)
            life.call(case)
    assert time.monotonic() - start < 20
    with pytest.raises(PeerError):  # and it stays so, in either group
        life.call(case)
    return str(caught.value)


SCENARIOS: dict[str, Callable[[Life], Any]] = {
    function.__name__: function
    for function in (
        all_layouts,
        one_row_has_not_agreed,
        one_column_has_not_agreed,
        lone_recompiles_in_two_groups,
        both_groups_at_once,
        growth,
        no_room,
        verified,
        wrong_result,
        one_rank_raises,
    )
}


def live(rank: int, size: int, rows: int, names: list[str]) -> dict[str, Any]:
    """Scenarios one after the other, each in a life of its own of the process group."""
    logging.disable(logging.WARNING)
    store = dist.distributed_c10d._get_default_store()
    results = {}
    for name in names:
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=size)
        ledger.clear()
        print("scenario", name, flush=True)
        results[name] = SCENARIOS[name](Life(rank, rows, size // rows))
    return results


@pytest.mark.timeout(180)
def test_scenarios() -> None:
    results = run_world(4, live, 2, list(SCENARIOS), timeout_s=170)
    for rank, said in enumerate(results):
        assert "rank" in said["one_rank_raises"], rank


def test_a_mesh_that_is_not_square() -> None:
    run_world(6, live, 2, ["all_layouts", "one_row_has_not_agreed"], timeout_s=100)


def one_rank_dies(rank: int, size: int) -> str:
    life = Life(rank, 2, 2)
    life.begin(timeout_s=20.0)
    life.mesh()
    if rank == 3:
        time.sleep(0.2)
        os._exit(1)
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        while True:
            life.mesh()
    assert time.monotonic() - start < 15, "nobody waits for the time-out: the process is gone"
    return str(caught.value)


def test_a_rank_that_dies() -> None:
    said = run_world(4, one_rank_dies, dying=(3,))
    assert all("rank 3" in text for text in said[:3]), said
