"""What is predicted of exchanges over NVLink, against what benchmarks/bench_exchange.py has measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks.bench_exchange import BACK, BEHIND, DIM, FUSED, HEADS, ONCE, OURS, PROJECTED, QKV, TWICE
from tscompile.lowering import cost_model, planner
from tscompile.options import Options
from tscompile.problem import Delivery, Departure, Fuse, FusionProblem, Gemm, Plan

# The rival of each, its exchanges and its permutes. What comes back is permuted on both sides by every program, and so is what a fused
# projection sends: q, k and v of several ranks do not lie so that a view could join them.
RIVALS = {QKV: (ONCE, 3, 3), FUSED: (ONCE, 1, 2), BACK: (TWICE, 1, 2)}

FILES = sorted((Path(benchmarks.__file__).parent / "results").glob("gpu-exchange-[0-9]x*.json"))


def measured(whats: Iterable[str]) -> list[Any]:
    return [
        pytest.param(case, data["environment"]["ranks"], id=f"{file.stem}: {case['name']}")
        for file in FILES
        for data in [json.loads(file.read_text())]
        for case in data["cases"]
        if case["what"] in whats
    ]


MEASURED = measured(RIVALS)
NOT_YET = pytest.mark.skip(
    reason="benchmarks/results has no gpu-exchange-*.json: run benchmarks.bench_exchange on GPUs"
)


def question(case: dict[str, Any], ranks: int) -> tuple[FusionProblem, Plan]:
    """What the planner is asked about a case of the benchmark."""
    _, count, _ = RIVALS[case["what"]]
    held = case["bytes_sent"] * ranks // (ranks - 1)
    problem = FusionProblem("all_to_all_permute", ranks, True, "cuda", "bfloat16", held, (), exchanges=count)
    deliveries = tuple(Delivery(i, (1, 0, 2)) for i in range(count))
    return problem, Plan(problem.kind, "", "", "bfloat16", deliveries=deliveries, joins=(1,) * count)


def predicted(problem: FusionProblem, permutes: int) -> cost_model.Prediction:
    """Of a program that permutes so often; the model counts one for each exchange."""
    found = cost_model.predict(problem)
    more = (permutes - problem.exchanges) * cost_model.PERMUTE.us(problem.comm_bytes / (1 << 20) / problem.exchanges)
    return cost_model.Prediction(found.fused_us, found.original_us + more)


def check(case: dict[str, Any], ranks: int) -> None:
    """Fused within 15 %, original within 25 %; nothing is fused that ran slower so, and what gained a third or more is."""
    rival, _, permutes = RIVALS[case["what"]]
    problem, plan = question(case, ranks)
    fused, original = case["graph"]["us"][OURS], case["graph"]["us"][rival]
    found = predicted(problem, permutes)
    assert found.fused_us == pytest.approx(fused, rel=0.15)
    assert found.original_us == pytest.approx(original, rel=0.25)
    if isinstance(planner.plan(problem, plan, Options()), Fuse):
        assert fused < original
    else:
        assert fused > original / 1.5


@pytest.mark.parametrize(("case", "ranks"), MEASURED or [pytest.param({}, 0, marks=NOT_YET)])
def test_predictions_meet_what_was_measured(case: dict[str, Any], ranks: int) -> None:
    check(case, ranks)


@pytest.mark.parametrize(("case", "ranks"), measured([PROJECTED]))
def test_predictions_of_projections_meet_what_was_measured(case: dict[str, Any], ranks: int) -> None:
    """All three ways within an eighth; where projecting is chosen, it was the fastest or within an eighth of that."""
    rows, width, panel = case["tokens"] // ranks, HEADS * DIM, HEADS // ranks * DIM
    problem = FusionProblem(
        "matmul_all_to_all",
        ranks,
        True,
        "cuda",
        "bfloat16",
        3 * rows * width * 2,
        (Gemm(rows, 3 * width, width),),
        ("bfloat16",),
        exchanges=3,
        grids=((rows, ranks, panel),) * 3,
    )
    plan = Plan(
        problem.kind,
        "",
        "",
        "bfloat16",
        deliveries=tuple(Delivery(i, (1, 0, 2)) for i in range(3)),
        joins=(1,) * 3,
        departures=tuple(Departure(0, 3, (), (1, 0, 2), columns=(i * width, width)) for i in range(3)),
    )
    found, us = cost_model.predict(problem, (), plan), case["graph"]["us"]
    assert found.fused_us == pytest.approx(us[OURS], rel=1 / 8)
    assert found.partial_us == pytest.approx(us[BEHIND], rel=1 / 8)
    assert found.original_us == pytest.approx(us[ONCE], rel=1 / 8)
    assert isinstance(planner.plan(problem, plan, Options()), Fuse)
    assert us[OURS] < 1.125 * min(us[BEHIND], us[ONCE])


@pytest.mark.parametrize("what", RIVALS)
@pytest.mark.parametrize("mib", [1, 24, 192])
def test_the_comparison(what: str, mib: int) -> None:
    """It takes what is predicted, and nothing that is far from it."""
    rival, _, permutes = RIVALS[what]
    case: dict[str, Any] = {"what": what, "bytes_sent": mib << 20}
    found = predicted(question(case, 4)[0], permutes)

    def measured(fused: float, original: float) -> dict[str, Any]:
        return {**case, "graph": {"us": {OURS: fused * found.fused_us, rival: original * found.original_us}}}

    check(measured(1.0, 1.0), 4)
    check(measured(1.1, 1.2), 4)
    for wrong in ((1.2, 1.0), (0.8, 1.0), (1.0, 1.4), (1.0, 0.75)):
        with pytest.raises(AssertionError):
            check(measured(*wrong), 4)


def test_nothing_is_fused_that_ran_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """However well both times are predicted."""
    monkeypatch.setitem(RIVALS, FUSED, (ONCE, 1, 1))
    case: dict[str, Any] = {"what": FUSED, "bytes_sent": 24 << 20}
    problem, plan = question(case, 4)
    close = cost_model.Link(0.0, 0.95 * cost_model.predict(problem).original_us / 24)
    monkeypatch.setattr(cost_model, "PUSH_EXCHANGE", (close,))
    assert isinstance(planner.plan(problem, plan, Options()), Fuse)
    found = predicted(problem, 1)
    with pytest.raises(AssertionError):
        check({**case, "graph": {"us": {OURS: 1.1 * found.fused_us, ONCE: 0.85 * found.original_us}}}, 4)
    check({**case, "graph": {"us": {OURS: found.fused_us, ONCE: found.original_us}}}, 4)
