"""all_gather_matmul over NVLink: the copy engine pushes the shard to the peers while a GEMM takes the shards in order of arrival.

The kernel's loading warp waits for a shard's flag where it first needs it. Tiles of the own shard come first and are read where
the shard lies. A gather that this kernel serves no matmul of takes that of gather_blocks.py. Matmuls that neither serves, or that
have the rank dimension summed over while others do not, follow on the gathered tensor, which is complete by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...nvshmem import stream
from ...nvshmem.stream import Step, Values, steps_of
from ...problem import FusionProblem, GatherUse, Plan
from ..fresh import maker
from ..template import register_template, torch_dtype
from .call import EPOCH, SOURCE, Call
from .channel import MAIN, SIDE, DeviceChannel, DeviceLink
from .gather_blocks import BlocksLaunch, block_kernels, block_launches, blocks_of
from .jit import kernel
from .kernels.config import MAX_OPERANDS, TILE_M, GemmConfig, depth
from .lasting import lasting_tables
from .operands import is_transposed, lies, pointer_of
from .refusal import gather_refusal, serves_use
from .tiles import gather_tiles
from .widths import gather_width


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
        batches, _ = _batches(plan, others, biases)
        found: list[tuple[Any, ...]] = []
        for batch in batches:
            weights = [others[index] for index in batch.indices]
            config = _config(plan.dtype, size, shard.shape, weights, batch.bias)
            found.append(("all_gather", config, plan.return_gathered and not found))
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


@dataclass(frozen=True)
class _Batch:
    """Uses that one kernel serves: the same layout and k, all with a bias or none."""

    indices: tuple[int, ...]
    bias: bool


def _batches(plan: Plan, others: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[list[_Batch], list[int]]:
    """The uses that read gathered rows, and the indices of the others."""
    groups: dict[tuple[bool, bool, int], list[int]] = {}
    rest: list[int] = []
    for index, (use, other, bias) in enumerate(zip(plan.uses, others, biases, strict=True)):
        if serves_use(use, plan.dtype, other.shape[0], other.shape[1]):
            groups.setdefault((is_transposed(other), bias is not None, other.shape[0]), []).append(index)
        else:
            rest.append(index)
    batches = [
        _Batch(tuple(group[first : first + MAX_OPERANDS]), with_bias)
        for (_, with_bias, _), group in groups.items()
        for first in range(0, len(group), MAX_OPERANDS)
    ]
    return batches, rest


def _config(dtype: str, ranks: int, shard: Sequence[int], weights: Sequence[Tensor], bias: bool) -> GemmConfig:
    """What the kernel of a batch is compiled for; `shard` is the shape of the shard."""
    pieces, width = shard
    k, transposed = int(weights[0].shape[0]), is_transposed(weights[0])
    tile_rows = -(-pieces * (width // k) * ranks // TILE_M)
    tile_n = gather_width(tile_rows, [weight.shape[1] for weight in weights], k, ranks, transposed)
    return GemmConfig(dtype, transposed, len(weights), bias, tile_n, depth(tile_n))


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
        batches, self.rest = _batches(plan, others, biases)
        self.launches: list[_Launch | BlocksLaunch] = [
            _Launch(
                self,
                batch,
                [others[index] for index in batch.indices],
                collects=plan.return_gathered and number == 0,
                last=number == len(batches) - 1 and not self.rest,
            )
            for number, batch in enumerate(batches)
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
        for distance in range(1, channel.size):
            peer = (channel.rank - distance) % channel.size
            side += [self._copy(channel, peer, SIDE), channel.signal_step(peer, channel.rank)]
        if channel.captured:
            channel.link.pinned.append(self)
        return Call(channel, [*local, *launches], side, values)

    def _copy(self, channel: DeviceChannel, owner: int, stream_number: int) -> Step:
        """Step that copies the shard, whose address is patched in, to its place in the slot of `owner`."""
        nbytes = self.width * self.dtype.itemsize
        return Step(
            kind=stream.COPY if self.pieces == 1 else stream.COPY_ROWS,
            stream=stream_number,
            dst=channel.data(owner, channel.rank * nbytes),
            bytes=nbytes,
            rows=self.pieces,
            dst_pitch=channel.size * nbytes,
            src_pitch=nbytes,
        )

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
        if gathered is not None:
            outputs.append(gathered)
        return outputs

    def _acknowledge(self, channel: DeviceChannel) -> None:
        """Tell the peers that this captured call has read its slot."""
        closer = channel.link.closer
        values = closer.values(channel.values())
        channel.link.issue(steps_of(closer.step(values, MAIN)))


class _Launch:
    """One kernel of a recipe: the matmuls of a batch."""

    def __init__(
        self, recipe: _Recipe, batch: _Batch, weights: Sequence[Tensor], *, collects: bool, last: bool
    ) -> None:
        link = recipe.link
        shard_shape = (recipe.pieces, recipe.width)
        config = _config(str(recipe.dtype).removeprefix("torch."), link.size, shard_shape, weights, batch.bias)
        k, self.transposed = weights[0].shape[0], config.transposed
        inner = recipe.width // k
        self.lies = all(lies(weight, self.transposed) for weight in weights)
        self.rows = recipe.pieces * inner * link.size
        widths = [weight.shape[1] for weight in weights]
        made = gather_tiles(link.rank, link.size, recipe.pieces, inner, widths, config.tile_n)
        self.spans = made.spans
        (self._table,) = lasting_tables([made.rows], link.device)
        self._fixed = {
            "table": self._table.data_ptr(),
            "tiles": len(made.rows),
            "MR": recipe.pieces * inner,
            "M": self.rows,
            "K": k,
            "pieces": recipe.pieces,
            "shard_bytes": recipe.width * recipe.dtype.itemsize,
            **{f"N{place}": width for place, width in enumerate(widths)},
        }
        if not last:
            self._fixed["ack"] = -1
        self.kernel = kernel("all_gather", config, collects)
        place = self.kernel.place
        self.shard, self.epoch, self.gathered = place("X"), place("epoch"), place("gathered")
        # Of each weight: its index among the op's, its width, and the places of its address, its result's and its bias's.
        self.operands = [
            (index, width, place(f"B{number}"), place(f"C{number}"), place(f"V{number}"))
            for number, (index, width) in enumerate(zip(batch.indices, widths, strict=True))
        ]

    def values(self, known: dict[str, int]) -> Values:
        """Values of launches in one slot, but for those that change from call to call."""
        patched = {
            "X",
            "epoch",
            "gathered",
            *(f"{kind}{number}" for kind in "BCV" for number in range(len(self.operands))),
        }
        return self.kernel.values({**known, "A": known["slot"], **self._fixed}, patched)


def _multiply(use: GatherUse, gathered: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    """The matmul of a use from the gathered tensor [P, R*Q]."""
    contracted = other.shape[0 if use.side == "lhs" else 1]
    columns = contracted if (use.side == "lhs") != use.transposed else gathered.numel() // contracted
    matrix = gathered.to(torch_dtype(use.dtype)).view(-1, columns)
    operand = matrix.t() if use.transposed else matrix
    a, b = (operand, other) if use.side == "lhs" else (other, operand)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
