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

from tests.numerics_worker import Outcome, run_programs
from tests.programs import PROGRAMS
from tscompile.testing import run_ranks

FACTOR = 2.0
# Eager can be exact by luck (a sum of two products that needs no rounding, say). Nothing can be asked to be better than
# one correct rounding to its dtype, whose relative error is up to half of eps.
FLOOR_EPS = 0.5
FUSE_ALL = {"tilescale.inner": "eager", "tilescale.fuse": "always"}
WORLD_S = 680  # the first test of a world waits for all its programs: some minutes on a busy machine
CASES = [
    pytest.param(world, dtype, program.name, id=f"{world}-{str(dtype).removeprefix('torch.')}-{program.name}")
    for world in (2, 4)
    for dtype in (torch.float32, torch.bfloat16)
    for program in PROGRAMS.values()
    if dtype in program.numerics
]


@cache
def _world(world: int, dtype: torch.dtype) -> dict[str, list[Outcome]]:
    """All programs in one world, since starting ranks costs more than a program: name -> outcome of each rank."""
    names = [program.name for program in PROGRAMS.values() if dtype in program.numerics]
    ranks: list[list[Outcome]] = run_ranks(world, run_programs, names, dtype, FUSE_ALL, timeout_s=WORLD_S)
    return {name: [outcomes[index] for outcomes in ranks] for index, name in enumerate(names)}


def is_close(compiled: float, eager: float, dtype: torch.dtype) -> bool:
    """Written so that NaN is not."""
    return compiled <= max(FACTOR * eager, FLOOR_EPS * torch.finfo(dtype).eps)


def _check(outcome: Outcome, rank: int, dtype: torch.dtype) -> None:
    assert not outcome.failure, f"rank {rank}:\n{outcome.failure}"
    wrong = {
        name: f"error {compiled:.3g}, eager {eager:.3g}"
        for name, (compiled, eager) in outcome.errors.items()
        if not is_close(compiled, eager, dtype)
    }
    assert not wrong, f"rank {rank}: {wrong}; sites: {outcome.decisions}"
    assert outcome.errors, "nothing was compared"
    # Without this the test would pass by fusing nothing.
    assert outcome.fused > 0, f"rank {rank} fused no site: {outcome.decisions}"


@pytest.mark.timeout(WORLD_S + 40)
@pytest.mark.parametrize(("world", "dtype", "name"), CASES)
def test_error_is_at_most_twice_that_of_eager(world: int, dtype: torch.dtype, name: str) -> None:
    for rank, outcome in enumerate(_world(world, dtype)[name]):
        _check(outcome, rank, dtype)


@pytest.mark.timeout(WORLD_S + 40)
@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_reach_every_parameter(world: int, dtype: torch.dtype) -> None:
    """The comparison above has something to compare: an output, and a gradient for each leaf that eager gives one."""
    for name, outcomes in _world(world, dtype).items():
        gradients = [label for label in outcomes[0].errors if label.startswith("gradient")]
        assert any(label.startswith("output") for label in outcomes[0].errors), name
        assert bool(gradients) == PROGRAMS[name].backward, name


@pytest.mark.timeout(WORLD_S + 40)
@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_exchanges_only_move_bits(world: int, dtype: torch.dtype) -> None:
    names = [name for name, program in PROGRAMS.items() if program.family == "Ulysses" and dtype in program.numerics]
    assert names
    for name in names:
        assert all(outcome.equal for outcome in _world(world, dtype)[name]), name


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_generated_code(tmp_path: Path) -> None:
    """One program through Inductor's code generation: fused ops must survive its scheduler and buffer reuse.

    The second start finds the artifacts of the first, so that its ranks fuse without the pass having run.
    """
    options: dict[str, Any] = {"tilescale.fuse": "always"}
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for _ in ("cold", "warm"):
        ranks = run_ranks(2, run_programs, ["c1_funcol_2d"], torch.float32, options, timeout_s=200, env=env)
        for rank, (outcome,) in enumerate(ranks):
            _check(outcome, rank, torch.float32)
