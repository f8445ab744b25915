"""Exchanges as the kernel takes them: its table, read by plain Python, gives what the program asks for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.exchange_cases import ExchangeCase, random_case, ulysses
from tscompile.problem import Delivery
from tscompile.templates.nvlink.all_to_all import prepared
from tscompile.templates.nvlink.kernels.config import DATA_FLAGS, GRID_DIMS, MAX_LEGS, UNIT_WORDS, WORD_BYTES
from tscompile.templates.nvlink.legs import Layout, Leg, batches_of, in_words, legs_of, rows_of, worded

ITEMS = 8  # bfloat16 of a word


def words_of(storage: Tensor) -> Tensor:
    """A tensor's memory as words."""
    return torch.as_strided(storage, (storage.untyped_storage().nbytes() // 2 // ITEMS, ITEMS), (ITEMS, 1), 0)


def offset(row: Sequence[int], word: int) -> int | None:
    """As exchange.h reads a row of the table."""
    sizes, *others = (row[5 + part * GRID_DIMS : 5 + (part + 1) * GRID_DIMS] for part in range(5))
    at = 0
    for size, stride, index, multiplier, shift in reversed(list(zip(sizes, *others, strict=True))):
        if size == 1:
            continue
        quotient = (word * (multiplier % (1 << 32)) >> 32) >> shift
        assert quotient == word // size
        word, i = quotient, word - quotient * size
        if index >= 0:
            if i != index:
                return None
        else:
            at += i * stride
    assert word == 0
    return at


def run(
    case: ExchangeCase, legs: Sequence[Leg], inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor], rank: int
) -> None:
    """Deliver what all ranks send to `rank`, word by word, from the table's rows alone."""
    batches = batches_of([leg.words for leg in legs], len(inputs))
    rows = rows_of(legs, batches)
    for number, leg in enumerate(legs):
        _, words, first, count, *_ = row = rows[number]
        assert words == leg.words
        for source, sent in enumerate(inputs):
            x = sent[leg.source.tensor]
            memory = words_of(x)
            start = x.storage_offset() // ITEMS + leg.source.start + rank * row[4]
            for target, place in zip(leg.targets, rows[len(legs) + first : len(legs) + first + count], strict=True):
                out = words_of(outputs[target.tensor])
                for word in range(words):
                    here, there = offset(row, word), offset(place, word)
                    assert here is not None
                    if there is not None:
                        out[target.start + source * place[4] + there] = memory[start + here]


def check(case: ExchangeCase, ranks: int) -> None:
    inputs = [case.inputs(lambda shape: torch.randn(*shape).bfloat16()) for _ in range(ranks)]
    legs = worded(case.deliveries, case.joins, inputs[0])
    assert legs is not None
    rank = ranks - 1
    truth = case.truth(inputs, rank)
    outputs = [torch.full_like(want, float("nan")) for want in truth]
    run(case, legs, inputs, outputs, rank)
    for got, want in zip(outputs, truth, strict=True):
        assert torch.equal(got, want), case.name


@pytest.mark.parametrize("ranks", [2, 3])
def test_attention(ranks: int) -> None:
    for case in [*ulysses(ranks, 1, 5, 2, 16), *ulysses(ranks, 2, 3, 1, 8)]:
        check(case, ranks)


@pytest.mark.parametrize("seed", range(30))
def test_random(seed: int) -> None:
    check(random_case(2, seed, ITEMS), 2)


def test_dims_that_lie_alike_are_one() -> None:
    """Heads and their dims are one run on both sides: an index of two dims, whatever the program's shapes are."""
    x = torch.empty(64, 2, 4, 128, dtype=torch.bfloat16, device="meta").permute(1, 0, 2, 3)
    found = worded([Delivery(0, (0, 1, 2, 3))], [1], [x])
    assert found is not None and found[0].sizes == (64, 64)
    assert found[0].source == Layout(0, 0, 64, (128, 1), (-1, -1))
    assert found[0].targets == (Layout(0, 0, 4096, (64, 1), (-1, -1)),)


def test_what_the_kernel_cannot_take() -> None:
    def refused(x: Tensor, *order: int) -> bool:
        return worded([Delivery(0, order)], [1], [x]) is None

    make = {"dtype": torch.bfloat16, "device": "meta"}
    assert not refused(torch.empty(2, 5, 8, **make), 0, 1, 2)
    assert refused(torch.empty(2, 5, 12, **make), 1, 0, 2), "rows of 24 bytes"
    assert refused(torch.empty(2, 16, 8, **make), 0, 2, 1), "the innermost dim is another"
    assert refused(torch.empty(2, 8, 16, **make).transpose(1, 2), 0, 1, 2), "the input's innermost dim is another"
    legs = legs_of([Delivery(0, (0, 1, 2))], [1], [torch.empty(2, 5, 8, **make)])
    assert legs[0].targets[0].strides == (8, 1)


def test_batches_of_short_legs() -> None:
    small = batches_of([100, 300], 2)
    assert (small.words, small.firsts, small.count) == (UNIT_WORDS, (0, 1), 3)


# ---- any sizes and strides ----------------------------------------------------------------------------------------------------

_WORDS = st.lists(st.one_of(st.integers(1, 1 << 12), st.integers(1, 1 << 26)), min_size=1, max_size=MAX_LEGS)


@given(words=_WORDS, ranks=st.integers(2, 8))
def test_batches_cover_all_words_once(words: list[int], ranks: int) -> None:
    """As the kernel finds a batch's leg and its part of it; and the flags and the slot suffice for all batches of all peers."""
    found = batches_of(words, ranks)
    assert found.words % UNIT_WORDS == 0 and found.flags(ranks) == (ranks - 1) * found.count <= DATA_FLAGS
    assert found.scratch_bytes(ranks) == found.flags(ranks) * found.words * WORD_BYTES
    ends = [*found.firsts[1:], found.count]
    for first, end, size in zip(found.firsts, ends, words, strict=True):
        assert (end - first - 1) * found.words < size <= (end - first) * found.words
    # No more batches than a launch does well with, unless the longest ones are as many.
    assert found.flags(ranks) <= 280 or found.words >= 16 * UNIT_WORDS


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), ranks=st.integers(2, 4), pads=st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_all_ranks_cut_alike_whatever_their_strides(seed: int, ranks: int, pads: list[int]) -> None:
    """A rank with strides that the kernel cannot take copies its inputs; the sizes decide whether there is a kernel at all."""
    case = random_case(ranks, seed, ITEMS)
    plain = [torch.empty(x.shape, dtype=torch.bfloat16, device="meta") for x in case.inputs(torch.empty)]
    truth = worded(case.deliveries, case.joins, plain)
    assert truth is not None
    wanted = batches_of([leg.words for leg in truth], ranks)
    dice = random.Random(seed)

    def other(x: Tensor) -> Tensor:
        """The same sizes in another order of memory, with gaps that may be no whole words."""
        order = dice.sample(range(x.dim()), x.dim())
        stored = torch.empty([x.shape[dim] + dice.choice(pads) for dim in order], dtype=x.dtype, device="meta")
        for at, dim in enumerate(order):
            stored = stored.narrow(at, 0, x.shape[dim])
        return stored.permute([order.index(dim) for dim in range(x.dim())])

    plan = case.plan("nvlink", torch.bfloat16)
    for inputs in (plain, [other(x) for x in plain]):
        found = prepared(plan, inputs, ranks)
        assert found is not None
        legs, batches, copied = found
        assert batches == wanted and [leg.words for leg in legs] == [leg.words for leg in truth]
        assert [len(leg.targets) for leg in legs] == [len(leg.targets) for leg in truth]
        assert copied == (worded(case.deliveries, case.joins, inputs) is None)


