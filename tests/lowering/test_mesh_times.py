"""What is predicted of mesh_matmul over NVLink, against what benchmarks/bench_mesh.py has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks.bench_mesh import SUMMA
from tscompile.lowering import cost_model, planner
from tscompile.options import Options
from tscompile.problem import Fuse, FusionProblem, GatherUse, Gemm, Plan

RESULTS = Path(benchmarks.__file__).parent / "results"
MEASURED = json.loads((RESULTS / "gpu-mesh-4xh200-2026-11-28.json").read_text())["cases"]


def question(layout: str, size: int) -> tuple[FusionProblem, Plan]:
    """What the planner is asked about [size, size] operands on 2 x 2 ranks."""
    summed = layout == SUMMA
    part = size // 2
    left, right = ("cols", "rows") if summed else ("rows", "cols")
    uses = (GatherUse("lhs", False, left, "bfloat16"), GatherUse("rhs", False, right, "bfloat16"))
    problem = FusionProblem(
        "mesh_matmul",
        2,
        True,
        "cuda",
        "bfloat16",
        part * size * 2,
        (Gemm(part, part, size),),
        ("bfloat16",),
        pieces=part if summed else 1,
        second_group_size=2,
        second_comm_bytes=part * size * 2,
        second_pieces=1 if summed else size,
    )
    return problem, Plan("mesh_matmul", "", "", "bfloat16", uses=uses)


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case["name"])
def test_predictions_meet_what_was_measured(case: dict[str, Any]) -> None:
    """All times within a seventh where the GPU sets the pace, and all sizes are fused, which ran faster so than any other way."""
    layout, size = case["name"].split()
    problem, plan = question(layout, int(size))
    us = case["us"]
    one = min(us["one_gather, left"], us["one_gather, right"])
    assert us["tscompile"] < min(one, us["original"])
    assert isinstance(planner.plan(problem, plan, Options()), Fuse)
    found = cost_model.predict(problem, plan.uses)
    if us["tscompile"] < 1.3 * case["host_us"]["tscompile"]:
        return  # eager calls: the host's time was measured
    assert found.fused_us == pytest.approx(us["tscompile"], rel=1 / 7)
    if us["original"] > 2 * case["host_us"]["original"]:
        assert found.original_us == pytest.approx(us["original"], rel=1 / 7)
        assert found.partial_us == pytest.approx(one, rel=1 / 7)
