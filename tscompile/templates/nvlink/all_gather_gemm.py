"""all_gather_matmul over NVLink: the copy engine pushes the shard to the peers while a GEMM takes the shards in order of arrival.

The kernel's loading warp waits for a shard's flag where it first needs it. Tiles of the own shard come first and are read where
the shard lies. A small gather takes a kernel that pushes the shard itself (gather_rows.py chooses). A gather that these kernels
serve no matmul of takes that of gather_blocks.py. Matmuls that none serves, or that have the rank dimension summed over while
others do not, follow on the gathered tensor, which is complete by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...nvshmem.stream import Step, steps_of
from ...problem import FusionProblem, GatherUse, Plan
from ..fresh import maker
from ..template import register_template, torch_dtype
from .call import EPOCH, SOURCE, Call, Send, copy_step
from .channel import MAIN, SIDE, DeviceChannel, DeviceLink
from .gather_blocks import BlocksLaunch, block_kernels, block_launches, blocks_of
from .gather_rows import RowsLaunch, row_uses
from .mesh_tiles import Rectangle
from .operands import pointer_of
from .refusal import gather_refusal, serves_use


@register_template("all_gather_matmul", "nvlink")
class NvlinkAllGatherGemm:
    """shard [P, Q] of each rank, gathered to [P, R*Q], times the other operands."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return gather_refusal(problem, plan)

    def scratch_bytes(
        self, plan: Plan, size: int, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> int:
        for use, other in zip(plan.uses, others, strict=True) if shard.numel() else ():
            k, n = (int(s) for s in other.shape)
            if serves_use(use, plan.dtype, k, n) or blocks_of(use, plan.dtype, size, shard.shape, other) is not None:
                return int(shard.numel()) * size * torch_dtype(plan.dtype).itemsize
        return -1

    def kernels(
        self, plan: Plan, size: int, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[tuple[Any, ...]]:
        found = [batch.kernel for batch in row_uses(plan, size, shard.shape, others, biases).batches]
        return found or block_kernels(plan, size, shard, others, biases)

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        recipe: _Recipe = channel.site.recipe
        if recipe is None or recipe.link is not channel.link:
            recipe = channel.site.recipe = _Recipe(channel.link, plan, shard, others, biases)
        if shard.dtype is not recipe.dtype or not shard.is_contiguous():
            shard = shard.to(recipe.dtype).contiguous()
        return recipe.run(channel, plan, shard, others, biases)


class _Recipe:
    """What the calls of one site with the same layout share."""

    def __init__(
        self,
        link: DeviceLink,
        plan: Plan,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> None:
        self.link = link
        self.dtype = torch_dtype(plan.dtype)
        self.pieces, self.width = shard.shape
        self._full = (self.pieces, link.size * self.width)
        self._new = maker(shard.device)
        uses = row_uses(plan, link.size, shard.shape, others, biases)
        self.rest, self._pushed = uses.rest, uses.pushed
        self.launches: list[RowsLaunch | BlocksLaunch] = [
            RowsLaunch(
                link,
                uses,
                batch,
                plan.dtype,
                shard.shape,
                [others[index] for index in batch.indices],
                last=batch is uses.batches[-1] and not self.rest,
            )
            for batch in uses.batches
        ]
        if not self.launches:
            launches, self.rest = block_launches(link, plan, shard, others, biases)
            self.launches += launches
        # The own shard is read where it lies, unless a tile has rows of others too, or a later matmul reads the slot.
        self._local = any(launch.spans for launch in self.launches) or (bool(self.rest) and not plan.return_gathered)
        self._calls: dict[int, Call] = {}

    def _call(self, channel: DeviceChannel) -> Call:
        """The steps of a call in the channel's slot."""
        known = channel.values()
        values = [launch.values(known) for launch in self.launches]
        local = [self._copy(channel, channel.rank, MAIN)] if self._local else []
        launches = [launch.kernel.step(v, MAIN) for launch, v in zip(self.launches, values, strict=True)]
        side = []
        # The previous rank's copy first, so that at any time every rank sends to another one.
        for distance in () if self._pushed else range(1, channel.size):
            peer = (channel.rank - distance) % channel.size
            side.append(Send([self._copy(channel, peer, SIDE)], channel.signal_step(peer, channel.rank)))
        if channel.captured:
            channel.link.pinned.append(self)
        return Call(channel, [*local, *launches], side, values)

    def _copy(self, channel: DeviceChannel, owner: int, stream_number: int) -> Step:
        """Step that copies the shard, whose address is patched in, to its place in the slot of `owner`."""
        nbytes = self.width * self.dtype.itemsize
        copy = Rectangle(0, 0, self.pieces, nbytes, nbytes, channel.size * nbytes)
        return copy_step(stream_number, channel.data(owner, channel.rank * nbytes), copy)

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        call = self._calls.get(channel.slot)
        if call is None:
            call = self._calls[channel.slot] = self._call(channel)
        source, epoch = shard.data_ptr(), channel.epoch
        if source % 16:
            shard = shard.clone()
            source = shard.data_ptr()
        call.words[SOURCE], call.words[EPOCH] = source, epoch
        outputs: list[Any] = [None] * len(plan.uses)
        new, dtype = self._new, self.dtype
        gathered = new(self._full, (self._full[1], 1), dtype) if plan.return_gathered else None
        alive: list[Tensor] = []  # copies of operands, until the kernels are enqueued
        for number, launch in enumerate(self.launches):
            values = call.values[number]
            values[launch.shard], values[launch.epoch] = source, epoch
            if gathered is not None:
                values[launch.gathered] = gathered.data_ptr()
            for index, width, weight, result, bias in launch.operands:
                values[weight] = pointer_of(others[index], launch.transposed, alive, launch.lies)
                out = outputs[index] = new((launch.rows, width), (width, 1), dtype)
                values[result] = out.data_ptr()
                added = biases[index]
                if added is not None:
                    alive.append(added.to(dtype))
                    values[bias] = pointer_of(alive[-1], False, alive)
        channel.link.issue(call.steps)
        if self.rest:
            source_tensor = gathered if gathered is not None else channel.view(self._full, dtype)
            for index in self.rest:
                outputs[index] = _multiply(plan.uses[index], source_tensor, others[index], biases[index])
            if channel.captured:
                self._acknowledge(channel)
            elif gathered is None:  # they have read the slot: a next call on another stream must wait for them, too
                channel.link.issue(channel.link.done)
        if gathered is not None:
            outputs.append(gathered)
        return outputs

    def _acknowledge(self, channel: DeviceChannel) -> None:
        """Tell the peers that this captured call has read its slot."""
        closer = channel.link.closer
        values = closer.values(channel.values())
        channel.link.issue(steps_of(closer.step(values, MAIN)))


def _multiply(use: GatherUse, gathered: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    """The matmul of a use from the gathered tensor [P, R*Q]."""
    contracted = other.shape[0 if use.side == "lhs" else 1]
    columns = contracted if (use.side == "lhs") != use.transposed else gathered.numel() // contracted
    matrix = gathered.to(torch_dtype(use.dtype)).view(-1, columns)
    operand = matrix.t() if use.transposed else matrix
    a, b = (operand, other) if use.side == "lhs" else (other, operand)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
