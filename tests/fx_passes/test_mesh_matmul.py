"""Two gathers of two groups into one matmul: what becomes mesh_matmul, what is left to all_gather_matmul, and the order of ops."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh

from tests.compat import all_gather
from tests.graphs import Compiled, compile_graphs
from tscompile.fx_passes.lanes import find_lanes
from tscompile.lowering import cost_model, planner
from tscompile.options import Options
from tscompile.problem import Fuse, FusionProblem, Plan
from tscompile.testing import fake_world

KIND = "mesh_matmul"
Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]


@pytest.fixture
def groups() -> Iterator[Groups]:
    """Column and row of a 2 x 2 mesh."""
    with fake_world(4):
        mesh = init_device_mesh("cpu", (2, 2))
        yield mesh.get_group(0), mesh.get_group(1)


def rand(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def ops_of(found: Compiled) -> list[fx.Node]:
    return [n for n in found.graphs[0].nodes if str(n.target).startswith("tscompile.") and "begin" not in str(n.target)]


def plan_of(node: fx.Node) -> Plan:
    return Plan.loads(str(node.args[-2]))


FUSED: dict[str, tuple[str, Callable[[Groups], Any], tuple[Tensor, ...]]] = {
    "summa": ("cannon", lambda g: lambda a, b: all_gather(a, 1, g[1]) @ all_gather(b, 0, g[0]), (rand(8, 6), rand(6, 10))),
    "rows and columns": (
        "stream",
        lambda g: lambda a, b: all_gather(a, 0, g[1]) @ all_gather(b, 1, g[0]),
        (rand(8, 6), rand(6, 10)),
    ),
    "weights gathered like FSDP's": (
        "stream",
        lambda g: lambda a, w: all_gather(a, 0, g[1]) @ all_gather(w, 0, g[0]).t(),
        (rand(8, 6), rand(5, 6)),
    ),
    "batches of rows, contracted on one side": (
        "stream",
        lambda g: lambda a, b: all_gather(a, 1, g[1]) @ all_gather(b, 0, g[0]),
        (rand(3, 8, 6), rand(3, 10)),
    ),
    "bfloat16": (
        "stream",
        lambda g: lambda a, b: all_gather(a, 1, g[1]) @ all_gather(b, 0, g[0]),
        (rand(8, 6, dtype=torch.bfloat16), rand(6, 10, dtype=torch.bfloat16)),
    ),
    "bias": (
        "cannon",
        lambda g: lambda a, b, c: torch.addmm(c, all_gather(a, 1, g[1]), all_gather(b, 0, g[0])),
        (rand(8, 6), rand(6, 10), rand(10)),
    ),
    "residual": (
        "cannon",
        lambda g: lambda a, b, c: all_gather(a, 1, g[1]) @ all_gather(b, 0, g[0]) + c,
        (rand(8, 6), rand(6, 10), rand(8, 10)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fuses_both_gathers(name: str, groups: Groups) -> None:
    schedule, make, args = FUSED[name]
    found = compile_graphs(make(groups), *args)
    assert (found.kinds(), found.codes()) == ([KIND], ["fused"]), found.rows
    (row,) = found.rows
    assert len(row.collectives) == 2
    assert row.reason.endswith(f"runs as {schedule}")
    assert row.bytes == 2 * sum(each.nbytes for each in args[:2])
    targets = found.targets()
    assert targets.count(f"tscompile.{KIND}") == 1
    assert not [t for t in targets if "_c10d_functional" in t or t in ("aten.mm", "aten.addmm")]
    assert plan_of(ops_of(found)[0]).schedule == schedule


def test_training_gathers_each_operand_once(groups: Groups) -> None:
    """The backward reads what the forward gathered: both operands are outputs of the op."""
    args = (rand(8, 6, grad=True), rand(6, 10, grad=True))
    found = compile_graphs(FUSED["summa"][1](groups), *args, backward=True)
    assert found.kinds() == [KIND, "matmul_reduce_scatter", "matmul_reduce_scatter"]
    assert found.codes() == ["fused"] * 3
    plan = plan_of(ops_of(found)[0])
    assert (plan.return_gathered, plan.return_second) == (True, True)
    assert not [t for t in found.targets() if "_c10d_functional" in t]


def test_the_left_operands_group_comes_first_whatever_the_graph_says(groups: Groups) -> None:
    column, row = groups

    def right_first(a: Tensor, b: Tensor) -> Tensor:
        right = all_gather(b, 0, column)
        return all_gather(a, 1, row) @ right

    found = compile_graphs(right_first, rand(8, 6), rand(6, 10))
    (node,) = ops_of(found)
    assert (node.args[-1], node.args[-4]) == (row.group_name, column.group_name)


def test_a_graph_votes_on_its_op_in_both_groups(groups: Groups) -> None:
    found = compile_graphs(FUSED["summa"][1](groups), *FUSED["summa"][2])
    begin = next(n for n in found.graphs[0].nodes if "begin" in str(n.target))
    entries = json.loads(str(begin.args[1]))["groups"]
    assert set(entries) == {group.group_name for group in groups}
    assert all(entry["sites"] == 1 and entry["scratch_bytes"] == 6 * 10 * 4 for entry in entries.values())
    assert len({entry["digest"] for entry in entries.values()}) == 1


def test_what_the_planner_and_the_vote_of_gpus_are_told(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of either operand, whether sizes are known, and which groups an op joins where it cannot be taken back."""
    column, row = groups
    asked: list[FusionProblem] = []

    def enqueued(problem: FusionProblem, plan: Plan, options: Options) -> Fuse:
        asked.append(problem)
        return Fuse("nvlink", 1.0, 2.0)

    monkeypatch.setattr(planner, "plan", enqueued)
    found = compile_graphs(FUSED["summa"][1](groups), rand(8, 6), rand(6, 10))
    (problem,) = asked
    assert (problem.pieces, problem.second_pieces, problem.panels, problem.static) == (8, 1, True, True)
    (node,) = ops_of(found)
    assert plan_of(node).second_size == 2
    begin = next(n for n in found.graphs[0].nodes if "begin" in str(n.target))
    meshes = json.loads(str(begin.args[1]))["meshes"]
    assert meshes == [{"groups": [row.group_name, column.group_name], "sites": [plan_of(node).site]}]
    shards = rand(8, 6), rand(6, 10)
    torch._dynamo.mark_dynamic(shards[0], 0)
    compile_graphs(FUSED["summa"][1](groups), *shards)
    assert not asked[1].static


