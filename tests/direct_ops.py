"""Fused ops at chosen shapes, called through the runtime without a graph: inputs, truth, and a judge that can stay on the GPU."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import direct
from benchmarks.gpu_harness import allowed, errors_of
from benchmarks.harness import poison
from tests.fused_programs import GATHER, REDUCE, SCATTER
from tscompile.problem import Delivery

EXCHANGE = "all_to_all_permute"


@dataclass(frozen=True)
class Shape:
    """m: rows of this rank's x. n: columns of each weight. k: the contracted size; of an EXCHANGE the columns of x, without weights."""

    kind: str
    m: int
    n: tuple[int, ...]
    k: int
    bias: bool = False
    plain_layout: bool = False  # x @ w instead of x @ w.t()
    gathered: bool = False
    average: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("bias", "plain_layout", "gathered", "average") if getattr(self, name)]
        return " ".join([self.kind, f"{self.m}x{'+'.join(map(str, self.n))}x{self.k}", *flags])


class LiveOp:
    """An op with its tensors. `refill` gives it new inputs; `truth` and `plain` are what it should return."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, group: Any = None, timeout_s: float | None = None
    ) -> None:
        self.shape, self.group = shape, group or dist.group.WORLD
        self.x = torch.empty(shape.m, shape.k, dtype=dtype, device=device)
        sizes = [(shape.k, n) if shape.plain_layout else (n, shape.k) for n in shape.n]
        self.weights = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
        self.biases = [torch.empty(n, dtype=dtype, device=device) if shape.bias else None for n in shape.n]
        self.refill()
        more: dict[str, Any] = {"plain_layout": shape.plain_layout, "group": self.group, "timeout_s": timeout_s}
        if shape.kind == GATHER:
            self.call = direct.all_gather_linear(self.x, self.weights, self.biases, gathered=shape.gathered, **more)
        elif (
            shape.kind == EXCHANGE
        ):  # a part of the columns to each rank; the rows of all ranks come first in what is read
            del more["plain_layout"]
            self.call = direct.exchange([self._parts(self.x)], [Delivery(0, (1, 0, 2))], [1], **more)
        else:
            more["reduce_op"] = "avg" if shape.average else "sum"
            self.call = direct.reduce_linear(shape.kind, self.x, self.weights[0], self.biases[0], **more)

    def refill(self) -> None:
        self.x.normal_()
        for weight in self.weights:
            weight.normal_().mul_(self.shape.k**-0.5)
        for bias in self.biases:
            if bias is not None:
                bias.normal_()

    def _parts(self, x: Tensor) -> Tensor:
        return x.view(self.shape.m, self.group.size(), -1).permute(1, 0, 2)

    def truth(self) -> list[Tensor]:
        """The original ops on the same values in float32."""
        return self._original(torch.float32)

    def plain(self) -> list[Tensor]:
        return self._original(self.x.dtype)

    def _original(self, dtype: torch.dtype) -> list[Tensor]:
        x, ranks = self.x.to(dtype), self.group.size()
        if self.shape.kind == EXCHANGE:
            sent = self._parts(x).contiguous()
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self.group)
            return [received.permute(1, 0, 2).contiguous()]
        whole = x
        if self.shape.kind == GATHER:
            whole = torch.empty(x.shape[0] * ranks, x.shape[1], dtype=dtype, device=x.device)
            dist.all_gather_into_tensor(whole, x, group=self.group)
        results = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            rhs = weight.to(dtype) if self.shape.plain_layout else weight.to(dtype).t()
            results.append(whole @ rhs if bias is None else torch.addmm(bias.to(dtype), whole, rhs))
        if self.shape.kind == SCATTER:
            part = torch.empty(results[0].shape[0] // ranks, results[0].shape[1], dtype=dtype, device=x.device)
            dist.reduce_scatter_tensor(part, results[0], group=self.group)
            results = [part]
        elif self.shape.kind == REDUCE:
            dist.all_reduce(results[0], group=self.group)
        if self.shape.average:
            results[0] /= ranks
        return [*results, whole] if self.shape.gathered else results

    def check(self, repeats: int = 4) -> None:
        """New inputs, memory full of NaN, the right result, and the same bits again and again."""
        self.refill()
        truth, plain = self.truth(), self.plain()
        poison(plain)
        first = [t.clone() for t in self.call()]
        for index, (got, want, base) in enumerate(zip(first, truth, plain, strict=True)):
            found, limits = errors_of([got], [want]), allowed(errors_of([base], [want]), base.dtype)
            where = f"{self.shape}, output {index}"
            assert found[0] <= limits[0] and found[1] <= limits[1], f"{where}: errors {found}, limits {limits}"
            if index == len(self.weights):
                assert torch.equal(got.view(base.shape), base), f"{where}: what is only moved has other bits"
        for _ in range(repeats):
            poison(plain)
            again = self.call()
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{self.shape}: other bits"


class Pool:
    """Inputs with known results, so that a stress test can judge every call without waiting for the device."""

    def __init__(self, op: LiveOp, count: int = 3) -> None:
        self.op = op
        self.inputs, self.truth, self.limits = [], [], []
        for _ in range(count):
            op.x.normal_()
            self.inputs.append(op.x.clone())
            self.truth.append(op.truth()[0])
            self.limits.append(allowed(errors_of(op.plain()[:1], self.truth[-1:]), op.x.dtype)[0])

    def call(self, index: int) -> Tensor:
        """Error of one call as a share of its limit, on the device."""
        index %= len(self.inputs)
        self.op.x.copy_(self.inputs[index])
        return self.judge(index, self.op.call()[0])

    def judge(self, index: int, output: Tensor) -> Tensor:
        truth = self.truth[index]
        return (output.float() - truth).norm() / truth.norm() / self.limits[index]


def stress(
    shapes: list[Shape], dtype: torch.dtype, device: torch.device, iterations: int, say: Any, longest_us: float = 300.0
) -> None:
    """Ops of changing kinds and shapes in one queue, with random pauses on random ranks and no word from the host between."""
    pools = [Pool(LiveOp(shape, dtype, device)) for shape in shapes]
    order, own = random.Random(5), random.Random(1000 + dist.get_rank())  # what runs is common, who pauses is not
    shares = torch.zeros(iterations, device=device)
    for i in range(iterations):
        pool = order.choice(pools)
        if own.random() < 0.5:
            pause(device, own.random() * longest_us)
        shares[i] = pool.call(i)
        if i % 1000 == 999:
            worst = shares[: i + 1].nan_to_num(nan=float("inf")).max().item()
            say(f"stress: {i + 1} calls, worst error {worst:.2f} of its limit")
    wrong = (~(shares <= 1)).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} of {iterations} calls are wrong, first {wrong[:5]}: {shares[wrong[:5]].tolist()}"


def pause(device: torch.device, us: float) -> None:
    """Hold up this rank: its GPU's queue, or on CPU the rank itself."""
    if device.type == "cuda":
        torch.cuda._sleep(int(us * 1500))  # cycles at about 1.5 GHz
    else:
        time.sleep(us / 1e6)


