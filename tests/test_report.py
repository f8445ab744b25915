"""The report: columns, wrapping, summary, JSON keys, colour only on a terminal."""

from __future__ import annotations

import io
import json

import pytest

from tscompile.observe import ledger
from tscompile.problem import Row
from tscompile.report import Report, reports


def row(**changes: object) -> Row:
    values: dict[str, object] = {
        "site": "g0.forward.0",
        "graph": "g0",
        "phase": "forward",
        "pattern": "all_gather_matmul",
        "group": "0",
        "ranks": 2,
        "collectives": ["all_gather_into_tensor"],
        "decision": "fused",
        "code": "fused",
        "reason": "predicted 1.4x",
        "shapes": ["[64, 32] @ [32, 16]"],
        "dtype": "float32",
        "bytes": 3 << 20,
        "predicted_us": {"fused": 71.26, "original": 110.4},
        "measured_us": None,
        "source": "model.py:12",
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


KEPT = row(
    site="g0.backward.1",
    phase="backward",
    decision="kept",
    code="too-small",
    reason="the collective moves 0.01 MiB, and starting the fused op costs more than the overlap can win back",
    bytes=10_000,
    measured_us=0.5,
)
UNMATCHED = row(
    site="g0.forward.2",
    pattern=None,
    decision="unmatched",
    code="no-pattern",
    reason="no matmul reads the result",
    collectives=["all_reduce", "all_reduce"],
    predicted_us={"fused": None, "original": None},
)


KEYS = ["site", "graph", "phase", "pattern", "group", "ranks", "collectives", "decision", "reason", "code", "shapes"]
KEYS += ["dtype", "bytes", "predicted_us", "measured_us", "source"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_table() -> None:
    lines = str(Report([row(), KEPT, UNMATCHED])).splitlines()
    header, _, fused = lines[:3]
    assert header.split("  ")[0] == "site" and header.endswith("reason")
    for title, value in {"MiB": "3.00", "fused us": "71.3", "orig us": "110", "meas. us": "-"}.items():
        end = header.index(title) + len(title)
        assert fused[:end].endswith(value), title  # numbers are aligned on the right
    assert "  (all_reduce)  " in lines[-4]  # no pattern matched: the table says what is left alone
    assert lines[-1] == "1 of 4 collectives fused, 1 kept, 2 unmatched"
    assert all(len(line) <= 128 for line in lines)


def test_long_reasons_wrap_under_their_column() -> None:
    lines = str(Report([KEPT])).splitlines()
    column = lines[0].index("reason")
    assert lines[2][column:].startswith("[too-small] the collective")
    words = [line[column:] for line in lines[2:-2]]
    assert len(words) > 1 and all(not line[:column].strip() for line in lines[3:-2])
    assert " ".join(words) == f"[too-small] {KEPT.reason}"


def test_text_is_ascii_and_names_are_bounded() -> None:
    text = str(Report([row(site="s" * 90 + ".7", decision="kept", reason="12 \u00b5s\nis\ttoo long \u2192 kept")]))
    assert text.isascii()
    assert "12 \\xb5s is too long" in text
    assert ".." + "s" * 36 + ".7  " in text


def test_what_is_in_no_graph_comes_after_the_table() -> None:
    text = "graph break on communication at model.py:12: " + "word " * 30
    report = Report([row()], outside=[text])
    summary, *lines = str(report).splitlines()[4:]
    assert summary == report.summary()
    assert " ".join(" ".join(lines).split()) == f"not in a graph: {text.strip()}"
    assert len(lines) > 1 and all(len(line) <= 128 for line in lines)
    assert report.to_json()["outside"] == [text]


def test_no_rows() -> None:
    assert str(Report([])) == "no collectives in the graphs of this report"
    assert repr(Report([row()])) == "Report(1 of 1 collective fused, 0 kept, 0 unmatched)"


def test_json_has_exactly_these_keys() -> None:
    data = Report([row(predicted_us={"fused": float("nan")}, measured_us=float("inf")), UNMATCHED]).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["schema"] == 1
    for item in data["rows"]:
        assert list(item) == KEYS
        assert set(item["predicted_us"]) == {"fused", "original"}
    assert data["rows"][0]["predicted_us"] == {"fused": None, "original": None}
    assert data["rows"][0]["measured_us"] is None


def test_colour_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report([row(), KEPT])
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    plain, terminal, no_colour = io.StringIO(), Terminal(), Terminal()
    report.print(plain)
    report.print(terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    report.print(no_colour)
    assert plain.getvalue() == no_colour.getvalue() == f"{report}\n"
    assert "\x1b[32m" in terminal.getvalue()


def test_reports_reads_the_ledger() -> None:
    before = ledger.rows()
    ledger.clear()
    try:
        ledger.add([row(), UNMATCHED])
        ledger.measured("g0.forward.0", 12.0)
        assert [r.site for r in reports().rows] == ["g0.forward.0", "g0.forward.2"]
        assert reports().counts() == {"fused": 1, "kept": 0, "unmatched": 2}
        assert reports().rows[0].measured_us == 12.0
        ledger.outside(["FSDP2 gathers in hooks", "FSDP2 gathers in hooks"])
        assert reports().outside == ["FSDP2 gathers in hooks"]
    finally:
        ledger.clear()
        ledger.add(before)
