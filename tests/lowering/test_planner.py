"""The planner: pure, the same on every rank, and the original ops are always a candidate."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tscompile.lowering import cost_model, planner
from tscompile.options import Options
from tscompile.problem import Fuse, FusionProblem, GatherUse, Gemm, Keep, Plan

PROBLEM = FusionProblem(
    kind="all_gather_matmul",
    group_size=2,
    intra_host=True,
    device="cpu",
    dtype="float32",
    comm_bytes=16 << 20,
    gemms=(Gemm(4096, 512, 1024),),
)

USE = GatherUse("lhs", False, "rows", "float32")
PLAN = Plan("all_gather_matmul", "", "", "float32", uses=(USE,))


def code(problem: FusionProblem, **options: object) -> str:
    decision = planner.plan(problem, PLAN, Options(**options))  # type: ignore[arg-type]
    return decision.code if isinstance(decision, Keep) else "fused"


def test_fuses_what_is_predicted_to_gain() -> None:
    decision = planner.plan(PROBLEM, PLAN, Options())
    assert isinstance(decision, Fuse)
    assert decision.executor == "shm"
    assert decision.predicted_fused_us < decision.predicted_original_us


def test_keeps_what_is_not_and_says_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {kind: cost_model.Link(1e6, 1e6) for kind in cost_model.SHM}
    monkeypatch.setattr(cost_model, "SHM", slow)
    decision = planner.plan(PROBLEM, PLAN, Options())
    assert isinstance(decision, Keep) and decision.code == "no-gain"
    assert "us fused against" in decision.reason
    assert code(PROBLEM, fuse="always") == "fused"


def test_predictions_grow_with_every_cost() -> None:
    base = cost_model.predict(PROBLEM)
    for larger in (
        replace(PROBLEM, comm_bytes=PROBLEM.comm_bytes * 2),
        replace(PROBLEM, gemms=PROBLEM.gemms * 2),
        replace(PROBLEM, return_gathered=True),
    ):
        assert cost_model.predict(larger).fused_us > base.fused_us
    assert cost_model.predict(PROBLEM).original_us == pytest.approx(
        2 * 4096 * 512 * 1024 / (cost_model.GFLOPS * 1e3) + cost_model.GLOO["all_gather_matmul"].us(8.0)
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device": "xpu"}, "no-executor"),
        ({"device": "cuda"}, "unsupported"),  # float32
        ({"group_size": 1}, "one-rank"),
        ({"comm_bytes": 0}, "empty"),
        ({"dtype": "int64"}, "unsupported"),
        ({"dtype": "complex64"}, "unsupported"),
        ({"intra_host": False}, "unsupported"),
        ({"kind": "all_reduce_matmul"}, "no-executor"),
    ],
)
def test_refuses_what_no_kernel_takes(change: dict[str, object], expected: str) -> None:
    assert code(replace(PROBLEM, **change), fuse="always") == expected  # type: ignore[arg-type]


def test_a_disabled_kind_is_kept_whatever_it_gains() -> None:
    assert code(PROBLEM, disable=("all_gather_matmul",), fuse="always") == "disabled"


def test_kernels_are_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, dtype="bfloat16", uses=(replace(USE, dtype="bfloat16"),))
    problem = replace(PROBLEM, device="cuda", dtype="bfloat16", gemm_dtypes=("bfloat16",))
    monkeypatch.setattr(planner, "_capability", lambda: (9, 0))
    assert isinstance(planner.plan(problem, plan, Options(fuse="always")), Fuse)
    monkeypatch.setattr(planner, "_capability", lambda: (8, 0))
    kept = planner.plan(problem, plan, Options(fuse="always"))
    assert isinstance(kept, Keep) and kept.code == "unsupported" and "8.0" in kept.reason
