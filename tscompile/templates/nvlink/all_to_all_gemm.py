"""all_to_all_matmul over NVLink: copy engines push panels of the left operand while a GEMM adds them in the order of their arrival.

The kernel is that of gather_blocks.py: a gather along the contracted dim, of which each rank gets something else. Every tile begins
with this rank's own panels, which are read where they lie, or in the slot if several exchanges make up the operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem import FusionProblem, Plan
from ..all_to_all_gemm import as_panels, panel_shapes
from ..template import register_template, torch_dtype
from .channel import DeviceChannel, DeviceLink
from .gather_blocks import block_kernels, block_launches, blocks_of
from .kernels.config import WORD_BYTES
from .panels import chunk_count, chunk_rows, parcels_of
from .recipe import Recipe
from .refusal import panels_refusal
from .tiles import Row, panel_tiles


@register_template("all_to_all_matmul", "nvlink")
class NvlinkAllToAllGemm:
    """inputs as `as_panels` takes them, dim 0 the destination, with equal Q, in any strides; others `[K, N]`."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return panels_refusal(problem, plan)

    def scratch_bytes(
        self, plan: Plan, size: int, inputs: Sequence[Tensor], others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> int:
        shapes = panel_shapes(plan, inputs)
        if not inputs[0].numel() or len({int(shape[3]) for shape in shapes}) > 1:
            return -1
        shard = _shard(shapes)
        for use, other in zip(plan.uses, others, strict=True):
            if blocks_of(use, plan.dtype, size, shard, other) is not None:
                return shard[0] * shard[1] * size * torch_dtype(plan.dtype).itemsize
        return -1

    def kernels(
        self, plan: Plan, size: int, inputs: Sequence[Tensor], others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[tuple[Any, ...]]:
        return list(block_kernels(plan, size, _shard(panel_shapes(plan, inputs)), others, biases))

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        inputs: Sequence[Tensor],
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        inputs = [_readable(x) for x in as_panels(plan, inputs)]
        recipe: Recipe = channel.site.recipe
        if recipe is None or recipe.link is not channel.link:
            recipe = channel.site.recipe = _recipe(channel.link, plan, inputs, others, biases)
        outputs = recipe.run(channel, plan, inputs, others, biases)
        if plan.return_gathered:
            outputs[-1] = outputs[-1].view(inputs[0].shape[1], -1)
        return outputs


def _shard(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """What a rank sends another as the [P, Q] of a gather: P = (M, panels). shapes: `[R, M, O, Q]` of each exchange."""
    return sum(int(shape[1] * shape[2]) for shape in shapes), int(shapes[0][3])


def _recipe(
    link: DeviceLink,
    plan: Plan,
    inputs: Sequence[Tensor],
    others: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> Recipe:
    shapes, steps = [x.shape for x in inputs], [int(x.stride(0)) for x in inputs]
    shard, item, rows = _shard(shapes), inputs[0].element_size(), int(shapes[0][1])
    k, columns = (int(size) for size in others[0].shape)
    panels = [(int(shape[2]), int(shape[3])) for shape in shapes]
    count, _ = chunk_count(rows, columns, k, panels, link.size, plan.uses[0])
    bounds = chunk_rows(rows, count)
    chunks = [parcels_of(shapes, steps, link.rank, item, bound) for bound in bounds]
    one = len(inputs) == 1

    def table(pieces: int, rows: int, columns: int, tile_n: int) -> list[Row]:
        return panel_tiles(link.rank, link.size, pieces, bounds, columns, tile_n, placed=not one)

    launches, rest = block_launches(link, plan, shard, others, biases, table)
    # What follows the kernels reads the slot, unless the kernels have put everything into an output.
    local = not one or (rest and not plan.return_gathered)
    placed = parcels_of(shapes, steps, link.rank, item, (0, rows)) if local else []
    own = link.rank * steps[0] * item if one else None
    return Recipe(link, plan, (shard[0], link.size * shard[1]), launches, rest, chunks, placed, own)


def _readable(x: Tensor) -> Tensor:
    """`x`, or a copy if what goes to a rank does not lie in one piece, or begins within a word of 16 bytes."""
    if not x.is_contiguous() and (not x[0].is_contiguous() or x.stride(0) * x.element_size() % WORD_BYTES):
        x = x.contiguous()
    if x.data_ptr() % WORD_BYTES:
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    return x
