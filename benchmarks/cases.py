"""The functions that the benchmarks race: a collective beside a matmul, and the same matmul without communication.

Shapes (R ranks; m, n, k are sizes of the local matmul `[m, k] @ [k, n]`, m being the global number of rows):

| function               | x, per rank  | others                       | result, per rank     | crosses ranks |
|------------------------|--------------|------------------------------|----------------------|---------------|
| all_gather_matmul      | `[m / R, k]` | w `[k, n]`                   | `[m, n]`             | x             |
| all_gather_matmul_x3   | `[m / R, k]` | three w `[k, n]`             | three `[m, n]`       | x, once       |
| matmul_reduce_scatter  | `[m, k]`     | w `[k, n]`                   | `[m / R, n]`         | `[m, n]`      |
| matmul_all_reduce      | `[m, k]`     | w `[k, n]`                   | `[m, n]`             | `[m, n]`      |
| matmul_all_gather      | `[m / R, k]` | w `[k, n]`                   | `[m, n]`             | `[m / R, n]`  |
| feed_forward           | `[m / R, k]` | w1, w3 `[k, n]`, w2 `[n, k]` | `[m / R, k]`         | x; `[m, k]`   |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]

# The names with `tensor` are deprecated since torch 2.13, those with `single` do not exist before.
_all_gather = getattr(funcol, "all_gather_single", funcol.all_gather_tensor)
_reduce_scatter = getattr(funcol, "reduce_scatter_single", funcol.reduce_scatter_tensor)


def _gather(x: Tensor) -> Tensor:
    gathered: Tensor = _all_gather(x, 0, dist.group.WORLD)
    return gathered


def _scatter(x: Tensor) -> Tensor:
    scattered: Tensor = _reduce_scatter(x, "sum", 0, dist.group.WORLD)
    return scattered


def all_gather_matmul(x: Tensor, w: Tensor) -> Tensor:
    return _gather(x) @ w


def all_gather_matmul_x3(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, ...]:
    gathered = _gather(x)
    return gathered @ w1, gathered @ w2, gathered @ w3


def matmul_reduce_scatter(x: Tensor, w: Tensor) -> Tensor:
    return _scatter(x @ w)


def matmul_all_reduce(x: Tensor, w: Tensor) -> Tensor:
    reduced: Tensor = funcol.all_reduce(x @ w, "sum", dist.group.WORLD)
    return reduced


def matmul_all_gather(x: Tensor, w: Tensor) -> Tensor:
    return _gather(x @ w)


def feed_forward(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    gathered = _gather(F.rms_norm(x, x.shape[-1:]))
    return x + _scatter((F.silu(gathered @ w1) * (gathered @ w3)) @ w2)


def matmul_alone(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def matmul_alone_x3(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, ...]:
    return x @ w1, x @ w2, x @ w3


def feed_forward_alone(x: Tensor, gathered: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
    """All computation of `feed_forward`; the gathered tensor is an input, and the reduction is left out."""
    y = (F.silu(gathered @ w1) * (gathered @ w3)) @ w2
    return F.rms_norm(x, x.shape[-1:]), x + y[: x.shape[0]], y


@dataclass(frozen=True)
class Case:
    """One function at one size. `inputs` and `inputs_alone` are made fresh from a seed; ranks differ where they
    hold shards."""

    function: str
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.function} m={self.m} n={self.n} k={self.k}"

    @property
    def run(self) -> Function:
        return _FUNCTIONS[self.function][0]

    @property
    def run_alone(self) -> Function:
        return _FUNCTIONS[self.function][1]

    def inputs(self, seed: int) -> list[Tensor]:
        sharded = self.function not in ("matmul_reduce_scatter", "matmul_all_reduce")
        rows = self.m // dist.get_world_size() if sharded else self.m
        return [self._random(seed, rows, self.k), *self._weights(seed)]

    def inputs_alone(self, seed: int) -> list[Tensor]:
        x = self.inputs(seed)[0]
        if self.function == "matmul_all_gather":
            return [x, *self._weights(seed)]
        full = self._random(seed, self.m, self.k)
        return [x, full, *self._weights(seed)] if self.function == "feed_forward" else [full, *self._weights(seed)]

    def _weights(self, seed: int) -> list[Tensor]:
        count = {"all_gather_matmul_x3": 3, "feed_forward": 2}.get(self.function, 1)
        weights = [self._random(seed + i + 1, self.k, self.n) / self.k**0.5 for i in range(count)]
        if self.function == "feed_forward":
            weights.append(self._random(seed + 9, self.n, self.k) / self.n**0.5)
        return weights

    def _random(self, seed: int, *shape: int) -> Tensor:
        """Different on every rank: weights too are a rank's own in tensor parallelism."""
        generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        return torch.randn(*shape, generator=generator)


_FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "all_gather_matmul": (all_gather_matmul, matmul_alone),
    "all_gather_matmul_x3": (all_gather_matmul_x3, matmul_alone_x3),
    "matmul_reduce_scatter": (matmul_reduce_scatter, matmul_alone),
    "matmul_all_reduce": (matmul_all_reduce, matmul_alone),
    "matmul_all_gather": (matmul_all_gather, matmul_alone),
    "feed_forward": (feed_forward, feed_forward_alone),
}


def cases(quick: bool) -> list[Case]:
    """Every function at every size. The smallest m is there for the planner: fusing must not cost where little can be won."""
    rows = (256, 4096) if quick else (256, 2048, 4096, 8192)
    columns = (128, 512) if quick else (128, 256, 512, 1024)
    return [Case(function, m, n, 1024) for function, m, n in product(_FUNCTIONS, rows, columns)]
