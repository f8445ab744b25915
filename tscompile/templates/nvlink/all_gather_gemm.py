"""all_gather_matmul over NVLink: one kernel whose idle warps gather while a GEMM takes the rows in order of arrival.

The gathered tensor is built in ordinary memory, so it may be an output; the slot holds only this rank's shard, for the peers to fetch.
Tiles of the own shard come first and are read where the shard lies. Matmuls that the kernel does not serve (the rank
dimension summed over, other layouts) follow on the gathered tensor, which is complete by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...problem import FusionProblem, GatherUse, Plan
from ..template import register_template, torch_dtype
from .channel import ACK, DATA_FLAGS, DeviceChannel
from .jit import kernel
from .kernels.all_gather import PIECE_BYTES, all_gather_kernel
from .kernels.gemm import MAX_OPERANDS, SMS, GemmConfig
from .operands import Right, aligned_pointer, right_operand
from .refusal import gather_refusal, serves_use
from .tiles import TILE_M, gather_flags, gather_tiles

_TILE_WIDTHS = (256, 240, 224)  # narrower ones lose more in the tensor cores than they win in waves


@dataclass(frozen=True)
class _Fused:
    """A use that the kernel serves: number, right operand, bias."""

    index: int
    right: Right
    bias: Tensor | None

    @property
    def k(self) -> int:
        return self.right.matrix.shape[1 if self.right.transposed else 0]

    @property
    def n(self) -> int:
        return self.right.matrix.shape[0 if self.right.transposed else 1]


@dataclass(frozen=True)
class _Tables:
    rows: Tensor
    pieces: Tensor
    counts: int
    slice_steps: int


def tile_width(rows: int, widths: Sequence[int]) -> int:
    """Columns of a tile for `rows` tile rows over weights of these widths: fewest wave-columns, then the widest."""
    if max(widths) <= 128:
        return 128

    def cost(tile: int) -> tuple[int, int]:
        waves = math.ceil(rows * sum(math.ceil(width / tile) for width in widths) / SMS)
        return waves * tile, -tile

    return min(_TILE_WIDTHS, key=cost)


@register_template("all_gather_matmul", "nvlink")
class NvlinkAllGatherGemm:
    """shard [P, Q] of each rank, gathered to [P, R*Q], times the other operands."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return gather_refusal(problem, plan)

    def scratch_bytes(
        self, plan: Plan, size: int, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> int:
        for use, other in zip(plan.uses, others, strict=True):
            k, n = int(other.shape[0]), int(other.shape[1])
            if serves_use(use, plan.dtype, k, n):
                pieces, width = int(shard.shape[0]), int(shard.shape[1])
                if gather_flags(size, pieces, width // k, k, PIECE_BYTES) <= DATA_FLAGS:
                    return pieces * width * torch_dtype(plan.dtype).itemsize
        return -1

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        shard: Tensor,
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        dtype = torch_dtype(plan.dtype)
        shard = aligned_pointer(shard.to(dtype).contiguous())
        pieces, width = shard.shape
        channel.start()
        outputs: list[Tensor | None] = [None] * len(plan.uses)
        fused = [
            _Fused(index, right_operand(other), None if bias is None else bias.to(dtype))
            for index, (use, other, bias) in enumerate(zip(plan.uses, others, biases, strict=True))
            if serves_use(use, plan.dtype, other.shape[0], other.shape[1])
        ]
        gathered = shard.new_empty((pieces, channel.size * width))
        whole = plan.return_gathered or len(fused) < len(plan.uses)
        for number, batch in enumerate(_batches(fused)):
            _launch(channel, shard, gathered, batch, outputs, number == 0, whole)
        for index, (use, other, bias) in enumerate(zip(plan.uses, others, biases, strict=True)):
            if outputs[index] is None:
                outputs[index] = _multiply(use, gathered, other, bias)
        channel.finish()
        results = [output for output in outputs if output is not None]
        return [*results, gathered] if plan.return_gathered else results


def _batches(fused: list[_Fused]) -> list[list[_Fused]]:
    """What one kernel takes: at most MAX_OPERANDS weights of one layout and one k, with or without biases."""
    groups: dict[tuple[bool, bool, int], list[_Fused]] = {}
    for f in fused:
        groups.setdefault((f.right.transposed, f.bias is not None, f.k), []).append(f)
    return [group[i : i + MAX_OPERANDS] for group in groups.values() for i in range(0, len(group), MAX_OPERANDS)]


def _launch(
    channel: DeviceChannel,
    shard: Tensor,
    gathered: Tensor,
    batch: list[_Fused],
    outputs: list[Tensor | None],
    first: bool,
    whole: bool,
) -> None:
    """One kernel; the first of a call also gathers."""
    pieces, width = shard.shape
    k = batch[0].k
    m = pieces * channel.size * width // k
    widths = tuple(f.n for f in batch)
    tile_n = tile_width(-(-m // TILE_M), widths)
    tables = _tables(channel, pieces, width // k, k, widths, tile_n, whole)
    right = batch[0].right
    config = GemmConfig(
        str(shard.dtype).removeprefix("torch."), right.transposed, len(batch), batch[0].bias is not None, tile_n
    )
    results = [shard.new_empty((m, n)) for n in widths]
    for f, result in zip(batch, results, strict=True):
        outputs[f.index] = result
    weights = [aligned_pointer(f.right.matrix) for f in batch]
    rows = [f.bias if f.bias is not None else result[0] for f, result in zip(batch, results, strict=True)]
    kernel(all_gather_kernel, config, first)(
        shard.view(-1, k),
        gathered.view(m, k),
        *_padded(weights),
        *_padded(results),
        *_padded(rows),
        channel.counts,
        tables.rows,
        tables.pieces,
        channel.context,
        channel.counters,
        tables.slice_steps,
        tables.counts,
        channel.epoch,
        channel.site,
        ACK if first else -1,
    )


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many tensors as a kernel takes; it does not look at the surplus."""
    return [*tensors, *[tensors[0]] * (MAX_OPERANDS - len(tensors))]


def _tables(
    channel: DeviceChannel, pieces: int, inner: int, k: int, widths: tuple[int, ...], tile_n: int, whole: bool
) -> _Tables:
    cache = channel.link.tables
    key = ("gather", pieces, inner, k, widths, tile_n, whole)
    found: _Tables | None = cache.get(key)
    if found is None:
        made = gather_tiles(channel.rank, channel.size, pieces, inner, k, widths, tile_n, PIECE_BYTES, whole)
        rows, list_ = (
            torch.tensor(data, dtype=torch.int32, device=channel.link.device).view(-1, 8)
            for data in (made.rows, made.pieces)
        )
        found = cache[key] = _Tables(rows, list_, made.counts, made.slice_steps)
    return found


def _multiply(use: GatherUse, gathered: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    """The matmul of a use from the gathered tensor [P, R*Q]."""
    contracted = other.shape[0 if use.side == "lhs" else 1]
    columns = contracted if (use.side == "lhs") != use.transposed else gathered.numel() // contracted
    matrix = gathered.to(torch_dtype(use.dtype)).view(-1, columns)
    operand = matrix.t() if use.transposed else matrix
    a, b = (operand, other) if use.side == "lhs" else (other, operand)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
