"""matmul_all_to_all over NVLink: cuBLAS computes chunks of columns, copy engines send each while the next one is computed.

A chunk is what one or several exchanges send: the keys of a projection, say, beside its queries. Behind the last one the exchange
kernel collects: it takes the own blocks from where the matmuls put them and the others from the slot. Transport takes no SM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...nvshmem.stream import Step
from ...problem import FusionProblem, Gemm, Plan
from ..all_to_all import output_shapes
from ..attention import sent_shapes
from ..fresh import maker
from ..template import register_template, torch_dtype
from .all_to_all import strides_of
from .call import EPOCH, SOURCE, Call, send_steps
from .channel import MAIN, DeviceChannel, DeviceLink
from .exchange import ExchangeLaunch
from .kernels.config import SMS, WORD_BYTES
from .projected import Chunk, Projection, project
from .refusal import exchange_refusal

# The most that a peer gets of a leg of the last chunk for one call of the driver to set all flags, behind all copies. To collect that
# much takes 3 us at 3.5 TB/s, no longer than a call of its own would take the host (projected.py has both).
_TOGETHER_BYTES = 5 << 20


@register_template("matmul_all_to_all", "nvlink")
class NvlinkGemmAllToAll:
    """lhs `[M, K]`, rhs `[K, N]`, biases `[N]` or None of each matmul; `sizes` as the plan's departures take them."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        general = exchange_refusal(problem, plan)
        if general is not None:
            return general
        sizes = [size for grid in problem.grids for size in grid]
        found = project(plan, problem.group_size, problem.gemms, sizes)
        if found is None:
            return "what is sent lies in no few runs of whole words of 16 bytes in the matmul's result"
        if not found.divisible:
            return "one exchange sends all that is computed: nothing would be left to compute while it travels"
        return None

    def scratch_bytes(
        self,
        plan: Plan,
        size: int,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        sizes: Sequence[int],
    ) -> int:
        found = project(plan, size, _gemms(lhs, rhs), sizes)
        return -1 if found is None else found.batches.scratch_bytes(size)

    def kernels(
        self,
        plan: Plan,
        size: int,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        sizes: Sequence[int],
    ) -> list[tuple[Any, ...]]:
        return [("exchange", SMS)]

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        sizes: Sequence[int],
    ) -> list[Tensor]:
        recipe: _Recipe = channel.site.recipe
        if recipe is None or recipe.link is not channel.link:
            found = project(plan, channel.size, _gemms(lhs, rhs), sizes)
            assert found is not None, "scratch_bytes says so"
            shapes = output_shapes(plan.deliveries, plan.joins, sent_shapes(plan.departures, sizes))
            recipe = channel.site.recipe = _Recipe(channel.link, found, shapes, torch_dtype(plan.dtype), lhs[0].device)
        return recipe.run(channel, lhs, rhs, biases)


def _gemms(lhs: Sequence[Tensor], rhs: Sequence[Tensor]) -> list[Gemm]:
    return [Gemm(a.shape[0], b.shape[1], a.shape[1]) for a, b in zip(lhs, rhs, strict=True)]


class _Recipe:
    """What the calls of one site with the same layout share. shapes: of the outputs."""

    def __init__(
        self,
        link: DeviceLink,
        projection: Projection,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.link = link
        self._projection = projection
        self._dtype = dtype
        self._new = maker(device)
        self._outputs = [(tuple(shape), strides_of(shape)) for shape in shapes]
        self._launch = ExchangeLaunch(link, projection.legs, projection.batches, copied=True)
        self._calls: dict[int, Call] = {}

    def _call(self, channel: DeviceChannel) -> Call:
        """The steps of a call in the channel's slot."""
        values = self._launch.values(channel.values())
        early = [self._sends(channel, chunk) for chunk in self._projection.chunks]
        if channel.captured:
            channel.link.pinned.append(self)
        return Call(channel, [self._launch.step(values, MAIN)], [], [values], early)

    def _sends(self, channel: DeviceChannel, chunk: Chunk) -> list[Step]:
        """Leg by leg to all peers, the next rank first, so that every rank sends to another one; exchange.h says where to."""
        found, size = self._projection, channel.size
        part = found.batches.count * found.batches.words * WORD_BYTES  # of a slot, for each rank that sends
        sends = []
        for number in chunk.legs:
            for distance in range(1, size):
                place = size - 1 - distance
                parcels = [replace(p, target=place * part + p.target) for p in found.parcels[number]]
                sends.append(((channel.rank + distance) % size, parcels, place * len(found.legs) + number))
        # The kernel that waits for them comes behind the last chunk.
        return send_steps(channel, sends, None if chunk is not found.chunks[-1] else _TOGETHER_BYTES)

    def run(
        self,
        channel: DeviceChannel,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        call = self._calls.get(channel.slot)
        if call is None:
            call = self._calls[channel.slot] = self._call(channel)
        call.words[EPOCH] = channel.epoch
        results = []
        for number, (chunk, steps) in enumerate(zip(self._projection.chunks, call.early, strict=True)):
            columns, bias = rhs[chunk.matmul], biases[chunk.matmul]
            if chunk.columns != columns.shape[1]:
                columns = columns.narrow(1, chunk.first, chunk.columns)
                bias = None if bias is None else bias.narrow(0, chunk.first, chunk.columns)
            if bias is None:
                result = torch.mm(lhs[chunk.matmul], columns)
            else:
                result = torch.addmm(bias, lhs[chunk.matmul], columns)
            call.words[SOURCE + number] = result.data_ptr()
            channel.link.issue(steps)
            results.append(result)
        outputs = [self._new(shape, strides, self._dtype) for shape, strides in self._outputs]
        self._launch.patch(call.values[0], results, outputs, channel.epoch)
        channel.link.issue(call.steps)
        return outputs
