"""Compiled programs: every pattern with its outputs and gradients, on the world and on groups of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests import fused_runs
from tests.compat import permuted_group
from tests.fused_programs import PROGRAMS, Program
from tests.gpu.conftest import World
from tests.numerics_worker import run_programs
from tests.programs import PROGRAMS as SUITE
from tests.test_numerics import FUSE_ALL

# These must fuse; of the others a kernel may refuse the layout, which then shows as a skip after the result was checked.
ESSENTIAL = {name for name in PROGRAMS if "x @ w" in name or "three" in name or "returned" in name} | {
    "block, forward and backward"
}


def one(world: World, program: Program, group: dist.ProcessGroup, dtype: torch.dtype, inner: str = "eager") -> None:
    rows = fused_runs.run(
        program, group, dtype, world.device, world.sizes, inner=inner, must_fuse=program.name in ESSENTIAL
    )
    if not any(row.decision == "fused" for row in rows):
        pytest.skip(f"right, but not fused: {'; '.join(f'[{row.code}] {row.reason}' for row in rows)}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(world: World, name: str, dtype: str) -> None:
    one(world, PROGRAMS[name], dist.group.WORLD, getattr(torch, dtype))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["block, forward and backward", "gather, three weights"])
def test_generated_code(world: World, name: str) -> None:
    """Through Inductor's code generation: its scheduler and its reuse of buffers."""
    one(world, PROGRAMS[name], dist.group.WORLD, torch.bfloat16, inner="inductor")


@pytest.fixture(scope="session")
def groups(world: World) -> list[tuple[list[int], dist.ProcessGroup]]:
    """Groups of the world that this rank belongs to; all ranks create all of them, in one order."""
    made = [(ranks, permuted_group(ranks)) for ranks in fused_runs.subgroups(world.size)]
    return [(ranks, group) for ranks, group in made if world.rank in ranks]


@pytest.mark.parametrize("kind", ["gather", "scatter", "reduce"])
def test_groups(world: World, groups: list[tuple[list[int], dist.ProcessGroup]], kind: str) -> None:
    """Halves of the world, permuted and overlapping groups, one after the other, twice."""
    for _ in range(2):
        for ranks, group in groups:
            world.say(kind, ranks)
            one(world, PROGRAMS[f"{kind}, x @ w"], group, torch.bfloat16)
    dist.barrier()


@pytest.mark.timeout(600)
def test_programs_of_the_suite(world: World) -> None:
    """What recall and numerics are measured on, on this device: small sizes, so kernels may refuse many, but nothing may be wrong."""
    names = [name for name, program in SUITE.items() if torch.bfloat16 in program.numerics]
    wrong = {}
    outcomes = run_programs(names if world.cuda else names[:3], torch.bfloat16, FUSE_ALL, device=world.device.type)
    for outcome in outcomes:
        bad = list(outcome.wrong(torch.bfloat16))
        if bad or outcome.failure:
            wrong[outcome.program] = outcome.failure[-600:] or f"{bad}: {outcome.decisions}"
    world.say(f"{sum(o.fused for o in outcomes)} sites fused in {len(outcomes)} programs")
    assert not wrong
