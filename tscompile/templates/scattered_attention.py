"""attention_reduce_scatter over shared memory: the gradients of a peer's keys and values leave for it as soon as they are computed.

A rank takes the chunks in ring order, the next rank's first and its own last. It writes the gradients of a peer's chunk into the arena
of that peer, in the slot of this rank, and signals. Then it adds what it received to its own, in the order of ranks, so that the result
does not depend on who was faster. The gradient of the queries adds up over the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..nvshmem.heap import Channel, aligned
from ..problem import ChunkedAttention, FusionProblem, Plan
from .arithmetic import sum_partials
from .gathered_attention import in_memory
from .key_chunks import SEQUENCE, chunk_of, chunked, gradients, steps
from .template import register_template, shm_refusal


def split_sizes(chunks: ChunkedAttention, sizes: Sequence[int]) -> list[list[int]]:
    """The op's `sizes`, scatter by scatter."""
    found, start = [], 0
    for scatter in chunks.scatters:
        found.append(list(sizes[start : start + scatter.sizes]))
        start += scatter.sizes
    return found


def block_shapes(chunks: ChunkedAttention, sizes: Sequence[int]) -> list[list[int]]:
    """The shape of each scatter's result."""
    split = split_sizes(chunks, sizes)
    return [[size[dim] for dim in scatter.order] for scatter, size in zip(chunks.scatters, split, strict=True)]


def blocks_of(chunks: ChunkedAttention, sizes: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor]:
    """What each scatter sums of a chunk, in its order; `parts` are the gradients of its queries, keys and values."""
    found = []
    for scatter, size in zip(chunks.scatters, split_sizes(chunks, sizes), strict=True):
        taken = [parts[number] for number in scatter.parts]
        whole = torch.stack(taken) if len(taken) > 1 else taken[0]
        found.append(whole.reshape(size).permute(scatter.order))
    return found


def named(chunks: ChunkedAttention, operands: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The backward op's operands by name but for keys and values; and these."""
    given = dict(zip(chunks.operands, operands, strict=True))
    keys = [given.pop("key"), given.pop("value")]
    return given, keys


class ChunkGradients:
    """Gradients of a call, chunk by chunk.

    Attributes:
        query: of the queries, over the chunks so far, in float32 (float64 for float64).
    """

    def __init__(self, chunks: ChunkedAttention, operands: Sequence[Tensor]) -> None:
        self._chunks = chunks
        self._given, self._keys = named(chunks, operands)
        self._rows = self._given["query"].shape[SEQUENCE]
        query = self._given["query"]
        self.query = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))

    def of_chunk(self, rank: int) -> list[Tensor]:
        """Of the keys and of the values of `rank`, with the queries' first; adds to `query`."""
        chunks = self._chunks
        keys = [chunk_of(chunks.order, rank, whole) for whole in self._keys]
        held = keys[0].shape[SEQUENCE]
        todo = steps(chunks.order, chunks.causal, rank, held, self._rows)
        found = [torch.zeros_like(key) for key in keys] if len(todo) != 1 or todo[0].length < held else []
        for step in todo:
            cut = [key.narrow(SEQUENCE, step.start, step.length) for key in keys]
            of_query, *of_keys = gradients(chunks, self._given, cut, step.row, step.causal)
            self.query[:, :, step.row :].add_(of_query)
            if not found:  # all of the chunk at once
                return [self.query, *of_keys]
            for whole, part in zip(found, of_keys, strict=True):
                whole.narrow(SEQUENCE, step.start, step.length).copy_(part)
        return [self.query, *found]


@register_template("attention_reduce_scatter")
class ShmScatteredAttention:
    """operands: those of the attention's backward op, as the plan names them; sizes: of the scatters' parts."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(self, plan: Plan, size: int, operands: Sequence[Tensor], sizes: Sequence[int]) -> int:
        width = operands[0].element_size()
        return size * sum(aligned(int(prod(shape)) * width) for shape in block_shapes(chunked(plan), sizes))

    def run(self, channel: Channel, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        chunks, dtype = chunked(plan), operands[0].dtype
        shapes = block_shapes(chunks, sizes)
        places, slot = [], 0
        for shape in shapes:
            places.append(slot)
            slot += aligned(prod(shape) * dtype.itemsize)
        channel.payload = slot

        def received(owner: int, source: int) -> list[Tensor]:
            """What `source` computed for `owner`, in the arena of that."""
            return [
                channel.view(owner, source * slot + place, tuple(shape), dtype)
                for place, shape in zip(places, shapes, strict=True)
            ]

        computed = ChunkGradients(chunks, operands)
        for peer in channel.peers():
            blocks = blocks_of(chunks, sizes, computed.of_chunk(peer))
            for target, block in zip(received(peer, channel.rank), blocks, strict=True):
                target.copy_(block)
            channel.signal(peer)
        outs = [block.contiguous() for block in blocks_of(chunks, sizes, computed.of_chunk(channel.rank))]
        partials = [[out] for out in outs]
        for rank in range(channel.size):
            if rank != channel.rank:
                channel.wait(rank)
                for found, partial in zip(partials, received(channel.rank, rank), strict=True):
                    found.append(partial)
        divisor = channel.size if plan.reduce_op == "avg" else 1
        for out, found in zip(outs, partials, strict=True):
            rows = (-1, out.shape[-1] if out.dim() else 1)
            sum_partials(out.view(rows), [partial.view(rows) for partial in found], divisor)
        results = [computed.query.to(dtype)] if chunks.results else []
        return [*in_memory(results, chunks.layouts), *outs]
