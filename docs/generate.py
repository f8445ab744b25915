"""Writes the generated parts of README.md and docs/; run through `./dev docs`.

A generated part stands between `<!-- generated:<name> -->` and `<!-- /generated:<name> -->`. A capture, between
`<!-- capture:<name> -->` and `<!-- /capture:<name> -->`, is the output of a real run and changes only with --capture.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from tscompile.options import KINDS, OptionRow, Options
from tscompile.problem import FusionProblem, Gemm, Keep

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16", "float16", "float64")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


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
    """The docstring of each matcher, as its author wrote it."""
    parts = []
    for kind in KINDS:
        path = ROOT / "tscompile" / "fx_passes" / f"{kind}.py"
        text = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
        if text:
            parts.append(f"## {kind}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def support() -> str:
    """What the planner answers for one large problem of each kind, on two ranks of one host and on CUDA."""
    from tscompile.lowering.planner import plan

    def answer(kind: str, device: str, dtype: str, intra_host: bool) -> str:
        problem = FusionProblem(kind, 2, intra_host, device, dtype, 64 << 20, (Gemm(4096, 4096, 4096),))
        decision = plan(problem, Options(fuse="always"))
        return f"`{decision.code}`" if isinstance(decision, Keep) else "fused"

    header = ["kind", *(f"CPU, {dtype}" for dtype in DTYPES), "CPU, several hosts", "CUDA"]
    return table(
        header,
        [
            [
                f"`{kind}`",
                *(answer(kind, "cpu", dtype, True) for dtype in DTYPES),
                answer(kind, "cpu", "float32", False),
                answer(kind, "cuda", "bfloat16", True),
            ]
            for kind in KINDS
        ],
    )


PARTS: dict[str, Callable[[], str]] = {"options": options, "variables": variables, "patterns": patterns}
if find_spec("tscompile.lowering.planner"):
    PARTS["support"] = support


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
        new_parts = {f"generated:{name}": part() for name, part in PARTS.items()}
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
