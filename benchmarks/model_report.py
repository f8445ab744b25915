"""What a result of model_llama says, as text and markdown, from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_report import machine, markdown_table, number
from benchmarks.harness import paired_ratio

KEPT_KEYS = ("site", "phase", "pattern", "decision", "code", "reason", "shapes")
SIDES = ("inductor", "async_tp", "tilescale", "inductor_graphs", "tilescale_graphs", "roof")
HEADER = ["model", "Inductor", "async TP", "tilescale", "roof", "vs Inductor", "vs async TP", "hidden", "left"]


def milliseconds(case: Mapping[str, Any], side: str) -> float | None:
    """Median over rounds of a step."""
    times = [times[side] for times in case.get("rounds", {}).get("eager", []) if side in times]
    return 1e3 * statistics.median(times) if times else None


def ratio(case: Mapping[str, Any], base: str, side: str = "tilescale") -> float | None:
    """Median over rounds of base / side."""
    rounds = [times for times in case.get("rounds", {}).get("eager", []) if {base, side} <= times.keys()]
    return paired_ratio(rounds, base, side) if rounds else None


def hidden(case: Mapping[str, Any]) -> float | None:
    """Share of what communication adds to a step with Inductor that is not there with ours."""
    times = [milliseconds(case, side) for side in ("inductor", "tilescale", "roof")]
    if None in times:
        return None
    inductor, ours, roof = times
    return (inductor - ours) / (inductor - roof) if inductor > roof else None  # type: ignore[operator]


def nccl(case: Mapping[str, Any], mode: str = "tilescale") -> int | None:
    """Kernels of NCCL in a step, as the profiler saw them; None where it did not look."""
    counts = case.get("nccl_kernels", {}).get(mode)
    return sum(n for name, n in counts.items() if name.startswith("nccl")) if counts is not None else None


def case_lines(case: Mapping[str, Any]) -> list[str]:
    lines = [f"{side:18} {number(milliseconds(case, side)):>8} ms" for side in SIDES if milliseconds(case, side)]
    lines += [f"error of {mode}: worst {e['worst']:.1e}, loss {e['loss']:.1e}" for mode, e in case["errors"].items()]
    lines += [f"{mode} in one step: {counts}" for mode, counts in case["nccl_kernels"].items() if counts]
    for mode, found in case.get("profiles", {}).items():
        spans = f"{found['busy_us'] / 1e3:.2f} ms of kernels in {found['span_us'] / 1e3:.2f} ms"
        lines.append(f"{mode}, profiled: {spans}, most in {found['busiest'][:3]}")
    lines.append(f"report: {case['collectives_left']} of {case['collectives']} collectives left")
    lines += [
        f"{r['site']}: {r['decision']} [{r['code']}] {r['reason']} {', '.join(r['shapes'])}" for r in case["kept"]
    ]
    return lines + [f"{mode} FAILED: {text}" for mode, text in case["failures"].items()]


def markdown(result: Mapping[str, Any]) -> str:
    rows = []
    for case in result["cases"]:
        if case.get("status") != "done":
            rows.append([case["name"], *["-"] * (len(HEADER) - 2), "did not end"])
            continue
        times = [number(milliseconds(case, side)) for side in ("inductor", "async_tp", "tilescale", "roof")]
        ratios = [number(ratio(case, base)) for base in ("inductor", "async_tp")]
        part = hidden(case)
        seen = nccl(case)
        left = f"{case['collectives_left']} of {case['collectives']}" + (
            f"; {seen} kernels" if seen is not None else ""
        )
        rows.append([case["name"], *times, *ratios, "-" if part is None else f"{100 * part:.0f} %", left])
    return (
        f"{machine(result)}. Milliseconds of a forward+backward step, medians of interleaved rounds, slowest rank. `hidden`: share of "
        "the communication exposed with Inductor that is gone; `left`: collectives of a step that are not fused, and NCCL kernels "
        f"that the profiler saw.\n\n{markdown_table(HEADER, rows)}"
    )
