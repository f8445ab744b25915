"""matmul_all_reduce over shared memory, in one of two ways that depend on shapes alone.

Large results, more than two ranks: the rows are split into R nearly equal blocks. A rank computes its partial of each block
in the arena of the block's owner, the owner sums in rank order and publishes the block, and the peers copy it into their
outputs.
Otherwise each rank computes its whole partial in its own arena, and everyone sums all of them: one exchange instead of two.

Either way the ranks end with bitwise identical results: a block is summed by one rank, or by all in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..nvshmem.heap import Channel, aligned
from ..problem import FusionProblem, Plan
from .arithmetic import sum_partials, sum_terms
from .gemm_reduce_scatter import coefficients_of, result_shape
from .template import register_template, shm_refusal, torch_dtype

_ONE_EXCHANGE_BYTES = 512 << 10  # read from peers, above which splitting the sum between the ranks is cheaper
_PARTIAL, _REDUCED = 0, 1  # flags


def _one_exchange(rows: int, nbytes: int, size: int) -> bool:
    """True if every rank sums all partials itself; two ranks always do: splitting saves them no bytes and costs a second wait."""
    return size == 2 or rows < size or nbytes * (size - 1) <= _ONE_EXCHANGE_BYTES


def _bounds(rows: int, size: int, index: int) -> tuple[int, int]:
    """First and last + 1 row of block `index` of `size` nearly equal blocks."""
    return rows * index // size, rows * (index + 1) // size


@register_template("matmul_all_reduce")
class ShmGemmAllReduce:
    """Sum over ranks of terms [M, N], on every rank."""

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
    ) -> int:
        m, n = (int(extent) for extent in result_shape(lhs, rhs, addends))
        itemsize = torch_dtype(plan.dtype).itemsize
        if _one_exchange(m, m * n * itemsize, size):
            return m * n * itemsize
        return (size + 1) * aligned(-(-m // size) * n * itemsize)

    def run(
        self,
        channel: Channel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
    ) -> list[Tensor]:
        dtype = torch_dtype(plan.dtype)
        m, n = result_shape(lhs, rhs, addends)
        size, rank = channel.size, channel.rank
        coefficients = coefficients_of(plan, lhs, addends)
        divisor = size if plan.reduce_op == "avg" else 1
        nbytes = m * n * dtype.itemsize
        channel.payload = nbytes
        out = (lhs[0] if lhs else addends[0]).new_empty((m, n), dtype=dtype)
        if _one_exchange(m, nbytes, size):
            sum_terms(channel.view(rank, 0, (m, n), dtype), lhs, rhs, biases, addends, coefficients)
            channel.signal_all(_PARTIAL)
            for peer in channel.peers():
                channel.wait(peer, _PARTIAL)
            sum_partials(out, [channel.view(owner, 0, (m, n), dtype) for owner in range(size)], divisor)
            return [out]

        slot = aligned(-(-m // size) * n * dtype.itemsize)

        def partial(target: Tensor, owner: int) -> None:
            start, stop = _bounds(m, size, owner)
            rows, extras = [a[start:stop] for a in lhs], [addend[start:stop] for addend in addends]
            sum_terms(target, rows, rhs, biases, extras, coefficients)

        for peer in channel.peers():
            start, stop = _bounds(m, size, peer)
            partial(channel.view(peer, rank * slot, (stop - start, n), dtype), peer)
            channel.signal(peer, _PARTIAL)
        start, stop = _bounds(m, size, rank)
        shape = (stop - start, n)
        own = channel.view(rank, rank * slot, shape, dtype)
        partial(own, rank)
        for peer in channel.peers():
            channel.wait(peer, _PARTIAL)
        reduced = channel.view(rank, size * slot, shape, dtype)
        sum_partials(reduced, [channel.view(rank, writer * slot, shape, dtype) for writer in range(size)], divisor)
        channel.signal_all(_REDUCED)
        out[start:stop].copy_(reduced)
        for peer in channel.peers():
            start, stop = _bounds(m, size, peer)
            channel.wait(peer, _REDUCED)
            out[start:stop].copy_(channel.view(peer, size * slot, (stop - start, n), dtype))
        return [out]
