"""all_to_all_permute of all ranks of a group on one GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.exchange_cases import ExchangeCase, random_case, ulysses
from tscompile.templates import find_template
from tscompile.templates.nvlink.channel import Site

from .group import SLOT_BYTES, Group

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="needs an NVIDIA GPU (H100 or H200)"))


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


class Exchange:
    """One site of a group."""

    def __init__(self, group: Group, case: ExchangeCase, dtype: torch.dtype = torch.bfloat16) -> None:
        self.group, self.case = group, case
        self.sites = [Site(7) for _ in range(group.size)]
        self.plan = case.plan("nvlink", dtype)
        found = find_template("all_to_all_permute", "nvlink")
        assert found is not None
        self.template = found

        def make(shape: Any) -> Tensor:
            return torch.randn(*shape, device="cuda").to(dtype)

        self.inputs = [case.inputs(make) for _ in range(group.size)]
        assert 0 < found.scratch_bytes(self.plan, group.size, self.inputs[0]) <= SLOT_BYTES
        torch.cuda.synchronize()

    def refill(self) -> None:
        for x in (x for inputs in self.inputs for x in inputs):
            x.copy_(torch.randn_like(x))

    def call(self, rank: int) -> list[Tensor]:
        """On the current stream."""
        outputs: list[Tensor] = self.template.run(
            self.group.links[rank].open(self.sites[rank]), self.plan, self.inputs[rank]
        )
        return outputs

    def truth(self) -> list[list[Tensor]]:
        return [self.case.truth(self.inputs, rank) for rank in range(self.group.size)]

    def check(self, outputs: list[list[Tensor]], truth: list[list[Tensor]]) -> None:
        for rank, (found, wanted) in enumerate(zip(outputs, truth, strict=True)):
            for index, (got, want) in enumerate(zip(found, wanted, strict=True)):
                assert torch.equal(got, want), (self.case.name, rank, index)


def cases(ranks: int) -> list[ExchangeCase]:
    return [
        *ulysses(ranks, 1, 96, 4, 128),
        *ulysses(ranks, 2, 33, 2, 64),
        *ulysses(ranks, 1, 7, 1, 8),
        *(random_case(ranks, seed, 8) for seed in range(12)),
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_bits(patch: pytest.MonkeyPatch, ranks: int) -> None:
    group = Group(patch, ranks)
    for case in cases(ranks):
        op = Exchange(group, case)
        truth = op.truth()
        for _ in range(3):
            outputs = group.each(op.call)
            torch.cuda.synchronize()
            op.check(outputs, truth)
            op.refill()
            truth = op.truth()
            torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_other_dtypes(patch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    group = Group(patch, 3)
    op = Exchange(group, random_case(3, 5, 8), dtype)
    truth = op.truth()
    outputs = group.each(op.call)
    torch.cuda.synchronize()
    op.check(outputs, truth)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_deep_queue_with_pauses(patch: pytest.MonkeyPatch, pytestconfig: pytest.Config, ranks: int) -> None:
    """Ranks are held up at random, and outputs of all calls are right."""
    group, dice = Group(patch, ranks), random.Random(ranks)
    ops = [Exchange(group, case) for case in cases(ranks)]
    truths = [op.truth() for op in ops]
    torch.cuda.synchronize()
    kept: list[tuple[int, list[list[Tensor]]]] = []
    for number in range(pytestconfig.getoption("--iterations")):
        which = dice.randrange(len(ops))

        def late(rank: int, op: Exchange = ops[which]) -> list[Tensor]:
            if dice.random() < 0.2:
                torch.cuda._sleep(int(dice.random() * 200_000))
            return op.call(rank)

        kept.append((which, group.each(late)))
        if len(kept) == 40 or number + 1 == pytestconfig.getoption("--iterations"):
            torch.cuda.synchronize()
            for found, outputs in kept:
                ops[found].check(outputs, truths[found])
            kept.clear()


@pytest.mark.parametrize("ranks", [2, 4])
def test_graphs_among_eager_calls(patch: pytest.MonkeyPatch, ranks: int) -> None:
    group = Group(patch, ranks)
    ops = [Exchange(group, case) for case in cases(ranks)[:4]]
    for op in ops:
        group.each(op.call)
    torch.cuda.synchronize()
    graphs, results = [], []
    for rank in range(ranks):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=group.streams[rank], capture_error_mode="thread_local"):
            results.append([op.call(rank) for op in ops])
        graphs.append(graph)
    for replay in range(5):
        for op in ops:
            op.refill()
        truths = [op.truth() for op in ops]
        for found in results:
            for outputs in found:
                for output in outputs:
                    output.fill_(-1.0)
        torch.cuda.synchronize()
        group.each(lambda rank: graphs[rank].replay())
        eager = [group.each(op.call) for op in ops] if replay % 2 else []
        torch.cuda.synchronize()
        for number, op in enumerate(ops):
            op.check([results[rank][number] for rank in range(ranks)], truths[number])
            if eager:
                op.check(eager[number], truths[number])


def test_a_rank_that_stays_away(patch: pytest.MonkeyPatch) -> None:
    """The others give up after the time-out, say whom they waited for, and return NaN."""
    group = Group(patch, 3, timeout_s=1.0)
    op = Exchange(group, cases(3)[0])
    outputs = group.each(op.call, ranks=[0, 1])
    torch.cuda.synchronize()
    records = [link.read_record() for link in group.links[:2] if link.has_record()]
    assert len(records) == 2 and any(record.peer == 2 and record.site == 7 for record in records), records
    for rank in (0, 1):
        assert all(output.isnan().any() for output in outputs[rank])
