"""all_gather_attention over shared memory: each peer's keys and values are attended to where they lie, as soon as they are there.

A rank copies its shards into its own arena, signals, and attends to its own chunk while the peers do the same. Then it takes the peers
in ring order, and merges what each chunk gives (key_chunks.py). The gathered tensors are built only if the program wants them for
something else, its backward, say. A chunk of which a causal mask leaves nothing is waited for all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..nvshmem.heap import Channel, aligned
from ..problem import FusionProblem, Plan
from .all_to_all import Outputs
from .key_chunks import SEQUENCE, Merged, attend, chunked, keys_view, steps
from .template import register_template, shm_refusal


def gathered_shapes(shards: Sequence[Tensor], ranks: int) -> list[list[int]]:
    """`[R, f1, ..., fk]` of each gathered tensor."""
    return [[ranks, *shard.shape] for shard in shards]


def in_memory(results: Sequence[Tensor], layouts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each result with its dims as the plan says that they lie in memory, contiguous."""
    return [result.permute(tuple(layout)).contiguous() for result, layout in zip(results, layouts, strict=True)]


@register_template("all_gather_attention")
class ShmGatheredAttention:
    """query `[B, heads, L, E]`; shards `[f1, ..., fk]` of this rank's keys and values."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(self, plan: Plan, size: int, query: Tensor, shards: Sequence[Tensor]) -> int:
        return sum(aligned(int(shard.numel()) * shard.element_size()) for shard in shards)

    def run(self, channel: Channel, plan: Plan, query: Tensor, shards: Sequence[Tensor]) -> list[Tensor]:
        chunks = chunked(plan)
        channel.payload = sum(shard.numel() * shard.element_size() for shard in shards)
        places: list[int] = []
        offset = 0
        for shard in shards:
            channel.view(channel.rank, offset, tuple(shard.shape), shard.dtype).copy_(shard)
            places.append(offset)
            offset += aligned(shard.numel() * shard.element_size())
        channel.signal_all()
        gathered = Outputs(plan.deliveries, plan.joins, gathered_shapes(shards, channel.size), query)
        merged = Merged(query)
        rows = query.shape[SEQUENCE]
        for rank in (channel.rank, *channel.peers()):
            held = list(shards)
            if rank != channel.rank:
                channel.wait(rank)
                held = [
                    channel.view(rank, place, tuple(shard.shape), shard.dtype)
                    for place, shard in zip(places, shards, strict=True)
                ]
            parts = [keys_view(keys, held[keys.shard]) for keys in chunks.keys]
            for step in steps(chunks.order, chunks.causal, rank, parts[0].shape[SEQUENCE], rows):
                cut = [part.narrow(SEQUENCE, step.start, step.length) for part in parts]
                out, lse, *_ = attend(chunks, query[:, :, step.row :], cut, step.causal)
                merged.add(out, lse, step.row)
            for number, block in enumerate(held):
                gathered.deliver(number, rank, block.unsqueeze(0))
        both = merged.results()
        results = [both[number] for number in chunks.results]
        return [*in_memory(results, chunks.layouts), *gathered.tensors]
