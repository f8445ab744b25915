"""all_gather_matmul over NVLink: the copy engine pushes the shard to the peers while a GEMM takes the shards in order of arrival.

The kernel's loading warp waits for a shard's flag where it first needs it. Tiles of the own shard come first and are read where
the shard lies. A gather that this kernel serves no matmul of takes that of gather_blocks.py. Matmuls that neither serves, or that
have the rank dimension summed over while others do not, follow on the gathered tensor, which is complete by then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ...nvshmem import copies
from ...nvshmem.copies import Step
from ...problem import FusionProblem, GatherUse, Plan
from ..template import register_template, torch_dtype
from .channel import ACK, SIDE, DeviceChannel, DeviceLink, fork, steps_of
from .gather_blocks import BlocksLaunch, block_launches, blocks_of
from .jit import kernel
from .kernels.all_gather import all_gather_kernel
from .kernels.gemm import MAX_OPERANDS, GemmConfig
from .kernels.service import service_kernel
from .operands import aligned_pointer, is_transposed, right_operand
from .refusal import gather_refusal, serves_use
from .tiles import TILE_M, gather_tiles
from .widths import tile_width

_T = TypeVar("_T")


@register_template("all_gather_matmul", "nvlink")
class NvlinkAllGatherGemm:
    """shard [P, Q] of each rank, gathered to [P, R*Q], times the other operands."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return gather_refusal(problem, plan)

    def scratch_bytes(
        self, plan: Plan, size: int, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> int:
        for use, other in zip(plan.uses, others, strict=True):
            k, n = (int(s) for s in other.shape)
            if serves_use(use, plan.dtype, k, n) or blocks_of(use, plan.dtype, size, shard.shape, other) is not None:
                return int(shard.numel()) * size * torch_dtype(plan.dtype).itemsize
        return -1

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        shard = aligned_pointer(shard.to(torch_dtype(plan.dtype)).contiguous())
        recipe = _recipe(channel, plan, shard, others, biases)
        pieces, width = recipe.pieces, recipe.width
        channel.start()
        recipe.push(channel, shard)
        gathered = shard.new_empty((pieces, channel.size * width)) if plan.return_gathered else None
        if recipe.local:
            slot = channel.view((pieces, channel.size, width), shard.dtype)
            slot[:, channel.rank].copy_(shard)
        outputs: list[Tensor | None] = [None] * len(plan.uses)
        for number, launch in enumerate(recipe.launches):
            launch.run(channel, shard, others, biases, gathered if number == 0 else None, outputs)
        if recipe.rest:
            source = gathered if gathered is not None else channel.view((pieces, channel.size * width), shard.dtype)
            for index in recipe.rest:
                outputs[index] = _multiply(plan.uses[index], source, others[index], biases[index])
            if channel.captured:
                service_kernel("tsk_acknowledge")(channel.link.contexts[channel.slot], channel.epoch, channel.site, ACK)
        channel.join()
        results = [output for output in outputs if output is not None]
        return results if gathered is None else [*results, gathered]


class _Launch:
    """One kernel: weights of one layout and one k, at most MAX_OPERANDS; prepared once for its shapes."""

    def __init__(
        self, link: DeviceLink, indices: list[int], shard: Tensor, others: Sequence[Tensor], has_bias: bool, last: bool
    ) -> None:
        pieces, width = shard.shape
        first = others[indices[0]]
        self.indices = indices
        self.transposed = is_transposed(first)
        self.has_bias = has_bias
        self.k = first.shape[0]
        inner = width // self.k
        self.m = pieces * link.size * inner
        self.widths = [others[index].shape[1] for index in indices]
        self.pieces, self.shard_bytes = pieces, width * shard.element_size()
        tile_n = tile_width(-(-self.m // TILE_M), self.widths)
        made = gather_tiles(link.rank, link.size, pieces, inner, self.widths, tile_n)
        self.spans = made.spans
        self.table = torch.tensor(made.rows, dtype=torch.int32, device=link.device)
        self.ack = ACK if last else -1
        dtype = str(shard.dtype).removeprefix("torch.")
        self.config = GemmConfig(dtype, self.transposed, len(indices), has_bias, tile_n)
        self._kernels: dict[bool, Callable[..., None]] = {}

    def _kernel(self, collects: bool) -> Callable[..., None]:
        found = self._kernels.get(collects)
        if found is None:
            found = self._kernels[collects] = kernel(all_gather_kernel, self.config, collects)
        return found

    def run(
        self,
        channel: DeviceChannel,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        gathered: Tensor | None,
        outputs: list[Tensor | None],
    ) -> None:
        """Launch it; it also fills `gathered`, if any."""
        weights = [right_operand(others[index], self.transposed) for index in self.indices]
        results = []
        for index, width in zip(self.indices, self.widths, strict=True):
            outputs[index] = result = shard.new_empty((self.m, width))
            results.append(result.data_ptr())
        rows = [biases[index] for index in self.indices] if self.has_bias else []
        held = [row.to(shard.dtype) for row in rows if row is not None]
        self._kernel(gathered is not None)(
            shard.view(-1, self.k),
            channel.view((self.m, self.k), shard.dtype),
            *_padded(weights),
            *_padded(results),
            *(_padded([row.data_ptr() for row in held]) if held else (0, 0, 0)),
            0 if gathered is None else gathered.data_ptr(),
            self.table.data_ptr(),
            len(self.table),
            channel.context,
            channel.counters,
            self.pieces,
            self.shard_bytes,
            channel.epoch,
            channel.site,
            self.ack,
        )


class _Recipe:
    """What the calls of one site with the same shapes share."""

    def __init__(
        self,
        link: DeviceLink,
        plan: Plan,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> None:
        self.pieces, self.width = shard.shape
        groups: dict[tuple[bool, bool, int], list[int]] = {}
        self.rest: list[int] = []
        for index, (use, other, bias) in enumerate(zip(plan.uses, others, biases, strict=True)):
            if serves_use(use, plan.dtype, other.shape[0], other.shape[1]):
                groups.setdefault((is_transposed(other), bias is not None, other.shape[0]), []).append(index)
            else:
                self.rest.append(index)
        batches = [
            (group[i : i + MAX_OPERANDS], with_bias)
            for (_, with_bias, _), group in groups.items()
            for i in range(0, len(group), MAX_OPERANDS)
        ]
        self.launches: list[_Launch | BlocksLaunch] = [
            _Launch(link, batch, shard, others, with_bias, number == len(batches) - 1 and not self.rest)
            for number, (batch, with_bias) in enumerate(batches)
        ]
        if not self.launches:
            launches, self.rest = block_launches(link, plan, shard, others, biases)
            self.launches += launches
        # The own shard is read where it lies, unless a tile has rows of others too, or a later matmul reads the slot.
        self.local = any(launch.spans for launch in self.launches) or (bool(self.rest) and not plan.return_gathered)
        self._steps: dict[int, ctypes.Array[Step]] = {}

    def push(self, channel: DeviceChannel, shard: Tensor) -> None:
        """Copy the shard into the slot of every peer, each copy followed by its flag."""
        steps = self._steps.get(channel.slot)
        if steps is None:
            steps = self._steps[channel.slot] = steps_of(*fork(), *_push(channel, shard))
        source = shard.data_ptr()
        for index in range(2, len(steps), 2):
            steps[index].src = source
            steps[index + 1].value = channel.epoch
        channel.link.issue(steps)


def _recipe(
    channel: DeviceChannel, plan: Plan, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> _Recipe:
    cache = channel.link.tables
    has_bias = tuple(bias is not None for bias in biases)  # a site's name does not say it
    key = (plan.site, has_bias, shard.shape, *[(other.shape, other.stride()) for other in others])
    found: _Recipe | None = cache.get(key)
    if found is None:
        found = cache[key] = _Recipe(channel.link, plan, shard, others, biases)
    return found


def _padded(operands: list[_T]) -> list[_T]:
    """As many as a kernel takes; it does not look at the surplus."""
    return [*operands, *[operands[0]] * (MAX_OPERANDS - len(operands))]


def _push(channel: DeviceChannel, shard: Tensor) -> list[Step]:
    """Copies of the shard into the slot of every peer, each followed by its flag: the previous rank's first, so that at any time
    every rank sends to another one."""
    pieces, width = shard.shape
    nbytes = width * shard.element_size()
    steps: list[Step] = []
    for distance in range(1, channel.size):
        peer = (channel.rank - distance) % channel.size
        target = channel.data(peer, channel.rank * nbytes)
        if pieces == 1:
            steps.append(Step(kind=copies.COPY, stream=SIDE, dst=target, src=shard.data_ptr(), bytes=nbytes))
        else:
            steps.append(
                Step(
                    kind=copies.COPY_ROWS,
                    stream=SIDE,
                    dst=target,
                    src=shard.data_ptr(),
                    bytes=nbytes,
                    rows=pieces,
                    dst_pitch=channel.size * nbytes,
                    src_pitch=nbytes,
                )
            )
        steps.append(channel.signal_step(peer, channel.rank))
    return steps


def _multiply(use: GatherUse, gathered: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    """The matmul of a use from the gathered tensor [P, R*Q]."""
    contracted = other.shape[0 if use.side == "lhs" else 1]
    columns = contracted if (use.side == "lhs") != use.transposed else gathered.numel() // contracted
    matrix = gathered.to(torch_dtype(use.dtype)).view(-1, columns)
    operand = matrix.t() if use.transposed else matrix
    a, b = (operand, other) if use.side == "lhs" else (other, operand)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