def sweep(ranks: int, tiny: bool) -> list[Shape]:
    """Kinds by layouts and features, at sizes of every regime, even and ragged."""
    if tiny:
        rows, n, k, odd = (8, 24), 24, 16, 7
        few = 9
    else:
        rows, n, k, odd = (32, 64, 128, 256, 512, 1024), 1024, 1024, 37
        few = 13
    shapes = [Shape(GATHER, m, (n,), k) for m in rows]
    shapes += [Shape(kind, m * ranks, (n,), k) for kind in (SCATTER, REDUCE) for m in rows]
    m = rows[-1]
    shapes += [Shape(EXCHANGE, m, (), width * ranks) for m in (*rows, few) for width in (k, 8)]
    shapes += [  # few rows, which the kernel itself pushes on GPUs: tiles with rows of several ranks, and slices of k
        Shape(GATHER, few, (n,), k, bias=True),
        Shape(GATHER, few, (n, n // 4, n // 4), k, gathered=True),
        Shape(GATHER, few + odd, (n - 8,), 4 * k - 24, plain_layout=True),
        Shape(GATHER, 2 * rows[1], (n, n), 4 * k + 8, bias=True, gathered=True),
        Shape(GATHER, 2 * rows[1], (n, n // 4), 8 * k, plain_layout=True, gathered=True),
    ]
    shapes += [
        Shape(GATHER, m, (n,), k, plain_layout=True),
        Shape(GATHER, m, (n,), k, bias=True),
        Shape(GATHER, m, (n, n // 4, n // 4), k),
        Shape(GATHER, m, (n, n), k, gathered=True),
        Shape(GATHER, m + odd, (n,), k),
        Shape(GATHER, m, (n - 8,), k - 8),
        Shape(SCATTER, m * ranks, (n,), k, plain_layout=True),
        Shape(SCATTER, m * ranks, (n,), k, bias=True),
        Shape(SCATTER, m * ranks, (n,), k, average=True),
        Shape(SCATTER, (m + odd) * ranks, (n,), k),
        Shape(SCATTER, m * ranks, (n - 8,), k - 8),
        Shape(REDUCE, m * ranks, (n,), k, plain_layout=True),
        Shape(REDUCE, m * ranks, (n,), k, bias=True),
        Shape(REDUCE, 8 * ranks * (m // 8) + odd, (n,), k),
        Shape(REDUCE, odd, (n,), k),
        Shape(REDUCE, odd, (n,), k, bias=True, average=True),
        Shape(SCATTER, rows[0] * ranks, (n,), k, bias=True, average=True),
        Shape(REDUCE, m * ranks, (n - 8,), k - 8),
    ]
    if not tiny:  # tiles of all widths on GPUs, in both layouts
        shapes += [Shape(GATHER, 1024, (n,), 512) for n in (2112, 2368, 2624, 2880, 3136, 3392, 3648, 3904)]
        shapes += [Shape(GATHER, 1024, (n,), 512, plain_layout=True) for n in (2112, 3904)]
        shapes += [Shape(GATHER, 16, (9000,), 512)]
        sums = (
            (4096, 4096, 1024, False),
            (4032, 4088, 512, True),
            (4096, 4096, 4096, False),
            (1024, 5120, 4096, False),
        )
        sums += ((2048, 3072, 1024, True), (2048, 4096, 1024, True), (1024, 5120, 2048, True))
        sums += ((512, 5120, 4096, False), (512, 5120, 4096, True), (512, 8192, 1024, False), (256, 1024, 4096, True))
        sums += ((512, 2048, 512, False), (128, 8192, 1024, True), (128, 256, 2048, False), (512, 4096, 1024, True))
        shapes += [
            Shape(kind, rows, (n,), k, plain_layout=plain) for kind in (SCATTER, REDUCE) for rows, n, k, plain in sums
        ]
    return shapes
