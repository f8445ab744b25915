"""Small programs with one fused site each (or one block's worth), for CPU and GPU ranks alike; tests/fused_runs.py judges them.

A program is built for a group, a dtype and sizes. The tests on CPU run them with tiny sizes, so that the tests themselves are
tried where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from tests.compat import all_gather

GATHER, SCATTER, REDUCE = "all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"

_reduce_scatter = getattr(funcol, "reduce_scatter_single", funcol.reduce_scatter_tensor)
gather_autograd = getattr(funcol, "all_gather_single_autograd", funcol.all_gather_tensor_autograd)
scatter_autograd = getattr(funcol, "reduce_scatter_single_autograd", funcol.reduce_scatter_tensor_autograd)


@dataclass(frozen=True)
class Sizes:
    """rows of a rank's shard, the contracted size, and columns of the result."""

    rows: int
    k: int
    n: int


TINY = Sizes(6, 16, 24)
FULL = Sizes(256, 1024, 1024)  # those of tests/direct_ops.py: kernels that are built once serve both


@dataclass
class Draw:
    """Draws a program's tensors: new values with each `seed`, other ones on each rank."""

    sizes: Sizes
    group: dist.ProcessGroup
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    _count: int = field(default=0)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(1000 * self.seed + dist.get_rank())

    @property
    def ranks(self) -> int:
        return self.group.size()

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=self.generator, device=self.device) * scale
        return values.to(self.dtype)

    def weight(self, *size: int) -> Tensor:
        return self.normal(*size, scale=self.sizes.k**-0.5)


Build = Callable[[Draw], tuple[Callable[..., Any], list[Tensor]]]


@dataclass(frozen=True)
class Program:
    name: str
    kind: str
    build: Build
    backward: bool = False


PROGRAMS: dict[str, Program] = {}


def program(name: str, kind: str, backward: bool = False) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        PROGRAMS[name] = Program(name, kind, build, backward)
        return build

    return register


def scatter(x: Tensor, group: Any, dim: int = 0, op: str = "sum") -> Tensor:
    scattered: Tensor = _reduce_scatter(x, op, dim, group)
    return scattered


def reduce(x: Tensor, group: Any, op: str = "sum") -> Tensor:
    reduced: Tensor = funcol.all_reduce(x, op, group)
    return reduced


@program("gather, x @ w", GATHER)
def _(d: Draw) -> Any:
    return lambda x, w: all_gather(x, 0, d.group) @ w, [
        d.normal(d.sizes.rows, d.sizes.k),
        d.weight(d.sizes.k, d.sizes.n),
    ]


@program("gather, bias", GATHER)
def _(d: Draw) -> Any:
    args = [d.normal(d.sizes.rows, d.sizes.k), d.weight(d.sizes.n, d.sizes.k), d.normal(d.sizes.n)]
    return lambda x, w, b: F.linear(all_gather(x, 0, d.group), w, b), args


