"""The report: every site that was fused or kept and why, and every collective that no pattern matched.

Rows come from problem.Row; this module turns them into text and JSON, and decides nothing.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, TextIO

from .observe import ledger
from .problem import GroupMemory, Row

SCHEMA = 1
_WIDTH = 128
_REASON_WIDTH = 36  # the reason gets at least this, however wide the other columns are
_SITE_WIDTH = 40
_COLUMNS = ("site", "phase", "pattern", "decision", "MiB", "fused us", "orig us", "meas. us", "reason")
_RIGHT_ALIGNED = range(4, 8)
_COLOURS = {"fused": "green", "kept": "yellow", "unmatched": "cyan"}
_KEYS = (
    "site",
    "graph",
    "phase",
    "pattern",
    "group",
    "ranks",
    "collectives",
    "decision",
    "reason",
    "code",
    "shapes",
    "dtype",
    "bytes",
    "predicted_us",
    "measured_us",
    "source",
)


class Report:
    """Rows of one compilation, or of every graph that this process has run.

    `str(report)` is a table in plain ASCII; `print()` adds colour on a terminal; `to_json()` is for programs.
    """

    def __init__(self, rows: Iterable[Row], memory: Iterable[GroupMemory] = (), outside: Iterable[str] = ()) -> None:
        self.rows: list[Row] = list(rows)
        self.memory: list[GroupMemory] = list(memory)
        self.outside: list[str] = list(outside)  # communication that is in no graph, and so in no row

    def counts(self) -> dict[str, int]:
        """Original collectives by decision: `{"fused": .., "kept": .., "unmatched": ..}`."""
        counts = {"fused": 0, "kept": 0, "unmatched": 0}
        for row in self.rows:
            counts[row.decision] += len(row.collectives)
        return counts

    def summary(self) -> str:
        """One line, such as "7 of 9 collectives fused, 1 kept, 1 unmatched"."""
        counts = self.counts()
        total = sum(counts.values())
        if not total:
            return "no collectives in the graphs of this report"
        noun = "collective" if total == 1 else "collectives"
        return f"{counts['fused']} of {total} {noun} fused, {counts['kept']} kept, {counts['unmatched']} unmatched"

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data; `schema` grows when a key changes its meaning or goes."""
        return {
            "schema": SCHEMA,
            "rows": [_row_json(row) for row in self.rows],
            "memory": [asdict(memory) for memory in self.memory],
            "outside": self.outside,
        }

    def print(self, file: TextIO | None = None) -> None:
        """Print the table, in colour if `file` is a terminal and NO_COLOR is not set."""
        out = file or sys.stdout
        if os.environ.get("NO_COLOR") or not out.isatty():
            out.write(f"{self}\n")
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(file=out)
        for line, row in self._lines(max(console.width, 100)):
            console.print(Text(line, style=_COLOURS[row.decision] if row else ""), soft_wrap=True)

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self._lines(_WIDTH))

    def __repr__(self) -> str:
        return f"Report({self.summary()})"

    def _lines(self, width: int) -> Iterator[tuple[str, Row | None]]:
        """Lines of the table, each with the row that it shows, if any."""
        if self.rows:
            cells = [_cells(row) for row in self.rows]
            sizes = [max(len(line[i]) for line in [list(_COLUMNS), *cells]) for i in range(len(_COLUMNS) - 1)]
            indent = sum(sizes) + 2 * len(sizes)
            sizes.append(max(width - indent, _REASON_WIDTH))
            yield _line(list(_COLUMNS), sizes), None
            yield "  ".join("-" * (size if i < len(sizes) - 1 else len("reason")) for i, size in enumerate(sizes)), None
            for row, line in zip(self.rows, cells, strict=True):
                reason, *more = textwrap.wrap(line[-1], sizes[-1]) or [""]
                yield _line([*line[:-1], reason], sizes), row
                for text in more:
                    yield " " * indent + text, row
            yield "", None
        yield self.summary(), None
        for outside in self.outside:
            told = f"not in a graph: {_ascii(outside)}"
            for text in textwrap.wrap(told, width, subsequent_indent="    ", break_on_hyphens=False):
                yield text, None
        for memory in self.memory:
            ranks = ", ".join(str(rank) for rank in memory.ranks)
            reason = f" ({memory.reason})" if memory.reason else ""
            yield (
                _ascii(f"buffers of ranks {ranks}: {memory.bytes / 2**20:.1f} MiB on each, {memory.provider}{reason}"),
                None,
            )


def reports() -> Report:
    """The report on every graph that this process has started to run, in the order of first launch."""
    return Report(ledger.rows(), ledger.memory(), ledger.seen_outside())


def _line(cells: list[str], sizes: list[int]) -> str:
    padded = [
        cell.rjust(size) if i in _RIGHT_ALIGNED else cell.ljust(size)
        for i, (cell, size) in enumerate(zip(cells, sizes, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _cells(row: Row) -> list[str]:
    site = _ascii(row.site)
    if len(site) > _SITE_WIDTH:  # the end tells sites of one graph apart; to_json has the whole name
        site = ".." + site[2 - _SITE_WIDTH :]
    return [
        site,
        row.phase,
        _ascii(row.pattern or f"({', '.join(dict.fromkeys(row.collectives))})"),
        row.decision,
        f"{row.bytes / 2**20:.2f}",
        _microseconds(row.predicted_us.get("fused")),
        _microseconds(row.predicted_us.get("original")),
        _microseconds(row.measured_us),
        _reason(row),
    ]


def _reason(row: Row) -> str:
    """The code leads, since it is what docs/troubleshooting.md is indexed by."""
    if row.decision == "fused" or row.code in ("", row.reason):
        return _ascii(row.reason)
    return _ascii(f"[{row.code}] {row.reason}".rstrip())


def _microseconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ascii(text: str) -> str:
    return " ".join(text.split()).encode("ascii", "backslashreplace").decode("ascii")


def _row_json(row: Row) -> dict[str, Any]:
    data = row.to_dict()
    data["predicted_us"] = {name: _finite(row.predicted_us.get(name)) for name in ("fused", "original")}
    data["measured_us"] = _finite(row.measured_us)
    return {key: data[key] for key in _KEYS}


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN or infinity."""
    return value if value is not None and math.isfinite(value) else None
