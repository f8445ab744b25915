"""all_gather_matmul over NVLink: the copy engine pushes the shard to the peers while a GEMM takes the shards in order of arrival.

The kernel's loading warp waits for a shard's flag where it first needs it. Tiles of the own shard come first and are read where
the shard lies. A small gather takes a kernel that pushes the shard itself (gather_rows.py chooses). A gather that these kernels
serve no matmul of takes that of gather_blocks.py. Matmuls that none serves, or that have the rank dimension summed over while
others do not, follow on the gathered tensor, which is complete by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...problem import FusionProblem, Plan
from ..template import register_template, torch_dtype
from .channel import DeviceChannel, DeviceLink
from .gather_blocks import BlocksLaunch, block_kernels, block_launches, blocks_of
from .gather_rows import RowsLaunch, row_uses
from .panels import Parcel
from .recipe import Recipe
from .refusal import gather_refusal, serves_use


@register_template("all_gather_matmul", "nvlink")
class NvlinkAllGatherGemm:
    """shard [P, Q] of each rank, gathered to [P, R*Q], times the other operands."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return gather_refusal(problem, plan)

    def scratch_bytes(
        self, plan: Plan, size: int, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> int:
        for use, other in zip(plan.uses, others, strict=True) if shard.numel() else ():
            k, n = (int(s) for s in other.shape)
            if serves_use(use, plan.dtype, k, n) or blocks_of(use, plan.dtype, size, shard.shape, other) is not None:
                return int(shard.numel()) * size * torch_dtype(plan.dtype).itemsize
        return -1

    def kernels(
        self, plan: Plan, size: int, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[tuple[Any, ...]]:
        found = [batch.kernel for batch in row_uses(plan, size, shard.shape, others, biases).batches]
        return found or block_kernels(plan, size, shard.shape, others, biases)

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        recipe: Recipe = channel.site.recipe
        if recipe is None or recipe.link is not channel.link:
            recipe = channel.site.recipe = _recipe(channel.link, plan, shard, others, biases)
        if shard.dtype is not recipe.dtype or not shard.is_contiguous():
            shard = shard.to(recipe.dtype).contiguous()
        return recipe.run(channel, plan, (shard,), others, biases)


def _recipe(
    link: DeviceLink, plan: Plan, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Recipe:
    uses = row_uses(plan, link.size, shard.shape, others, biases)
    rest = uses.rest
    launches: list[RowsLaunch | BlocksLaunch] = [
        RowsLaunch(
            link,
            uses,
            batch,
            plan.dtype,
            shard.shape,
            [others[index] for index in batch.indices],
            last=batch is uses.batches[-1] and not rest,
            joins=batch is uses.batches[-1] and not uses.pushed,
        )
        for batch in uses.batches
    ]
    if not launches:
        blocks, rest = block_launches(link, plan, shard.shape, others, biases)
        launches += blocks
    pieces, columns = shard.shape
    width = columns * torch_dtype(plan.dtype).itemsize
    parcel = Parcel(0, 0, 0, pieces, width, width, link.rank * width, link.size * width)
    # The own shard is read where it lies, unless a tile has rows of others too, or a later matmul reads the slot.
    local = any(launch.spans for launch in launches) or (bool(rest) and not plan.return_gathered)
    full = (pieces, link.size * columns)
    return Recipe(link, plan, full, launches, rest, [] if uses.pushed else [[parcel]], [parcel] if local else [])
