"""Small sums: every form has the right result on every rank, whatever happens when, with any number of CTAs resident.

First the protocol under a random scheduler, then the device code itself on the host.
"""

from __future__ import annotations

import ctypes
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tscompile.problem import FusionProblem, Gemm
from tscompile.templates.nvlink.kernels.config import DATA_FLAGS, SMS, SUM_FORMS
from tscompile.templates.nvlink.sums import PULL, plan_sum, problem_plan, pull_plan, push_plans
from tscompile.templates.nvlink.tiles import whole_tiles

from . import host_code
from .sum_protocol import push_all


@settings(deadline=None, max_examples=120)
@given(
    form=st.sampled_from(SUM_FORMS),
    ranks=st.integers(2, 8),
    outer=st.integers(1, 3),
    stripes=st.integers(1, 9),
    odd=st.integers(0, 15),
    n=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_a_small_sum(form: str, ranks: int, outer: int, stripes: int, odd: int, n: int, seed: int) -> None:
    scattered = form == "scatter"
    inner = 16 * stripes
    m = ranks * outer * inner if scattered else inner - odd
    plans = [plan for plan in push_plans(m, 8 * n, 64, ranks, outer, not scattered) if plan.form == form]
    plan = random.Random(seed).choice(plans)
    assert plan.has_flags and plan.tiles <= SMS
    products = [
        torch.randint(-50, 50, (m, 8 * n), generator=torch.Generator().manual_seed(seed + r)) for r in range(ranks)
    ]
    table = whole_tiles(m, 8 * n, plan.width)
    assert len(table) == plan.tiles
    assert all(row[2] <= plan.rows for row in table)
    rows, dice = m // ranks if scattered else m, random.Random(seed)
    workers = [dice.randint(1, 3) for _ in range(ranks)]
    world = push_all(plan, table, products, inner, rows, workers, seed)
    total = torch.stack(products).sum(0)
    for rank, pusher in enumerate(world):
        wanted = total.view(outer, ranks, inner, -1)[:, rank].reshape(rows, -1) if scattered else total
        assert torch.equal(pusher.written, torch.ones_like(pusher.written))
        assert torch.equal(pusher.out, wanted)


@pytest.mark.parametrize(
    ("m", "n", "k", "ranks", "scattered", "reduced"),
    [
        (8192, 4096, 7168, 4, PULL, PULL),  # many waves: partial tiles travel while others are computed
        (256, 8192, 7168, 4, "scatter", "two_shot"),
        (128, 8192, 14336, 2, "scatter", "one_shot"),  # as many bytes in one way as in two
        (16, 4096, 3584, 4, PULL, "one_shot"),  # four rows of each rank are no stripe; so few bytes take one way
    ],
)
def test_few_rows_are_pushed(m: int, n: int, k: int, ranks: int, scattered: str, reduced: str) -> None:
    assert plan_sum(m, n, k, ranks, 1, False).form == scattered
    assert plan_sum(m, n, k, ranks, 1, True).form == reduced


@given(st.integers(1, 2048), st.integers(1, 1100), st.integers(1, 2000), st.integers(2, 8), st.booleans())
def test_whoever_plans_finds_the_same(m: int, n: int, k: int, ranks: int, all_reduce: bool) -> None:
    kind = "matmul_all_reduce" if all_reduce else "matmul_reduce_scatter"
    m = m if all_reduce else m * ranks
    gemms = (Gemm(m, 8 * n, 8 * k), Gemm(m, 8 * n, 64))
    problem = FusionProblem(kind, ranks, True, "cuda", "bfloat16", m * n * 16, gemms, ("bfloat16",) * 2)
    chosen = problem_plan(problem)
    assert chosen == plan_sum(m, 8 * n, 8 * k + 64, ranks, 1, all_reduce)
    assert chosen.us <= pull_plan(m, 8 * n, 8 * k + 64, ranks, 1 if all_reduce else ranks, all_reduce).us
    for plan in push_plans(m, 8 * n, 64, ranks, 1, all_reduce):
        assert plan.flags <= DATA_FLAGS and plan.places <= plan.flags


# ---- kernels/sum_push.h on the host ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    tile = host_code.kernel_text("tile.h")
    starts = (
        "template <int DT> TSL uint4 tsk_pack8",
        "template <int DT> TSL void tsk_add8",
        "TSL void tsk_quad_transpose",
        "template <int NF> TSL void tsk_scale",
        "template <int NF, bool COPY, typename Words> TSL void tsk_store_words",
        "template <int NF, int DT, bool COPY> TSL void tsk_rows",
    )
    before, after = ((host_code.HERE / name).read_text() for name in ("host_sum.h", "host_sum_run.h"))
    helpers = [host_code.part(tile, start) for start in starts]
    sums = host_code.kernel_text("sum_push.h")
    return host_code.build(tmp_path_factory.mktemp("sum"), before, *helpers, sums, runner=after)


class Sizes(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_int)
            for n in ("seed", "ranks", "ctas", "tiles", "m", "n", "columns", "inner", "share", "epoch")
        ),
        ("scale", ctypes.c_float),
    ]


@pytest.mark.parametrize(
    ("form", "ranks", "outer", "m", "n", "ctas"),
    [
        ("scatter", 2, 1, 32, 72, 1),
        ("scatter", 3, 2, 192, 64, 2),
        ("scatter", 4, 1, 256, 136, 1),
        ("two_shot", 2, 1, 40, 64, 1),
        ("two_shot", 3, 1, 130, 72, 2),
        ("two_shot", 8, 1, 128, 64, 1),
        ("one_shot", 2, 1, 5, 128, 1),
        ("one_shot", 3, 1, 144, 64, 2),
    ],
)
def test_the_device_code_sums(
    library: ctypes.CDLL, form: str, ranks: int, outer: int, m: int, n: int, ctas: int
) -> None:
    """Integers that bfloat16 has, and their sums, so every bit counts."""
    width, scattered = 64, form == "scatter"
    plan = next(p for p in push_plans(m, n, 64, ranks, outer, not scattered) if (p.form, p.width) == (form, width))
    table = torch.tensor(whole_tiles(m, n, width), dtype=torch.int32)
    products = [torch.randint(-8, 9, (m, n)).float() for _ in range(ranks)]
    rows, inner = (m // ranks, m // ranks // outer) if scattered else (m, m)
    outs = [torch.full((rows, n), float("nan"), dtype=torch.bfloat16) for _ in range(ranks)]
    slots = [torch.full((plan.scratch_bytes // 2,), float("nan"), dtype=torch.bfloat16) for _ in range(ranks)]
    flags = [torch.full((plan.flags + 1,), 4, dtype=torch.int32) for _ in range(ranks)]  # epochs of an earlier call
    group = host_code.Group.of(ranks)
    contexts = group.contexts(slots, flags)
    given = Sizes(
        m, ranks, ctas, len(table), m, n, -(-n // width), inner, plan.share, 3, 0.5
    )  # epoch: and 2 of the cell
    lists = [host_code.pointers(each) for each in (contexts, products, outs)]
    number = ctypes.c_int(SUM_FORMS.index(form))
    host_code.call(library.run_sum, group, number, ctypes.byref(given), ctypes.c_void_p(table.data_ptr()), *lists)
    total = torch.stack(products).sum(0) / 2
    for rank in range(ranks):
        wanted = total.view(outer, ranks, inner, n)[:, rank].reshape(rows, n) if scattered else total
        assert torch.equal(outs[rank].float(), wanted)
        assert flags[rank][-1] == 4 and set(flags[rank].tolist()) <= {4, 5}
