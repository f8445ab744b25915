"""Recall: every collective that stands next to a matmul or an attention is recognised, in every program of the suite, on every rank."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

import tscompile
from tests.programs import ADDRESSABLE, FAMILIES, PROGRAMS, Program, Setting, mesh
from tscompile.problem import Row
from tscompile.testing import fake_world, short_name

WORLD = 4
PATTERNS = {
    "all_gather_matmul",
    "matmul_reduce_scatter",
    "matmul_all_reduce",
    "matmul_all_gather",
    "mesh_matmul",
    "all_reduce_matmul",
    "reduce_scatter_matmul",
    "all_to_all_permute",
    "all_to_all_matmul",
    "all_to_all_attention",
    "matmul_all_to_all",
    "all_gather_attention",
    "attention_reduce_scatter",
}
# Addressable collectives that are fused when every supported match is: a floor, so that recognising never stands in for
# fusing. Those that are missing have no kernel (a reduction before a matmul, twice) or lost their matmul to another
# site (the gather after llama's output layer; on a mesh, the scatter after a gathered weight).
FUSED = FAMILIES | {"llama": 18, "TP no-SP": 18, "einsum, consumers, gather-output": 9, "2-D mesh": 19}
# DTensor code may depend on the rank where an embedding is parallel over the vocabulary, and on a mesh; there all ranks are tried.
# Other programs never ask for their rank, so one more is enough.
RANKED = {"a_llama_full_B2_w4", *(program.name for program in mesh.PROGRAMS)}
OTHER_RANKS = [(name, rank) for name in PROGRAMS for rank in ((1, 2, 3) if name in RANKED else (3,))]
MESH = {program.name for program in mesh.PROGRAMS}  # in groups of 2 of the 4 ranks, too

Tally = Counter[tuple[str, str]]  # (phase, collective) -> number


@cache
def _rows(name: str, rank: int = 0) -> tuple[Row, ...]:
    program = PROGRAMS[name]
    setting = Setting(WORLD, rank, program.dtype)
    with fake_world(WORLD, rank):
        built = program.build(setting)
        built.mark_dynamic()
        with program.enter(setting):
            report = tscompile.explain(built.call, *built.args, options={"tilescale.fuse": "always"})
    return tuple(report.rows)


def _tally(rows: tuple[Row, ...]) -> Tally:
    return Counter((row.phase, short_name(op)) for row in rows for op in row.collectives)


def _expected(program: Program, index: int) -> Tally:
    """Collectives (index 0) or addressable collectives (index 1) of a program."""
    numbers = {(p, op): counts[index] for p, ops in program.expected.items() for op, counts in ops.items()}
    return Counter({key: number for key, number in numbers.items() if number})


def _recognised(program: Program, rows: tuple[Row, ...]) -> Tally:
    """Addressable collectives that stand in a row with a pattern.

    Rows do not say which collective of the recorder's graph they mean, so the two are matched by number.
    """
    return _tally(tuple(row for row in rows if row.pattern is not None)) & _expected(program, 1)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_collective_stands_in_one_row(name: str) -> None:
    rows = _rows(name)
    assert _tally(rows) == _expected(PROGRAMS[name], 0)
    assert all(row.collectives for row in rows)
    assert {row.ranks for row in rows} <= ({2, WORLD} if name in MESH else {WORLD})
    assert {row.pattern for row in rows} <= PATTERNS | {None}
    # A refusal that does not say why is of no use to anybody.
    assert all(row.code and row.reason for row in rows if row.decision != "fused")
    assert all((row.decision == "unmatched") == (row.pattern is None) for row in rows)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_addressable_collective_is_recognised(name: str) -> None:
    program, rows = PROGRAMS[name], _rows(name)
    missed = _expected(program, 1) - _recognised(program, rows)
    assert not missed, [f"{row.phase} {row.collectives} {row.code}: {row.reason}" for row in rows if not row.pattern]


@pytest.mark.parametrize(("name", "rank"), OTHER_RANKS)
def test_other_ranks_see_the_same_sites(name: str, rank: int) -> None:
    def identity(row: Row) -> tuple[object, ...]:
        shape = (tuple(row.shapes), row.dtype, row.bytes)
        group = "" if name in MESH else row.group  # the groups of a mesh's rows, say, have names of their own
        return (row.site, row.phase, row.pattern, group, tuple(row.collectives), row.decision, row.code, *shape)

    assert [identity(row) for row in _rows(name, rank)] == [identity(row) for row in _rows(name)]


def test_recall_of_the_whole_table(summary: list[str]) -> None:
    """265 of 265, shown per family at the end of the run."""
    summary.append(f"{'family':<34}{'addressable':>12}{'recognised':>12}{'fused':>8}")
    total = 0
    for family, addressable in FAMILIES.items():
        programs = [p for p in PROGRAMS.values() if p.family == family and not p.extra]
        recognised = sum(_recognised(program, _rows(program.name)).total() for program in programs)
        fused = sum(
            len(row.collectives) for program in programs for row in _rows(program.name) if row.decision == "fused"
        )
        summary.append(f"{family:<34}{addressable:>12}{recognised:>12}{fused:>8}")
        total += recognised
        assert fused >= FUSED[family], f"{family}: fewer collectives are fused than before"
    summary.append(f"{'total':<34}{ADDRESSABLE:>12}{total:>12}")
    assert total == ADDRESSABLE
