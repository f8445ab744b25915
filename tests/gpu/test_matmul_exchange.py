"""Projections whose results are exchanged, over NVLink: sizes of models, under delays, in graphs among eager calls.

torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest tests/gpu/test_matmul_exchange.py -x -q
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import direct
from benchmarks.gpu_harness import allowed, errors_of
from benchmarks.harness import poison
from tests.direct_ops import pause
from tests.gpu.conftest import World
from tscompile.problem import Delivery, Departure


@dataclass(frozen=True)
class Shape:
    """heads of q, k and v together, of `dim` each; `tokens` of a rank; `k` is what x has. separate: a matmul for each of the three."""

    heads: tuple[int, int, int]
    dim: int
    tokens: int
    k: int
    separate: bool = False
    bias: bool = False


def shapes(world: World) -> list[Shape]:
    if not world.cuda:
        return [Shape((8, 4, 4), 8, 6, 32), Shape((4, 4, 4), 8, 5, 16, separate=True, bias=True)]
    return [
        Shape((32, 32, 32), 128, 1024, 4096),
        Shape((32, 8, 8), 128, 2048, 4096, bias=True),
        Shape((32, 32, 32), 128, 4096, 4096, separate=True),
        Shape((32, 8, 8), 64, 333, 2048, separate=True, bias=True),
        Shape((8, 8, 8), 128, 16, 1024),
    ]


class Op:
    """A site with its tensors; outputs `[heads of this rank, all tokens, dim]` of q, k and v."""

    def __init__(self, world: World, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        self.world, self.shape = world, shape
        ranks, widths = world.size, [count * shape.dim for count in shape.heads]
        self.widths = widths if shape.separate else [sum(widths)]

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=world.device)

        self.x = empty(shape.tokens, shape.k)
        self.weights = [empty(n, shape.k) for n in self.widths]
        self.biases = [empty(n) if shape.bias else None for n in self.widths]
        firsts = [0, 0, 0] if shape.separate else [0, widths[0], widths[0] + widths[1]]
        departures = [
            Departure(i if shape.separate else 0, 4, (), (1, 0, 2, 3), columns=(firsts[i], widths[i])) for i in range(3)
        ]
        grids = [(shape.tokens, ranks, count // ranks, shape.dim) for count in shape.heads]
        deliveries = [Delivery(i, (2, 0, 1, 3)) for i in range(3)]
        self.refill()
        lhs, rhs = [self.x] * len(self.weights), [weight.t() for weight in self.weights]
        self.call = direct.matmul_exchange(lhs, rhs, departures, grids, deliveries, [1] * 3, self.biases)

    def refill(self) -> None:
        self.x.normal_()
        for weight in self.weights:
            weight.normal_().mul_(self.shape.k**-0.5)
        for bias in self.biases:
            if bias is not None:
                bias.normal_()

    def original(self, dtype: torch.dtype) -> list[Tensor]:
        """torch's matmuls and collectives."""
        made = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            product = self.x.to(dtype) @ weight.to(dtype).t()
            made.append(product if bias is None else product + bias.to(dtype))
        parts = torch.cat(made, 1).split([count * self.shape.dim for count in self.shape.heads], 1)
        found = []
        for part in parts:
            sent = part.unflatten(1, (self.world.size, -1, self.shape.dim)).transpose(0, 1).contiguous()
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent)
            found.append(received.permute(2, 0, 1, 3).contiguous())
        return found

    def expect(self) -> tuple[list[Tensor], list[tuple[float, float]]]:
        """float32 truth, and the errors that are allowed."""
        truth, plain = self.original(torch.float32), self.original(self.x.dtype)
        return truth, [allowed(errors_of([a], [b]), a.dtype) for a, b in zip(plain, truth, strict=True)]

    def judge(self, outputs: list[Tensor], truth: list[Tensor], limits: list[tuple[float, float]]) -> None:
        for index, (got, want, limit) in enumerate(zip(outputs, truth, limits, strict=True)):
            found = errors_of([got.view(want.shape)], [want])
            assert found[0] <= limit[0] and found[1] <= limit[1], (self.shape, index, found, limit)


def test_results_and_bits(world: World) -> None:
    """Memory full of NaN in between, and the same bits again and again."""
    for shape in shapes(world):
        op = Op(world, shape)
        for _ in range(2):
            op.refill()
            truth, limits = op.expect()
            poison(truth)
            first = [t.clone() for t in op.call()]
            op.judge(first, truth, limits)
            for _ in range(4):
                poison(first)
                again = op.call()
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{shape}: other bits"


def test_under_delays(world: World, pytestconfig: pytest.Config) -> None:
    """Ops of changing sizes follow each other on the same memory, and each rank is late at times."""
    ops = [Op(world, shape) for shape in shapes(world)]
    expected = [op.expect() for op in ops]
    alike, late = random.Random(1), random.Random(world.rank)
    for _ in range(0, pytestconfig.getoption("--iterations"), 10):
        order = [alike.randrange(len(ops)) for _ in range(10)]
        results = []
        for which in order:
            if late.random() < 0.3:
                pause(world.device, late.random() * 200)
            results.append(ops[which].call())
        for which, outputs in zip(order, results, strict=True):
            ops[which].judge(outputs, *expected[which])


@pytest.mark.gpu
def test_graphs_among_eager_calls(world: World) -> None:
    if not world.cuda:
        pytest.skip("CUDA graphs need GPUs")
    ops = [Op(world, shape) for shape in shapes(world)]
    for op in ops:
        op.call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [op.call() for op in ops]
    alike = random.Random(2)
    for _ in range(8):
        for op in ops:
            op.refill()
        expected = [op.expect() for op in ops]
        for _ in range(alike.choice((1, 2, 3))):
            graph.replay()
        for op, outputs, (truth, limits) in zip(ops, captured, expected, strict=True):
            op.judge(outputs, truth, limits)
        for _ in range(alike.choice((0, 1, 3))):
            which = alike.randrange(len(ops))
            ops[which].judge(ops[which].call(), *expected[which])
