"""What the GPU benchmark races: matmuls of Llama layers beside their collectives, in nn.Linear layout (`x @ w.t()`).

Sizes are those of the whole model; a rank has its part. `m` is the number of rows of all ranks.

| op                    | x, per rank  | weights, per rank     | result, per rank | crosses ranks |
|-----------------------|--------------|-----------------------|------------------|---------------|
| all_gather_matmul     | `[m / R, k]` | each n: `[n / R, k]`  | `[m, n / R]` each | x            |
| matmul_reduce_scatter | `[m, k / R]` | `[n, k / R]`          | `[m / R, n]`     | `[m, n]`      |
| matmul_all_reduce     | `[m, k / R]` | `[n, k / R]`          | `[m, n]`         | `[m, n]`      |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from benchmarks import direct
from benchmarks.cases import _all_gather, _reduce_scatter
from benchmarks.gpu_harness import Side

GATHER, SCATTER, REDUCE = "all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"


@dataclass(frozen=True)
class Case:
    """One op at one size; `compiled`: also as a program, through torch.compile."""

    op: str
    label: str
    m: int
    n: tuple[int, ...]
    k: int
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.label} m={self.m} n={'+'.join(map(str, self.n))} k={self.k}"

    def local(self, ranks: int) -> tuple[list[int], int]:
        """Columns of each weight and the contracted size, as one rank has them."""
        return ([n // ranks for n in self.n], self.k) if self.op == GATHER else (list(self.n), self.k // ranks)

    def crossing(self, ranks: int, itemsize: int) -> float:
        """Bytes that one rank must send at least."""
        elements = self.m * (self.k if self.op == GATHER else self.n[0])
        return elements * itemsize * (ranks - 1) / ranks * (2 if self.op == REDUCE else 1)


SWEEP = ((4096, 28672, 8192), (2048, 28672, 4096), (1024, 28672, 8192), (512, 28672, 8192), (256, 28672, 8192))
SWEEP = (*SWEEP, (128, 28672, 8192))


def cases() -> list[Case]:
    """The sizes that kernels are judged by, then what the layers of Llama 3 8B and 70B have."""
    found = [
        Case(GATHER, "7B up", 8192, (11008,), 4096, compiled=True),
        Case(GATHER, "8B gate+up as one", 8192, (28672,), 4096),
        Case(GATHER, "70B qkv as one", 8192, (10240,), 8192),
        Case(GATHER, "70B up", 8192, (28672,), 8192),
        *(Case(GATHER, "sweep", m, (n,), k, compiled=m in (1024, 128)) for m, n, k in SWEEP),
    ]
    reductions = [
        ("7B down", 8192, 4096, 11008),
        ("k 28672", 8192, 4096, 28672),
        ("70B o, k 10240", 8192, 8192, 10240),
        ("70B down", 8192, 8192, 28672),
        *(("sweep", m, k, n) for m, n, k in SWEEP),
    ]
    for op in (SCATTER, REDUCE):
        found += [
            Case(op, label, m, (n,), k, compiled=label == "7B down" or m in (1024, 128))
            for label, m, n, k in reductions
        ]
    for length in (8192, 2048):
        for model, dim, kv, hidden in (("8B", 4096, 1024, 14336), ("70B", 8192, 1024, 28672)):
            found.append(Case(GATHER, f"{model} q,k,v", length, (dim, kv, kv), dim, compiled=length == 8192))
            found.append(Case(GATHER, f"{model} gate,up", length, (hidden, hidden), dim))
            for op in (SCATTER, REDUCE):
                found.append(Case(op, f"{model} o", length, (dim,), dim))
                if (op, f"{model} down", length) != (op, "70B down", 8192):  # that is in the first list
                    found.append(Case(op, f"{model} down", length, (dim,), hidden))
    return found


def quick_cases() -> list[Case]:
    """One size of each regime and op."""
    wanted = {(GATHER, "7B up"), (GATHER, "8B q,k,v"), (SCATTER, "7B down"), (SCATTER, "8B o"), (REDUCE, "7B down")}
    chosen = [c for c in cases() if (c.op, c.label) in wanted and c.m == 8192]
    return chosen + [c for c in cases() if c.label == "sweep" and c.m in (1024, 256)]


def tiny_cases() -> list[Case]:
    """For trying the benchmark itself."""
    return [
        Case(GATHER, "tiny", 64, (96,), 32, compiled=True),
        Case(GATHER, "tiny q,k,v", 64, (64, 32, 32), 32),
        Case(SCATTER, "tiny", 64, (48,), 64, compiled=True),
        Case(REDUCE, "tiny", 64, (48,), 64, compiled=True),
    ]


def gather_program(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    gathered = _all_gather(x, 0, dist.group.WORLD)
    return tuple(F.linear(gathered, w) for w in weights)


def scatter_program(x: Tensor, w: Tensor) -> Tensor:
    scattered: Tensor = _reduce_scatter(F.linear(x, w), "sum", 0, dist.group.WORLD)
    return scattered


def reduce_program(x: Tensor, w: Tensor) -> Tensor:
    reduced: Tensor = funcol.all_reduce(F.linear(x, w), "sum", dist.group.WORLD)
    return reduced


PROGRAMS: dict[str, Callable[..., Any]] = {GATHER: gather_program, SCATTER: scatter_program, REDUCE: reduce_program}


@dataclass
class Workspace:
    """Tensors of a case on this rank. Candidates keep references, so `refill` gives all of them new inputs."""

    case: Case
    device: torch.device
    dtype: torch.dtype
    x: Tensor = field(init=False)
    weights: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        ranks = dist.get_world_size()
        columns, k = self.case.local(ranks)
        rows = self.case.m // ranks if self.case.op == GATHER else self.case.m
        self.k = k
        self.x = self._empty(rows, k)
        self.weights = [self._empty(n, k) for n in columns]
        self.whole = self._empty(self.case.m, k)  # the gathered input, or the input itself
        self.full = [self._empty(self.case.m, n) for n in columns]
        self.part = self._empty(self.case.m // ranks, columns[0])
        self.refill()

    def _empty(self, *size: int) -> Tensor:
        return torch.empty(size, device=self.device, dtype=self.dtype)

    def refill(self) -> None:
        self.x.normal_()
        for w in self.weights:
            w.normal_().mul_(self.k**-0.5)
        if self.case.op != GATHER:
            self.whole.copy_(self.x)
        else:
            dist.all_gather_into_tensor(self.whole, self.x)

    def matmuls(self) -> None:
        for w, out in zip(self.weights, self.full, strict=True):
            torch.mm(self.whole, w.t(), out=out)

    def collective(self) -> None:
        if self.case.op == GATHER:
            dist.all_gather_into_tensor(self.whole, self.x)
        elif self.case.op == SCATTER:
            dist.reduce_scatter_tensor(self.part, self.full[0])
        else:
            dist.all_reduce(self.full[0])

    def collective_alone(self) -> None:
        if self.case.op == REDUCE and self.device.type == "cuda":
            dist.all_reduce(self.full[0], dist.ReduceOp.AVG)  # a sum in place would grow from call to call
        else:
            self.collective()

    def original(self) -> list[Tensor]:
        if self.case.op == GATHER:
            self.collective()
            self.matmuls()
            return self.full
        self.matmuls()
        self.collective()
        return [self.part] if self.case.op == SCATTER else self.full

    def truth(self) -> list[Tensor]:
        """In float32, from the same inputs; the ranks' parts are summed in float32 too."""
        full = [self.whole.float() @ w.float().t() for w in self.weights]
        if self.case.op == SCATTER:
            part = torch.empty(self.part.shape, device=self.device)
            dist.reduce_scatter_tensor(part, full[0])
            return [part]
        if self.case.op == REDUCE:
            dist.all_reduce(full[0])
        return full


