"""One use of a gathered tensor whose ranks are summed over, or that stands on the right: its sizes, and its launch.

The gathered operand is a row of blocks along one of the axes of G2 (problem.py), one per piece and rank: [blocks, inner, width] if the
rank dimension lies in the rows of G2, [width, blocks, inner] if in its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...problem import GatherUse, Plan
from .channel import ACK, DeviceChannel, DeviceLink
from .jit import kernel
from .kernels.gather_blocks import blocked, gather_blocks_kernel
from .kernels.gemm import BlocksConfig
from .operands import aligned_pointer, aligned_sizes
from .tiles import TILE_M, Row, block_tiles, contraction_tiles
from .widths import SWIZZLED_WIDTHS, TILE_WIDTHS, tile_width


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
    """Sizes of a use of shards [P, Q], None if the kernel cannot serve it: TMA cannot address an operand, or a row of the result
    that a rank contributes to is not aligned, or the matmul has another dtype than what travels."""
    if use.dtype != wire:
        return None
    p, q = shard
    local = _from_k(use, other)
    k, free = local.shape
    if min(p, q, k, free) < 1:
        return None
    contracts, in_rows = use.contracts_ranks, use.rank_axis == "rows"
    if in_rows:
        pieces, inner = p, k // (p * ranks) if contracts else q // k
        width = q // inner
    else:
        pieces, inner = k // (q * ranks) if contracts else p // k, q
        width = p // pieces
    columns = free if use.side == "lhs" else width if contracts else inner
    if not aligned_sizes(width if in_rows else inner, columns):
        return None
    k_first, k_last = aligned_sizes(free), aligned_sizes(inner if contracts else k)
    if not (k_first or k_last):
        return None
    return Blocks(pieces, inner, width, free, in_rows == contracts, k_first and not (k_last and local.stride(0) == 1))


def _from_k(use: GatherUse, other: Tensor) -> Tensor:
    """The local operand as [k, free]."""
    return other if use.side == "lhs" else other.t()


def block_launches(
    link: DeviceLink, plan: Plan, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[BlocksLaunch], list[int]]:
    """Launches for the uses of a plan that the kernel serves, in their order, and the indices of the others."""
    found, rest = [], []
    for index, (use, other) in enumerate(zip(plan.uses, others, strict=True)):
        sizes = blocks_of(use, plan.dtype, link.size, shard.shape, other)
        if sizes is None:
            rest.append(index)
        else:
            found.append((index, sizes))
    # A sum needs all shards for its first tile, so what is no sum hides more of the transport.
    found.sort(key=lambda item: plan.uses[item[0]].contracts_ranks)
    launches = []
    for number, (index, sizes) in enumerate(found, 1):
        last = number == len(found) and not rest
        launches.append(BlocksLaunch(link, index, plan.uses[index], sizes, shard, biases[index] is not None, last))
    return launches, rest


class BlocksLaunch:
    """One kernel for one use; prepared once for its shapes."""

    spans = False  # tiles and steps are of one rank, so the own shard is read where it lies

    def __init__(
        self, link: DeviceLink, index: int, use: GatherUse, sizes: Blocks, shard: Tensor, has_bias: bool, last: bool
    ) -> None:
        self.index, self.use, self.sizes, self.has_bias = index, use, sizes, has_bias
        left, contracts = use.side == "lhs", use.contracts_ranks
        count = sizes.pieces * link.size
        span = sizes.width if contracts else count * sizes.inner
        self.m, self.n = (span, sizes.free) if left else (sizes.free, span)
        self.shard_bytes = shard.shape[1] * shard.element_size()
        left_first, right_first = (sizes.k_first, sizes.local_k_first)[:: 1 if left else -1]
        rows, widths = -(-self.m // TILE_M), [self.n]
        if not contracts:
            rows, widths = (count * -(-sizes.inner // TILE_M), widths) if left else (rows, [sizes.inner] * count)
        tile_n = tile_width(rows, widths, SWIZZLED_WIDTHS if right_first else TILE_WIDTHS)
        place = (link.rank, link.size, sizes.pieces)
        blocks: list[Row] = []
        if contracts:
            tiles, blocks = contraction_tiles(*place, self.m, self.n, tile_n)
        else:
            tiles = block_tiles(*place, sizes.inner, sizes.free, left, tile_n)
        self.tiles = len(tiles)
        self.table = torch.tensor(tiles + blocks, dtype=torch.int32, device=link.device)
        self.ack = ACK if last else -1
        dtype = str(shard.dtype).removeprefix("torch.")
        self.config = BlocksConfig(
            dtype,
            not right_first,
            bias=has_bias,
            tile_n=tile_n,
            left_transposed=left_first,
            gathered_left=left,
            contracts=contracts,
        )
        shapes = [(sizes.pieces, sizes.inner), (count, sizes.inner)]
        self.own_shape, self.slot_shape = (blocked(sizes.k_first, contracts, *shape, sizes.width) for shape in shapes)
        k_blocks = (count, sizes.inner) if contracts else (1, sizes.width)
        self.local_shape = blocked(sizes.local_k_first, True, *k_blocks, sizes.free)
        self._kernels: dict[bool, Callable[..., None]] = {}

    def _kernel(self, collects: bool) -> Callable[..., None]:
        found = self._kernels.get(collects)
        if found is None:
            found = self._kernels[collects] = kernel(gather_blocks_kernel, self.config, collects)
        return found

    def run(
        self,
        channel: DeviceChannel,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        gathered: Tensor | None,
        outputs: list[Tensor | None],
    ) -> None:
        """Launch it; it also fills `gathered`, if any."""
        local = _from_k(self.use, others[self.index])
        local = aligned_pointer((local if self.sizes.local_k_first else local.t()).contiguous())
        outputs[self.index] = result = shard.new_empty((self.m, self.n))
        bias = biases[self.index]
        held = None if bias is None else bias.to(shard.dtype)
        self._kernel(gathered is not None)(
            shard.view(self.own_shape),
            channel.view(self.slot_shape, shard.dtype),
            local.view(self.local_shape),
            result.data_ptr(),
            0 if held is None else held.data_ptr(),
            0 if gathered is None else gathered.data_ptr(),
            self.table.data_ptr(),
            self.tiles,
            channel.context,
            channel.counters,
            shard.shape[0],
            self.shard_bytes,
            channel.epoch,
            channel.site,
            self.ack,
        )
