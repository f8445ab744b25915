"""Pictures of GPU results: efficiency of each op and size, and step times of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import model_report
from benchmarks.gpu_report import MODES, efficiency, finite, machine

OPS = {"original": ("NCCL + cuBLAS", "#9a9a9a"), "async_tp": ("async TP", "#d9a45b"), "tscompile": ("fused", "#1b7f5c")}
STEPS = {
    "inductor": ("Inductor", "#9a9a9a"),
    "async_tp": ("Inductor, async TP", "#d9a45b"),
    "tilescale": ("tilescale", "#1b7f5c"),
    "roof": ("no communication", "#4a6fa5"),
}


def picture_ops(result: Mapping[str, Any], path: Path) -> None:
    """A row per op: efficiency of each candidate, eager calls filled and graph replays as a mark; 1 is a perfect overlap."""
    figure, plt = _figure()
    done = [case for case in result["cases"] if case.get("rounds")]
    ops = list(dict.fromkeys(case["op"] for case in done))
    axes = figure.subplots(max(1, len(ops)), 1, squeeze=False)
    width = max((sum(case["op"] == op for case in done) for op in ops), default=1)
    figure.set_size_inches(max(7.0, 0.75 * width + 2), 3.4 * max(1, len(ops)) + 0.8)
    for axis, op in zip(axes.flat, ops, strict=False):
        group = [case for case in done if case["op"] == op]
        for index, (side, (_, colour)) in enumerate(OPS.items()):
            places = [x + 0.27 * (index - 1) for x in range(len(group))]
            eager, graph = ([efficiency(case, side, mode) for case in group] for mode in MODES)
            axis.bar(places, [finite(value) for value in eager], 0.27, color=colour)
            marks = [(x, value) for x, value in zip(places, graph, strict=True) if value is not None]
            axis.plot([x for x, _ in marks], [value for _, value in marks], "_", color="black", ms=7)
        axis.axhline(1, color="black", lw=0.8)
        axis.set_ylim(0, 1.12)
        axis.set_title(op, fontsize=10)
        axis.set_ylabel("efficiency")
        labels = [f"{case['label']}\nm {case['m']}\nn {sum(case['n'])}\nk {case['k']}" for case in group]
        axis.set_xticks(range(len(group)), labels, fontsize=6)
    _finish(
        figure,
        plt,
        OPS,
        f"max(matmul, transport) / time; bars: eager calls, marks: CUDA graph\n{machine(result)}",
        path,
    )


def picture_models(result: Mapping[str, Any], path: Path) -> None:
    """A group of bars per model: milliseconds of a step."""
    figure, plt = _figure()
    done = [case for case in result["cases"] if case.get("rounds")]
    axis = figure.subplots()
    figure.set_size_inches(max(6.0, 1.5 * len(done) + 2), 4.2)
    for index, (side, (_, colour)) in enumerate(STEPS.items()):
        places = [x + 0.2 * (index - 1.5) for x in range(len(done))]
        heights = [finite(model_report.milliseconds(case, side)) for case in done]
        bars = axis.bar(places, heights, 0.2, color=colour)
        axis.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], fontsize=6)
    axis.set_ylabel("ms per step")
    axis.set_xticks(range(len(done)), [case["name"].replace(" ", "\n", 1) for case in done], fontsize=8)
    _finish(figure, plt, STEPS, f"Forward and backward, slowest rank\n{machine(result)}", path)


def _figure() -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt.figure(layout="constrained"), plt


def _finish(figure: Any, plt: Any, legend: Mapping[str, Sequence[str]], title: str, path: Path) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in legend.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