@st.composite
def item_legs(draw: st.DrawFn) -> Leg:
    """Of up to five dims in any strides, with targets that may take one index of a dim. Most consist of words."""
    outer_sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=4))
    sizes = [*outer_sizes, draw(st.sampled_from([8, 8, 16, 24, 2, 4, 12]))]
    dims, last = len(sizes), len(sizes) - 1

    def rarely(*values: int) -> int:
        """The first one, as a rule."""
        return values[0] if draw(st.integers(0, 15)) else draw(st.sampled_from(values[1:]))

    def layout(tensor: int, is_target: bool) -> Layout:
        outer = draw(st.permutations(range(last)))
        order = [*outer, last] if rarely(0, 1) == 0 else [last, *outer]
        if draw(st.booleans()):
            order = list(range(dims))
        strides, stride = [0] * dims, rarely(1, 2)
        for dim in reversed(order):
            strides[dim] = stride
            stride = stride * sizes[dim] + draw(st.sampled_from([0, 0, 0, 8])) + rarely(0, 4)
        fixed = [-1] * dims
        if is_target and draw(st.integers(0, 3)) == 0:
            dim = draw(st.integers(0, last))
            strides[dim], fixed[dim] = 0, draw(st.integers(0, sizes[dim] - 1))
        return Layout(tensor, rarely(24, 4), rarely(8, 12), tuple(strides), tuple(fixed))

    targets = [layout(index, True) for index in range(draw(st.integers(1, 2)))]
    return Leg(tuple(sizes), layout(0, False), tuple(targets))


