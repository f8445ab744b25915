"""all_to_all_matmul on real ranks falls back, verifies and fails as every op does; test_shm_templates.py has results under delays."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cases import panels
from tests.templates import test_all_to_all as exchanges
from tests.worlds import run_world
from tscompile.errors import PeerError, TscompileError
from tscompile.fx_passes.all_to_all_matmul import fake, reference
from tscompile.templates import find_template

pytestmark = pytest.mark.slow
JOINED = ((1, 24), (2, 24), (1, 8))


class Life(exchanges.Life):
    case = staticmethod(panels)
    reference = staticmethod(reference)
    site = "panels"


def the_reference_computes_the_same(life: Life) -> None:
    for seed in range(6):  # no graph has started: the original ops
        life.call(seed, shapes=JOINED[: 1 + seed % 3], returned=seed % 2 == 0, bias=seed % 3 == 0)
    assert life.references == 6


def growth(life: Life) -> None:
    life.begin(scratch_bytes=64)
    for seed in range(4):
        life.call(seed, shapes=JOINED, rows=8 << seed)
    assert life.references == 0


def verified(life: Life) -> None:
    life.begin(verify=True)
    life.call(shapes=JOINED)
    assert life.references == 1
    with pytest.raises(TscompileError, match="verify: output 0 of site panels1"):
        life.launch(panels(life.size, 1, "bfloat16"), spoil=1.0)


def other_sizes(life: Life) -> str:
    life.begin(timeout_s=10.0)
    life.call()
    with pytest.raises(PeerError) as caught:
        life.call(rows=7 if life.rank else 9)
    return str(caught.value)


def a_late_rank(life: Life) -> None:
    """The others have multiplied their own panels, and wait."""
    life.begin()
    for seed in range(6):
        if life.rank == seed % life.size:
            time.sleep(0.1)
        life.call(seed, shapes=JOINED, returned=True)
    assert life.references == 0


SCENARIOS: dict[str, Callable[[Any], Any]] = {
    function.__name__: function
    for function in (
        the_reference_computes_the_same,
        exchanges.one_rank_has_other_plans,
        exchanges.one_rank_compiles_alone,
        growth,
        verified,
        other_sizes,
        a_late_rank,
        exchanges.one_rank_stays_away,
    )
}


def live(rank: int, size: int) -> dict[str, Any]:
    return exchanges.live(rank, size, Life, SCENARIOS)


@pytest.mark.parametrize("size", [2, 4])
def test_scenarios(size: int) -> None:
    results = run_world(size, live, timeout_s=120)
    for said in results[:-1]:
        assert f"rank {size - 1} did not answer within 1.5 s" in said["one_rank_stays_away"]
    assert any("number of bytes" in said["other_sizes"] for said in results)


def test_shapes_and_scratch() -> None:
    template = find_template("all_to_all_matmul", "shm")
    assert template is not None
    case = panels(2, 0, "bfloat16", ((1, 3), (2, 5)), rows=7, free=(4, 9), returned=True)
    inputs, others, biases = case.args[0]
    assert template.scratch_bytes(case.plan, 2, inputs, others, biases) == 128 + 320
    assert [tuple(out.shape) for out in fake(case.plan, 2, inputs, others, biases)] == [(7, 4), (7, 9), (7, 26)]
    assert [tuple(out.shape) for out in case.plain[0]] == [(7, 4), (7, 9), (7, 26)]
    assert case.plan.computes and case.plain[0][0].dtype == torch.bfloat16
