"""Tables of what the examples of examples/tilescale take on GPUs, from the JSON of their benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markdown_table import table


def machine(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "driver", "nccl", "tilelang"))
    return f"{environment['date']}, {environment['ranks']}x {environment['gpu']}, {environment['dtype']}, {versions}. "


def interval(estimate: Mapping[str, float], form: str = "{:.2f}x") -> str:
    return f"{form.format(estimate['value'])} [{form.format(estimate['low'])}, {form.format(estimate['high'])}]"


def collectives(result: Mapping[str, Any]) -> str:
    """all_gather and all_to_all against NCCL."""
    rows = [
        [
            case["op"],
            f"{case['bytes'] >> 10}",
            *(f"{case['us'][side]:.1f} ({case['gbytes_per_s'][side]:.0f})" for side in ("ours", "nccl")),
            interval(case["speedup"]),
        ]
        for case in result["cases"]
    ]
    said = "Eager calls, medians of interleaved rounds, slowest rank; in brackets GB/s that pass a rank's link.\n\n"
    return machine(result["environment"]) + said + table(["", "KiB", "ours, us", "NCCL, us", "speed-up"], rows)


def experts(result: Mapping[str, Any]) -> str:
    """Dispatch and combine against all_to_all_single."""
    rows = []
    for case in result["cases"]:
        best = case["best"]
        bases = [side for side in case["milliseconds"] if side.endswith((" once", " copies"))]
        rows.append(
            [
                best,
                f"{case['bytes'] / 2**20:.1f}",
                f"{case['milliseconds'][best]:.3f} ({case['gbytes_per_s'][best]:.0f})",
                *(f"{case['milliseconds'][base]:.2f}" for base in bases),
                interval(case["speedup_once"]),
                interval(case["of_peak"], "{:.2f}"),
            ]
        )
    first = result["cases"][0]
    sizes = f"{first['tokens']} tokens a rank of {first['hidden']}, top {first['topk']} of {first['experts']} experts"
    said = f"{sizes}; the peak of pushing is {first['peak_gbytes_per_s']:.0f} GB/s.\n\n"
    header = [
        "",
        "MiB over the link",
        "ms (GB/s)",
        "a token once a rank, NCCL",
        "once an expert, NCCL",
        "speed-up over the first",
    ]
    return machine(result["environment"]) + said + table([*header, "of the peak"], rows)
