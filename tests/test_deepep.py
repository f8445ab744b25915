"""The exchange of examples/tilescale/expert_parallel: layout, conversions, and CPU ranks in odd situations."""

from __future__ import annotations

import random
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import tilelang.language as T
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tscompile.language as tl

FOLDER = Path(__file__).parents[1] / "examples" / "tilescale"
sys.path.insert(0, str(FOLDER))  # the scripts import each other by these names
from common import ExampleError, launch  # noqa: E402
from expert_parallel import halves, kernels  # noqa: E402
from expert_parallel.layout import aligned, check_sizes, layout_of, local_experts_of, refusal  # noqa: E402
from expert_parallel.routing import WAYS, Router  # noqa: E402

CASES = Path(__file__).parent / "deepep_cases.py"
RANKS, EXPERTS, TOPK = 8, 16, 3

pytestmark = pytest.mark.slow

choices = st.lists(st.lists(st.integers(-1, EXPERTS - 1), min_size=TOPK, max_size=TOPK), max_size=300)


def table(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, TOPK)


@cache
def layout_kernel():
    d = tl.dialect("cpu")
    return d.compile(kernels.layout(d, kernels.Sizes(RANKS, EXPERTS, TOPK, 64, "float32", 100, 1)))


@given(choices)
def test_a_layout_counts_tokens_once_per_rank_and_entries_once_per_expert(rows: list[list[int]]) -> None:
    got, each = layout_of(table(rows), EXPERTS, RANKS), EXPERTS // RANKS
    to = [{expert // each for expert in row if expert >= 0} for row in rows]
    assert got.is_token_in_rank.tolist() == [[rank in ranks for rank in range(RANKS)] for ranks in to]
    assert got.tokens_per_rank.tolist() == [sum(rank in ranks for ranks in to) for rank in range(RANKS)]
    assert got.tokens_per_expert.tolist() == [sum(row.count(e) for row in rows) for e in range(EXPERTS)]


@given(choices, st.integers(0, RANKS - 1))
def test_local_experts_are_those_of_the_rank(rows: list[list[int]], rank: int) -> None:
    each = EXPERTS // RANKS
    want = [[e - rank * each if e >= 0 and e // each == rank else -1 for e in row] for row in rows]
    assert local_experts_of(table(rows), rank, EXPERTS, RANKS).tolist() == want


@settings(deadline=None, max_examples=60)
@given(
    choices.filter(len),
    st.dictionaries(st.integers(0, 10**6), st.sampled_from([-2, EXPERTS, 2**33, -(2**62)]), max_size=3),
)
def test_the_kernel_numbers_rows_in_the_order_of_tokens(rows: list[list[int]], wrong: dict[int, int]) -> None:
    topk_idx = table(rows)
    for at, value in wrong.items():
        topk_idx.view(-1)[at % topk_idx.numel()] = value
    valid = (topk_idx >= 0) & (topk_idx < EXPERTS)
    want = layout_of(torch.where(valid, topk_idx, -1), EXPERTS, RANKS)
    chunks = -(-len(rows) // 128)
    position, counts = (
        torch.full((len(rows), RANKS), 99, dtype=torch.int32),
        torch.full((chunks, RANKS), 99, dtype=torch.int32),
    )
    numbers = torch.zeros(RANKS + EXPERTS + 1, dtype=torch.int32)
    layout_kernel()(topk_idx, position, counts, numbers)
    assert torch.equal(position >= 0, want.is_token_in_rank)
    for chunk, (places, expected) in enumerate(zip(position.split(128), counts, strict=True)):
        for rank in range(RANKS):
            taken = places[:, rank][places[:, rank] >= 0].tolist()
            assert taken == list(range(int(expected[rank]))), f"chunk {chunk}, rank {rank}"
    assert torch.equal(counts.sum(0, dtype=torch.int32), want.tokens_per_rank)
    assert torch.equal(numbers[RANKS:-1], want.tokens_per_expert)
    assert int(numbers[-1]) == int((~valid & (topk_idx != -1)).sum())


@given(st.lists(st.integers(0, 1000)), st.integers(1, 300))
def test_aligned_counts_are_the_next_multiples(counts: list[int], alignment: int) -> None:
    for count, rounded in zip(counts, aligned(counts, alignment), strict=True):
        assert rounded % alignment == 0 and 0 <= rounded - count < alignment


@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0, 0, 0, 5])), min_size=1, max_size=8))
def test_an_exchange_is_refused_if_and_only_if_something_is_wrong(told: list[tuple[int, int]]) -> None:
    rows, wrong = [row for row, _ in told], [count for _, count in told]
    said = refusal(rows, wrong, 100, EXPERTS)
    assert bool(said) == (max(rows) > 100 or any(wrong))
    if any(wrong):
        assert f"on rank {wrong.index(5)} " in said
    elif said:
        assert f"rank {rows.index(max(rows))} would receive {max(rows)} rows and has room for 100" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": 6}, "6 experts on 4 ranks"),
        ({"experts": 0}, "0 experts on 4 ranks"),
        ({"topk": 0}, "topk is 0"),
        ({"room": 0}, "max_recv_tokens 0"),
        ({"row_bytes": 24}, "rows of 24 bytes"),
        ({"blocks": 133}, "num_sms is 133: it is 1 to 132"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_a_way_out(change: dict[str, int], words: str) -> None:
    sizes = {"ranks": 4, "experts": 8, "topk": 2, "row_bytes": 64, "room": 10, "blocks": 2, "sms": 132}
    check_sizes(**sizes)
    with pytest.raises(ValueError, match=words):
        check_sizes(**(sizes | change))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("topk", "experts", "ranks"), [(3, 8, 4), (6, 8, 4), (1, 4, 4), (2, 2, 1)])
