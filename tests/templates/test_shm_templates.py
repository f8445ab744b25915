"""All CPU templates on real ranks: right results in every layout, under delays that make races likely, in fresh memory."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case, all_cases, all_gather, manifest, reduction, shuffled
from tests.compat import permuted_group
from tests.worlds import run_world
from tscompile.lowering import runtime
from tscompile.problem import FusionProblem, Gemm, Plan
from tscompile.templates import find_template, register_template, registered


def refuse() -> list[torch.Tensor]:
    raise AssertionError("the reference ran where the template should")


def call(case: Case, group: str, index: int) -> list[torch.Tensor]:
    return runtime.launch(case.plan, group, case.args[index], refuse)


def soak(rank: int, size: int, cases: list[Case], group: str, count: int) -> None:
    """Many calls in a row with random delays; each output is destroyed after it was checked, while the next call runs."""
    delays = random.Random(rank)
    for case in shuffled(cases, count, seed=size):
        if delays.random() < 0.2:
            time.sleep(delays.random() * 0.003)
        outputs = call(case, group, rank)
        case.check(rank, outputs)
        for output in outputs:
            output.fill_(float("nan"))


def correctness(rank: int, size: int) -> None:
    torch.manual_seed(0)
    group = dist.group.WORLD.group_name
    runtime.begin(manifest({group: 1}))
    cases = all_cases(size)
    for case in cases:
        case.check(rank, call(case, group, rank))
    state = runtime._world.by_name[group, "shm"]
    assert state.refusal is None
    soak(rank, size, cases, group, 300)
    same = reduction("matmul_all_reduce", size, 1, "bfloat16", inner=301, free=1000)
    (mine,) = call(same, group, rank)
    everyone = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(mine, other) for other in everyone)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_results(size: int) -> None:
    run_world(size, correctness, timeout_s=120)


def groups_in_a_world(rank: int, size: int) -> None:
    every_other = dist.new_group([0, 2])
    swapped = permuted_group([3, 1])
    mine: list[tuple[str, tuple[int, ...]]] = []
    names: dict[str, Any] = {}
    whole, again = dist.group.WORLD, dist.new_group()  # two names of the same ranks
    for group in (whole, every_other, swapped, again):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            continue
        ranks = tuple(dist.get_process_group_ranks(group))
        if rank in ranks:
            mine.append((group.group_name, ranks))
            names[group.group_name] = 1
    runtime.begin(manifest(names))
    for step in range(30):
        for name, ranks in mine:
            index = ranks.index(rank)
            case = all_gather(len(ranks), step, "float32", [("lhs", False, "rows")], inner=3 + step)
            case.check(index, call(case, name, index))
            case = reduction("matmul_reduce_scatter", len(ranks), step, "float32", inner=3 + step)
            case.check(index, call(case, name, index))


@pytest.mark.slow
def test_groups_of_a_world() -> None:
    run_world(4, groups_in_a_world)


def test_registry() -> None:
    kinds = {"all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce", "matmul_all_gather", "mesh_matmul"}
    kinds |= {"all_to_all_permute", "all_to_all_matmul", "all_to_all_attention", "matmul_all_to_all"}
    assert {(kind, "shm") for kind in kinds} <= set(registered())
    with pytest.raises(ValueError, match="already"):
        register_template("all_gather_matmul")(type("Again", (), {}))
    assert find_template("all_gather_matmul", "abacus") is None


def problem(**changes: Any) -> FusionProblem:
    facts: dict[str, Any] = {
        "kind": "all_gather_matmul",
        "group_size": 2,
        "intra_host": True,
        "device": "cpu",
        "dtype": "float32",
        "comm_bytes": 64,
        "gemms": (Gemm(2, 2, 2),),
        "second_group_size": 2,
    }
    return FusionProblem(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"device": "cuda"}, "cuda"),
        ({"intra_host": False}, "several hosts"),
        ({"dtype": "int8"}, "int8"),
        ({"reduce_op": "max"}, "max"),
        ({"group_size": 1}, "one rank"),
    ],
)
def test_supports(changes: dict[str, Any], said: str | None) -> None:
    for kind, executor in registered():
        template = find_template(kind, executor)
        assert template is not None
        if executor != "shm":
            continue
        reason = template.supports(problem(**changes), Plan(kind, "", "", "float32"))
        assert reason is None if said is None else said in str(reason)
