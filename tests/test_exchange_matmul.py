"""Whole blocks of Ulysses whose exchanges hide behind the projections: on 2 and 4 ranks, forward and backward, judged in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.numerics_worker import Outcome, run_cases
from tests.programs import PROGRAMS
from tscompile.testing import run_ranks

pytestmark = pytest.mark.slow
WORLD_S = 400
OPTIONS: dict[str, Any] = {
    "tilescale.inner": "eager",
    "tilescale.fuse": "always",
    "tilescale.disable": "all_to_all_attention",
}
NAMES = (
    "d1_ulysses_deepspeed",
    "d1_ulysses_deepspeed_full_B1",
    "d2_ulysses_yunchang_gqa",
    "d3_ulysses_functional",
    "d5_ulysses_fusedqkv",
    "d7_ulysses_yunchang_nograd",
    "d8_ulysses_opaque",
    "d10_ulysses_dynamic",
)
CASES = [(dtype, name) for name in NAMES for dtype in PROGRAMS[name].numerics]


@cache
def _world(world: int) -> list[dict[tuple[torch.dtype, str], Outcome]]:
    ranks: list[list[Outcome]] = run_ranks(world, run_cases, CASES, OPTIONS, timeout_s=WORLD_S)
    return [dict(zip(CASES, outcomes, strict=True)) for outcomes in ranks]


@pytest.mark.timeout(WORLD_S + 40)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("dtype", "name"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_a_block_computes_what_eager_does(world: int, dtype: torch.dtype, name: str) -> None:
    for rank, outcomes in enumerate(_world(world)):
        outcome = outcomes[dtype, name]
        assert not outcome.failure, f"rank {rank}:\n{outcome.failure}"
        assert outcome.errors and not outcome.wrong(dtype), (rank, outcome.wrong(dtype))
        assert PROGRAMS[name].backward == any(label.endswith("wqkv") for label in outcome.errors)
        lines = [line.split() for line in outcome.decisions]
        fused = {(phase, kind) for decision, phase, kind, _ in lines if decision == "fused"}
        phases = ("forward", "backward") if PROGRAMS[name].backward else ("inference",)
        assert {(phase, "all_to_all_matmul") for phase in phases} <= fused, lines
        assert outcome.fused == sum(decision == "fused" for decision, *_ in lines), "a fused op was not launched"
        if dtype == torch.bfloat16:  # summed at once, as eager does
            assert outcome.equal
