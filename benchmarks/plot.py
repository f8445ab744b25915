"""Picture, table and verdicts of a benchmark result, from its JSON alone; of GPU results too (benchmarks.gpu_plot).

    python -m benchmarks.plot benchmarks/results/cpu-2026-01-31.json [PICTURE]

Every statistic is computed again from the rounds in the file, so a result can be judged by another rule without
measuring anew.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Interval, Statistics, at_least, at_most, summarize

EXPOSED_LIMIT = 0.25  # of Inductor's exposed communication, at fused sites
SPEED_LIMIT = 0.97  # of Inductor's speed, everywhere
COMPILE_LIMIT = 0.10  # of Inductor's compile time, spent in our pass


def decision(case: Mapping[str, Any]) -> str:
    """What the report says of the case's sites: "fused", "kept (code)", both if they differ, "not reported" if
    empty."""
    words = [site["decision"] if site["decision"] == "fused" else f"kept ({site['code']})" for site in case["sites"]]
    return ", ".join(dict.fromkeys(words)) or "not reported"


def is_fused(case: Mapping[str, Any]) -> bool:
    """True if every site of the case is fused: only then is the exposed time ours to answer for."""
    return bool(case["sites"]) and all(site["decision"] == "fused" for site in case["sites"])


def _ms(interval: Interval) -> str:
    return f"{1e3 * interval.value:.2f} [{1e3 * interval.low:.2f}, {1e3 * interval.high:.2f}]"


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "not resolved"
    return f"{100 * interval.value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _times(interval: Interval) -> str:
    return f"{interval.value:.3f}x [{interval.low:.3f}, {interval.high:.3f}]"


def verdicts(case: Mapping[str, Any], stats: Statistics) -> tuple[str, str]:
    """Verdicts on exposed communication ("-" where the target does not apply) and on speed."""
    speed = at_least(stats.speedup, SPEED_LIMIT)
    if not is_fused(case):
        return "-", speed
    return at_most(stats.exposed_ratio, EXPOSED_LIMIT) if stats.exposed_ratio else "undecided", speed


def verdict_lines(case: Mapping[str, Any]) -> list[str]:
    """A case in three lines, for the terminal."""
    stats = summarize(case["rounds"])
    exposed, speed = verdicts(case, stats)
    return [
        f"{decision(case)}; matmul alone {1e3 * stats.alone:.2f} ms, {len(case['rounds'])} rounds",
        f"exposed, ms: ours {_ms(stats.exposed_ours)}, inductor {_ms(stats.exposed_inductor)}: "
        f"{_percent(stats.exposed_ratio)} (target at fused sites <= {100 * EXPOSED_LIMIT:.0f} %: {exposed})",
        f"speed against inductor {_times(stats.speedup)} (target >= {SPEED_LIMIT}: {speed})",
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result as a table, with the machine and a count of the verdicts."""
    env = result["environment"]
    lines = [
        f"{env['date']}, {env['cpu']}, {env['cores']} cores, {env['ranks']} ranks with {env['threads_per_rank']} thread each, "
        f"{env['dtype']}, torch {env['torch']}, tscompile {env['tscompile']}, backend {result['backend']}. "
        "Medians of paired rounds with 95 % bootstrap intervals.",
        "",
        "| function | m, n, k | report | matmul, ms | exposed ours, ms | exposed inductor, ms | ours / inductor | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    counts: dict[str, list[str]] = {"exposed": [], "speed": []}
    for case in result["cases"]:
        stats = summarize(case["rounds"])
        exposed, speed = verdicts(case, stats)
        counts["exposed"] += [exposed] if exposed != "-" else []
        counts["speed"].append(speed)
        sizes = f"{case['m']}, {case['n']}, {case['k']}"
        cells = [case["function"], sizes, decision(case), f"{1e3 * stats.alone:.2f}", _ms(stats.exposed_ours)]
        cells += [_ms(stats.exposed_inductor), _percent(stats.exposed_ratio), _times(stats.speedup)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, rule in {
        "exposed": f"exposed communication of fused sites at most {100 * EXPOSED_LIMIT:.0f} % of Inductor's",
        "speed": f"speed at least {SPEED_LIMIT} of Inductor's, fused or kept",
    }.items():
        told = ", ".join(f"{v} {counts[name].count(v)}" for v in ("met", "undecided", "missed"))
        lines.append(f"* {rule}: {told} (of {len(counts[name])})")
    if share := result.get("compile_time"):
        met = "met" if share["share"] <= COMPILE_LIMIT else "missed"
        lines.append(
            f"* compile time: {share['pass_s']:.2f} s in our pass, {share['inductor_s']:.1f} s with Inductor alone, "
            f"{share['ours_s']:.1f} s with ours: {100 * share['share']:.1f} % "
            f"(target <= {100 * COMPILE_LIMIT:.0f} %: {met})"
        )
    return "\n".join(lines) + "\n"


def summary(result: Mapping[str, Any], least_rows: int = 2048) -> str:
    """One line per function over its sizes with m >= least_rows: what a reader of the README wants to know."""
    env = result["environment"]
    lines = [
        f"{env['date'][:10]}, {env['cpu']}, {env['ranks']} ranks with {env['threads_per_rank']} thread each on {env['cores']} cores, "
        f"{env['dtype']}, torch {env['torch']}; m >= {least_rows}, n 128 to 1024, k 1024.",
        "",
        "| function | sizes | speed-up over Inductor with gloo: mean (lowest, highest) | exposed communication left, median |",
        "|---|---|---|---|",
    ]
    for function in dict.fromkeys(case["function"] for case in result["cases"]):
        group = [c for c in result["cases"] if c["function"] == function and c["m"] >= least_rows]
        stats = [summarize(case["rounds"], resamples=200) for case in group]
        if not stats:
            continue
        speeds = [s.speedup.value for s in stats]
        ratios = [s.exposed_ratio.value for s in stats if s.exposed_ratio is not None]
        left = f"{100 * statistics.median(ratios):.0f} %" if ratios else "not resolved"
        mean = f"{statistics.geometric_mean(speeds):.2f}x ({min(speeds):.2f}x, {max(speeds):.2f}x)"
        lines.append(f"| {function} | {len(stats)} | {mean} | {left} |")
    return "\n".join(lines)


def picture(result: Mapping[str, Any], path: Path) -> None:
    """Bars of exposed communication per case; zero is the matmul alone, the black marks are the target."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    functions = list(dict.fromkeys(case["function"] for case in result["cases"]))
    columns = min(2, len(functions))
    rows = math.ceil(len(functions) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(7 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(functions) :]:
        axis.set_visible(False)
    for axis, function in zip(axes.flat, functions, strict=False):
        group = [case for case in result["cases"] if case["function"] == function]
        stats = [summarize(case["rounds"]) for case in group]
        sides = {
            "inductor": ([s.exposed_inductor for s in stats], ["#9a9a9a"] * len(group)),
            "ours": ([s.exposed_ours for s in stats], ["#1b7f5c" if is_fused(case) else "#d9c48f" for case in group]),
        }
        for shift, (intervals, colours) in zip((-0.2, 0.2), sides.values(), strict=True):
            values = [1e3 * i.value for i in intervals]
            below = [1e3 * (i.value - i.low) for i in intervals]
            above = [1e3 * (i.high - i.value) for i in intervals]
            places = [x + shift for x in range(len(group))]
            axis.bar(places, values, 0.4, color=colours, yerr=[below, above], error_kw={"lw": 0.8, "ecolor": "#444444"})
        for x, s in enumerate(stats):
            target = 1e3 * EXPOSED_LIMIT * max(0.0, s.exposed_inductor.value)
            axis.plot([x, x + 0.4], [target, target], color="black", lw=1.6)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_title(function, fontsize=10)
        axis.set_ylabel("exposed, ms")
        labels = [f"m {case['m']}\nn {case['n']}" for case in group]
        axis.set_xticks(range(len(group)), labels, fontsize=7)
    legend = {"inductor": "#9a9a9a", "ours, fused": "#1b7f5c", "ours, kept": "#d9c48f", "25 % of inductor": "black"}
    handles = [mpl.patches.Patch(color=colour, label=label) for label, colour in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    env = result["environment"]
    figure.suptitle(
        f"Communication that the matmul does not hide (zero = matmul alone)\n"
        f"{env['cpu']}, {env['cores']} cores, {env['ranks']} ranks, {env['dtype']}, {env['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The picture of a result of any benchmark."""
    from benchmarks import gpu_plot

    {"gpu-ops": gpu_plot.picture_ops, "gpu-model": gpu_plot.picture_models}.get(result.get("kind", ""), picture)(
        result, path
    )


def text(result: Mapping[str, Any]) -> str:
    """The table of a result of any benchmark."""
    from benchmarks import gpu_report, model_report

    written = {"gpu-ops": gpu_report.markdown, "gpu-model": model_report.markdown}
    return written.get(result.get("kind", ""), markdown)(result)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    result = json.loads(source.read_text())
    print(text(result))
    beside = source.with_suffix(".png") if "kind" in result else source.parent / "cpu.png"
    draw(result, Path(sys.argv[2]) if len(sys.argv) == 3 else beside)


if __name__ == "__main__":
    main()