def places(leg: Leg, layout: Layout) -> list[int | None]:
    """Of each item of the grid, one after the other."""
    found: list[int | None] = []
    for index in itertools.product(*map(range, leg.sizes)):
        taken = all(at in (i, -1) for at, i in zip(layout.fixed, index, strict=True))
        at = sum(i * stride for i, stride in zip(index, layout.strides, strict=True))
        found.append(layout.start + at if taken else None)
    return found


def runs(leg: Leg, layout: Layout) -> list[int | None] | None:
    """Of each word of the grid, in words; None if one is in pieces."""
    items, found = places(leg, layout), []
    if len(items) % ITEMS or layout.rank_stride % ITEMS:
        return None
    for first in range(0, len(items), ITEMS):
        at = items[first]
        if items[first : first + ITEMS] != ([None] * ITEMS if at is None else list(range(at, at + ITEMS))):
            return None
        if at is not None and at % ITEMS:
            return None
        found.append(None if at is None else at // ITEMS)
    return found


@settings(deadline=None, max_examples=400)
@given(leg=item_legs())
def test_words_are_the_items_of_the_grid(leg: Leg) -> None:
    """Whatever is in words is what was asked for; and what consists of words is in words."""
    layouts = (leg.source, *leg.targets)
    wanted = [runs(leg, layout) for layout in layouts]
    found = in_words(leg, 2)
    if found is None:
        # A dim of which one index is taken is not merged with those inside of it, so it may not be the innermost.
        kept = [dim for dim, size in enumerate(leg.sizes) if size > 1]
        innermost = bool(kept) and any(layout.fixed[kept[-1]] >= 0 for layout in layouts)
        assert None in wanted or innermost or short_inside_of_fixed(leg)
        return
    assert found.words * ITEMS == prod(leg.sizes) and len(found.sizes) <= GRID_DIMS
    for layout, want in zip((found.source, *found.targets), wanted, strict=True):
        assert places(found, layout) == want
    assert [t.rank_stride * ITEMS for t in (found.source, *found.targets)] == [t.rank_stride for t in layouts]


def short_inside_of_fixed(leg: Leg) -> bool:
    """The dims inside of one that a target takes an index of are no whole words."""
    fixed = [dim for target in leg.targets for dim, at in enumerate(target.fixed) if at >= 0]
    return any(prod(leg.sizes[dim + 1 :]) % ITEMS for dim in fixed)
