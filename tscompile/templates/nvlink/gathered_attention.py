"""all_gather_attention over NVLink: the copy engine sends keys and values while torch's attention takes the chunks that are there.

Each rank has its chunk first, then those of the next ranks, in the order in which they arrive. Partial results are merged by a few
elementwise kernels (../key_chunks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...nvshmem.heap import aligned
from ...problem import FusionProblem, Plan
from ..all_to_all import Outputs
from ..gathered_attention import gathered_shapes, in_memory
from ..key_chunks import Merged, as_returned, attend, chunked, keys_view
from ..template import register_template
from .channel import DeviceChannel, DeviceLink
from .chunks import KERNELS, ChunkCall, Piece, floating, peers, receivers, sendable
from .refusal import nvlink_refusal


def chunks_refusal(problem: FusionProblem, plan: Plan) -> str | None:
    """What GPUs cannot do chunk by chunk of keys."""
    if plan.chunks is not None and plan.chunks.causal:
        return "torch's attention ops on GPUs do not agree on causal masks of fewer queries than keys"
    return nvlink_refusal(problem)


@register_template("all_gather_attention", "nvlink")
class NvlinkGatheredAttention:
    """query `[B, heads, L, E]`; shards `[f1, ..., fk]` of this rank's keys and values."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return chunks_refusal(problem, plan)

    def scratch_bytes(self, plan: Plan, size: int, query: Tensor, shards: Sequence[Tensor]) -> int:
        return size * sum(aligned(int(shard.numel()) * shard.element_size()) for shard in shards)

    def kernels(self, plan: Plan, size: int, query: Tensor, shards: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return list(KERNELS)

    def run(self, channel: DeviceChannel, plan: Plan, query: Tensor, shards: Sequence[Tensor]) -> list[Tensor]:
        recipe: _Recipe = channel.site.recipe
        if recipe is None or recipe.link is not channel.link:
            recipe = channel.site.recipe = _Recipe(channel.link, shards)
        own = [sendable(shard) for shard in shards]
        call = recipe.call(channel)
        call.begin(channel, own)
        for peer in receivers(channel):
            call.send(peer)
        chunks = chunked(plan)
        gathered = Outputs(plan.deliveries, plan.joins, gathered_shapes(own, channel.size), query)
        merged = Merged(query)
        first: tuple[Any, ...] = ()
        for rank in (channel.rank, *peers(channel)):
            held = own
            if rank != channel.rank:
                call.wait(rank)
                held = recipe.received(channel, rank)
            found = attend(chunks, query, [keys_view(keys, held[keys.shard]) for keys in chunks.keys])
            first = first or found
            merged.add(found[0], found[1], 0)
            for number, block in enumerate(held):
                gathered.deliver(number, rank, block.unsqueeze(0))
        # What is neither output nor logsumexp is about random numbers, and the same for every chunk without dropout.
        output, logsumexp = merged.results()
        results = [output, as_returned(logsumexp, first[1]), *first[2:]]
        outputs = [*in_memory([results[n] for n in chunks.results], chunks.layouts), *gathered.tensors]
        call.end(floating(outputs))
        return outputs


class _Recipe:
    """Where the shards of each rank lie in a slot, and the steps of the calls."""

    def __init__(self, link: DeviceLink, shards: Sequence[Tensor]) -> None:
        self.link = link
        self._shapes = [(tuple(shard.shape), shard.dtype) for shard in shards]
        self._bytes = [shard.numel() * shard.element_size() for shard in shards]
        self._places: list[int] = []
        self._stride = 0
        for nbytes in self._bytes:
            self._places.append(self._stride)
            self._stride += aligned(nbytes)
        self._calls: dict[int, ChunkCall] = {}

    def call(self, channel: DeviceChannel) -> ChunkCall:
        call = self._calls.get(channel.slot)
        if call is None:
            start = channel.rank * self._stride
            pieces = [
                Piece(nbytes, start + place, source)
                for source, (nbytes, place) in enumerate(zip(self._bytes, self._places, strict=True))
            ]
            call = self._calls[channel.slot] = ChunkCall(channel, [pieces] * channel.size, len(pieces))
        return call

    def received(self, channel: DeviceChannel, rank: int) -> list[Tensor]:
        """The shards of `rank`, in this rank's slot."""
        start = rank * self._stride
        places = zip(self._shapes, self._places, strict=True)
        return [channel.view(shape, dtype, start + place) for (shape, dtype), place in places]
