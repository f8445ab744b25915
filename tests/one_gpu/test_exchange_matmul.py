"""all_to_all_matmul of all ranks of a group on one GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tscompile.problem import GatherUse, Plan
from tscompile.templates import find_template
from tscompile.templates.all_to_all_gemm import Received
from tscompile.templates.nvlink import all_to_all_gemm
from tscompile.templates.nvlink.channel import Site

from .group import SLOT_BYTES, Group

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="needs an NVIDIA GPU (H100 or H200)"))


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


@dataclass(frozen=True)
class Shape:
    """outers, inner: panels that a rank sends another, of each exchange, and columns of one; rows of the left operand; columns of each
    right one.

    lies: "together", or with gaps between what goes to each rank ("apart"), or within ("strided").
    chunks: in which the operand travels; as many as the sizes choose, if 0.
    """

    outers: tuple[int, ...]
    inner: int
    rows: int
    free: tuple[int, ...]
    lies: str = "together"
    plain_layout: bool = False
    bias: bool = False
    returned: bool = False
    chunks: int = 0


SHAPES = [
    Shape((1,), 128, 256, (512,)),
    Shape((1,), 512, 128, (264,), bias=True, returned=True),
    Shape((1,), 72, 37, (520,), plain_layout=True, returned=True),  # panels end within a step of k
    Shape((1,), 8, 5, (8,), lies="apart"),
    Shape((1,), 256, 300, (256, 1032), lies="strided", plain_layout=True),
    Shape((3,), 64, 200, (512,), returned=True),
    Shape((1, 1, 1), 128, 256, (512,), returned=True),
    Shape((1, 1, 1), 40, 131, (264,), lies="apart", plain_layout=True, bias=True),
    Shape((1, 2), 64, 64, (1032,), lies="strided", returned=True),
    Shape((1, 1), 256, 1040, (2056,), returned=True),
    Shape((1,), 64, 16, (72, 71), returned=True),  # the second follows on what was received
    Shape((1, 1), 64, 16, (72, 71)),
    Shape((1,), 128, 1040, (520,), returned=True, chunks=4),
    Shape((2,), 72, 300, (264, 72), plain_layout=True, bias=True, chunks=2),
    Shape((1, 1, 1), 64, 520, (1032,), returned=True, chunks=3),
    Shape((1, 1), 40, 257, (512,), lies="apart", chunks=3),
]


class Op:
    """One site of a group: inputs of all ranks, and what the ranks should return."""

    def __init__(self, group: Group, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        self.group, self.shape, self.dtype = group, shape, dtype
        self.sites = [Site(7) for _ in range(group.size)]
        name = str(dtype).removeprefix("torch.")
        use = GatherUse("lhs", False, "cols", name)
        uses = (use,) * len(shape.free)
        self.plan = Plan("all_to_all_matmul", "g/site", "nvlink", name, uses=uses, return_gathered=shape.returned)
        found = find_template("all_to_all_matmul", "nvlink")
        assert found is not None
        self.template = found
        ranks, rows, k = group.size, shape.rows, group.size * sum(shape.outers) * shape.inner

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=group.device)

        def sent(outer: int) -> Tensor:
            if shape.lies == "apart":
                return empty(ranks, 2 * rows, outer, shape.inner)[:, :rows]
            if shape.lies == "strided":
                return empty(rows, ranks, outer, shape.inner).transpose(0, 1)
            return empty(ranks, rows, outer, shape.inner)

        def weight(n: int) -> Tensor:
            return empty(k, n) if shape.plain_layout else empty(n, k).t()

        self.inputs = [[sent(outer) for outer in shape.outers] for _ in range(ranks)]
        self.weights = [[weight(n) for n in shape.free] for _ in range(ranks)]
        self.biases = [[empty(n) if shape.bias else None for n in shape.free] for _ in range(ranks)]
        self.refill()
        assert 0 < found.scratch_bytes(self.plan, ranks, *self.args(0)) <= SLOT_BYTES
        # Loading a kernel of torch's waits for the GPU, on which one of ours would wait for ranks that have not been called yet.
        for each, bias in zip(self.weights[0], self.biases[0], strict=True):
            torch.mm(empty(rows, k), each) if bias is None else torch.addmm(bias, empty(rows, k), each)

    def refill(self) -> None:
        for rank in range(self.group.size):
            for x in self.inputs[rank]:
                x.normal_()
            for weight in self.weights[rank]:
                weight.normal_().mul_(weight.shape[0] ** -0.5)
            for bias in self.biases[rank]:
                if bias is not None:
                    bias.normal_()
        torch.cuda.synchronize()

    def args(self, rank: int) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        return self.inputs[rank], self.weights[rank], self.biases[rank]

    def call(self, rank: int) -> list[Tensor]:
        """On the current stream."""
        with pytest.MonkeyPatch.context() as patch:
            if self.shape.chunks:
                patch.setattr(all_to_all_gemm, "chunk_count", lambda *_: (self.shape.chunks, 0.0))
            channel = self.group.links[rank].open(self.sites[rank])
            outputs: list[Tensor] = self.template.run(channel, self.plan, *self.args(rank))
        return outputs

    def truth(self) -> list[list[Tensor]]:
        """Of each rank: the products in float32, what was received as it is."""
        found = []
        for rank in range(self.group.size):
            whole = Received(self.inputs[rank])
            for source, inputs in enumerate(self.inputs):
                for number, x in enumerate(inputs):
                    whole.put(number, source, x[rank])
            products = []
            for weight, bias in zip(self.weights[rank], self.biases[rank], strict=True):
                product = whole.tensor.float() @ weight.float()
                products.append(product if bias is None else product + bias.float())
            found.append([*products, whole.tensor] if self.shape.returned else products)
        torch.cuda.synchronize()
        return found

    def check(self, outputs: list[list[Tensor]], truth: list[list[Tensor]]) -> None:
        """Rounding of the result, and nothing else; what was received has its bits."""
        eps = torch.finfo(self.dtype).eps
        for rank, (got, want) in enumerate(zip(outputs, truth, strict=True)):
            assert len(got) == len(want)
            for index, (a, b) in enumerate(zip(got, want, strict=True)):
                where = (self.shape, rank, index)
                assert a.shape == b.shape, where
                if index == len(self.shape.free):
                    assert torch.equal(a, b), where
                    continue
                difference = a.float() - b
                error, largest = float(difference.norm() / b.norm()), float(difference.abs().max() / b.abs().max())
                assert error <= eps and largest <= 4 * eps, (*where, error, largest)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_results_and_bits(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """Every shape: the right results, and the same bits again."""
    group = Group(patch, ranks)
    for shape in SHAPES:
        op = Op(group, shape)
        for _ in range(2):
            op.refill()
            truth = op.truth()
            first = group.each(op.call)
            torch.cuda.synchronize()
            op.check(first, truth)
            again = group.each(op.call)
            torch.cuda.synchronize()
            for a, b in zip(first, again, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True)), f"{shape}: other bits"


def test_float16(patch: pytest.MonkeyPatch) -> None:
    group = Group(patch, 4)
    for shape in SHAPES[::3]:
        op = Op(group, shape, torch.float16)
        truth = op.truth()
        outputs = group.each(op.call)
        torch.cuda.synchronize()
        op.check(outputs, truth)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_deep_queue_with_pauses(patch: pytest.MonkeyPatch, pytestconfig: pytest.Config, ranks: int) -> None:
    """Ops of changing shapes follow each other on the same memory; ranks are held up at random."""
    group = Group(patch, ranks)
    ops = [Op(group, shape) for shape in SHAPES]
    truths = [op.truth() for op in ops]
    for op in ops:
        group.each(op.call)  # loads the kernels and makes the tables
        torch.cuda.synchronize()
    dice = random.Random(ranks)
    for _ in range(0, pytestconfig.getoption("--iterations"), 12):
        order = [dice.randrange(len(ops)) for _ in range(12)]
        results = []
        for which in order:
            if dice.random() < 0.5:
                with torch.cuda.stream(group.streams[dice.randrange(ranks)]):
                    torch.cuda._sleep(int(dice.random() * 300_000))
            results.append(group.each(ops[which].call))
        torch.cuda.synchronize()
        for which, outputs in zip(order, results, strict=True):
            ops[which].check(outputs, truths[which])


@pytest.mark.parametrize("ranks", [2, 4])
def test_graphs_among_eager_calls(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """Captured calls are replayed an odd number of times between eager ones."""
    group = Group(patch, ranks)
    ops = [Op(group, shape) for shape in SHAPES]
    for op in ops:
        group.each(op.call)
        torch.cuda.synchronize()
    dice = random.Random(ranks)
    used = [*ops[:3], *ops[5:8], *ops[-5:]]
    graphs = [torch.cuda.CUDAGraph() for _ in range(ranks)]
    captured: list[list[list[Tensor]]] = []
    for rank, graph in enumerate(graphs):
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            captured.append([op.call(rank) for op in used])
    for _ in range(6):
        for op in ops:
            op.refill()
        truths = [op.truth() for op in ops]
        for _ in range(dice.choice((1, 2, 3))):
            group.each(lambda rank: graphs[rank].replay())
        torch.cuda.synchronize()
        for number, op in enumerate(used):
            op.check([captured[rank][number] for rank in range(ranks)], truths[ops.index(op)])
        for _ in range(dice.choice((0, 1, 3))):
            which = dice.randrange(len(ops))
            outputs = group.each(ops[which].call)
            torch.cuda.synchronize()
            ops[which].check(outputs, truths[which])


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6], SHAPES[-2]], ids=["one exchange", "three", "chunks"])
def test_a_rank_that_stays_away(patch: pytest.MonkeyPatch, shape: Shape) -> None:
    """The others give up in time, fill their outputs with NaN and leave a record."""
    group = Group(patch, 3, timeout_s=1.5)
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
