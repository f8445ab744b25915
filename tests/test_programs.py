"""The programs show the graphs that they stand for: without this the recall table would measure something else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.programs import ADDRESSABLE, EVERY_PROGRAM, FAMILIES, LEFT_OUT, PROGRAMS, Program, Setting
from tests.recorder import record
from tscompile.testing import fake_world

WORLD = 4


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fake_world(WORLD):
        yield


@pytest.mark.parametrize("name", EVERY_PROGRAM)
def test_runs_on_this_torch(name: str) -> None:
    if name in LEFT_OUT:
        pytest.skip(LEFT_OUT[name])
    assert name in PROGRAMS


def test_families_sum_to_the_table() -> None:
    totals = dict.fromkeys(FAMILIES, 0)
    for program in PROGRAMS.values():
        if not program.extra:
            totals[program.family] += program.addressable
    assert totals == FAMILIES
    assert sum(totals.values()) == ADDRESSABLE


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda program: program.name)
def test_graphs_are_as_expected(program: Program) -> None:
    snapshots = record(program, Setting(WORLD, dtype=program.dtype))
    assert len(snapshots) == (2 if program.backward else 1), "fullgraph capture gives one graph per phase"
    collectives = {snapshot.phase: snapshot.collectives for snapshot in snapshots}
    addressable = {snapshot.phase: snapshot.addressable for snapshot in snapshots}
    assert collectives == {
        phase: {op: total for op, (total, _) in counts.items()} for phase, counts in program.expected.items()
    }
    assert addressable == {
        phase: {op: reachable for op, (_, reachable) in counts.items()} for phase, counts in program.expected.items()
    }


def test_truth_holds_the_values_of_the_low_precision_build() -> None:
    program = PROGRAMS["c1_funcol_2d"]
    low = program.build(Setting(WORLD, dtype=torch.bfloat16))
    truth = program.build(Setting(WORLD, dtype=torch.bfloat16, truth=True))
    for name, parameter in truth.parameters.items():
        assert parameter.dtype == torch.float64
        torch.testing.assert_close(parameter, low.parameters[name].double(), rtol=0, atol=0)
    torch.testing.assert_close(truth.args[0], low.args[0].double(), rtol=0, atol=0)
