"""mesh_matmul over shared memory: both operands lie in pieces in the arenas of two groups, and are multiplied from there.

A rank copies its two shards into its own arenas and signals both groups before it waits for anybody. What follows is a schedule:

    summa   the contracted dim is cut into panels, each held by one rank of either group; all ranks take them in the same order
    cannon  the same on a square mesh, but rank (i, j) starts with panel i + j, so that no two ranks of a group read one arena at a time
    stream  the operand with fewer bytes is put together first; the other one is multiplied shard by shard as it arrives

Panels need no copy of either operand, and hold for sums that need not be rounded once: 16-bit types are streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..nvshmem.heap import Channel
from ..problem import FusionProblem, GatherUse, Plan
from .all_gather_gemm import ChunkedUse, ChunkLayout
from .arithmetic import multiply
from .template import register_template, shm_refusal, torch_dtype

SUMMA, CANNON, STREAM = "summa", "cannon", "stream"


class Posted:
    """One operand's gather in one launch: the shard is in this rank's arena and signalled; the peers' follow.

    Args:
        channel: of the operand's group.
        shard: [P, Q].
        dtype: what crosses ranks.
        keep: put the gathered tensor together, too.
    """

    def __init__(self, channel: Channel, shard: Tensor, dtype: torch.dtype, keep: bool) -> None:
        self.channel = channel
        self.shape = (shard.shape[0], shard.shape[1])
        self.dtype = dtype
        self.rank, self.size = channel.rank, channel.size
        self.nbytes = channel.size * shard.numel() * dtype.itemsize
        self._chunks: dict[int, Tensor] = {}
        self._gathered = self._empty(shard) if keep else None
        channel.payload = shard.numel() * dtype.itemsize
        channel.view(channel.rank, 0, self.shape, dtype).copy_(shard)
        channel.signal_all()

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty((self.shape[0], self.size * self.shape[1]), dtype=self.dtype)

    def ring(self) -> Iterator[int]:
        """The ranks of the group, this one first."""
        yield self.rank
        yield from self.channel.peers()

    def chunk(self, rank: int) -> Tensor:
        """The shard of `rank` in its arena, once it is there. Raises as `Channel.wait`."""
        chunk = self._chunks.get(rank)
        if chunk is None:
            if rank != self.rank:
                self.channel.wait(rank)
            chunk = self._chunks[rank] = self.channel.view(rank, 0, self.shape, self.dtype)
            if self._gathered is not None:
                self._gathered.view(self.shape[0], self.size, self.shape[1])[:, rank].copy_(chunk)
        return chunk

    def settle(self) -> list[Tensor]:
        """Every rank's shard, in the group's order."""
        for rank in self.ring():
            self.chunk(rank)
        return [self._chunks[rank] for rank in range(self.size)]

    def whole(self) -> Tensor:
        """The gathered tensor [P, R*Q]."""
        if self._gathered is None:
            self._gathered = torch.stack(self.settle(), 1).flatten(1)
        else:
            self.settle()
        return self._gathered


@register_template("mesh_matmul")
class ShmMeshGemm:
    """lhs and rhs, each gathered in its own group, multiplied with each other."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        refusal = shm_refusal(problem)
        if refusal is None and problem.second_group_size < 2:
            return "the second group has one rank: there is no second gather to hide"
        return refusal

    def scratch_bytes(self, plan: Plan, size: int, lhs: Tensor, rhs: Tensor, *args: Any) -> int:
        """Of either group's arena; the larger shard counts for both."""
        return int(max(lhs.numel(), rhs.numel())) * torch_dtype(plan.dtype).itemsize

    def run(
        self,
        channel: tuple[Posted, Posted],
        plan: Plan,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None,
        contracted: int,
        second_group: str,
    ) -> list[Tensor]:
        """`channel` is what lowering/mesh.py has posted: the left operand and the right one."""
        left, right = channel
        layouts = [
            ChunkLayout(use, shard, posted.size, contracted)
            for use, shard, posted in zip(plan.uses, (lhs, rhs), channel, strict=True)
        ]
        panels = all(  # each rank of either group holds one block of the contracted dim
            use.contracts_ranks and layout.split[0] == 1 for use, layout in zip(plan.uses, layouts, strict=True)
        )
        if plan.schedule in (SUMMA, CANNON) and panels and contracted:
            out = lhs.new_empty((layouts[0].free, layouts[1].free), dtype=torch_dtype(plan.uses[0].dtype))
            _by_panels(out, plan, left, right, layouts, bias, contracted)
        else:
            out = _streamed(plan, left, right, (lhs, rhs), bias, contracted)
        outputs = [out]
        for posted, keep in ((left, plan.return_gathered), (right, plan.return_second)):
            posted.settle()  # no op ends before it has heard of every peer
            if keep:
                outputs.append(posted.whole())
        return outputs


def panel_bounds(contracted: int, left: int, right: int) -> list[tuple[int, int]]:
    """The contracted dim cut where a shard of either group ends."""
    cuts = {i * contracted // left for i in range(left)} | {i * contracted // right for i in range(right)}
    return list(pairwise([*sorted(cuts), contracted]))


def _by_panels(
    out: Tensor,
    plan: Plan,
    left: Posted,
    right: Posted,
    layouts: Sequence[ChunkLayout],
    bias: Tensor | None,
    contracted: int,
) -> None:
    bounds = panel_bounds(contracted, left.size, right.size)
    first = (left.rank + right.rank) % len(bounds) if plan.schedule == CANNON else 0
    for index, (start, stop) in enumerate(bounds[first:] + bounds[:first]):
        a = _panel(plan.uses[0], left, layouts[0], start, stop)
        b = _panel(plan.uses[1], right, layouts[1], start, stop)
        if index == 0:
            multiply(out, a, b, bias)
        else:
            out.addmm_(a, b)


def _panel(use: GatherUse, posted: Posted, layout: ChunkLayout, start: int, stop: int) -> Tensor:
    """[m, stop - start] of the left operand, [stop - start, n] of the right one."""
    owner, offset = divmod(start, layout.split[2])
    matrix = posted.chunk(owner).to(torch_dtype(use.dtype)).view(layout.matrix_shape)
    operand = matrix.t() if use.transposed else matrix
    return operand.narrow(1 if use.side == "lhs" else 0, offset, stop - start)


def _streamed(
    plan: Plan, left: Posted, right: Posted, shards: tuple[Tensor, Tensor], bias: Tensor | None, contracted: int
) -> Tensor:
    lhs_use, rhs_use = plan.uses
    if left.nbytes >= right.nbytes:
        posted, shard, use = left, shards[0], lhs_use
        other = gathered_matrix(rhs_use, right.whole(), contracted)
    else:
        posted, shard, use = right, shards[1], rhs_use
        other = gathered_matrix(lhs_use, left.whole(), contracted)
    chunked = ChunkedUse(use, shard, posted.size, other, bias)
    if chunked.waits_for_all:
        chunked.finish(posted.whole())
    else:
        for rank in posted.ring():
            chunked.add_chunk(rank, posted.chunk(rank))
    return chunked.out


def gathered_matrix(use: GatherUse, gathered: Tensor, contracted: int) -> Tensor:
    """The operand that a use makes of its gathered tensor [P, R*Q]."""
    columns_contracted = (use.side == "lhs") != use.transposed
    free = gathered.numel() // max(contracted, 1)
    shape = (free, contracted) if columns_contracted else (contracted, free)
    matrix = gathered.to(torch_dtype(use.dtype)).view(shape)
    return matrix.t() if use.transposed else matrix
