"""All ranks of a group on one GPU, in one process: a link, a stream and a region for each, and the kernels that run over NVLink.

Each rank gets a share of the SMs, so that the kernels of all ranks are resident together; "peers" are other regions of the same memory.
What this cannot show is what only a link between GPUs does: its speed, and how late its writes arrive.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.direct_ops import Shape
from tests.fused_programs import GATHER, REDUCE, SCATTER
from tscompile.nvshmem import stream
from tscompile.nvshmem.device import CONTROL_BYTES, SLOTS
from tscompile.problem import GatherUse, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink import exchange, gather_blocks, gather_rows, gemm_reduce, jit, mesh_gemm, widths
from tscompile.templates.nvlink.channel import DeviceLink, Site
from tscompile.templates.nvlink.launch import Kernel
from tscompile.templates.nvlink.sums import SumPlan, pull_plan, push_plans

# Ranks of other GPUs have hardware queues of their own. Here streams that share one could hold each other up: a rank's second kernel
# waits at its head for the first one, which waits for the copies of another rank behind it.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

CTAS = 96  # of all ranks together; the other SMs are left to copies, which wait for nobody
SLOT_BYTES = 24 << 20


class Region:
    """Symmetric memory as one rank sees it."""

    def __init__(self, rank: int, regions: Sequence[Tensor]) -> None:
        self.rank, self.size, self._regions = rank, len(regions), regions
        self.addresses = tuple(region.data_ptr() for region in regions)

    def view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self._regions[owner][offset : offset + nbytes].view(dtype).view(shape)


@lru_cache
def _kernel(grid: int, name: str, *args: Any) -> Kernel:
    """`jit.kernel` with fewer CTAs."""
    cubin, spec = jit.artifact(name, *args)
    if spec.grid > 1:
        spec = replace(spec, grid=grid)
    return Kernel(spec, stream.load().load_kernel(cubin, spec.kernel, spec.shared_bytes))


class Group:
    """The links of `size` ranks. world: ranks that run at the same time, where these are not all."""

    def __init__(self, patch: pytest.MonkeyPatch, size: int, timeout_s: float = 20.0, world: int = 0) -> None:
        self.size, self.device = size, torch.device("cuda", torch.cuda.current_device())

        def kernel(name: str, *args: Any) -> Kernel:
            return _kernel(CTAS // (world or size), name, *args)

        for module in (exchange, gather_rows, gather_blocks, gemm_reduce, mesh_gemm):
            patch.setattr(module, "kernel", kernel)
        nbytes = CONTROL_BYTES + SLOTS * SLOT_BYTES
        regions = [torch.zeros(nbytes, dtype=torch.uint8, device=self.device) for _ in range(size)]
        services = [kernel("service", name) for name in ("tsk_open", "tsk_acknowledge")]
        self.links = [
            DeviceLink(Region(rank, regions), SLOT_BYTES, timeout_s, *services)  # type: ignore[arg-type]
            for rank in range(size)
        ]
        self.streams = [torch.cuda.Stream() for _ in range(size)]
        self.dice = random.Random(size)
        torch.cuda.synchronize()

    def each(
        self, action: Callable[[int], Any], ranks: Sequence[int] | None = None, shuffled: bool = True
    ) -> list[Any]:
        """`action(rank)` on the stream of each rank, in any order."""
        results: list[Any] = [None] * self.size
        order = list(range(self.size) if ranks is None else ranks)
        if shuffled:
            self.dice.shuffle(order)
        for rank in order:
            with torch.cuda.stream(self.streams[rank]):
                results[rank] = action(rank)
        return results


Form = bool | SumPlan  # of a gather: whether its kernel pushes; of a sum: its plan


def forms_of(shape: Shape, ranks: int) -> list[Form]:
    """All forms that an op of this shape has, whichever the planner would choose."""
    if shape.kind == GATHER:
        return [False, True]
    every, n, k = shape.kind == REDUCE, shape.n[0], shape.k
    found = [pull_plan(shape.m, n, k, ranks, 1 if every else ranks, every), *push_plans(shape.m, n, k, ranks, 1, every)]
    return [plan for plan in found if 0 <= plan.scratch_bytes <= SLOT_BYTES]


class Op:
    """One site of a group: inputs of all ranks, and what the ranks should return. form: the one that the sizes choose, if None."""

    def __init__(
        self, group: Group, shape: Shape, dtype: torch.dtype = torch.bfloat16, form: Form | None = None
    ) -> None:
        self.group, self.shape, self.dtype, self.form = group, shape, dtype, form
        self.sites = [Site(7) for _ in range(group.size)]
        name = str(dtype).removeprefix("torch.")
        options: dict[str, Any] = {"coefficients": (1.0,), "reduce_op": "avg" if shape.average else "sum"}
        if shape.kind == GATHER:
            use = GatherUse("lhs", False, "rows", name)
            options = {"uses": (use,) * len(shape.n), "return_gathered": shape.gathered}
        self.plan = Plan(shape.kind, "g/site", "nvlink", name, **options)
        found = find_template(shape.kind, "nvlink")
        assert found is not None
        self.template = found
        make: dict[str, Any] = {"dtype": dtype, "device": group.device}
        self.x = [torch.empty(shape.m, shape.k, **make) for _ in range(group.size)]
        sizes = [(shape.k, n) if shape.plain_layout else (n, shape.k) for n in shape.n]
        self.weights = [[torch.empty(size, **make) for size in sizes] for _ in range(group.size)]
        self.biases = [[torch.empty(n, **make) if shape.bias else None for n in shape.n] for _ in range(group.size)]
        self.refill()
        assert self.template.scratch_bytes(self.plan, group.size, *self.args(0)) in range(SLOT_BYTES + 1)

    def refill(self) -> None:
        for rank in range(self.group.size):
            self.x[rank].normal_()
            for weight in self.weights[rank]:
                weight.normal_().mul_(self.shape.k**-0.5)
            for bias in self.biases[rank]:
                if bias is not None:
                    bias.normal_()
        torch.cuda.synchronize()

    def args(self, rank: int) -> tuple[Any, ...]:
        rhs = [w if self.shape.plain_layout else w.t() for w in self.weights[rank]]
        if self.shape.kind == GATHER:
            return self.x[rank].view(1, -1), rhs, self.biases[rank]
        return ([self.x[rank]], rhs, self.biases[rank], [], *([1] if self.shape.kind == SCATTER else []))

    def call(self, rank: int) -> list[Tensor]:
        """On the current stream."""
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(self.form, bool):
                patch.setattr(widths, "pushes", lambda *_: self.form)
            elif self.form is not None:
                patch.setattr(gemm_reduce, "terms_plan", lambda *_: self.form)
            channel = self.group.links[rank].open(self.sites[rank])
            outputs: list[Tensor] = self.template.run(channel, self.plan, *self.args(rank))
        return outputs

    def truth(self) -> list[list[Tensor]]:
        """Of each rank, in float32."""
        products = []
        whole = torch.cat(self.x).float()
        for rank in range(self.group.size):
            left = whole if self.shape.kind == GATHER else self.x[rank].float()
            products.append([])
            for weight, bias in zip(self.weights[rank], self.biases[rank], strict=True):
                product = left @ (weight if self.shape.plain_layout else weight.t()).float()
                products[-1].append(product if bias is None else product + bias.float())
        if self.shape.kind == GATHER:
            return [[*found, whole] if self.shape.gathered else found for found in products]
        total = torch.stack([found[0] for found in products]).sum(0) / (self.group.size if self.shape.average else 1)
        if self.shape.kind == REDUCE:
            return [[total]] * self.group.size
        return [[part] for part in total.chunk(self.group.size)]

    def check(self, outputs: list[list[Tensor]], truth: list[list[Tensor]]) -> None:
        """Rounding of partial sums and of the result, and nothing else."""
        eps = torch.finfo(self.dtype).eps
        for rank, (got, want) in enumerate(zip(outputs, truth, strict=True)):
            for index, (a, b) in enumerate(zip(got, want, strict=True)):
                difference = a.view(b.shape).float() - b
                error, largest = float(difference.norm() / b.norm()), float(difference.abs().max() / b.abs().max())
                assert error <= eps and largest <= 4 * eps, (str(self.shape), rank, index, error, largest)
        if self.shape.kind == REDUCE:
            assert all(torch.equal(outputs[0][0], other[0]) for other in outputs), "ranks have other bits"
