"""Small programs with one fused site each (or one block's worth), for CPU and GPU ranks alike, and how they are judged.

A program is built for a group, a dtype and sizes. Its truth is the same function on float64 inputs, eagerly; what the compiled
program may be off is measured against the eager one in the same dtype, which is NCCL + cuBLAS on GPUs. The tests on CPU run
them with tiny sizes, so that the tests themselves are tried where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

import tscompile
from benchmarks.gpu_harness import allowed, errors_of
from benchmarks.harness import poison
from tests.compat import all_gather
from tscompile.backend import tilescale
from tscompile.fx_passes.fusion_pass import collect_rows
from tscompile.problem import Row

GATHER, SCATTER, REDUCE = "all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"
REPEATS = 4

_reduce_scatter = getattr(funcol, "reduce_scatter_single", funcol.reduce_scatter_tensor)
_gather_autograd = getattr(funcol, "all_gather_single_autograd", funcol.all_gather_tensor_autograd)
_scatter_autograd = getattr(funcol, "reduce_scatter_single_autograd", funcol.reduce_scatter_tensor_autograd)


@dataclass(frozen=True)
class Sizes:
    """rows of a rank's shard, the contracted size, and columns of the result."""

    rows: int
    k: int
    n: int


TINY = Sizes(6, 16, 24)
FULL = Sizes(256, 512, 768)


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


def _scatter(x: Tensor, group: Any, dim: int = 0, op: str = "sum") -> Tensor:
    scattered: Tensor = _reduce_scatter(x, op, dim, group)
    return scattered


def _reduce(x: Tensor, group: Any, op: str = "sum") -> Tensor:
    reduced: Tensor = funcol.all_reduce(x, op, group)
    return reduced


