"""all_gather_matmul over shared memory: each peer's shard is multiplied where it lies, as soon as it is there.

A rank copies its shard into its own arena, signals, and multiplies its own chunk while the peers do the same. Then it takes the
peers in ring order, and their arenas are the operands of its matmuls: the gathered tensor is not built unless the program
wants it, or a matmul in a 16-bit type sums over the ranks (a sum of rounded partial sums would be less exact).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..nvshmem.heap import Channel
from ..problem import FusionProblem, GatherUse, Plan
from .arithmetic import MIN_PIECE, RunningSum, is_low_precision, multiply
from .template import register_template, shm_refusal, torch_dtype


class ChunkLayout:
    """The matrix G2 of a use, chunk by chunk: the rank dimension lies in its rows or columns as (outer, R, inner).

    Attributes:
        split: (outer, R, inner).
        matrix_shape: of a chunk, which is G2 without R.
        free: size of G2's dim that is not contracted.
    """

    def __init__(self, use: GatherUse, shard: Tensor, size: int, contracted: int) -> None:
        pieces, inner = shard.shape
        self.free = pieces * inner * size // max(contracted, 1)
        columns = contracted if (use.side == "lhs") != use.transposed else self.free
        if use.rank_axis == "rows":
            self.matrix_shape = (pieces * inner // max(columns, 1), columns)
            self.split = (pieces, size, inner // max(columns, 1))
        else:
            outer = columns // max(size * inner, 1)
            self.split = (outer, size, inner)
            self.matrix_shape = (pieces // max(outer, 1), outer * inner)


class ChunkedUse:
    """One matmul with the gathered tensor, taken chunk by chunk."""

    def __init__(self, use: GatherUse, shard: Tensor, size: int, other: Tensor, bias: Tensor | None) -> None:
        self.use = use
        self.other = other
        self.bias = bias
        self.dtype = torch_dtype(use.dtype)
        self.is_lhs = use.side == "lhs"
        layout = ChunkLayout(use, shard, size, other.shape[0 if self.is_lhs else 1])
        self.matrix_shape, self.split = layout.matrix_shape, layout.split
        self.outer, _, self.inner = layout.split
        m, n = (layout.free, other.shape[1]) if self.is_lhs else (other.shape[0], layout.free)
        self.out = other.new_empty((m, n), dtype=self.dtype)
        # 16-bit sums over ranks wait for the whole operand: one matmul, rounded once.
        self.waits_for_all = use.contracts_ranks and is_low_precision(self.dtype)
        self._sum = RunningSum(self.out, bias)

    def add_chunk(self, rank: int, chunk: Tensor) -> None:
        """Multiply the chunk [P, Q] of `rank`."""
        matrix = chunk.to(self.dtype).view(self.matrix_shape)
        operand = matrix.t() if self.use.transposed else matrix
        if self.use.contracts_ranks:
            self._accumulate(rank, operand)
        else:
            self._place(rank, operand)

    def finish(self, gathered: Tensor) -> None:
        """The matmul of a use that waits for all, from the gathered tensor [P, R*Q]."""
        rows, columns = self.matrix_shape
        shape = (rows * self.split[1], columns) if self.use.rank_axis == "rows" else (rows, columns * self.split[1])
        matrix = gathered.to(self.dtype).view(shape)
        operand = matrix.t() if self.use.transposed else matrix
        a, b = (operand, self.other) if self.is_lhs else (self.other, operand)
        multiply(self.out, a, b, self.bias)

    def _place(self, rank: int, operand: Tensor) -> None:
        """The ranks are an output dimension: the product of this chunk has its own place in the output."""
        dim = 0 if self.is_lhs else 1
        target = self.out.unflatten(dim, self.split).select(dim + 1, rank)  # lhs [A, inner, n], rhs [m, A, inner]
        bias = self.bias
        if bias is not None and not self.is_lhs:
            bias = bias.view(self.split)[:, rank]
        if self.outer > 1 and self.inner < MIN_PIECE:
            flat_bias = None if bias is None else bias.reshape(-1)
            a, b = (operand, self.other) if self.is_lhs else (self.other, operand)
            product = torch.mm(a, b) if flat_bias is None else torch.addmm(flat_bias.to(self.dtype), a, b)
            target.copy_(product.view(target.shape))
            return
        parts = operand.unflatten(dim, (self.outer, self.inner))
        for index in range(self.outer):
            part = parts.select(dim, index)
            out = target.select(dim, index)
            if self.is_lhs:
                multiply(out, part, self.other, bias)
            else:
                multiply(out, self.other, part, None if bias is None else bias[index])

    def _accumulate(self, rank: int, operand: Tensor) -> None:
        """The ranks are summed over: the product of this chunk is added to the output."""
        dim = 0 if self.is_lhs else 1
        others = self.other.unflatten(dim, self.split).select(dim + 1, rank)  # lhs [A, inner, n], rhs [m, A, inner]
        if self.outer == 1 or self.inner < MIN_PIECE:
            other = others.flatten(dim, dim + 1)
            self._add(operand, other)
            return
        parts = operand.unflatten(1 - dim, (self.outer, self.inner))
        for index in range(self.outer):
            self._add(parts.select(1 - dim, index), others.select(dim, index))

    def _add(self, operand: Tensor, other: Tensor) -> None:
        a, b = (operand, other) if self.is_lhs else (other, operand)
        self._sum.add(a, b)


@register_template("all_gather_matmul")
class ShmAllGatherGemm:
    """shard [P, Q] of each rank, gathered to [P, R*Q], times the other operands."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(
        self, plan: Plan, size: int, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> int:
        return int(shard.numel()) * torch_dtype(plan.dtype).itemsize

    def run(
        self, channel: Channel, plan: Plan, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        dtype = torch_dtype(plan.dtype)
        shape = (shard.shape[0], shard.shape[1])
        channel.payload = shard.numel() * dtype.itemsize
        own = channel.view(channel.rank, 0, shape, dtype)
        own.copy_(shard)
        channel.signal_all()
        uses = [
            ChunkedUse(use, shard, channel.size, other, bias)
            for use, other, bias in zip(plan.uses, others, biases, strict=True)
        ]
        late = [use for use in uses if use.waits_for_all]
        early = [use for use in uses if not use.waits_for_all]
        gathered: Tensor | None = None
        if plan.return_gathered or late:
            gathered = shard.new_empty((shape[0], channel.size * shape[1]), dtype=dtype)
        for rank in (channel.rank, *channel.peers()):
            if rank == channel.rank:
                chunk = own
            else:
                channel.wait(rank)
                chunk = channel.view(rank, 0, shape, dtype)
            if gathered is not None:
                gathered.view(shape[0], channel.size, shape[1])[:, rank].copy_(chunk)
            for use in early:
                use.add_chunk(rank, chunk)
        if gathered is not None:
            for use in late:
                use.finish(gathered)
        outputs = [use.out for use in uses]
        if plan.return_gathered and gathered is not None:
            outputs.append(gathered)
        return outputs
