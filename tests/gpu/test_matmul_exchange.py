"""Projections whose results are exchanged, and projections of what was exchanged, over NVLink: sizes of models, under delays, in graphs
among eager calls.

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


@dataclass(frozen=True)
class Panels:
    """A projection of `exchanges` exchanges, each of `heads` of `dim` in all, for `tokens` of a rank, to `n` columns.

    returned: what was received is read, too.
    """

    exchanges: int
    heads: int
    dim: int
    tokens: int
    n: int
    bias: bool = False
    returned: bool = False


def panels(world: World) -> list[Panels]:
    if not world.cuda:
        return [Panels(1, 4, 8, 6, 5, bias=True), Panels(3, 4, 8, 7, 16, returned=True)]
    return [
        Panels(1, 32, 128, 1024, 4096),
        Panels(1, 32, 128, 4096, 4096, bias=True, returned=True),
        Panels(3, 32, 128, 2048, 4096, returned=True),
        Panels(3, 32, 128, 8192, 4096, returned=True),
        Panels(2, 8, 64, 333, 1032, bias=True, returned=True),
        Panels(1, 8, 128, 16, 1024),
    ]


class Site:
    """A site with its tensors."""

    world: World
    shape: Shape | Panels
    tensors: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]
    call: direct.BoundOp

    def original(self, dtype: torch.dtype) -> list[Tensor]:
        """torch's matmuls and collectives."""
        raise NotImplementedError

    def refill(self) -> None:
        for x in self.tensors:
            x.normal_()
        for weight in self.weights:
            weight.normal_().mul_(weight.shape[1] ** -0.5)
        for bias in self.biases:
            if bias is not None:
                bias.normal_()

    def expect(self) -> tuple[list[Tensor], list[tuple[float, float]]]:
        """float32 truth, and the errors that are allowed."""
        truth, plain = self.original(torch.float32), self.original(self.tensors[0].dtype)
        return truth, [allowed(errors_of([a], [b]), a.dtype) for a, b in zip(plain, truth, strict=True)]

    def judge(self, outputs: list[Tensor], truth: list[Tensor], limits: list[tuple[float, float]]) -> None:
        for index, (got, want, limit) in enumerate(zip(outputs, truth, limits, strict=True)):
            found = errors_of([got.view(want.shape)], [want])
            assert found[0] <= limit[0] and found[1] <= limit[1], (self.shape, index, found, limit)


class Projection(Site):
    """Outputs the projection, then what was received if it is returned."""

    def __init__(self, world: World, shape: Panels, dtype: torch.dtype = torch.bfloat16) -> None:
        self.world, self.shape = world, shape
        ranks, panel = world.size, shape.heads // world.size * shape.dim

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=world.device)

        self.tensors = [empty(ranks, shape.tokens, 1, panel) for _ in range(shape.exchanges)]
        self.weights = [empty(shape.n, shape.exchanges * ranks * panel)]
        self.biases = [empty(shape.n) if shape.bias else None]
        self.refill()
        self.call = direct.exchange_matmul(self.tensors, [self.weights[0].t()], self.biases, returned=shape.returned)

    def original(self, dtype: torch.dtype) -> list[Tensor]:
        assert isinstance(self.shape, Panels)
        found = []
        for x in self.tensors:
            received = torch.empty_like(x)
            dist.all_to_all_single(received, x)
            found.append(received.transpose(0, 1).reshape(self.shape.tokens, -1))
        left = torch.cat(found, 1).to(dtype)
        (bias,) = self.biases
        product = left @ self.weights[0].to(dtype).t()
        product = product if bias is None else product + bias.to(dtype)
        return [product, left] if self.shape.returned else [product]


class Op(Site):
    """Outputs `[heads of this rank, all tokens, dim]` of q, k and v."""

    def __init__(self, world: World, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        self.world, self.shape = world, shape
        ranks, widths = world.size, [count * shape.dim for count in shape.heads]
        self.widths = widths if shape.separate else [sum(widths)]

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=world.device)

        x = empty(shape.tokens, shape.k)
        self.tensors = [x]
        self.weights = [empty(n, shape.k) for n in self.widths]
        self.biases = [empty(n) if shape.bias else None for n in self.widths]
        firsts = [0, 0, 0] if shape.separate else [0, widths[0], widths[0] + widths[1]]
        departures = [
            Departure(i if shape.separate else 0, 4, (), (1, 0, 2, 3), columns=(firsts[i], widths[i])) for i in range(3)
        ]
        grids = [(shape.tokens, ranks, count // ranks, shape.dim) for count in shape.heads]
        deliveries = [Delivery(i, (2, 0, 1, 3)) for i in range(3)]
        self.refill()
        lhs, rhs = [x] * len(self.weights), [weight.t() for weight in self.weights]
        self.call = direct.matmul_exchange(lhs, rhs, departures, grids, deliveries, [1] * 3, self.biases)

    def original(self, dtype: torch.dtype) -> list[Tensor]:
        assert isinstance(self.shape, Shape)
        made = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            product = self.tensors[0].to(dtype) @ weight.to(dtype).t()
            made.append(product if bias is None else product + bias.to(dtype))
        parts = torch.cat(made, 1).split([count * self.shape.dim for count in self.shape.heads], 1)
        found = []
        for part in parts:
            sent = part.unflatten(1, (self.world.size, -1, self.shape.dim)).transpose(0, 1).contiguous()
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent)
            found.append(received.permute(2, 0, 1, 3).contiguous())
        return found


def sites(world: World) -> list[Site]:
    return [*(Op(world, shape) for shape in shapes(world)), *(Projection(world, shape) for shape in panels(world))]


def test_results_and_bits(world: World) -> None:
    """Memory full of NaN in between, and the same bits again and again."""
    for op in sites(world):
        for _ in range(2):
            op.refill()
            truth, limits = op.expect()
            poison(truth)
            first = [t.clone() for t in op.call()]
            op.judge(first, truth, limits)
            for _ in range(4):
                poison(first)
                again = op.call()
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{op.shape}: other bits"


def test_under_delays(world: World, pytestconfig: pytest.Config) -> None:
    """Ops of changing sizes follow each other on the same memory, and each rank is late at times."""
    ops = sites(world)
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
    ops = sites(world)
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
