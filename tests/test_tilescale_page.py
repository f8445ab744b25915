"""docs/tilescale.md: every row of its checklist names tests or says what is missing, and its program runs.

That the tests exist is for tests/test_docs.py to say, as of all pages.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import tscompile.language as tl
from tests.language import backends
from tscompile.language.compile import build_cubin, parse
from tscompile.testing import run_ranks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tilescale.md").read_text()
CHECKLIST = PAGE[PAGE.index("\n## Checklist") :]
ROWS = [
    line.strip("| ").split(" | ")
    for line in CHECKLIST.splitlines()
    if re.match(r"\| (?!TileScale \||pattern \|)", line)
]

# What a program can use of TileScale, as of its merge with TileLang of March 2026.
NAMES = re.findall(
    r"\w+",
    """put_warp get_warp put_block get_block ld st wait_eq wait_ne wait_ge wait_le wait_gt wait_lt barrier_blocks sync_blocks
    alloc_barrier_gpu init_barrier_gpu arrive_barrier_gpu wait_barrier_gpu sync_barrier_gpu sync_grid fence_cta fence_gpu fence_sys
    sync_warp warp_any warp_all shuffle_elect atom_add get_rank get_num_ranks get_pe get_pe_num CmpType Amo Team cpengine_cpasync
    get_allocator init_nvshmem_by_uniqueid nvshmem_create_tensor nvshmem_barrier_all set_signal init_dist init_distributed perf_fn
    dist_print has_fullmesh_nvlink supports_p2p_native_atomic TILELANG_USE_DISTRIBUTED TILELANG_USE_NVSHMEM""",
)


def ids(cell: str) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::\w+)`", cell)


def test_the_checklist_is_complete() -> None:
    assert len(ROWS) > 30 and all(len(row) == 3 for row in ROWS), [row for row in ROWS if len(row) != 3]
    named = {name for row in ROWS for name in re.findall(r"`([\w.]+)", row[0])}
    assert set(NAMES) <= named, set(NAMES) - named


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row_is_proved_or_open(row: list[str]) -> None:
    proof = row[2]
    assert proof.startswith("open: ") if not ids(proof) else not re.sub(r"`[^`]*`", "", proof).strip(), proof


def test_what_it_calls_by_name_is_there() -> None:
    named = set(re.findall(r"\btl\.(\w+)", PAGE))
    public = {*tl.__all__, "nvshmem"}
    assert len(named) > 15 and named <= public, named - public


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's Python as one file."""
    path = tmp_path / "ported_program.py"
    path.write_text("\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("ported_program")
    sys.modules.pop("ported_program")


@pytest.mark.slow
def test_its_program_compiles_for_gpus_and_runs_on_cpu_ranks(program) -> None:
    d = tl.dialect("cuda")
    cubin, spec = build_cubin(parse(lambda: program.shift(d)))
    assert cubin[:4] == b"\x7fELF" and (spec.grid, spec.threads) == (program.ROWS, program.THREADS)
    _, lowered = backends.lowered(parse(lambda: program.meet(d)), d.target, d.backend)
    assert "tsl_x_red_add_release_sys_u64" in lowered.kernel_source and "tsl_x_wait_s64" in lowered.kernel_source
    run_ranks(2, "ported_program:main", backend=None, timeout_s=100)
