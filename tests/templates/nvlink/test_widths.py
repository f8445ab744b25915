"""The width of tiles: which sums get narrow ones, and that every sum gets a tiling that fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.direct_ops import sweep
from tests.fused_programs import GATHER, REDUCE, SCATTER
from tscompile.templates.nvlink import gemm_reduce
from tscompile.templates.nvlink.widths import (
    DENSE_WIDTHS,
    SUM_WIDTHS,
    SWIZZLED_WIDTHS,
    gather_width,
    sum_tiling,
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
    assert sum_tiling(m, n, k, 4, 4, False).width == scattered
    assert sum_tiling(m, n, k, 4, 1, True).width == reduced


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
    tiling = sum_tiling(m, 8 * n8, 8 * k8, ranks, pieces, all_reduce)
    assert tiling.tiles == pieces * -(-(m // pieces) // 128) * -(-8 * n8 // tiling.width)
    # A narrower tile is never the reason why a sum has too many flags.
    assert tiling.width == 256 or gemm_reduce._scratch(tiling, ranks, all_reduce) >= 0


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_sweep_on_gpus_gathers_into_tiles_of_all_widths(ranks: int) -> None:
    found = {
        (shape.plain_layout, gather_width(-(-shape.m * ranks // 128), shape.n, shape.k, ranks, not shape.plain_layout))
        for shape in sweep(ranks, tiny=False)
        if shape.kind == GATHER
    }
    assert found == {(False, width) for width in DENSE_WIDTHS} | {(True, width) for width in SWIZZLED_WIDTHS}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kind", [SCATTER, REDUCE])
def test_the_sweep_on_gpus_has_tiles_of_all_widths(kind: str, ranks: int) -> None:
    pieces = ranks if kind == SCATTER else 1
    found = {
        (sum_tiling(shape.m, shape.n[0], shape.k, ranks, pieces, kind == REDUCE).width, shape.plain_layout)
        for shape in sweep(ranks, tiny=False)
        if shape.kind == kind
    }
    assert found == {(width, plain) for width in SUM_WIDTHS for plain in (False, True)}
