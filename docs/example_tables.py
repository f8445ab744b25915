"""Tables of what the examples of examples/tilescale take on GPUs, from the JSON of their benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
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


def exchanges(result: Mapping[str, Any]) -> str:
    """all_to_all_permute against NCCL and permutes."""
    rows = []
    for case in result["cases"]:
        found = case["graph"]
        us, gained = found["us"], found["speedup"]
        if "roof" in us:  # with what is projected
            continue
        once = f"{us['nccl']:.0f}" if "nccl" in us else "-"
        best = gained.get("nccl", gained["nccl, twice"])
        rows.append(
            [
                case["what"],
                f"{case['tokens'] >> 10}K",
                f"{us['ours']:.0f} ({found['gbytes_per_s']:.0f})",
                once,
                f"{us['nccl, twice']:.0f}",
                interval(best),
            ]
        )
    said = (
        "One sequence, 32 heads of 128; replays of CUDA graphs, medians of interleaved rounds, slowest rank; in brackets GB/s that "
        "leave a rank.\n\n"
    )
    header = [
        "",
        "tokens",
        "ours, us",
        "NCCL and a permute each, us",
        "and two permutes each, us",
        "speed-up over the faster one",
    ]
    return machine(result["environment"]) + said + table(header, rows)


def ulysses(result: Mapping[str, Any], mask: str = "causal") -> str:
    """A program around an attention."""
    rows = []
    for case in result["cases"]:
        rounds = case["rounds"]["eager"]
        times = {mode: median(times[mode] for times in rounds) for mode in rounds[0]}
        rows.append(
            [
                case["name"],
                *(f"{1e3 * times[mode]:.2f}" for mode in ("inductor", "tilescale", "roof")),
                f"{median(t['inductor'] / t['tilescale'] for t in rounds):.2f}x",
                f"{median(t['inductor'] / t['roof'] for t in rounds):.2f}x",
                f"{median(t['roof'] / t['tilescale'] for t in rounds):.2f}",
            ]
        )
    what = f"{case['attention']} attention, {mask}, {case['heads']} heads of {case['dim']}"
    said = f"{what}; milliseconds, eager calls, slowest rank.\n\n"
    header = ["", "Inductor", "tilescale", "roof", "speed-up", "at the roof", "of the roof"]
    return machine(result["environment"]) + said + table(header, rows)


def exchange_matmuls(result: Mapping[str, Any]) -> str:
    """all_to_all_matmul against an exchange and a matmul."""
    rows = []
    for case in result["cases"]:
        found = case["graph"]
        us, gained = found["us"], found["speedup"]
        times = [f"{us[side]:.0f}" for side in ("ours", "apart", "nccl")]
        rows.append(
            [case["what"], f"{case['tokens'] >> 10}K", *times, interval(gained["apart"]), interval(gained["nccl"])]
        )
    said = "32 heads of 128; replays of CUDA graphs, medians of interleaved rounds, slowest rank.\n\n"
    header = ["", "tokens", "ours, us", "apart, us", "NCCL, us", "speed-up over apart", "over NCCL"]
    return machine(result["environment"]) + said + table(header, rows)


def meshes(result: Mapping[str, Any]) -> str:
    """mesh_matmul against two gathers and a matmul."""
    rows = []
    for case in result["cases"]:
        us = case["us"]
        one = min(us["one_gather, left"], us["one_gather, right"])
        times = [us["gemm"], us["original"], one, us["tscompile"]]
        gained = case["faster_than_original"]["tscompile"]
        goal = f"{case['goal']:.2f}x" if case["goal"] else "-"
        rows.append([case["name"], *(f"{time:.0f}" for time in times), f"{gained:.2f}x", goal])
    said = "Microseconds, eager calls, medians of interleaved rounds, slowest rank.\n\n"
    header = ["", "cuBLAS alone", "original", "one gather", "ours", "over the original", "at least"]
    return machine(result["environment"]) + said + table(header, rows)
