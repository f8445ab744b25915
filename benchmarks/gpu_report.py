"""What a GPU result says: efficiency, speed-ups and targets, as text, tables and markdown, from its JSON alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import paired_ratio

LINK_BYTES_PER_S = 300e9  # what copies between the GPUs of one host reach, one direction
GATHER, SCATTER, REDUCE = "all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"
MODES = ("eager", "graph")
FUSED = ("tscompile", "tscompile_gathered", "tscompile_in_place")


def roof(case: Mapping[str, Any], times: Mapping[str, float]) -> float:
    """Seconds that a perfect overlap would take, by what the same round measured."""
    return max(times["gemm"], min(times["collective"], case["transport_s"]))


def rounds_of(case: Mapping[str, Any], mode: str) -> list[dict[str, float]]:
    rounds: list[dict[str, float]] = case.get("rounds", {}).get(mode, [])
    return rounds


def efficiency(case: Mapping[str, Any], side: str, mode: str) -> float | None:
    """Median over rounds of roof / time; None where the side was not timed."""
    rounds = [times for times in rounds_of(case, mode) if {side, "gemm", "collective"} <= times.keys()]
    return statistics.median(roof(case, times) / times[side] for times in rounds) if rounds else None


def speedup(case: Mapping[str, Any], base: str, mode: str, side: str = "tscompile") -> float | None:
    """Median over rounds of base / side."""
    rounds = [times for times in rounds_of(case, mode) if {side, base} <= times.keys()]
    return paired_ratio(rounds, base, side) if rounds else None


def as_planned(case: Mapping[str, Any], base: str, mode: str) -> float | None:
    """The same for what the planner chooses: the fused op, or the original ones."""
    if "planned" not in case:
        return None
    return speedup(case, base, mode, "tscompile" if case["planned"] == "fused" else "original")


def milliseconds(case: Mapping[str, Any], side: str, mode: str) -> float | None:
    values = [times[side] for times in rounds_of(case, mode) if side in times]
    return 1e3 * statistics.median(values) if values else None


def transport_bound(case: Mapping[str, Any]) -> bool:
    """True if the collective and not the matmul is what nothing can be faster than."""
    rounds = rounds_of(case, "eager")
    return bool(rounds) and statistics.median(roof(case, t) / t["gemm"] for t in rounds) > 1.02


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def pair(function: Callable[[str], float | None], digits: int = 2) -> str:
    """Both modes, as "eager/graph"."""
    values = [function(mode) for mode in MODES]
    return "-" if values == [None, None] else "/".join(number(value, digits) for value in values)


def case_lines(case: Mapping[str, Any]) -> list[str]:
    """A case in a few lines, for the terminal."""
    lines = []
    sides = dict.fromkeys(side for mode in MODES for times in rounds_of(case, mode) for side in times)
    for side in sides:
        times = pair(lambda mode, side=side: milliseconds(case, side, mode), 4)
        eff = pair(lambda mode, side=side: efficiency(case, side, mode), 3)
        host = case.get("host_us", {}).get(side)
        lines.append(f"{side:20} {times:>17} ms   efficiency {eff:>13}   host {number(host, 1):>7} us")
    lines += [f"{what}: host {us:.1f} us" for what, us in case.get("host_us", {}).items() if what not in sides]
    lines += [
        f"{side}: errors {e[0]:.1e}, {e[1]:.1e} (limits {e[2]:.1e}, {e[3]:.1e})" for side, e in case["errors"].items()
    ]
    return lines + [f"{side} FAILED: {text}" for side, text in case["failures"].items()]


@dataclass(frozen=True)
class Target:
    """A line of the acceptance table: the least efficiency of `side` over the cases that `wanted` picks."""

    name: str
    side: str
    least: float
    wanted: Callable[[Mapping[str, Any]], bool]


def _as_long(case: Mapping[str, Any]) -> bool:
    """The sizes at which transport takes at least as long as the matmul; which of them wins a round is chance."""
    return case["label"] in ("8B q,k,v", "8B o") and case["op"] != REDUCE and bool(case["m"] == 8192)


def _is(op: str, low: int, high: int, more: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> Any:
    """Cases of an op and a range of rows. Gathers and scatters that are bound by transport have a target of their own."""

    def wanted(case: Mapping[str, Any]) -> bool:
        apart = op != REDUCE and (_as_long(case) or transport_bound(case))
        return case["op"] == op and low <= case["m"] <= high and not apart and more(case)

    return wanted


TARGETS = (
    Target("AG m >= 4096, in place", "tscompile_in_place", 0.97, _is(GATHER, 4096, 1 << 30)),
    Target("AG m >= 4096, local copy", "tscompile", 0.94, _is(GATHER, 4096, 1 << 30)),
    Target("AG m >= 4096, gathered returned", "tscompile_gathered", 0.92, _is(GATHER, 4096, 1 << 30)),
    Target("AG m 1024-2048", "tscompile", 0.93, _is(GATHER, 1024, 2048)),
    Target("AG m 512", "tscompile", 0.86, _is(GATHER, 512, 512)),
    Target("RS m >= 4096, k 7168", "tscompile", 0.95, _is(SCATTER, 4096, 1 << 30, lambda c: c["k"] >= 7168)),
    Target(
        "RS m >= 4096, 70B o", "tscompile", 0.92, _is(SCATTER, 4096, 1 << 30, lambda c: c["label"].startswith("70B o"))
    ),
    Target("RS m >= 4096, 7B", "tscompile", 0.88, _is(SCATTER, 4096, 1 << 30, lambda c: c["label"] == "7B down")),
    Target("RS m 1024-2048", "tscompile", 0.86, _is(SCATTER, 1024, 2048)),
    Target("RS m 128-512", "tscompile", 0.78, _is(SCATTER, 128, 512)),
    Target("AR m >= 4096", "tscompile", 0.85, _is(REDUCE, 4096, 1 << 30)),
    Target("AR m 128-2048", "tscompile", 0.68, _is(REDUCE, 128, 2048)),
    Target(
        "8B q,k,v and o, bound by transport",
        "tscompile",
        0.90,
        _as_long,
    ),
)


def _verdict(values: Sequence[float], least: float) -> str:
    return "not measured" if not values else "met" if min(values) >= least else "missed"


def acceptance(cases: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of target, cases, lowest and mean in each mode, least, verdict (on the lowest of the better mode per case)."""
    done = [case for case in cases if case.get("rounds")]
    rows = []
    for target in TARGETS:
        chosen = [case for case in done if target.wanted(case)]
        rows.append(_row(target.name, [[efficiency(c, target.side, m) for c in chosen] for m in MODES], target.least))
    both = [case for case in done if case["op"] in (GATHER, SCATTER)]
    everywhere = [[as_planned(case, "original", mode) for case in done] for mode in MODES]
    rows.append(_row("original / as planned, lowest of all", everywhere, 0.98))
    rows.append(_row("original / as planned, mean of all", everywhere, 1.3, mean=True))
    values = [[as_planned(case, "async_tp", mode) for case in both] for mode in MODES]
    rows.append(_row("async_tp / as planned, mean of AG and RS", values, 1.6, mean=True))
    return rows