@program("gather, x @ w", GATHER)
def _(d: Draw) -> Any:
    return lambda x, w: all_gather(x, 0, d.group) @ w, [d.normal(d.sizes.rows, d.sizes.k), d.weight(d.sizes.k, d.sizes.n)]


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
    return run, [d.normal(s.rows, s.k), d.weight(s.n, s.k), d.weight(s.n // 3, s.k), d.weight(s.n // 3, s.k)]


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
    return lambda x, w: _scatter(x @ w, d.group), [d.normal(s.rows * d.ranks, s.k), d.weight(s.k, s.n)]


@program("scatter, bias", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(s.rows * d.ranks, s.k), d.weight(s.n, s.k), d.normal(s.n)]
    return lambda x, w, b: _scatter(F.linear(x, w, b), d.group), args


@program("scatter, sum of three", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [t for _ in range(3) for t in (d.normal(s.rows * d.ranks, s.k), d.weight(s.k, s.n))]
    return lambda a, u, b, v, c, w: _scatter(a @ u + b @ v + c @ w, d.group), args


@program("scatter, average", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(s.rows * d.ranks, s.k), d.weight(s.n, s.k)]
    # gloo knows no average: the truth divides, and so does the program where the ranks are on CPU
    if d.device.type == "cpu":
        return lambda x, w: _scatter(F.linear(x, w) / d.ranks, d.group), args
    return lambda x, w: _scatter(F.linear(x, w), d.group, op="avg"), args


@program("scatter along dim 1", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(2, s.rows * d.ranks, s.k), d.weight(s.n, s.k)]
    return lambda x, w: _scatter(F.linear(x, w), d.group, dim=1), args


@program("scatter, ragged rows", SCATTER)
def _(d: Draw) -> Any:
    s = d.sizes
    return lambda x, w: _scatter(F.linear(x, w), d.group), [d.normal((s.rows + 7) * d.ranks, s.k), d.weight(s.n, s.k)]


@program("reduce, x @ w", REDUCE)
def _(d: Draw) -> Any:
    s = d.sizes
    return lambda x, w: _reduce(x @ w, d.group), [d.normal(s.rows * d.ranks, s.k), d.weight(s.k, s.n)]


@program("reduce, bias", REDUCE)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [d.normal(s.rows, s.k), d.weight(s.n, s.k), d.normal(s.n)]
    return lambda x, w, b: _reduce(F.linear(x, w, b), d.group), args


@program("reduce, sum of two", REDUCE)
def _(d: Draw) -> Any:
    s = d.sizes
    args = [t for _ in range(2) for t in (d.normal(s.rows, s.k), d.weight(s.k, s.n))]
    return lambda a, u, b, v: _reduce(a @ u + b @ v, d.group), args


@program("reduce, ragged rows", REDUCE)
def _(d: Draw) -> Any:
    s = d.sizes  # not a multiple of the number of ranks either
    return lambda x, w: _reduce(F.linear(x, w), d.group), [d.normal(8 * d.ranks * (s.rows // 8) + 13, s.k), d.weight(s.n, s.k)]


@program("block, forward and backward", SCATTER, backward=True)
def _(d: Draw) -> Any:
    """Gather, two weights, gate, scatter: its backward gathers for a weight gradient and scatters a sum of two."""

    def run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gathered = _gather_autograd(x, 0, d.group)
        hidden = F.silu(F.linear(gathered, gate)) * F.linear(gathered, up)
        scattered: Tensor = _scatter_autograd(F.linear(hidden, down), "sum", 0, d.group)
        return scattered

    s = d.sizes
    return run, [d.normal(s.rows, s.k), d.weight(s.n, s.k), d.weight(s.n, s.k), d.weight(s.k, s.n)]


def results(function: Callable[..., Any], args: Sequence[Tensor], backward: bool) -> list[Tensor]:
    """Outputs, then gradients of the arguments for the sum of squares."""
    leaves = [arg.detach().clone().requires_grad_(backward) for arg in args]
    with torch.set_grad_enabled(backward):
        output = function(*leaves)
        outputs = list(output) if isinstance(output, tuple) else [output]
        outputs = [o.wait() if hasattr(o, "wait") else o for o in outputs]
        if backward:
            torch.autograd.backward(sum(o.double().square().sum() / 2 for o in outputs))
            outputs += [leaf.grad for leaf in leaves]  # type: ignore[misc]
    return [o.detach() for o in outputs]


def run(
    each: Program,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes,
    *,
    inner: str = "eager",
    must_fuse: bool = True,
) -> list[Row]:
    """Compile a program with everything fused, compare it, run it again and again; returns the rows of the report.

    Raises:
        AssertionError: a wrong result, other bits in a second run, or, if `must_fuse`, a site of the program's kind that
            ran its original ops.
    """
    torch._dynamo.reset()
    function, _ = each.build(Draw(sizes, group, dtype, device))
    options = {"tilescale.fuse": "always", "tilescale.inner": inner}
    compiled = torch.compile(function, backend=tilescale, fullgraph=True, dynamic=False, options=options)
    planned: list[Row] = []
    with collect_rows(planned.extend):
        for seed in (1, 2):
            args = each.build(Draw(sizes, group, dtype, device, seed))[1]
            truth = results(function, [arg.double() for arg in args], each.backward)
            plain = results(function, args, each.backward)
            poison([*plain, *args])
            first = results(compiled, args, each.backward)
            _judge(each.name, first, plain, truth, dtype)
            for _ in range(REPEATS):
                poison(plain)
                again = results(compiled, args, each.backward)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{each.name}: other bits"
    sites = {row.site for row in planned}
    rows = [row for row in tscompile.reports().rows if row.site in sites]
    ran = {row.pattern for row in rows if row.decision == "fused" and row.measured_us is not None}
    story = [f"{row.phase} {row.pattern} {row.decision} [{row.code}] {row.reason}" for row in rows]
    assert each.kind in ran or not must_fuse, f"{each.name}: not fused: {story}"
    return rows


def _judge(name: str, got: list[Tensor], plain: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for index, (a, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert a.shape == t.shape and a.dtype == p.dtype, (name, index, a.shape, a.dtype)
        found, limits = errors_of([a], [t]), allowed(errors_of([p], [t]), dtype)
        assert found[0] <= limits[0] and found[1] <= limits[1], f"{name}, tensor {index}: errors {found}, limits {limits}"


def subgroups(size: int) -> list[list[int]]:
    """Ranks of groups that every rank creates in this order: halves, permuted, overlapping; those that fit into the world."""
    wanted = [[0, 1], [2, 3], [1, 0], [3, 1, 2, 0], [1, 2], [0, 2, 3]]
    return [ranks for ranks in wanted if max(ranks) < size]
