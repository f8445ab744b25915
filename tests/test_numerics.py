"""Fused programs compute what eager ones do: outputs and gradients on 2 and 4 gloo ranks, float32 and bfloat16.

The measure is the error against the same program in float64. A fused program may round differently from eager, so
they are not compared with each other: the compiled program's error must be at most twice that of eager.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.numerics_worker import Outcome, run_cached, run_cases
from tests.programs import PROGRAMS, Program
from tscompile.testing import run_ranks

FUSE_ALL = {"tilescale.inner": "eager", "tilescale.fuse": "always"}
WORLD_S = 680  # the first test of a world waits for all its programs: some minutes on a busy machine


def _crossed() -> set[str]:
    """Programs that run in every combination of world and dtype: the smallest of each family, and those on meshes, which are quick."""
    families: dict[str, list[Program]] = {}
    for program in PROGRAMS.values():
        if program.numerics:
            families.setdefault(program.family, []).append(program)
    smallest = {min(programs, key=lambda program: program.addressable).name for programs in families.values()}
    return smallest | {program.name for program in families["2-D mesh"]}


# Tracing costs each rank seconds, so most programs run once with more than two ranks and once in a 16-bit dtype. These two are the
# slowest, and alike: each runs in one of the worlds.
CROSSED = _crossed()
ONLY_IN = {"i1_dyn_dtensor_sp_B1": 2, "i1_dyn_dtensor_sp_B2": 4}


def _runs(world: int, dtype: torch.dtype, program: Program) -> bool:
    chosen = program.name in CROSSED or (world, dtype) in ((4, torch.float32), (2, torch.bfloat16))
    return chosen and dtype in program.numerics and ONLY_IN.get(program.name, world) == world


CASES = [
    (world, dtype, program.name)
    for world in (2, 4)
    for dtype in (torch.float32, torch.bfloat16)
    for program in PROGRAMS.values()
    if _runs(world, dtype, program)
]


@cache
def _world(world: int) -> dict[tuple[torch.dtype, str], list[Outcome]]:
    """All programs in one world, since starting ranks costs more than a program: dtype and name -> outcome of each rank."""
    cases = [(dtype, name) for size, dtype, name in CASES if size == world]
    ranks: list[list[Outcome]] = run_ranks(world, run_cases, cases, FUSE_ALL, timeout_s=WORLD_S)
    return {case: [outcomes[index] for outcomes in ranks] for index, case in enumerate(cases)}


def test_every_program_meets_both_dtypes_and_four_ranks() -> None:
    for program in PROGRAMS.values():
        runs = {(world, dtype) for world, dtype, name in CASES if name == program.name}
        if program.name in ONLY_IN:
            assert {world for world, _ in runs} == {ONLY_IN[program.name]}
        else:
            assert {dtype for _, dtype in runs} == set(program.numerics), program.name
            assert 4 in {world for world, _ in runs} or not runs, program.name


def _check(outcome: Outcome, rank: int, dtype: torch.dtype) -> None:
    assert not outcome.failure, f"rank {rank}:\n{outcome.failure}"
    wrong = outcome.wrong(dtype)
    assert not wrong, f"rank {rank}: {wrong}; sites: {outcome.decisions}"
    assert outcome.errors, "nothing was compared"
    # Without this the test would pass by fusing nothing.
    assert outcome.fused > 0, f"rank {rank} fused no site: {outcome.decisions}"


@pytest.mark.timeout(WORLD_S + 40)
@pytest.mark.parametrize(
    ("world", "dtype", "name"),
    CASES,
    ids=[f"{world}-{str(dtype).removeprefix('torch.')}-{name}" for world, dtype, name in CASES],
)
def test_error_is_at_most_twice_that_of_eager(world: int, dtype: torch.dtype, name: str) -> None:
    for rank, outcome in enumerate(_world(world)[dtype, name]):
        _check(outcome, rank, dtype)


@pytest.mark.timeout(WORLD_S + 40)
@pytest.mark.parametrize("world", (2, 4))
def test_gradients_reach_every_parameter(world: int) -> None:
    """The comparison above has something to compare: an output, and a gradient for each leaf that eager gives one."""
    for (_, name), outcomes in _world(world).items():
        gradients = [label for label in outcomes[0].errors if label.startswith("gradient")]
        assert any(label.startswith("output") for label in outcomes[0].errors), name
        assert bool(gradients) == PROGRAMS[name].backward, name


@pytest.mark.timeout(WORLD_S + 40)
@pytest.mark.parametrize("world", (2, 4))
def test_exchanges_only_move_bits(world: int) -> None:
    """Unless a matmul adds panels as they arrive."""
    found = {case: outcomes for case, outcomes in _world(world).items() if PROGRAMS[case[1]].family == "Ulysses"}
    moved = {case: outcomes for case, outcomes in found.items() if not outcomes[0].adds_panels}
    assert moved
    for case, outcomes in moved.items():
        assert all(outcome.equal for outcome in outcomes), case


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_generated_code(tmp_path: Path) -> None:
    """One program through Inductor's code generation: fused ops must survive its scheduler and buffer reuse.

    The second start finds the artifacts of the first, so that its ranks fuse without the pass having run.
    """
    options: dict[str, Any] = {"tilescale.fuse": "always"}
    for _ in ("cold", "warm"):
        ranks = run_ranks(2, run_cached, str(tmp_path), ["c1_funcol_2d"], torch.float32, options, timeout_s=200)
        for rank, (outcome,) in enumerate(ranks):
            _check(outcome, rank, torch.float32)