def _row(name: str, by_mode: Sequence[Sequence[float | None]], least: float, mean: bool = False) -> list[str]:
    known = [[value for value in values if value is not None] for values in by_mode]
    means = [statistics.geometric_mean(values) if values else None for values in known]
    lows = [min(values) if values else None for values in known]
    judged = means if mean else lows
    words = [_verdict([value] if value is not None else [], least) for value in judged]
    count = str(max(len(values) for values in known))
    return [name, count, "/".join(map(number, lows)), "/".join(map(number, means)), f"{least:.2f}", "/".join(words)]


HEADER = [
    "case",
    "gemm",
    "NCCL",
    "original",
    "async TP",
    "fused",
    "efficiency",
    "vs original",
    "vs async TP",
    "planned",
    "host us",
]


def table(cases: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """One row per case: times in ms and ratios, eager/graph."""
    rows = []
    for case in cases:
        if case.get("status") != "done":
            rows.append([case["name"], *["-"] * (len(HEADER) - 2), "did not end"])
            continue
        times = [
            pair(lambda mode, case=case, side=side: milliseconds(case, side, mode), 3)
            for side in ("gemm", "collective", "original", "async_tp", "tscompile")
        ]
        ratios = [
            pair(lambda mode, case=case: efficiency(case, "tscompile", mode)),
            pair(lambda mode, case=case: speedup(case, "original", mode)),
            number(speedup(case, "async_tp", "eager")),
        ]
        if times[-1] == "-" and "tscompile" in case["failures"]:
            times[-1] = case["failures"]["tscompile"][:40]
        word = case.get("planned", "-").split(" ")[0].strip("[]")
        rows.append([case["name"], *times, *ratios, word, number(case.get("host_us", {}).get("tscompile"), 0)])
    return rows


def print_ops(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=200)
    for title, header, rows in (
        ("ms and ratios, eager/graph", HEADER, table(result["cases"])),
        ("targets, eager/graph", ACCEPTANCE_HEADER, acceptance(result["cases"])),
    ):
        shown = Table(title=title)
        for column in header:
            shown.add_column(column, justify="left" if column == header[0] else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)


ACCEPTANCE_HEADER = ["target", "cases", "lowest", "mean", "at least", "verdict"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def machine(result: Mapping[str, Any]) -> str:
    env = result["environment"]
    parts = [f"{env['date']}, {env['ranks']}x {env['gpu']}, {env['dtype']}, torch {env['torch']}"]
    parts += [f"{name} {env[name]}" for name in ("driver", "nccl", "tilelang") if env.get(name)]
    return ", ".join(parts)


def markdown(result: Mapping[str, Any]) -> str:
    """All cases and the targets of a result of bench_gpu."""
    return "\n\n".join(
        [
            f"{machine(result)}. Milliseconds, medians of interleaved rounds, slowest rank, eager calls/graph replays.",
            markdown_table(HEADER, table(result["cases"])),
            markdown_table(ACCEPTANCE_HEADER, acceptance(result["cases"])),
        ]
    )


def summary(result: Mapping[str, Any]) -> str:
    """One line per op over its sizes: what a reader of the README wants to know."""
    header = [
        "op",
        "sizes",
        "fused",
        "their efficiency: mean (lowest)",
        "over NCCL + cuBLAS: mean (lowest)",
        "over async TP: mean (lowest)",
    ]
    rows = []
    for op in (GATHER, SCATTER, REDUCE):
        group = [case for case in result["cases"] if case.get("op") == op and case.get("rounds")]
        fused = [case for case in group if case.get("planned") == "fused"]
        columns = [
            [efficiency(case, "tscompile", "eager") for case in fused],
            [as_planned(case, "original", "eager") for case in group],
            [as_planned(case, "async_tp", "eager") for case in group],
        ]
        known = [[value for value in column if value is not None] for column in columns]
        cells = [
            f"{statistics.geometric_mean(values):.2f}{'x' if i else ''} ({min(values):.2f})" if values else "-"
            for i, values in enumerate(known)
        ]
        rows.append([f"`{op}`", str(len(group)), str(len(fused)), *cells])
    words = "What the planner keeps counts as 1. Efficiency: max(matmul, transport) / time. Eager calls."
    return f"{machine(result)}. {words}\n\n{markdown_table(header, rows)}"


def finite(value: float | None) -> float:
    """For pictures: what is not there has no height."""
    return value if value is not None and math.isfinite(value) else 0.0
