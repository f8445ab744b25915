"""Exchanges as the kernel takes them: its table, read by plain Python, gives what the program asks for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.exchange_cases import ExchangeCase, random_case, ulysses
from tscompile.problem import Delivery
from tscompile.templates.nvlink.kernels.config import DATA_FLAGS, GRID_DIMS, UNIT_WORDS
from tscompile.templates.nvlink.legs import Layout, Leg, batches_of, legs_of, rows_of, worded

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


def test_a_part_of_the_heads() -> None:
    case = ulysses(2, 2, 3, 4, 16)[0]
    inputs = [case.inputs(lambda shape: torch.randn(*shape).bfloat16()) for _ in range(2)]
    truth = case.truth(inputs, 0)
    outputs = [torch.zeros_like(want) for want in truth]
    for group in (0, 1):
        legs = worded(case.deliveries, case.joins, inputs[0], [(3, 2 * group, 2)] * 3)
        assert legs is not None
        run(case, legs, inputs, outputs, 0)
        for got, want in zip(outputs, truth, strict=True):
            assert torch.equal(got[:, : 2 * group + 2], want[:, : 2 * group + 2])
            assert group or not got[:, 2:].any()


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


def test_batches_fit_the_flags() -> None:
    small = batches_of([100, 300], 2)
    assert (small.words, small.firsts, small.count) == (UNIT_WORDS, (0, 1), 3)
    for ranks in (2, 4, 8):
        for words in ([1 << 12], [1 << 22] * 3, [1 << 26] * 3):
            for share in (1, 8):
                found = batches_of(words, ranks, share)
                assert found.flags(ranks) <= DATA_FLAGS // share
                assert found.count * found.words >= sum(words)
                assert found.scratch_bytes(ranks) >= (ranks - 1) * 16 * sum(words)
