"""matmul_all_gather over shared memory: the result is computed and published in a few chunks of rows.

Each chunk is the output operand of a matmul and lies in this rank's arena. Between its own chunks a rank copies what the peers have
published so far into its output, so that their data is read while it is warm.
"""

from __future__ import annotations

from torch import Tensor

from ..nvshmem.heap import FLAGS_PER_PEER, Channel
from ..problem import FusionProblem, Plan
from .arithmetic import multiply
from .template import register_template, shm_refusal, torch_dtype

_CHUNK_BYTES = 4 << 20  # smaller chunks cost more in split matmuls than an earlier start wins [measured 2026-11-20]
_MAX_CHUNKS = min(4, FLAGS_PER_PEER)


def _chunks(rows: int, nbytes: int) -> list[tuple[int, int]]:
    """Bounds of the row chunks that a result of `nbytes` is published in; at least one, which may be empty."""
    count = max(1, min(_MAX_CHUNKS, nbytes // _CHUNK_BYTES, rows))
    return [(rows * index // count, rows * (index + 1) // count) for index in range(count)]


@register_template("matmul_all_gather")
class ShmGemmAllGather:
    """Result [M, N] of each rank's matmul, gathered along the rank dimension of its rows or columns."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(self, plan: Plan, size: int, lhs: Tensor, rhs: Tensor, bias: Tensor | None, outer: int) -> int:
        return int(lhs.shape[0]) * int(rhs.shape[1]) * torch_dtype(plan.dtype).itemsize

    def run(
        self, channel: Channel, plan: Plan, lhs: Tensor, rhs: Tensor, bias: Tensor | None, outer: int
    ) -> list[Tensor]:
        dtype = torch_dtype(plan.dtype)
        m, n = lhs.shape[0], rhs.shape[1]
        size, rank = channel.size, channel.rank
        rows = plan.rank_axis == "rows"
        channel.payload = m * n * dtype.itemsize
        chunks = _chunks(m, channel.payload)
        if rows:
            inner = m // max(outer, 1)
            out = lhs.new_empty((outer * size * inner, n), dtype=dtype)
            places = out.view(outer, size, inner, n)
        else:
            out = lhs.new_empty((m, size * n), dtype=dtype)
            places = out.view(m, outer, size, n // max(outer, 1))

        def collect(owner: int, start: int, stop: int) -> None:
            """Copy rows [start, stop) of the result of `owner` to their place in the output."""
            source = channel.view(owner, 0, (m, n), dtype)[start:stop]
            if not rows:
                target = places[start:stop, :, owner]
                target.copy_(source.view(target.shape))
                return
            while start < stop:  # a chunk may cross the bounds of the outer dimension
                index, first = divmod(start, inner)
                count = min(stop - start, inner - first)
                places[index, owner, first : first + count].copy_(source[:count])
                source, start = source[count:], start + count

        own = channel.view(rank, 0, (m, n), dtype)
        missing = [(peer, index) for index in range(len(chunks)) for peer in channel.peers()]
        for index, (start, stop) in enumerate(chunks):
            if lhs.dtype == dtype:
                multiply(own[start:stop], lhs[start:stop], rhs, bias)
            else:
                product = lhs.new_empty((stop - start, n))
                multiply(product, lhs[start:stop], rhs, bias)
                own[start:stop].copy_(product)
            channel.signal_all(index)
            collect(rank, start, stop)
            while missing and missing[0][1] <= index and channel.ready(*missing[0]):
                peer, published = missing.pop(0)
                collect(peer, *chunks[published])
        for peer, published in missing:
            channel.wait(peer, published)
            collect(peer, *chunks[published])
        return [out]
