"""Schedules of mesh_matmul, in one process: every layout of either operand on square and other meshes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.mesh_cases import LHS, RHS, MeshCase, mesh_case
from tscompile.templates import find_template
from tscompile.templates.mesh_gemm import Posted, panel_bounds

MESHES = ((2, 2), (2, 3), (3, 2), (1, 4), (3, 3))


class Here(Posted):
    """All shards are there; `asked` says in which order they were read first."""

    def __init__(self, rank: int, shards: list[Tensor], keep: bool) -> None:
        self.rank, self.size = rank, len(shards)
        self.shape = (shards[0].shape[0], shards[0].shape[1])
        self.dtype = shards[0].dtype
        self.nbytes = sum(shard.nbytes for shard in shards)
        self.shards = shards
        self.asked: list[int] = []
        self._chunks: dict[int, Tensor] = {}
        self._gathered = self._empty(shards[0]) if keep else None

    def ring(self) -> Iterator[int]:
        yield from ((self.rank + step) % self.size for step in range(self.size))

    def chunk(self, rank: int) -> Tensor:
        if rank not in self._chunks:
            self.asked.append(rank)
            self._chunks[rank] = self.shards[rank]
            if self._gathered is not None:
                self._gathered.view(self.shape[0], self.size, -1)[:, rank].copy_(self.shards[rank])
        return self._chunks[rank]


def run(case: MeshCase, mesh: tuple[int, int]) -> dict[tuple[int, int], tuple[Here, Here]]:
    rows, columns = mesh
    template = find_template("mesh_matmul", "shm")
    assert template is not None
    seen = {}
    for i, j in product(range(rows), range(columns)):
        left = Here(j, [case.args[i, c][0] for c in range(columns)], case.plan.return_gathered)
        right = Here(i, [case.args[r, j][1] for r in range(rows)], case.plan.return_second)
        case.check((i, j), template.run((left, right), case.plan, *case.args[i, j], "second"))
        assert sorted(left.asked) == list(range(columns)), "two halves of an arena suffice if every peer is heard"
        assert sorted(right.asked) == list(range(rows))
        seen[i, j] = left, right
    return seen


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("schedule", ["summa", "cannon", "stream"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout(mesh: tuple[int, int], schedule: str, dtype: str) -> None:
    for seed, (lhs, rhs) in enumerate(product(LHS.values(), RHS.values())):
        returned = ((False, False), (True, True), (True, False), (False, True))[seed % 4]
        chosen = schedule if dtype == "float32" else "stream"  # as the planner has it
        run(mesh_case(*mesh, lhs, rhs, schedule=chosen, dtype=dtype, bias=seed % 3 == 0, returned=returned), mesh)


def test_cannon_reads_other_arenas_at_the_same_time_where_summa_reads_one() -> None:
    mesh = (3, 3)
    cannon = run(mesh_case(*mesh, LHS["panels"], RHS["panels"], schedule="cannon"), mesh)
    summa = run(mesh_case(*mesh, LHS["panels"], RHS["panels"], schedule="summa"), mesh)
    for step, i in product(range(3), range(3)):
        assert sorted(cannon[i, j][0].asked[step] for j in range(3)) == [0, 1, 2]
        assert sorted(cannon[j, i][1].asked[step] for j in range(3)) == [0, 1, 2]
        assert {summa[i, j][0].asked[step] for j in range(3)} == {step}


def test_panels_end_where_a_shard_of_either_group_ends() -> None:
    assert panel_bounds(12, 2, 2) == [(0, 6), (6, 12)]
    assert panel_bounds(12, 2, 3) == [(0, 4), (4, 6), (6, 8), (8, 12)]
    assert panel_bounds(4, 1, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_panels_copy_neither_operand() -> None:
    case = mesh_case(2, 2, LHS["panels"], RHS["panels"], schedule="cannon")
    for left, right in run(case, (2, 2)).values():
        assert left._gathered is None
        assert right._gathered is None


def test_scratch_is_the_larger_shard() -> None:
    template = find_template("mesh_matmul", "shm")
    assert template is not None
    case = mesh_case(2, 3, LHS["panels"], RHS["panels"])
    lhs, rhs, *rest = case.args[0, 0]
    need = template.scratch_bytes(case.plan, 3, lhs, rhs, *rest, "second")
    assert need == max(lhs.numel(), rhs.numel()) * torch.float32.itemsize
