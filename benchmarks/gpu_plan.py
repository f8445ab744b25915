"""What the planner says of a benchmark case: pure, so it can be asked on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_report import GATHER
from tscompile.lowering import planner
from tscompile.options import Options
from tscompile.problem import Fuse, FusionProblem, GatherUse, Gemm, Keep, Plan


def question(case: Mapping[str, Any], ranks: int, dtype: str) -> tuple[FusionProblem, Plan]:
    """The planner's question for a case as gpu_results.py has it: `op`, `m`, and a rank's `n` (one per weight) and `k`."""
    kind, m, columns, k = case["op"], case["m"], case["n"], case["k"]
    moved = m * (k if kind == GATHER else columns[0]) * 2
    gemms = tuple(Gemm(m, n, k) for n in columns)
    uses = (GatherUse("lhs", False, "rows", dtype),) * len(columns) if kind == GATHER else ()
    problem = FusionProblem(kind, ranks, True, "cuda", dtype, moved, gemms, (dtype,) * len(gemms))
    return problem, Plan(kind, "", "", dtype, uses=uses)


def planned(case: Mapping[str, Any], ranks: int, dtype: str) -> dict[str, Any]:
    """`planned`: "fused", or the code and the reason why not; `predicted_us`: of the fused and of the original ops."""
    decision: Fuse | Keep = planner.plan(*question(case, ranks, dtype), Options())
    if isinstance(decision, Fuse):
        return {"planned": "fused", "predicted_us": [decision.predicted_fused_us, decision.predicted_original_us]}
    return {"planned": f"[{decision.code}] {decision.reason}"}
