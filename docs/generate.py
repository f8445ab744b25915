"""Writes the generated parts of README.md and docs/; run through `./dev docs`.

A generated part stands between `<!-- generated:<name> -->` and `<!-- /generated:<name> -->`. A capture, between
`<!-- capture:<name> -->` and `<!-- /capture:<name> -->`, is the output of a real run and changes only with --capture.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import example_tables
from markdown_table import table

from tscompile.options import KINDS, OptionRow, Options
from tscompile.problem import Delivery, Departure, FusionProblem, GatherUse, Gemm, Plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package
from benchmarks import gpu_report, plot  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"

DTYPES = ("float32", "bfloat16", "float16", "float64")


def default_of(row: OptionRow) -> str:
    return (
        "none"
        if row.default in (None, ())
        else f'`"{row.default}"`'
        if isinstance(row.default, str)
        else f"`{row.default}`"
    )


def options() -> str:
    rows = [[f"`{row.key}`", row.takes, default_of(row), row.doc] for row in Options.table()]
    return table(["option", "takes", "default", "meaning"], rows)


def variables() -> str:
    return table(["option", "environment"], [[f"`{row.key}`", f"`{row.variable}`"] for row in Options.table()])


def patterns() -> str:
    """The docstring of each file that registers a pattern, as its author wrote it."""
    parts = []
    for path in sorted((ROOT / "tscompile" / "fx_passes").glob("*.py")):
        source = path.read_text()
        kinds = sorted(re.findall(r'^@register_pattern\(\s*"(\w+)"', source, re.MULTILINE))
        if not kinds and path.stem in KINDS:
            kinds = [path.stem]
        text = ast.get_docstring(ast.parse(source))
        if kinds and text:
            parts.append(f"## {', '.join(kinds)}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def support() -> str:
    """Which template of which executor takes which problem: each is asked."""
    from tscompile.templates import find_template

    def cell(kind: str, executor: str, **changes: Any) -> str:
        values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "intra_host": True, **changes}
        dtype = values["dtype"]
        gemm = Gemm(4096, 4096, 4096)
        uses = (GatherUse("lhs", False, "rows", dtype), GatherUse("rhs", False, "rows", dtype))
        if kind == "mesh_matmul":
            values |= {"second_group_size": 2, "second_comm_bytes": 64 << 20}
        if kind == "matmul_all_to_all":
            values["grids"] = ((4096, 2, 1024),) * 2
        problem = FusionProblem(kind, 2, comm_bytes=64 << 20, gemms=(gemm,), gemm_dtypes=(dtype,), **values)
        plan = Plan(kind, "", executor, dtype, uses=uses if kind == "mesh_matmul" else uses[:1])
        if "all_to_all" in kind:
            plan = replace(plan, deliveries=(Delivery(0, (1, 0, 2)),), joins=(1,))
        if kind == "matmul_all_to_all":
            halves = tuple(Departure(0, 3, (), (1, 0, 2), columns=(first, 2048)) for first in (0, 2048))
            deliveries = tuple(Delivery(number, (1, 0, 2)) for number in range(2))
            plan = replace(plan, deliveries=deliveries, joins=(1, 1), departures=halves)
        template = find_template(kind, executor)
        return "fused" if template is not None and template.supports(problem, plan) is None else "original ops"

    header = [
        "kind",
        *(f"CPU, {dtype}" for dtype in DTYPES),
        "GPU, bfloat16 and float16",
        "GPU, float32",
        "several hosts",
    ]
    rows = [
        [
            f"`{kind}`",
            *(cell(kind, "shm", dtype=dtype) for dtype in DTYPES),
            cell(kind, "nvlink", device="cuda", dtype="bfloat16"),
            cell(kind, "nvlink", device="cuda", dtype="float32"),
            cell(kind, "shm", intra_host=False),
        ]
        for kind in KINDS
    ]
    return table(header, rows)


def newest_result() -> dict[str, Any]:
    """The newest committed result of the CPU benchmark."""
    found = sorted(RESULTS.glob("cpu-*.json"))
    if not found:
        raise SystemExit("docs: benchmarks/results has no result: run ./dev bench cpu")
    result: dict[str, Any] = json.loads(found[-1].read_text())
    return result


def measured() -> str:
    return plot.summary(newest_result())


def measured_in_full() -> str:
    return plot.markdown(newest_result()).rstrip()


def newest_gpu_result(kind: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest committed result of a GPU benchmark, "ops" or "model", if there is one."""
    found = [(path, json.loads(path.read_text())) for path in RESULTS.glob(f"gpu-{kind}-[0-9]x*.json")]
    return max(found, key=lambda pair: str(pair[1]["environment"]["date"]), default=None)