def base_sides(work: Workspace) -> dict[str, Side]:
    """The matmul alone, the collective alone, and both in sequence into memory that is there already."""
    poisoned = [*work.full, work.part] + ([work.whole] if work.case.op == GATHER else [])
    return {
        "gemm": Side(work.matmuls, checked=False),
        "collective": Side(work.collective_alone, checked=False),
        "original": Side(work.original, written=poisoned),
    }


def async_tp(work: Workspace) -> Side | None:
    """What PyTorch offers for the same, in its own ops."""
    if work.device.type != "cuda" or work.case.op == REDUCE:
        return None
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    rhs = [w.t() for w in work.weights]
    ops = torch.ops.symm_mem
    if work.case.op == GATHER:
        return Side(lambda: ops.fused_all_gather_matmul(work.x, rhs, 0, name)[1], graph=False)
    return Side(lambda: [ops.fused_matmul_reduce_scatter(work.x, rhs[0], "sum", 0, name)], graph=False)


def fused_sides(work: Workspace) -> Mapping[str, Callable[[], Side]]:
    """Makers of the candidates that are ours: each may find that its op is not fused."""
    if work.case.op != GATHER:
        return {"tscompile": lambda: Side(direct.reduce_linear(work.case.op, work.x, work.weights[0]))}

    def gather(gathered: bool) -> Side:
        return Side(direct.all_gather_linear(work.x, work.weights, gathered=gathered))

    return {"tscompile": lambda: gather(False), "tscompile_gathered": lambda: gather(True)}


def compiled_sides(work: Workspace, backend: Any) -> Mapping[str, Callable[[], Side]]:
    """The program compiled by our backend, everything fused, and by Inductor alone."""
    program = PROGRAMS[work.case.op]

    def side(**options: Any) -> Side:
        compiled = torch.compile(program, fullgraph=True, dynamic=False, **options)

        def run() -> list[Tensor]:
            result = compiled(work.x, *work.weights)
            return list(result) if isinstance(result, tuple) else [result]

        run()  # compiles
        return Side(run, graph=False)

    return {
        "compiled": lambda: side(backend=backend, options={"tilescale.fuse": "always"}),
        "inductor": lambda: side(),
    }
