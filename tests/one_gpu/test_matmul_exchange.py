"""matmul_all_to_all of all ranks of a group on one GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import Case, projected
from tests.templates.nvlink.fake_gpu import most_chunks
from tscompile.templates import find_template
from tscompile.templates.nvlink.channel import Site

from .group import SLOT_BYTES, Group

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="needs an NVIDIA GPU (H100 or H200)"))


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


# As tests/cases.py takes them: one matmul for q, k and v, three, or others; exchanges apart, fused, or delivered twice.
SHAPES: list[dict[str, Any]] = [
    {"batch": 1, "tokens": 96, "dim": 128, "k": 256},
    {"batch": 1, "tokens": 96, "dim": 128, "k": 256, "spelling": 1, "bias": True},
    {"parts": (1, 1, 1), "batch": 1, "tokens": 257, "dim": 128, "k": 512, "bias": True},
    {"parts": (1, 1, 1), "batch": 2, "tokens": 33, "dim": 64, "k": 200, "spelling": 2, "strided": True},
    {"parts": (3,), "batch": 3, "tokens": 7, "dim": 8, "k": 40, "spelling": 2, "bias": True},
    {"parts": (2, 1), "batch": 5, "tokens": 3, "dim": 24, "k": 64, "spelling": 1},
    {"parts": (1,), "batch": 1, "tokens": 128, "dim": 64, "k": 512},
]


class Op:
    """One site of a group: inputs of all ranks, and what the ranks should return. The inputs come from one of several cases."""

    def __init__(self, group: Group, shape: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
        self.group, self.shape = group, shape
        self.sites = [Site(7) for _ in range(group.size)]
        name = str(dtype).removeprefix("torch.")
        self._cases = [projected(group.size, seed, name, **shape) for seed in range(2)]
        self.case = self._cases[0]
        self.plan = self.case.plan
        found = find_template("matmul_all_to_all", "nvlink")
        assert found is not None
        self.template = found
        self.args = [self._on_gpu(args) for args in self.case.args]
        assert 0 < found.scratch_bytes(self.plan, group.size, *self.args[0]) <= SLOT_BYTES

    def _on_gpu(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        lhs, rhs, biases, sizes = args
        device = self.group.device
        lhs, rhs = ([_strided_copy(x, device) for x in side] for side in (lhs, rhs))
        return lhs, rhs, [bias if bias is None else bias.to(device) for bias in biases], sizes

    def refill(self) -> None:
        """Another case's inputs, in the same memory."""
        torch.cuda.synchronize()
        self.case = self._cases[1 - self._cases.index(self.case)]
        for here, there in zip(self.args, self.case.args, strict=True):
            for mine, new in zip(here[:3], there[:3], strict=True):
                for x, value in zip(mine, new, strict=True):
                    if x is not None:
                        x.copy_(value)
        torch.cuda.synchronize()

    def call(self, rank: int) -> list[Tensor]:
        """On the current stream."""
        channel = self.group.links[rank].open(self.sites[rank])
        outputs: list[Tensor] = self.template.run(channel, self.plan, *self.args[rank])
        return outputs

    def check(self, outputs: list[list[Tensor]], case: Case | None = None) -> None:
        for rank, found in enumerate(outputs):
            (case or self.case).check(rank, [output.cpu() for output in found])


def _strided_copy(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@pytest.mark.parametrize("cut", [0, 2, 5], ids=["as planned", "two chunks", "as many as can be"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_results_and_bits(patch: pytest.MonkeyPatch, ranks: int, cut: int) -> None:
    """The right results, and the same bits again."""
    group = Group(patch, ranks)
    if cut:
        most_chunks(patch, cut)
    for shape in SHAPES:
        op = Op(group, shape)
        for _ in range(3):
            first = group.each(op.call)
            torch.cuda.synchronize()
            op.check(first)
            again = group.each(op.call)
            torch.cuda.synchronize()
            for a, b in zip(first, again, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True)), f"{shape}: other bits"
            op.refill()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(patch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    group = Group(patch, 3)
    most_chunks(patch)
    for shape in SHAPES[::2]:
        op = Op(group, shape, dtype)
        outputs = group.each(op.call)
        torch.cuda.synchronize()
        op.check(outputs)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_deep_queue_with_pauses(patch: pytest.MonkeyPatch, pytestconfig: pytest.Config, ranks: int) -> None:
    """Ops of changing shapes follow each other on the same memory; ranks are held up at random."""
    group = Group(patch, ranks)
    most_chunks(patch)
    ops = [Op(group, shape) for shape in SHAPES]
    for op in ops:
        group.each(op.call)  # loads the kernels and makes the tables
        torch.cuda.synchronize()
    dice = random.Random(ranks)
    for _ in range(0, pytestconfig.getoption("--iterations"), 8):
        order = [dice.randrange(len(ops)) for _ in range(8)]
        results = []
        for which in order:
            if dice.random() < 0.5:
                with torch.cuda.stream(group.streams[dice.randrange(ranks)]):
                    torch.cuda._sleep(int(dice.random() * 300_000))
            results.append(group.each(ops[which].call))
        torch.cuda.synchronize()
        for which, outputs in zip(order, results, strict=True):
            ops[which].check(outputs)
        ops[dice.randrange(len(ops))].refill()


@pytest.mark.parametrize("ranks", [2, 4])
def test_graphs_among_eager_calls(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """Captured calls are replayed an odd number of times between eager ones."""
    group = Group(patch, ranks)
    most_chunks(patch)
    ops = [Op(group, shape) for shape in SHAPES]
    for op in ops:
        group.each(op.call)
        torch.cuda.synchronize()
    dice = random.Random(ranks)
    used = ops[:5]
    graphs = [torch.cuda.CUDAGraph() for _ in range(ranks)]
    captured: list[list[list[Tensor]]] = []
    for rank, graph in enumerate(graphs):
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            captured.append([op.call(rank) for op in used])
    for _ in range(6):
        for op in ops:
            op.refill()
        for _ in range(dice.choice((1, 2, 3))):
            group.each(lambda rank: graphs[rank].replay())
        torch.cuda.synchronize()
        for number, op in enumerate(used):
            op.check([captured[rank][number] for rank in range(ranks)])
        for _ in range(dice.choice((0, 1, 3))):
            op = dice.choice(ops)
            outputs = group.each(op.call)
            torch.cuda.synchronize()
            op.check(outputs)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=["three exchanges", "one"])
def test_a_rank_that_stays_away(patch: pytest.MonkeyPatch, shape: dict[str, Any]) -> None:
    """The others give up in time, fill their outputs with NaN and leave a record."""
    group = Group(patch, 3, timeout_s=1.5)
    most_chunks(patch)
    op = Op(group, shape)
    group.each(op.call)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(group.streams[0])
    outputs = group.each(op.call, ranks=[0, 1])
    end.record(group.streams[0])
    torch.cuda.synchronize()
    assert 1e3 <= start.elapsed_time(end) <= 6e3
    for rank in (0, 1):
        assert all(output.isnan().all() for output in outputs[rank]), rank
        assert group.links[rank].has_record()
    records = [group.links[rank].read_record() for rank in (0, 1)]
    assert any(r.site == 7 and r.peer == 2 and r.expected > r.seen for r in records), records
