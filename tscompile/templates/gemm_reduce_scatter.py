"""matmul_reduce_scatter over shared memory: each partial result is computed in the memory of the rank that sums it.

A rank takes its destinations in ring order, the next rank first. The block for a peer is the output operand of the matmul and lies
in the peer's arena, in the slot of this rank; then the peer is signalled. The own block comes last, and the received
partials are added to it, the own one first, then in rank order, so that the result does not depend on who was faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..nvshmem.heap import Channel, aligned
from ..problem import FusionProblem, Plan
from .arithmetic import MIN_PIECE, sum_partials, sum_terms
from .template import register_template, shm_refusal, torch_dtype


def coefficients_of(plan: Plan, lhs: Sequence[Tensor], addends: Sequence[Tensor]) -> tuple[float, ...]:
    """The factor of each matmul, then of each addend."""
    return plan.coefficients or (1.0,) * (len(lhs) + len(addends))


class _Terms:
    """The sum of terms [M, N] of one call, block of destination by block of destination."""

    def __init__(
        self,
        plan: Plan,
        size: int,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
        outer: int,
    ) -> None:
        self.lhs, self.rhs, self.biases, self.addends = lhs, rhs, biases, addends
        self.coefficients = coefficients_of(plan, lhs, addends)
        self.rows = plan.rank_axis == "rows"
        m, n = result_shape(lhs, rhs, addends)
        self.dim = 0 if self.rows else 1
        self.outer = outer
        self.inner = (m if self.rows else n) // max(outer * size, 1)
        self.split = (outer, size, self.inner)
        self.block_shape = (outer * self.inner, n) if self.rows else (m, outer * self.inner)

    def compute(self, destination: int, out: Tensor) -> None:
        """Write the block of `destination` into `out`, which has the block's shape."""
        dim = self.dim
        carriers = self.lhs if self.rows else self.rhs  # the operand that has the rank dimension
        selected = [operand.unflatten(dim, self.split).select(dim + 1, destination) for operand in carriers]
        addends = [addend.unflatten(dim, self.split).select(dim + 1, destination) for addend in self.addends]
        biases = list(self.biases)
        if not self.rows:
            biases = [None if bias is None else bias.view(self.split)[:, destination] for bias in biases]
        if self.outer > 1 and self.inner < MIN_PIECE:
            flat = [None if bias is None else bias.reshape(-1) for bias in biases]
            self._sum(
                out,
                [operand.flatten(dim, dim + 1) for operand in selected],
                flat,
                [addend.flatten(dim, dim + 1) for addend in addends],
            )
            return
        target = out.unflatten(dim, (self.outer, self.inner))
        for index in range(self.outer):
            self._sum(
                target.select(dim, index),
                [operand.select(dim, index) for operand in selected],
                biases if self.rows else [None if bias is None else bias[index] for bias in biases],
                [addend.select(dim, index) for addend in addends],
            )

    def _sum(
        self, out: Tensor, carriers: Sequence[Tensor], biases: Sequence[Tensor | None], addends: Sequence[Tensor]
    ) -> None:
        lhs, rhs = (carriers, self.rhs) if self.rows else (self.lhs, carriers)
        sum_terms(out, lhs, rhs, biases, addends, self.coefficients)


def result_shape(lhs: Sequence[Tensor], rhs: Sequence[Tensor], addends: Sequence[Tensor]) -> tuple[int, int]:
    """[M, N] of the sum of terms."""
    if lhs:
        return lhs[0].shape[0], rhs[0].shape[1]
    return addends[0].shape[0], addends[0].shape[1]


@register_template("matmul_reduce_scatter")
class ShmGemmReduceScatter:
    """Sum over ranks of terms [M, N], scattered along the rank dimension of its rows or columns."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(
        self,
        plan: Plan,
        size: int,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
        outer: int,
    ) -> int:
        m, n = result_shape(lhs, rhs, addends)
        return size * aligned(int(m) * int(n) // size * torch_dtype(plan.dtype).itemsize)

    def run(
        self,
        channel: Channel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
        outer: int,
    ) -> list[Tensor]:
        dtype = torch_dtype(plan.dtype)
        terms = _Terms(plan, channel.size, lhs, rhs, biases, addends, outer)
        shape = terms.block_shape
        nbytes = shape[0] * shape[1] * dtype.itemsize
        channel.payload = nbytes
        slot = aligned(nbytes)
        for peer in channel.peers():
            terms.compute(peer, channel.view(peer, channel.rank * slot, shape, dtype))
            channel.signal(peer)
        out = (lhs[0] if lhs else addends[0]).new_empty(shape, dtype=dtype)
        terms.compute(channel.rank, out)
        partials = [out]
        for rank in range(channel.size):
            if rank != channel.rank:
                channel.wait(rank)
                partials.append(channel.view(channel.rank, rank * slot, shape, dtype))
        sum_partials(out, partials, channel.size if plan.reduce_op == "avg" else 1)
        return [out]
