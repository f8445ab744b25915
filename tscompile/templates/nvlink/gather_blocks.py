"""One use of a gathered tensor whose ranks are summed over, or that stands on the right: its sizes, and its launch.

The gathered operand is a row of blocks along one of the axes of G2 (problem.py), one per piece and rank: [blocks, inner, width] if the
rank dimension lies in the rows of G2, [width, blocks, inner] if in its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...nvshmem.stream import Values
from ...problem import GatherUse, Plan
from ..template import torch_dtype
from .channel import DeviceLink
from .jit import kernel
from .kernels.config import BlocksConfig, depth
from .operands import aligned_sizes, lies
from .refusal import block_sizes, serves_blocks
from .tables import tables_of
from .tiles import Row, block_tiles, contraction_tiles
from .widths import blocks_tiling

Table = Callable[[int, int, int, int], list[Row]]  # of pieces, rows, columns, columns of a tile


@dataclass(frozen=True)
class Blocks:
    """Sizes and layouts of a use.

    pieces, inner, width: the gathered operand has `pieces` blocks per rank, of `inner` rows or columns, `width` across.
    free: size of the local operand beside k.
    k_first, local_k_first: k is the slower axis of the gathered operand, and of the local one as the kernel takes it.
    """

    pieces: int
    inner: int
    width: int
    free: int
    k_first: bool
    local_k_first: bool


def blocks_of(use: GatherUse, wire: str, ranks: int, shard: Sequence[int], other: Tensor) -> Blocks | None:
    """Sizes of a use of shards [P, Q], None if the kernel cannot serve it."""
    local = _from_k(use, other)
    k, free = local.shape
    if not serves_blocks(use, wire, ranks, shard, k, free):
        return None
    pieces, inner, width = block_sizes(use, ranks, shard, k)
    in_rows, contracts = use.rank_axis == "rows", use.contracts_ranks
    k_first, k_last = aligned_sizes(free), aligned_sizes(inner if contracts else k)
    return Blocks(pieces, inner, width, free, in_rows == contracts, k_first and not (k_last and local.stride(0) == 1))


def _from_k(use: GatherUse, other: Tensor) -> Tensor:
    """The local operand as [k, free]."""
    return other if use.side == "lhs" else other.t()


@dataclass(frozen=True)
class _Served:
    """A use that the kernel serves, by its index among the plan's."""

    index: int
    use: GatherUse
    sizes: Blocks
    bias: bool

    def shape(self, ranks: int) -> tuple[int, int]:
        """Rows and columns of the result."""
        sizes = self.sizes
        span = sizes.width if self.use.contracts_ranks else sizes.pieces * ranks * sizes.inner
        return (span, sizes.free) if self.use.side == "lhs" else (sizes.free, span)

    def config(self, dtype: str, ranks: int) -> BlocksConfig:
        """What its kernel is compiled for."""
        sizes, left, contracts = self.sizes, self.use.side == "lhs", self.use.contracts_ranks
        left_first, right_first = (sizes.k_first, sizes.local_k_first)[:: 1 if left else -1]
        blocks = (sizes.pieces, sizes.inner, sizes.width)
        tile_n = blocks_tiling(self.use, ranks, blocks, sizes.free, not right_first)[0].width
        return BlocksConfig(
            dtype,
            not right_first,
            bias=self.bias,
            tile_n=tile_n,
            stages=depth(tile_n),
            left_transposed=left_first,
            gathered_left=left,
            contracts=contracts,
        )


def _served(
    plan: Plan, ranks: int, shard: Sequence[int], others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[_Served], list[int]]:
    """The uses of a plan that the kernel serves, in the order of their launches, and the indices of the others."""
    found, rest = [], []
    for index, (use, other, bias) in enumerate(zip(plan.uses, others, biases, strict=True)):
        sizes = blocks_of(use, plan.dtype, ranks, shard, other)
        if sizes is None:
            rest.append(index)
        else:
            found.append(_Served(index, use, sizes, bias is not None))
    # A sum needs all shards for its first tile, so what is no sum hides more of the transport.
    found.sort(key=lambda served: served.use.contracts_ranks)
    return found, rest


