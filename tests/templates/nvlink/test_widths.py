"""The width of tiles: which sums get narrow ones, and that every sum gets a tiling that fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.direct_ops import sweep
from tests.fused_programs import REDUCE, SCATTER
from tscompile.templates.nvlink import gemm_reduce
from tscompile.templates.nvlink.widths import SUM_WIDTHS, sum_tiling


@pytest.mark.parametrize(
    ("m", "n", "k", "scattered", "reduced"),
    [
        (8192, 4096, 3584, 256, 256),
        (8192, 4096, 2752, 256, 256),
        (8192, 8192, 2560, 256, 256),
        (2048, 4096, 7168, 256, 256),
        (2048, 4096, 3584, 256, 256),  # measured: 169 us, where tiles of 128 take 204
        (1024, 4096, 3584, 256, 256),
        (512, 4096, 7168, 128, 128),  # 64 tiles of 256 for 132 SMs
        (512, 4096, 1792, 128, 128),
        (512, 5120, 3584, 192, 192),  # the most SMs in one wave
    ],
)
def test_small_sums_have_narrow_tiles(m: int, n: int, k: int, scattered: int, reduced: int) -> None:
    assert sum_tiling(m, n, k, 4, 4, False).width == scattered
    assert sum_tiling(m, n, k, 4, 1, True).width == reduced


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
@pytest.mark.parametrize("kind", [SCATTER, REDUCE])
def test_the_sweep_on_gpus_has_tiles_of_all_widths(kind: str, ranks: int) -> None:
    pieces = ranks if kind == SCATTER else 1
    found = {
        (sum_tiling(shape.m, shape.n[0], shape.k, ranks, pieces, kind == REDUCE).width, shape.plain_layout)
        for shape in sweep(ranks, tiny=False)
        if shape.kind == kind
    }
    assert found == {(width, plain) for width in SUM_WIDTHS for plain in (False, True)}
