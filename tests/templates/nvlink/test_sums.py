"""Small sums: every form has the right result on every rank, whatever happens when, with any number of CTAs resident."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tscompile.problem import FusionProblem, Gemm
from tscompile.templates.nvlink.kernels.config import DATA_FLAGS, SMS, SUM_FORMS
from tscompile.templates.nvlink.sums import PULL, plan_sum, problem_plan, pull_plan, push_plans
from tscompile.templates.nvlink.tiles import whole_tiles

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