def block_kernels(
    plan: Plan, ranks: int, shard: Sequence[int], others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[tuple[str, BlocksConfig, bool]]:
    """The kernels of `block_launches`, as jit.py names them."""
    found, _ = _served(plan, ranks, shard, others, biases)
    return [
        ("gather_blocks", served.config(plan.dtype, ranks), plan.return_gathered and number == 0)
        for number, served in enumerate(found)
    ]


def block_launches(
    link: DeviceLink,
    plan: Plan,
    shard: Sequence[int],
    others: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    table: Table | None = None,
) -> tuple[list[BlocksLaunch], list[int]]:
    """Launches for the uses of a plan of shards [P, Q] that the kernel serves, and the indices of the others. table: another one than a
    gather's."""
    found, rest = _served(plan, link.size, shard, others, biases)
    launches = [
        BlocksLaunch(
            link,
            served,
            plan.dtype,
            shard,
            others[served.index],
            collects=plan.return_gathered and number == 0,
            last=number == len(found) - 1 and not rest,
            joins=number == len(found) - 1,
            table=table,
        )
        for number, served in enumerate(found)
    ]
    return launches, rest


class BlocksLaunch:
    """One kernel for one use; prepared once for its layout."""

    spans = False  # tiles and steps are of one rank, so the own shard is read where it lies

    def __init__(
        self,
        link: DeviceLink,
        served: _Served,
        dtype: str,
        shard: Sequence[int],
        other: Tensor,
        *,
        collects: bool,
        last: bool,
        joins: bool,
        table: Table | None,
    ) -> None:
        sizes, config = served.sizes, served.config(dtype, link.size)
        left, contracts, tile_n = config.gathered_left, config.contracts, config.tile_n
        count = sizes.pieces * link.size
        self.rows, columns = served.shape(link.size)
        place = (link.rank, link.size, sizes.pieces)
        if table is not None:
            rows = table(sizes.pieces, self.rows, columns, tile_n)
        elif contracts:
            rows = contraction_tiles(*place, self.rows, columns, tile_n)
        else:
            rows = block_tiles(*place, sizes.inner, sizes.free, left, tile_n)
        tiles = sum(row[2] > 0 for row in rows)  # the others are walks
        self._tables = tables_of(rows, link, joins, count if contracts else 0)
        local_sizes = (count, sizes.inner) if contracts else (1, sizes.width)
        self._fixed = {
            "tiles": tiles,
            "own_blocks": sizes.pieces,
            "blocks": count,
            "inner": sizes.inner,
            "width": sizes.width,
            "k_blocks": local_sizes[0],
            "k_inner": local_sizes[1],
            "free": sizes.free,
            "pieces": shard[0],
            "shard_bytes": shard[1] * torch_dtype(dtype).itemsize,
        }
        if not last:
            self._fixed["ack"] = -1
        self.kernel = kernel("gather_blocks", config, collects)
        place_of = self.kernel.place
        self.shard, self.epoch, self.gathered = place_of("X"), place_of("epoch"), place_of("gathered")
        # As the kernel takes it, the local operand is [k, free] or [free, k]; on the left it comes as [free, k].
        self.transposed = sizes.local_k_first != left
        self.lies = lies(other, self.transposed)
        self.operands = [(served.index, columns, place_of("B"), place_of("C"), place_of("V"))]

    def values(self, known: dict[str, int], captured: bool) -> Values:
        """Values of launches in one slot, but for those that change from call to call. captured: it is one of those of graphs."""
        patched = {"X", "B", "C", "V", "epoch", "gathered"}
        table = self._tables[captured].data_ptr()
        return self.kernel.values({**known, "A": known["slot"], "table": table, **self._fixed}, patched)
