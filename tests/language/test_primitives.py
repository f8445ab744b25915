"""Every primitive on the C target: it compiles and links there, or it is refused where it is written. And the page that says so."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from pathlib import Path

import pytest

import tscompile.language as tl

from . import uses

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import language_tables  # noqa: E402

WHY = (
    "not on the C target (a kernel without tl.prelude): blocks run one after another, and none may wait for a later one"
)
REFUSED = {"gpu_arrive", "gpu_wait", "grid_sync"}
NAMES = [name for _, name, _ in uses.primitives()]
HOST = {
    "CudaArtifact",
    "Dialect",
    "SymmetricGroup",
    "Target",
    "ToolchainError",
    "compile_cuda",
    "compile_cuda_all",
    "dialect",
    "nvcc",
} | {
    "MAX_RANKS",
    "Nodes",
    "RECORD_WORDS",
    "WORDS",
    "dist_print",
    "has_fullmesh_nvlink",
    "perf_fn",
    "supports_p2p_native_atomic",
    "fill_context",
    "prelude",
    "use_wheels",
}

refusals = cache(language_tables.refusals)


def test_every_primitive_has_a_use_and_a_docstring() -> None:
    assert set(NAMES) == set(uses.USES)
    assert set(tl.__all__) - set(NAMES) == HOST, "a new module of primitives belongs into uses.MODULES"
    for _, name, function in uses.primitives():
        assert inspect.getdoc(function), name


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_hold_there_is_refused_where_it_is_written(name: str) -> None:
    with pytest.raises(ValueError, match="not on the C target") as raised:
        uses.written(tl.dialect("cpu"), name)
    assert str(raised.value).startswith(f"{name}: {WHY}")


@pytest.mark.slow
def test_all_others_compile_and_link_there() -> None:
    assert set(refusals()) == REFUSED


@pytest.mark.slow
def test_the_page_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """PTX and refusals, found anew, as docs/primitives.md has them."""
    monkeypatch.setattr(language_tables, "refusals", refusals)
    made = language_tables.primitives()
    assert made in (ROOT / "docs/primitives.md").read_text(), "stale: run ./dev docs"
    assert all(f"`{name}(" in made for name in NAMES)


def test_the_table_of_backends_is_fresh() -> None:
    made = language_tables.execution_backends(check=True)
    assert "stale" not in made and made in (ROOT / "docs/language.md").read_text(), "run ./dev docs"
