"""attention_reduce_scatter over NVLink: gradients of a peer's keys and values travel by copy engine while the next peer's are computed.

What leaves is staged in this rank's slot, behind what it receives. The sums are taken in float32 at the end, in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...nvshmem.heap import aligned
from ...problem import FusionProblem, Plan
from ..gathered_attention import in_memory
from ..key_chunks import chunked
from ..scattered_attention import ChunkGradients, block_shapes, blocks_of
from ..template import register_template
from .channel import DeviceChannel, DeviceLink
from .chunks import KERNELS, ChunkCall, Piece, floating, peers, receivers
from .gathered_attention import chunks_refusal


@register_template("attention_reduce_scatter", "nvlink")
class NvlinkScatteredAttention:
    """operands: those of the attention's backward op, as the plan names them; sizes: of the scatters' parts."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return chunks_refusal(problem, plan)

    def scratch_bytes(self, plan: Plan, size: int, operands: Sequence[Tensor], sizes: Sequence[int]) -> int:
        width = operands[0].element_size()
        return 2 * size * sum(aligned(int(prod(shape)) * width) for shape in block_shapes(chunked(plan), sizes))

    def kernels(self, plan: Plan, size: int, operands: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Any, ...]]:
        return list(KERNELS)

    def run(self, channel: DeviceChannel, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        chunks, dtype = chunked(plan), operands[0].dtype
        recipe: _Recipe = channel.site.recipe
        if recipe is None or recipe.link is not channel.link:
            recipe = channel.site.recipe = _Recipe(channel.link, block_shapes(chunks, sizes), dtype)
        call = recipe.call(channel)
        call.begin(channel)
        computed = ChunkGradients(chunks, operands)
        for peer in receivers(channel):
            blocks = blocks_of(chunks, sizes, computed.of_chunk(peer))
            for target, block in zip(recipe.blocks(channel, channel.size + peer), blocks, strict=True):
                target.copy_(block)
            call.send(peer)
        wide = torch.promote_types(dtype, torch.float32)
        sums = [block.to(wide, copy=True) for block in blocks_of(chunks, sizes, computed.of_chunk(channel.rank))]
        for peer in peers(channel):
            call.wait(peer)
        for rank in range(channel.size):
            if rank != channel.rank:
                for total, block in zip(sums, recipe.blocks(channel, rank), strict=True):
                    total.add_(block)
        if plan.reduce_op == "avg":
            sums = [total.div_(channel.size) for total in sums]
        outs = [total.to(dtype).contiguous() for total in sums]
        results = [computed.query.to(dtype)] if chunks.results else []
        outputs = [*in_memory(results, chunks.layouts), *outs]
        call.end(floating(outputs))
        return outputs


class _Recipe:
    """A slot has a place for what each rank sends to this one, then one for what this rank sends to each."""

    def __init__(self, link: DeviceLink, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        self.link = link
        self._shapes, self._dtype = [tuple(shape) for shape in shapes], dtype
        self._places: list[int] = []
        self._stride = 0
        for shape in self._shapes:
            self._places.append(self._stride)
            self._stride += aligned(prod(shape) * dtype.itemsize)
        self._calls: dict[int, ChunkCall] = {}

    def call(self, channel: DeviceChannel) -> ChunkCall:
        call = self._calls.get(channel.slot)
        if call is None:
            target = channel.rank * self._stride
            pieces = [
                [Piece(self._stride, target, offset=(channel.size + peer) * self._stride)]
                for peer in range(channel.size)
            ]
            call = self._calls[channel.slot] = ChunkCall(channel, pieces)
        return call

    def blocks(self, channel: DeviceChannel, place: int) -> list[Tensor]:
        start = place * self._stride
        return [
            channel.view(shape, self._dtype, start + offset)
            for shape, offset in zip(self._shapes, self._places, strict=True)
        ]
