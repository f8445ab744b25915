"""Options: parsing, precedence, and messages that name the fix. No torch needed."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscompile.errors import OptionError
from tscompile.options import KINDS, Options, patch, unknown_variables


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in Options.table():
        monkeypatch.delenv(row.variable, raising=False)


def test_defaults_and_rest() -> None:
    options, rest = Options.parse({"max_autotune": True, "triton.cudagraphs": False})
    assert options == Options()
    assert rest == {"max_autotune": True, "triton.cudagraphs": False}
    assert Options.parse(None) == (Options(), {})


def test_every_option_is_read_from_its_key() -> None:
    options, rest = Options.parse(
        {
            "tilescale.inner": "eager",
            "tilescale.fuse": "always",
            "tilescale.on_kept": "warn",
            "tilescale.dry_run": True,
            "tilescale.verify": 1,
            "tilescale.disable": ["matmul_all_reduce", "all_gather_matmul"],
            "tilescale.timeout_s": 5,
            "tilescale.heap_bytes": "256M",
        }
    )
    assert rest == {}
    assert options == Options(
        inner="eager",
        fuse="always",
        on_kept="warn",
        dry_run=True,
        verify=True,
        disable=("all_gather_matmul", "matmul_all_reduce"),
        timeout_s=5.0,
        heap_bytes=256 << 20,
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("inner", "eager", "eager"),
        ("fuse", "always", "always"),
        ("on_kept", "error", "error"),
        ("dry_run", "on", True),
        ("verify", "0", False),
        ("disable", "matmul_all_gather, all_gather_matmul", ("all_gather_matmul", "matmul_all_gather")),
        ("timeout_s", "2.5", 2.5),
        ("timeout_s", "none", None),
        ("heap_bytes", "1 GiB", 1 << 30),
        ("verify", "", False),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(f"TSCOMPILE_{name.upper()}", text)
    assert getattr(Options.parse()[0], name) == value


def test_precedence_is_explicit_then_patch_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSCOMPILE_FUSE", "always")
    monkeypatch.setenv("TSCOMPILE_ON_KEPT", "warn")
    with patch(fuse="auto", verify=True):
        with patch(dry_run=True):
            options, _ = Options.parse({"tilescale.verify": False})
        assert options == Options(fuse="auto", on_kept="warn", dry_run=True, verify=False)
        assert Options.parse()[0].dry_run is False
    assert Options.parse()[0] == Options(fuse="always", on_kept="warn")


def test_patch_is_undone_after_an_error() -> None:
    with pytest.raises(RuntimeError), patch(verify=True):
        raise RuntimeError
    assert Options.parse()[0].verify is False


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"tilescale.verfy": True}, ['"tilescale.verfy"', 'did you mean "tilescale.verify"']),
        ({"tilescale.qqq": True}, ["tilescale.inner", "tilescale.heap_bytes"]),
        ({"tilescale.inner": "induktor"}, ["tilescale.inner", '"inductor", "eager"', 'did you mean "inductor"']),
        ({"tilescale.verify": "maybe"}, ["tilescale.verify", "True, False"]),
        ({"tilescale.disable": ["all_gather_matmull"]}, ["tilescale.disable", 'did you mean "all_gather_matmul"']),
        ({"tilescale.disable": 3}, ["tilescale.disable", "list of kinds"]),
        ({"tilescale.timeout_s": -1}, ["tilescale.timeout_s", "positive"]),
        ({"tilescale.timeout_s": True}, ["tilescale.timeout_s", "positive"]),
        ({"tilescale.timeout_s": "nan"}, ["tilescale.timeout_s", "positive"]),
        ({"tilescale.heap_bytes": "many"}, ["tilescale.heap_bytes", '"256M"']),
        ({"tilescale.heap_bytes": 0}, ["tilescale.heap_bytes", "positive"]),
        ({"tilescale.heap_bytes": 1.5}, ["tilescale.heap_bytes", "positive"]),
        ({"tscompile.verify": True}, ['"tscompile.verify"', '"tilescale.verify"']),
        ({"tilscale.verify": True}, ['"tilscale.verify"', '"tilescale.verify"']),
    ],
)
def test_errors_name_key_and_fix(mapping: dict[str, object], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse(mapping)
    for word in words:
        assert word in str(caught.value)


def test_errors_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSCOMPILE_HEAP_BYTES", "lots")
    with pytest.raises(OptionError, match="TSCOMPILE_HEAP_BYTES = 'lots'"):
        Options.parse()


def test_patch_rejects_unknown_names_at_once() -> None:
    with pytest.raises(OptionError, match=r"tilescale\.verify"), patch(verfy=True):
        pass


def test_misspelt_variable_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TSCOMPILE_VERIFFY", "1")
    monkeypatch.setenv("TSCOMPILE_SOMETHING_ELSE", "1")
    assert unknown_variables() == {"TSCOMPILE_VERIFFY": "TSCOMPILE_VERIFY", "TSCOMPILE_SOMETHING_ELSE": ""}
    with caplog.at_level(logging.WARNING, logger="tscompile"):
        Options.parse()
    assert "TSCOMPILE_VERIFFY" in caplog.text
    assert "TSCOMPILE_SOMETHING_ELSE" not in caplog.text


def test_digest_follows_values_not_spelling() -> None:
    assert Options(disable=("matmul_all_reduce", "all_gather_matmul")).digest() == (
        Options.parse({"tilescale.disable": "all_gather_matmul,matmul_all_reduce"})[0].digest()
    )
    variants = {
        Options().digest(),
        Options(fuse="always").digest(),
        Options(verify=True).digest(),
        Options(on_kept="warn").digest(),
        Options(heap_bytes=1).digest(),
        Options(disable=KINDS[:1]).digest(),
    }
    assert len(variants) == 6


@given(st.integers(1, 2**40), st.sampled_from(["", "K", "M", "G", "k", "MB", "GiB"]))
def test_byte_counts(count: int, unit: str) -> None:
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit[:1].upper()]
    assert Options.parse({"tilescale.heap_bytes": f"{count}{unit}"})[0].heap_bytes == count * scale
