"""The forms of sums and the width of tiles: which sums get narrow ones, and that every sum gets a tiling that fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.direct_ops import sweep
from tests.fused_programs import GATHER, REDUCE, SCATTER
from tests.gpu.test_stress import mixture
from tscompile.templates.nvlink.sums import PULL, PULL_WIDTHS, PUSH_WIDTHS, plan_sum, pull_plan
from tscompile.templates.nvlink.widths import (
    DENSE_WIDTHS,
    NARROW_WIDTHS,
    SWIZZLED_WIDTHS,
    gather_us,
    gather_width,
    pushed_slices,
    pushes,
    received_mib,
    tile_us,
    tile_width,
)


@pytest.mark.parametrize(
    ("m", "n", "k", "scattered", "reduced"),
    [
        (8192, 4096, 7168, 256, 256),
        (8192, 4096, 3584, 256, 256),
        (8192, 8192, 2560, 256, 256),
        (2048, 4096, 7168, 256, 128),
        (2048, 4096, 3584, 128, 128),  # measured: 117 and 160 us, where tiles of 256 take 133 and 177
        (512, 4096, 7168, 128, 128),  # 64 tiles of 256 for 132 SMs
        (512, 5120, 3584, 192, 192),  # the most SMs in one wave
    ],
)
def test_small_sums_have_narrow_tiles(m: int, n: int, k: int, scattered: int, reduced: int) -> None:
    assert pull_plan(m, n, k, 4, 4, False).width == scattered
    assert pull_plan(m, n, k, 4, 1, True).width == reduced


@pytest.mark.parametrize(
    ("rows", "widths", "k", "plain", "linear"),
    [
        (8192, [7168], 4096, 256, 256),
        (8192, [2752], 4096, 128, 240),
        (2048, [7168], 4096, 128, 224),
        (8192, [1536], 4096, 192, 192),  # the transport takes longer than the matmul: what follows it must be short
    ],
)
def test_gathers_have_tiles_of_the_least_time(rows: int, widths: list[int], k: int, plain: int, linear: int) -> None:
    assert gather_width(rows, widths, k, 4, transposed=False) == plain
    assert gather_width(rows, widths, k, 4, transposed=True) == linear


@pytest.mark.parametrize(
    ("rows", "widths", "k", "pushed"),
    [
        (128, [7168], 8192, True),
        (512, [7168], 8192, True),
        (2048, [1024, 256, 256], 4096, True),  # bound by transport
        (2048, [7168], 8192, False),  # bound by the matmul, which pushing slows down
        (8192, [1536], 4096, False),  # its slices come so late that the first of several waves ends late
    ],
)
def test_small_gathers_are_pushed_by_the_kernel(rows: int, widths: list[int], k: int, pushed: bool) -> None:
    assert pushes(rows, widths, k, 4) == pushed


@given(
    st.integers(1, 1 << 15), st.lists(st.integers(1, 1 << 14), min_size=1, max_size=3), st.integers(1, 1 << 15),
    st.integers(2, 8), st.booleans(),
)  # fmt: skip
def test_a_gather_takes_its_transport_and_its_matmul(
    rows: int, widths: list[int], k: int, ranks: int, pushed: bool
) -> None:
    width, mib = gather_width(rows, widths, k, ranks, True, pushed), received_mib(rows, k, ranks)
    us = gather_us(width, rows, widths, k, ranks, pushed, mib)
    waves = -(-(-(-rows // 128) * sum(-(-n // width) for n in widths)) // 132)
    assert us > waves * tile_us(width, k) and us > 3.1 * mib
    assert gather_us(width, rows, widths, k, ranks, pushed, mib + 64) > us - 1e-6


@given(st.integers(1, 1000), st.lists(st.integers(1, 1 << 14), min_size=1, max_size=3), st.integers(1, 1 << 15))
def test_a_tile_takes_the_time_of_its_columns(rows: int, widths: list[int], k: int) -> None:
    assert tile_us(256, k) > tile_us(128, k) > tile_us(256, k) / 2
    for transposed, choices in ((True, DENSE_WIDTHS), (False, SWIZZLED_WIDTHS)):
        assert tile_width(rows, widths, k, transposed) in choices


@given(
    st.integers(0, 1 << 20),
    st.integers(1, 1 << 12),
    st.integers(1, 1 << 12),
    st.integers(2, 8),
    st.integers(1, 40),
    st.booleans(),
)
def test_any_sum_has_tiles(m: int, n8: int, k8: int, ranks: int, outer: int, all_reduce: bool) -> None:
    pieces = 1 if all_reduce else ranks * outer
    m -= m % pieces
    plan = pull_plan(m, 8 * n8, 8 * k8, ranks, pieces, all_reduce)
    assert plan.tiles == pieces * -(-(m // pieces) // 128) * -(-8 * n8 // plan.width)
    # A narrower tile is never the reason why a sum has too many flags, nor is a push.
    assert plan.width == 256 or plan.has_flags
    chosen = plan_sum(m, 8 * n8, 8 * k8, ranks, outer, all_reduce)
    assert chosen.us <= plan.us and (chosen.form == PULL or chosen.has_flags)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("pushed", [False, True])
def test_the_sweep_on_gpus_gathers_into_tiles_of_all_widths(ranks: int, pushed: bool) -> None:
    """tests/gpu/test_ops.py runs each shape in both forms."""
    found = {
        (shape.plain_layout, gather_width(shape.m * ranks, shape.n, shape.k, ranks, not shape.plain_layout, pushed))
        for shape in sweep(ranks, tiny=False)
        if shape.kind == GATHER
    }
    every = {(False, width) for width in DENSE_WIDTHS} | {(True, width) for width in SWIZZLED_WIDTHS}
    if pushed:  # the rest of the kernel is the same at every width
        narrow = {(not layout, width) for layout in (0, 1) for width in NARROW_WIDTHS[layout]}
        assert narrow | {(False, 256), (True, 256)} < found <= every | narrow
        assert len(found) > 7
    else:
        assert found == every


@pytest.mark.parametrize("ranks", [2, 4])
def test_gathers_of_both_forms_are_stressed(ranks: int) -> None:
    found = {
        (pushes(shape.m * ranks, shape.n, shape.k, ranks), pushed_slices(shape.m, shape.k)[0])
        for shape in mixture(SimpleNamespace(cuda=True, size=ranks))  # type: ignore[arg-type]
        if shape.kind == GATHER
    }
    assert {(True, 1), (True, 8)} < found and False in {pushed for pushed, _ in found}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kind", [SCATTER, REDUCE])
def test_the_sweep_on_gpus_has_sums_of_all_forms(kind: str, ranks: int) -> None:
    plans = [
        (plan_sum(shape.m, shape.n[0], shape.k, ranks, 1, kind == REDUCE), shape.plain_layout)
        for shape in sweep(ranks, tiny=False)
        if shape.kind == kind
    ]
    pulls = {(plan.width, plain) for plan, plain in plans if plan.form == PULL}
    assert pulls >= {(256, False), (256, True), (128, True)}
    assert {width for width, _ in pulls} <= set(PULL_WIDTHS)
    assert {plan.width for plan, _ in plans if plan.form != PULL} == set(PUSH_WIDTHS)
    # Two ranks have as much to send in one way as in two.
    pushes = {"scatter"} if kind == SCATTER else {"one_shot", "two_shot"} if ranks > 2 else {"one_shot"}
    assert {plan.form for plan, _ in plans} == {PULL, *pushes}