def gpu_summary() -> str:
    ops, models = newest_gpu_result("ops"), newest_gpu_result("model")
    parts = [gpu_report.summary(ops[1])] if ops else []
    parts += [plot.text(models[1]).rstrip()] if models else []
    return "\n\n".join(parts) or "Not measured yet."


def gpu_in_full(kind: str) -> str:
    found = newest_gpu_result(kind)
    if found is None:
        return "Not measured yet."
    path, result = found
    image = path.with_suffix(".png")
    link = f"![{kind} on GPUs](../benchmarks/results/{image.name})\n\n" if image.exists() else ""
    return link + plot.text(result).rstrip()


def examples_on_gpus(kind: str, tabulate: Callable[[Any], str]) -> str:
    found = newest_gpu_result(kind)
    return tabulate(found[1]) if found else "Not measured yet."


PARTS: dict[str, Callable[[], str]] = {
    "options": options,
    "variables": variables,
    "patterns": patterns,
    "support": support,
    "measured": measured,
    "measured-in-full": measured_in_full,
    "measured-gpu": gpu_summary,
    "measured-gpu-ops": lambda: gpu_in_full("ops"),
    "measured-collectives": lambda: examples_on_gpus("tilescale", example_tables.collectives),
    "measured-exchanges": lambda: examples_on_gpus("exchange", example_tables.exchanges),
    "measured-ulysses": lambda: examples_on_gpus("ulysses", example_tables.ulysses),
    "measured-projected": lambda: examples_on_gpus("projected", example_tables.ulysses),
    "measured-exchange-matmul": lambda: examples_on_gpus("exchange-matmul", example_tables.exchange_matmuls),
    "measured-kv-gather": lambda: examples_on_gpus("kv-gather", partial(example_tables.ulysses, mask="no mask")),
    "measured-meshes": lambda: examples_on_gpus("mesh", example_tables.meshes),
    "measured-experts": lambda: examples_on_gpus("deepep", example_tables.experts),
    "measured-gpu-models": lambda: gpu_in_full("model"),
}


def replace_block(text: str, marker: str, content: str) -> str:
    """`text` with what stands between the markers replaced, wherever they occur."""
    block = re.compile(rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- /{re.escape(marker)} -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def report_in(output: str) -> str:
    """The last report table in the output of a program."""
    reports = re.findall(
        r"^site +phase +pattern .*?^\d+ of \d+ collectives? fused, .*?$", output, re.DOTALL | re.MULTILINE
    )
    if not reports:
        raise SystemExit("docs: no report in the captured output; nothing changed")
    return f"```text\n{reports[-1]}\n```"


def main() -> int:
    parser = argparse.ArgumentParser(description="regenerate the generated parts of README.md and docs/")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a part is stale")
    parser.add_argument("--capture", metavar="NAME", help="put the report found in stdin into the capture NAME")
    arguments = parser.parse_args()
    if arguments.capture:
        new_parts = {f"capture:{arguments.capture}": report_in(sys.stdin.read())}
    else:
        import language_tables  # loads TileLang

        parts = {
            **PARTS,
            "primitives": language_tables.primitives,
            "backends": partial(language_tables.execution_backends, arguments.check),
        }
        new_parts = {f"generated:{name}": part() for name, part in parts.items()}
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = new = path.read_text()
        for marker, content in new_parts.items():
            new = replace_block(new, marker, content)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not arguments.check:
                path.write_text(new)
    if not stale:
        print("docs: up to date")
    elif arguments.check:
        print(f"docs: stale: {', '.join(stale)}; run ./dev docs")
    else:
        print(f"docs: wrote {', '.join(stale)}")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
