"""What the templates over NVLink take: reasons, slot sizes, and how operands are handed to TMA. No GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.cases import GATHER_USES
from tscompile.problem import FusionProblem, GatherUse, Gemm, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink.operands import aligned_pointer, aligned_sizes, is_transposed, pointer_of
from tscompile.templates.nvlink.tiles import TILE_M

from .fake_gpu import large_forms

BF16 = "bfloat16"
ROWS = GatherUse("lhs", False, "rows", BF16)
GRADIENT = GatherUse("lhs", True, "rows", BF16)
REDUCTIONS = ("matmul_reduce_scatter", "matmul_all_reduce")
KINDS = ("all_gather_matmul", *REDUCTIONS)


def template(kind: str) -> Any:
    found = find_template(kind, "nvlink")
    assert found is not None
    return found


def problem(kind: str, **changes: Any) -> FusionProblem:
    facts: dict[str, Any] = {
        "kind": kind,
        "group_size": 4,
        "intra_host": True,
        "device": "cuda",
        "dtype": BF16,
        "comm_bytes": 1 << 20,
        "gemms": (Gemm(1024, 512, 256),),
        "gemm_dtypes": (BF16,),
    }
    return FusionProblem(**{**facts, **changes})


def gather_problem(uses: tuple[GatherUse, ...], gemm: Gemm) -> FusionProblem:
    """Of equal matmuls; sizes of the gathered tensor follow from the first use."""
    left, transposed = uses[0].side == "lhs", uses[0].transposed
    rows, columns = (gemm.m, gemm.k) if left else (gemm.k, gemm.n)
    pieces = 1 if uses[0].rank_axis == "rows" else columns if transposed else rows
    gemms = (gemm,) * len(uses)
    return problem("all_gather_matmul", gemms=gemms, comm_bytes=2 * rows * columns, pieces=pieces)


def plan(kind: str, **changes: Any) -> Plan:
    facts: dict[str, Any] = {"uses": (ROWS,)} if kind == "all_gather_matmul" else {"coefficients": (1.0,)}
    return Plan(kind, "g/site", "nvlink", **{"dtype": BF16, **facts, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": "float16", "gemm_dtypes": ("float16",)}, None),
        ({"group_size": 2}, None),
        ({"group_size": 8}, None),
        ({"reduce_op": "avg"}, None),
        ({"device": "cpu"}, "NVLink serves CUDA tensors, these are on cpu"),
        ({"group_size": 1}, "2 to 8 ranks, the group has 1"),
        ({"group_size": 9}, "2 to 8 ranks, the group has 9"),
        ({"intra_host": False}, "several hosts"),
        ({"dtype": "float32"}, "dtype float32 is not one of bfloat16, float16"),
        ({"reduce_op": "max"}, "reduction max"),
        ({"gemms": (Gemm(1024, 512, 252),)}, "multiples? of 16 bytes"),
        ({"gemms": (Gemm(1024, 516, 256),)}, "multiples? of 16 bytes"),
        ({"gemms": (Gemm(1024, 0, 256),)}, "multiples? of 16 bytes|a matrix is empty"),
        ({"gemms": (Gemm(1001, 512, 256),)}, None),  # rows may be ragged
    ],
)
def test_problems_of_every_kind(kind: str, changes: dict[str, Any], reason: str | None) -> None:
    dtype = changes.get("dtype", BF16)
    asked = plan(kind, dtype=dtype)
    if kind == "all_gather_matmul":
        asked = plan(kind, dtype=dtype, uses=(GatherUse("lhs", False, "rows", dtype),))
    check(template(kind).supports(problem(kind, **changes), asked), reason)


def check(found: str | None, reason: str | None) -> None:
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found), found


@pytest.mark.parametrize(
    ("uses", "reason"),
    [
        ((ROWS,), None),
        ((GRADIENT, ROWS), None),
        ((GRADIENT,), None),
        ((GRADIENT, GatherUse("rhs", False, "rows", BF16)), None),
        ((GatherUse("lhs", False, "cols", BF16),), None),
        ((GatherUse("lhs", True, "cols", BF16),), None),
        ((GatherUse("rhs", False, "cols", BF16),), None),
        ((GatherUse("rhs", True, "rows", BF16),), None),
        ((GatherUse("lhs", False, "rows", "float16"),), "no matmul is in the dtype that travels"),
        ((GatherUse("lhs", True, "rows", "float16"), GatherUse("lhs", True, "cols", "float16")), "in the dtype"),
        ((GatherUse("lhs", False, "rows", "float16"), GRADIENT), None),  # one that is served carries the others
    ],
)
def test_uses_of_a_gather(uses: tuple[GatherUse, ...], reason: str | None) -> None:
    asked = gather_problem(uses, Gemm(1024, 512, 256))
    check(template("all_gather_matmul").supports(asked, plan("all_gather_matmul", uses=uses)), reason)


@pytest.mark.parametrize(
    ("use", "gemm", "reason"),
    [
        (GRADIENT, Gemm(256, 512, 1004), None),  # rows of both operands may be any number
        (GRADIENT, Gemm(252, 512, 1024), "16 bytes"),  # gathered rows of 252
        (GRADIENT, Gemm(256, 508, 1024), "16 bytes"),  # rows of the result
        (GatherUse("rhs", False, "rows", BF16), Gemm(252, 512, 1024), None),  # the local operand may lie along k
        (GatherUse("rhs", False, "rows", BF16), Gemm(252, 512, 1004), "16 bytes"),
        (GatherUse("rhs", True, "rows", BF16), Gemm(252, 512, 256), None),
        (GatherUse("rhs", True, "rows", BF16), Gemm(256, 508, 256), "16 bytes"),
        (GatherUse("rhs", True, "rows", BF16), Gemm(256, 528, 256), "16 bytes"),  # columns of a rank: 132
        (GatherUse("lhs", False, "cols", BF16), Gemm(64, 512, 48), "16 bytes"),  # 12
        (GatherUse("rhs", True, "rows", BF16), Gemm(256, 512, 252), "16 bytes"),
    ],
)
def test_sizes_of_a_gathers_other_uses(use: GatherUse, gemm: Gemm, reason: str | None) -> None:
    asked = gather_problem((use,), gemm)
    check(template("all_gather_matmul").supports(asked, plan("all_gather_matmul", uses=(use,))), reason)


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(32768, 16384, 1024), (65536, 8192, 1024)])
def test_sums_of_more_tiles_than_flags(kind: str, sizes: tuple[int, int, int]) -> None:
    asked = problem(kind, group_size=8, gemms=(Gemm(*sizes),))
    check(template(kind).supports(asked, plan(kind)), "more than the flags")
    a, b = fakes((sizes[0], sizes[2]), (sizes[2], sizes[1]))
    outer = [1] if kind == "matmul_reduce_scatter" else []
    assert template(kind).scratch_bytes(plan(kind), 8, [a], [b], [None], [], *outer) == -1


@pytest.mark.parametrize("kind", KINDS)
def test_calls_without_rows(kind: str) -> None:
    a, b = fakes((0, 256), (256, 512))
    if kind == "all_gather_matmul":
        arguments: list[Any] = [fakes((1, 0))[0], [b], [None]]
    else:
        arguments = [[a], [b], [None], [], *([1] if kind == "matmul_reduce_scatter" else [])]
    assert template(kind).scratch_bytes(plan(kind), 4, *arguments) == -1


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize(
    ("terms", "changes", "dtypes", "reason"),
    [
        (3, {}, None, None),
        (1, {"coefficients": ()}, None, None),
        (2, {"coefficients": (1.0, -0.5)}, None, None),
        (1, {"rank_axis": "cols"}, None, "columns of the result"),
        (1, {"coefficients": (1.0, 1.0)}, None, "not a matmul"),  # the second is an addend
        (4, {}, None, "4 matmuls, the kernel takes 3"),
        (0, {"coefficients": ()}, (), "0 matmuls"),
        (2, {"coefficients": (1.0, 0.0)}, None, "coefficient is zero"),
        (2, {}, (BF16, "float32"), "another dtype"),
    ],
)
def test_sums(
    kind: str, terms: int, changes: dict[str, Any], dtypes: tuple[str, ...] | None, reason: str | None
) -> None:
    asked = problem(
        kind,
        gemms=(Gemm(1024, 512, 256),) * terms,
        gemm_dtypes=(BF16,) * terms if dtypes is None else dtypes,
    )
    check(template(kind).supports(asked, plan(kind, **{"coefficients": (1.0,) * terms, **changes})), reason)


def fakes(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    with FakeTensorMode():
        return [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]


@pytest.mark.parametrize(
    ("uses", "other", "expected"),
    [
        ((ROWS,), (256, 512), 4 * 64 * 256 * 2),
        ((GRADIENT, ROWS), (256, 512), 4 * 64 * 256 * 2),
        ((ROWS,), (256, 510), -1),
        ((GRADIENT,), (256, 512), 4 * 64 * 256 * 2),
        ((GRADIENT,), (256, 510), -1),
    ],
)
def test_a_slot_of_a_gather(uses: tuple[GatherUse, ...], other: tuple[int, int], expected: int) -> None:
    shard, *others = fakes((1, 64 * 256), *[other] * len(uses))
    need = template("all_gather_matmul").scratch_bytes(
        plan("all_gather_matmul", uses=uses), 4, shard, others, [None] * len(uses)
    )
    assert need == expected


@pytest.mark.parametrize(
    ("m", "n", "outer", "size", "tiles", "width"),
    [
        (4 * 256, 512, 1, 4, 8, 128),
        (4 * 257, 520, 1, 4, 15, 128),  # ragged
        (4 * 256, 512, 4, 4, 16, 128),  # pieces of 64 rows take a tile row each
        (2 * 128, 256, 1, 2, 2, 128),
        (4 * 2048, 4096, 1, 4, 256, 256),
    ],
)
def test_a_slot_of_a_reduce_scatter(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, outer: int, size: int, tiles: int, width: int
) -> None:
    large_forms(monkeypatch)
    a, b = fakes((m, 256), (256, n))
    need = template("matmul_reduce_scatter").scratch_bytes(
        plan("matmul_reduce_scatter"), size, [a], [b], [None], [], outer
    )
    assert need == (size - 1) * tiles * TILE_M * width * 2  # a partial tile for each tile of each peer


@pytest.mark.parametrize(
    ("m", "n", "size", "tiles", "width"),
    [
        (1024, 512, 4, 8, 128),
        (1000, 520, 4, 10, 128),
        (8, 8, 8, 1, 128),
        (1024, 512, 3, 11, 128),
        (8192, 4096, 4, 256, 256),
    ],
)
def test_a_slot_of_an_all_reduce(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, size: int, tiles: int, width: int
) -> None:
    large_forms(monkeypatch)
    a, b = fakes((m, 256), (256, n))
    need = template("matmul_all_reduce").scratch_bytes(plan("matmul_all_reduce"), size, [a], [b], [None], [])
    assert need == size * tiles * TILE_M * width * 2  # and the sums of the own ones


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize(
    ("a", "b", "terms", "addends"),
    [
        ((1024, 256), (256, 512), 1, 1),
        ((1024, 256), (256, 512), 4, 0),
        ((1024, 252), (252, 512), 1, 0),
        ((1024, 256), (256, 510), 1, 0),
        ((1 << 20, 256), (256, 1 << 15), 1, 0),  # more tiles than flags
    ],
)
def test_sizes_that_no_kernel_serves(
    kind: str, a: tuple[int, int], b: tuple[int, int], terms: int, addends: int
) -> None:
    left, right, addend = fakes(a, b, (a[0], b[1]))
    outer = [1] if kind == "matmul_reduce_scatter" else []
    arguments = ([left] * terms, [right] * terms, [None] * terms, [addend] * addends, *outer)
    assert template(kind).scratch_bytes(plan(kind, coefficients=(1.0,) * terms), 4, *arguments) == -1


def test_how_a_right_operand_lies() -> None:
    plain = torch.randn(16, 24)
    weight = torch.randn(24, 16)
    assert not is_transposed(plain) and is_transposed(weight.t())
    assert not is_transposed(weight.t()[:, ::2]) and not is_transposed(plain[:, :8])
    # Without a copy where it lies as the kernel wants it, with one where not.
    alive: list[torch.Tensor] = []
    assert pointer_of(plain, False, alive) == plain.data_ptr()
    assert pointer_of(weight.t(), True, alive) == weight.data_ptr()
    assert not alive
    for operand, transposed in ((weight.t(), False), (plain, True), (plain[:, 8:16], False)):
        address = pointer_of(operand, transposed, alive)
        made = alive.pop()
        assert made.is_contiguous() and made.data_ptr() == address
        assert torch.equal(made.t() if transposed else made, operand)


def test_alignment() -> None:
    assert aligned_sizes(8, 16, 4096) and not aligned_sizes(8, 12) and not aligned_sizes(0)
    base = torch.zeros(64, dtype=torch.bfloat16)
    assert base.data_ptr() % 16 == 0
    assert aligned_pointer(base[8:]).data_ptr() == base[8:].data_ptr()
    moved = aligned_pointer(base[1:9])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, base[1:9])


@settings(deadline=None, max_examples=300)
@given(
    use=st.sampled_from(GATHER_USES),
    ranks=st.integers(2, 8),
    pieces=st.integers(1, 3),
    sizes=st.tuples(*[st.sampled_from([1, 3, 4, 8, 12, 24, 37, 64])] * 3),
)
def test_what_a_plan_promises_a_call_can_do(use: Any, ranks: int, pieces: int, sizes: tuple[int, int, int]) -> None:
    """A site that is planned fused must not turn out to be unserved when it runs, nor the other way round."""
    asked = GatherUse(*use, BF16)
    inner, width, free = sizes
    if asked.rank_axis == "rows":
        p, q, matrix = pieces, inner * width, (pieces * ranks * inner, width)
    else:
        p, q, matrix = width * pieces, inner, (width, pieces * ranks * inner)
    rows, columns = matrix[::-1] if asked.transposed else matrix
    left = asked.side == "lhs"
    gemm = Gemm(rows, free, columns) if left else Gemm(free, columns, rows)
    (shard, other) = fakes((p, q), (columns, free) if left else (free, rows))
    found = problem("all_gather_matmul", group_size=ranks, gemms=(gemm,), comm_bytes=2 * p * ranks * q, pieces=p)
    asked_plan = plan("all_gather_matmul", uses=(asked,))
    promised = template("all_gather_matmul").supports(found, asked_plan) is None
    need = template("all_gather_matmul").scratch_bytes(asked_plan, ranks, shard, [other], [None])
    assert promised == (need >= 0)
