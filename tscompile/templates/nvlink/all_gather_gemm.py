"""all_gather_matmul over NVLink: the copy engine pushes the shard to the peers while a GEMM takes the shards in order of arrival.

The kernel's loading warp waits for a shard's flag where it first needs it. Tiles of the own shard come first and are read where
the shard lies. Matmuls that the kernel does not serve (the rank dimension summed over, other layouts) follow on
the gathered tensor, which is complete by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...nvshmem import copies
from ...nvshmem.copies import Step
from ...problem import FusionProblem, GatherUse, Plan
from ..template import register_template, torch_dtype
from .channel import ACK, SIDE, DeviceChannel
from .jit import kernel
from .kernels.all_gather import all_gather_kernel
from .kernels.gemm import MAX_OPERANDS, SMS, GemmConfig
from .kernels.service import service_kernel
from .operands import Right, aligned_pointer, right_operand
from .refusal import gather_refusal, serves_use
from .tiles import TILE_M, gather_tiles

_TILE_WIDTHS = (256, 240, 224)  # narrower ones lose more in the tensor cores than they win in waves


@dataclass(frozen=True)
class _Fused:
    """A use that the kernel serves: number, right operand, bias."""

    index: int
    right: Right
    bias: Tensor | None


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
        return int(shard.numel()) * size * torch_dtype(plan.dtype).itemsize

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
        outputs: list[Tensor | None] = [None] * len(plan.uses)
        channel.start()
        channel.issue(_push(channel, shard))
        fused: list[_Fused] = []
        for index, (use, other, bias) in enumerate(zip(plan.uses, others, biases, strict=True)):
            if serves_use(use, plan.dtype, other.shape[0], other.shape[1]):
                fused.append(_Fused(index, right_operand(other), None if bias is None else bias.to(dtype)))
        rest = len(fused) < len(plan.uses)
        gathered = shard.new_empty((pieces, channel.size * width)) if plan.return_gathered else None
        self._run_kernels(channel, shard, fused, outputs, gathered, rest)
        if rest or (gathered is not None and not fused):
            source = self._complete(channel, shard, gathered, bool(fused))
            for index, (use, other, bias) in enumerate(zip(plan.uses, others, biases, strict=True)):
                if outputs[index] is None:
                    outputs[index] = _multiply(use, source, other, bias)
            if channel.captured:
                service_kernel("tsk_acknowledge")(channel.context, channel.epoch, channel.site, ACK)
        channel.issue(channel.join())
        results = [output for output in outputs if output is not None]
        return results if gathered is None else [*results, gathered]

    def _run_kernels(
        self,
        channel: DeviceChannel,
        shard: Tensor,
        fused: list[_Fused],
        outputs: list[Tensor | None],
        gathered: Tensor | None,
        rest: bool,
    ) -> None:
        """Launch one kernel per MAX_OPERANDS weights of one layout; the first one also fills `gathered`."""
        pieces, width = shard.shape
        local = not rest  # whether the own shard needs no place in the slot
        batches: list[list[_Fused]] = []
        for transposed in (True, False):
            for with_bias in (True, False):
                same = [f for f in fused if f.right.transposed == transposed and (f.bias is not None) == with_bias]
                batches += [same[i : i + MAX_OPERANDS] for i in range(0, len(same), MAX_OPERANDS)]
        for number, batch in enumerate(batches):
            k = batch[0].right.matrix.shape[1 if batch[0].right.transposed else 0]
            inner = width // k
            m = pieces * channel.size * inner
            widths = tuple(f.right.matrix.shape[0 if f.right.transposed else 1] for f in batch)
            tile_n = tile_width(-(-m // TILE_M), widths)
            table, spans = _table(channel, pieces, inner, widths, tile_n)
            slot = channel.view((m, k), shard.dtype)
            if spans and local:
                own = channel.view((pieces, channel.size, width), shard.dtype)
                own[:, channel.rank].copy_(shard)
                local = False
            config = GemmConfig(
                str(shard.dtype).removeprefix("torch."),
                batch[0].right.transposed,
                len(batch),
                batch[0].bias is not None,
                tile_n,
            )
            collects = gathered is not None and number == 0
            results = [shard.new_empty((m, n)) for n in widths]
            for f, result in zip(batch, results, strict=True):
                outputs[f.index] = result
            weights = [aligned_pointer(f.right.matrix) for f in batch]
            rows = [f.bias if f.bias is not None else result[0] for f, result in zip(batch, results, strict=True)]
            last = number == len(batches) - 1 and not rest
            kernel(all_gather_kernel, config, collects)(
                shard.view(pieces * inner, k),
                slot,
                *_padded(weights),
                *_padded(results),
                *_padded(rows),
                gathered.view(m, k) if gathered is not None else slot,
                table,
                channel.context,
                channel.counters,
                pieces,
                width * shard.element_size(),
                channel.epoch,
                channel.site,
                ACK if last else -1,
            )

    def _complete(self, channel: DeviceChannel, shard: Tensor, gathered: Tensor | None, waited: bool) -> Tensor:
        """The gathered tensor [P, R*Q]: the op's output if it has one, else the slot."""
        pieces, width = shard.shape
        if gathered is not None and waited:
            return gathered
        if not waited:
            service_kernel("tsk_await_shards")(channel.context, channel.epoch, channel.site, ACK)
        slot = channel.view((pieces, channel.size, width), shard.dtype)
        slot[:, channel.rank].copy_(shard)
        if gathered is None:
            return slot.view(pieces, channel.size * width)
        gathered.copy_(slot.view(gathered.shape))
        return gathered


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many tensors as a kernel takes; it does not look at the surplus."""
    return [*tensors, *[tensors[0]] * (MAX_OPERANDS - len(tensors))]


def _table(
    channel: DeviceChannel, pieces: int, inner: int, widths: tuple[int, ...], tile_n: int
) -> tuple[Tensor, bool]:
    tables = channel.link.tables
    key = ("gather", pieces, inner, widths, tile_n)
    if key not in tables:
        tiles = gather_tiles(channel.rank, channel.size, pieces, inner, widths, tile_n)
        tables[key] = (torch.tensor(tiles.rows, dtype=torch.int32, device=channel.link.device), tiles.spans)
    found: tuple[Tensor, bool] = tables[key]
    return found


def _push(channel: DeviceChannel, shard: Tensor) -> list[Step]:
    """Copies of the shard into the slot of every peer, each followed by its flag: the previous rank's first, so that at any time
    every rank sends to another one."""
    pieces, width = shard.shape
    nbytes = width * shard.element_size()
    steps = [channel.fork(), channel.forked()]
    for distance in range(1, channel.size):
        peer = (channel.rank - distance) % channel.size
        target = channel.data(peer, channel.rank * nbytes)
        if pieces == 1:
            steps.append(Step(kind=copies.COPY, stream=SIDE, dst=target, src=shard.data_ptr(), bytes=nbytes))
        else:
            steps.append(
                Step(
                    kind=copies.COPY_ROWS,
                    stream=SIDE,
                    dst=target,
                    src=shard.data_ptr(),
                    bytes=nbytes,
                    rows=pieces,
                    dst_pitch=channel.size * nbytes,
                    src_pitch=nbytes,
                )
            )
        steps.append(channel.signal_step(peer, channel.rank))
    return steps


def _multiply(use: GatherUse, gathered: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    """The matmul of a use from the gathered tensor [P, R*Q]."""
    contracted = other.shape[0 if use.side == "lhs" else 1]
    columns = contracted if (use.side == "lhs") != use.transposed else gathered.numel() // contracted
    matrix = gathered.to(torch_dtype(use.dtype)).view(-1, columns)
    operand = matrix.t() if use.transposed else matrix
    a, b = (operand, other) if use.side == "lhs" else (other, operand)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