@program("gather, three weights", GATHER)
def _(d: Draw) -> Any:
    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        gathered = all_gather(x, 0, d.group)
        return tuple(F.linear(gathered, w) for w in weights)

    s = d.sizes
    return run, [d.normal(s.rows, s.k), d.weight(s.n, s.k), d.weight(s.n // 4, s.k), d.weight(s.n // 4, s.k)]


@program("gather, returned too", GATHER)
def _(d: Draw) -> Any:
    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        gathered = all_gather(x, 0, d.group)
        return F.linear(gathered, w), gathered * 2

    return run, [d.normal(d.sizes.rows, d.sizes.k), d.weight(d.sizes.n, d.sizes.k)]


@program("gather, ragged rows", GATHER)
def _(d: Draw) -> Any:
    return lambda x, w: F.linear(all_gather(x, 0, d.group), w), [
        d.normal(d.sizes.rows + 7, d.sizes.k),
        d.weight(d.sizes.n, d.sizes.k),
    ]


@program("gather along dim 1", GATHER)
def _(d: Draw) -> Any:
    return lambda x, w: F.linear(all_gather(x, 1, d.group), w), [
        d.normal(3, d.sizes.rows, d.sizes.k),
        d.weight(d.sizes.n, d.sizes.k),
    ]


@program("gather of a weight gradient, rows contracted", GATHER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(s.rows, s.k), d.weight(s.rows * d.ranks, s.n)]
    return lambda dy, x: all_gather(dy, 0, d.group).t() @ x, args


@program("gather, read by a weight gradient and an input gradient", GATHER)
def _(d: Draw) -> Any:
    def run(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        gathered = all_gather(dy, 0, d.group)
        return gathered @ w, x.t() @ gathered

    s = d.sizes
    return run, [d.normal(s.rows, s.k), d.weight(s.rows * d.ranks, s.n), d.weight(s.k, s.n)]


@program("scatter, x @ w", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    return lambda x, w: scatter(x @ w, d.group), [d.normal(s.rows * d.ranks, s.k), d.weight(s.k, s.n)]


@program("scatter, bias", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(s.rows * d.ranks, s.k), d.weight(s.n, s.k), d.normal(s.n)]
    return lambda x, w, b: scatter(F.linear(x, w, b), d.group), args


@program("scatter, sum of three", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [t for _ in range(3) for t in (d.normal(s.rows * d.ranks, s.k), d.weight(s.k, s.n))]
    return lambda a, u, b, v, c, w: scatter(a @ u + b @ v + c @ w, d.group), args


@program("scatter, average", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(s.rows * d.ranks, s.k), d.weight(s.n, s.k)]
    # gloo knows no average: the truth divides, and so does the program where the ranks are on CPU
    if d.device.type == "cpu":
        return lambda x, w: scatter(F.linear(x, w) / d.ranks, d.group), args
    return lambda x, w: scatter(F.linear(x, w), d.group, op="avg"), args


@program("scatter along dim 1", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(2, s.rows * d.ranks, s.k), d.weight(s.n, s.k)]
    return lambda x, w: scatter(F.linear(x, w), d.group, dim=1), args


@program("scatter, ragged rows", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    return lambda x, w: scatter(F.linear(x, w), d.group), [d.normal((s.rows + 7) * d.ranks, s.k), d.weight(s.n, s.k)]


@program("reduce, x @ w", REDUCE)
def _(d: Draw) -> Any:
    s = d.sizes
    return lambda x, w: reduce(x @ w, d.group), [d.normal(s.rows * d.ranks, s.k), d.weight(s.k, s.n)]


@program("reduce, bias", REDUCE)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(s.rows, s.k), d.weight(s.n, s.k), d.normal(s.n)]
    return lambda x, w, b: reduce(F.linear(x, w, b), d.group), args


@program("reduce, sum of two", REDUCE)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [t for _ in range(2) for t in (d.normal(s.rows, s.k), d.weight(s.k, s.n))]
    return lambda a, u, b, v: reduce(a @ u + b @ v, d.group), args


@program("reduce, ragged rows", REDUCE)
def _(d: Draw) -> Any:
    s = d.sizes  # not a multiple of the number of ranks either
    return lambda x, w: reduce(F.linear(x, w), d.group), [
        d.normal(8 * d.ranks * (s.rows // 8) + 13, s.k),
        d.weight(s.n, s.k),
    ]


@program("block, forward and backward", SCATTER, backward=True)
def _(d: Draw) -> Any:
    """Gather, two weights, gate, scatter: its backward gathers for a weight gradient and scatters a sum of two."""

    def run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gathered = gather_autograd(x, 0, d.group)
        hidden = F.silu(F.linear(gathered, gate)) * F.linear(gathered, up)
        scattered: Tensor = scatter_autograd(F.linear(hidden, down), "sum", 0, d.group)
        return scattered

    s = d.sizes
    return run, [d.normal(s.rows, s.k), d.weight(s.n, s.k), d.weight(s.n, s.k), d.weight(s.k, s.n)]