def test_groups_of_cpu_ranks_decide_by_themselves(groups: Groups) -> None:
    found = compile_graphs(FUSED["summa"][1](groups), *FUSED["summa"][2])
    begin = next(n for n in found.graphs[0].nodes if "begin" in str(n.target))
    assert json.loads(str(begin.args[1]))["meshes"] == []


def test_ops_of_both_groups_and_of_either_run_in_one_order(groups: Groups) -> None:
    column, row = groups

    def fn(a: Tensor, b: Tensor, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return all_gather(x, 0, row) @ w, all_gather(a, 1, row) @ all_gather(b, 0, column), all_gather(y, 0, column) @ w

    found = compile_graphs(fn, rand(8, 6), rand(6, 10), rand(4, 6), rand(2, 6), rand(6, 5))
    first, second, third = ops_of(found)
    assert second.args[-3].args[0] is first
    assert third.args[-3].args[0] is second


def test_lanes_join_groups_that_share_an_op(groups: Groups) -> None:
    column, row = (group.group_name for group in groups)
    world = dist.group.WORLD.group_name  # type: ignore[union-attr]
    assert len(set(find_lanes([(row,), (column,), (world,)]).values())) == 3
    assert len(set(find_lanes([(row,), (column,), (world,), (row, column)]).values())) == 2
    assert len(set(find_lanes([(row,), (world, column), (column, row)]).values())) == 1


def same_group(g: Groups) -> Any:
    return lambda a, b: all_gather(a, 1, g[1]) @ all_gather(b, 0, g[1])


def read_twice(g: Groups) -> Any:
    def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        left = all_gather(a, 1, g[1])
        return left @ all_gather(b, 0, g[0]), left @ c

    return fn


def one_after_the_other(g: Groups) -> Any:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        left = all_gather(a, 1, g[1])
        return left @ all_gather(b * left.sum(), 0, g[0])

    return fn


def other_dtypes(g: Groups) -> Any:
    return lambda a, b: all_gather(a, 1, g[1]).float() @ all_gather(b, 0, g[0])


LEFT: dict[str, tuple[Callable[[Groups], Any], tuple[Tensor, ...]]] = {
    "one group": (same_group, (rand(8, 6), rand(6, 10))),
    "read by another matmul": (read_twice, (rand(8, 6), rand(6, 10), rand(12, 3))),
    "the second depends on the first": (one_after_the_other, (rand(8, 6), rand(6, 10))),
    "other dtypes on the wire": (other_dtypes, (rand(8, 6, dtype=torch.bfloat16), rand(6, 10))),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_to_all_gather_matmul(name: str, groups: Groups) -> None:
    make, args = LEFT[name]
    found = compile_graphs(make(groups), *args)
    assert set(found.kinds()) == {"all_gather_matmul"}
    assert "fused" in found.codes()
    assert sum(len(row.collectives) for row in found.rows) == 2, "every collective stands in one row"


@pytest.mark.parametrize("how", ["disabled", "no gain"])
def test_what_is_not_fused_gives_way(how: str, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    _, make, args = FUSED["summa"]
    if how == "disabled":
        found = compile_graphs(make(groups), *args, disable=(KIND,))
    else:
        monkeypatch.setattr(cost_model, "_predict_mesh", lambda problem, us: cost_model.Prediction(2.0, 1.0))
        found = compile_graphs(make(groups), *args, fuse="auto")
    assert found.kinds() == ["all_gather_matmul", "all_gather_matmul"]
    assert found.codes() == ["fused", "matmul-taken"]


def test_a_dry_run_says_what_would_be_fused(groups: Groups) -> None:
    _, make, args = FUSED["summa"]
    found = compile_graphs(make(groups), *args, dry_run=True)
    assert (found.kinds(), found.codes()) == ([KIND], ["dry-run"])
    assert len(found.rows[0].collectives) == 2


def test_a_group_of_one_rank_has_no_second_gather() -> None:
    with fake_world(2):
        mesh = init_device_mesh("cpu", (2, 1))
        groups = (mesh.get_group(0), mesh.get_group(1))
        found = compile_graphs(FUSED["summa"][1](groups), rand(8, 6), rand(3, 10))
    assert sorted(map(str, found.kinds())) == ["None", "all_gather_matmul"]
    assert sorted(found.codes()) == ["fused", "one-rank"]


@pytest.mark.parametrize("dims", [((0, 0),), ((0, 1), (1, 0)), ((1, 1),)], ids=("rows", "contracted", "columns"))
def test_symbolic_sizes(dims: tuple[tuple[int, int], ...], groups: Groups) -> None:
    args = (rand(8, 6), rand(6, 10))
    for argument, dim in dims:
        torch._dynamo.mark_dynamic(args[argument], dim)
    found = compile_graphs(FUSED["summa"][1](groups), *args)
    assert (found.kinds(), found.codes()) == ([KIND], ["fused"]), found.rows
    assert not [t for t in found.targets() if "_c10d_functional" in t]


def test_a_mesh_that_is_not_square_runs_summa() -> None:
    with fake_world(6):
        mesh = init_device_mesh("cpu", (2, 3))
        groups = (mesh.get_group(0), mesh.get_group(1))
        found = compile_graphs(FUSED["summa"][1](groups), rand(8, 4), rand(6, 10))
    assert found.codes() == ["fused"]
    assert found.rows[0].reason.endswith("runs as summa")
