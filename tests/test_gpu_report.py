"""What GPU results say, from made-up ones: efficiency, targets, tables, pictures, and the documents that show them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_cases, gpu_plan, gpu_report, model_report, plot, step_profile
from benchmarks.gpu_report import GATHER, REDUCE, SCATTER

ENVIRONMENT = {"date": "2026-01-31 10:00 UTC", "gpu": "A GPU", "ranks": 4, "dtype": "bfloat16", "torch": "2.11"}


def made_up(case: gpu_cases.Case, share: float) -> dict[str, Any]:
    """A result in which the fused op reaches `share` of the roof, eager; 1.02 of that in a graph."""
    columns, k = case.local(4)
    gemm = 2 * case.m * sum(columns) * k / 700e12
    transport = case.crossing(4, 2) / gpu_report.LINK_BYTES_PER_S
    collective = 1.1 * transport
    roof = max(gemm, transport)
    times = {"gemm": gemm, "collective": collective, "original": gemm + collective, "tscompile": roof / share}
    if case.op != REDUCE:
        times["async_tp"] = 1.7 * roof / share
    if case.op == GATHER:
        times["tscompile_gathered"] = 1.05 * times["tscompile"]
    graph = {name: t / (1.02 if name.startswith("tscompile") else 1) for name, t in times.items() if name != "async_tp"}
    record = {
        "name": case.name,
        "status": "done",
        "op": case.op,
        "label": case.label,
        "m": case.m,
        "n": columns,
        "k": k,
    }
    record |= gpu_plan.planned(record, 4, "bfloat16")
    record |= {"transport_s": transport, "errors": {"tscompile": [1e-3, 1e-3, 2e-3, 2e-3]}, "failures": {}}
    return record | {"host_us": {"tscompile": 20.0}, "rounds": {"eager": [times] * 3, "graph": [graph] * 3}}


def result(share: float = 0.955) -> dict[str, Any]:
    cases = [made_up(case, share) for case in gpu_cases.cases()]
    return {"kind": "gpu-ops", "environment": ENVIRONMENT, "cases": cases}


def test_every_case_has_its_own_name_and_divides() -> None:
    cases = gpu_cases.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.op for case in cases} == {GATHER, SCATTER, REDUCE}
    for case in cases:
        columns, k = case.local(4)
        assert all(n % 8 == 0 for n in columns) and k % 8 == 0 and case.m % 4 == 0
        assert sum(columns) * (4 if case.op == GATHER else 1) == sum(case.n)
    assert len(gpu_cases.quick_cases()) == 11


def test_efficiency_is_a_share_of_the_roof_of_the_round() -> None:
    for case in result(0.9)["cases"]:
        assert gpu_report.efficiency(case, "tscompile", "eager") == pytest.approx(0.9)
        assert gpu_report.efficiency(case, "tscompile", "graph") == pytest.approx(0.918)
        assert gpu_report.efficiency(case, "nobody", "eager") is None


def test_targets_find_their_cases() -> None:
    rows = {row[0]: row for row in gpu_report.acceptance(result(0.955)["cases"])}
    counts = {name: int(row[1]) for name, row in rows.items()}
    assert counts.pop("AG m >= 4096, in place") == 0  # no such candidate in this result
    assert all(counts.values()), counts
    assert counts["8B q,k,v and o, bound by transport"] == 2
    assert rows["AG m >= 4096, local copy"][5] == "met/met"
    assert rows["AG m >= 4096, gathered returned"][5] == "missed/met"
    assert rows["AG m >= 4096, in place"][5] == "not measured/not measured"
    assert rows["async_tp / as planned, mean of AG and RS"][5] == "met/not measured"
    slow = {row[0]: row for row in gpu_report.acceptance(result(0.3)["cases"])}
    assert slow["original / as planned, lowest of all"][5] == "missed/missed"


def test_what_the_planner_keeps_counts_as_one() -> None:
    cases = {case["name"]: case for case in result(0.3)["cases"]}
    assert sum(case["planned"] == "fused" for case in cases.values()) > len(cases) / 2
    few = cases["all_gather_matmul sweep m=128 n=28672 k=8192"]
    small = {**few, "m": 16, **gpu_plan.planned({**few, "m": 16}, 4, "bfloat16")}
    assert small["planned"].startswith("[no-gain] predicted")
    assert gpu_report.as_planned(small, "original", "eager") == 1
    large = cases["matmul_all_reduce 8B down m=8192 n=4096 k=14336"]
    assert large["predicted_us"][0] < large["predicted_us"][1]
    assert gpu_report.as_planned(large, "original", "eager") == gpu_report.speedup(large, "original", "eager") != 1
    del large["planned"]
    assert gpu_report.as_planned(large, "original", "eager") is None


def test_failures_and_hangs_show() -> None:
    data = result()
    data["cases"][0]["failures"] = {"tscompile": "wrong: error 1.0e-01"}
    for mode in gpu_report.MODES:
        data["cases"][0]["rounds"][mode] = [{"gemm": 1e-3, "collective": 1e-3, "original": 2e-3}]
    data["cases"].append({"name": "a case that hung", "status": "started"})
    text = plot.text(data)
    assert "wrong: error 1.0e-01" in text
    assert "| a case that hung | - |" in text and "did not end" in text
    assert "`matmul_reduce_scatter`" in gpu_report.summary(data)
    assert any("FAILED" in line for line in gpu_report.case_lines(data["cases"][0]))


def event(name: str, start: float, end: float, cuda: bool = True) -> Any:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=False)


def test_a_profile_of_a_step() -> None:
    """The busiest kernels first, overlapping ones counted twice; ops of the host count only where they name async TP."""
    events = [event("aten::mm", 0, 90, cuda=False), event("symm_mem::fused_x", 0, 9, cuda=False)]
    events += [event("gemm", 10, 30), event("gemm", 40, 45), event("ncclDevKernel_a(args)", 12, 52)]
    collectives, found = step_profile.summed(events)
    assert collectives == {"symm_mem::fused_x": 1, "ncclDevKernel_a": 1}
    assert found == {
        "busiest": [["ncclDevKernel_a(args)", 1, 40.0], ["gemm", 2, 25.0]],
        "busy_us": 65.0,
        "span_us": 42.0,
    }
    assert step_profile.summed([]) == ({}, {"busiest": [], "busy_us": 0.0, "span_us": 0.0})


def models() -> dict[str, Any]:
    times = {"inductor": 0.029, "async_tp": 0.028, "tilescale": 0.024, "roof": 0.0225}
    case = {"name": "8B S8192", "status": "done", "rounds": {"eager": [times] * 5}, "errors": {}, "failures": {}}
    case |= {
        "collectives": 16,
        "collectives_left": 1,
        "kept": [],
        "nccl_kernels": {"tilescale": {"ncclDevKernel_x": 1}},
    }
    return {"kind": "gpu-model", "environment": ENVIRONMENT, "cases": [case]}


def test_models() -> None:
    assert model_report.hidden(models()["cases"][0]) == pytest.approx(5 / 6.5)
    assert "| 8B S8192 | 29.00 | 28.00 | 24.00 | 22.50 | 1.21 | 1.17 | 77 % | 1 of 16; 1 kernels |" in plot.text(
        models()
    )


@pytest.mark.parametrize("data", [result(), models()], ids=["ops", "models"])
def test_pictures(tmp_path: Path, data: dict[str, Any]) -> None:
    plot.draw(data, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