def test_routings_are_what_their_names_say(way: str, topk: int, experts: int, ranks: int) -> None:
    for rank in range(ranks):
        router = Router(10, topk, experts, ranks, rank, random.Random(rank))
        chosen = router.choose(way)
        assert chosen.dtype == torch.int64 and chosen.shape[1:] == (topk,) and len(chosen) <= 10
        if len(chosen):
            assert int(chosen.min()) >= -1 and int(chosen.max()) < experts
        went = layout_of(chosen, experts, ranks).tokens_per_rank.tolist()
        if way == "all tokens to the last rank":
            assert went == [0] * (ranks - 1) + [10]
        if way == "each rank to itself":
            assert went == [10 * (other == rank) for other in range(ranks)]


def converted(dtype: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int16 to float32 and float32 to int16, by a kernel of the C target."""
    d, size = tl.dialect("cpu"), 1 << 16

    @T.prim_func
    def convert_kernel(
        narrow: T.Tensor((size,), "int16"),
        wide: T.Tensor((size,), "float32"),
        x: T.Tensor((size,), "float32"),
        y: T.Tensor((size,), "int16"),
    ):
        with T.Kernel(1, threads=1, prelude=d.prelude) as _:
            for i in T.serial(size):
                wide[i] = halves.widen(d, dtype, narrow[i])
                y[i] = halves.narrow(d, dtype, x[i])

    every = torch.arange(size).to(torch.int16)
    wide, y = torch.empty(size), torch.empty(size, dtype=torch.int16)
    d.compile(convert_kernel)(every, wide, values, y)
    return wide, y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_converted_as_torch_does_it(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    upwards = torch.where(every.float() > 0, 1.0, -1.0)
    between = torch.nextafter(every.float(), upwards * float("inf"))  # rounds back
    ties = (every.float() + torch.arange(1 << 16).add(1).to(torch.int16).view(dtype).float()) / 2
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0))
    for values in (
        every.float(),
        between,
        ties,
        torch.nextafter(ties, torch.zeros(())),
        bits.to(torch.int32).view(torch.float32),
    ):
        wide, narrow = converted(str(dtype).removeprefix("torch."), values)
        assert torch.equal(wide.isnan(), every.isnan())
        assert torch.equal(wide.nan_to_num(7.0).view(torch.int32), every.float().nan_to_num(7.0).view(torch.int32))
        want, got = values.to(dtype), narrow.view(dtype)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(7.0).view(torch.int16), want.nan_to_num(7.0).view(torch.int16))


def test_ranks_in_odd_situations() -> None:
    assert launch(CASES, ["--rounds", str(len(WAYS))], 4).endswith(" rows")


def test_a_rank_that_fails_ends_the_dispatch_of_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(ExampleError, match="fails on purpose"):
        launch(CASES, ["--fail", "1", "--timeout", "200"], 4)
    assert time.monotonic() - start < 100
