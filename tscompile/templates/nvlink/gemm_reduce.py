"""matmul_reduce_scatter and matmul_all_reduce over NVLink: one GEMM over all terms, partial tiles by copy engine, sums in its epilogue.

Tiles that peers sum come first, go to local staging, and travel in parts as soon as a part is complete. Tiles that this rank sums come
last (for an all_reduce: one part later than the peers') and add what arrived to their accumulators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...nvshmem import copies
from ...nvshmem.copies import Step
from ...nvshmem.heap import aligned
from ...problem import FusionProblem, Gemm, Plan
from ..template import register_template, torch_dtype
from .channel import ACK, RESULTS, SIDE, DeviceChannel
from .jit import kernel
from .kernels.gemm import MAX_OPERANDS, GemmConfig
from .kernels.reduce import reduce_kernel
from .kernels.service import service_kernel
from .operands import Right, aligned_pointer, right_operand
from .refusal import sum_refusal, terms_refusal
from .tiles import TILE_M, Part, Reduction, all_reduce_tiles, scatter_tiles

_TILE_N = 256
_ITEM = 2  # bytes of an element


@dataclass(frozen=True)
class _Tables:
    plan: Reduction
    rows: Tensor
    order: Tensor


@dataclass(frozen=True)
class _Sum:
    """The terms of a call, ready for the kernel: one layout, one factor."""

    lhs: list[Tensor]
    rhs: list[Right]
    bias: Tensor | None
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        matrix = self.rhs[0].matrix
        return self.lhs[0].shape[0], matrix.shape[0 if self.rhs[0].transposed else 1]


def _gather_terms(
    plan: Plan, size: int, lhs: Sequence[Tensor], rhs: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> _Sum:
    """Bring the terms to one layout and one factor; what differs from the first term is copied."""
    dtype = torch_dtype(plan.dtype)
    coefficients = plan.coefficients or (1.0,) * len(lhs)
    factor = coefficients[0]
    lefts: list[Tensor] = []
    rights: list[Right] = []
    for a, b, c in zip(lhs, rhs, coefficients, strict=False):
        right = right_operand(b.to(dtype))
        if rights and right.transposed != rights[0].transposed:
            right = Right(right.matrix.t().contiguous(), rights[0].transposed)
        rights.append(Right(aligned_pointer(right.matrix), right.transposed))
        left = a.to(dtype).contiguous()
        lefts.append(aligned_pointer(left if c == factor else left * (c / factor)))
    bias: Tensor | None = None
    for v, c in zip(biases, coefficients, strict=False):
        if v is not None:
            scaled = v.float() * (c / factor)
            bias = scaled if bias is None else bias + scaled
    divisor = size if plan.reduce_op == "avg" else 1
    return _Sum(lefts, rights, None if bias is None else bias.to(dtype), factor / divisor)


def _gemms(lhs: Sequence[Tensor], rhs: Sequence[Tensor]) -> tuple[Gemm, ...]:
    return tuple(Gemm(a.shape[0], b.shape[1], a.shape[1]) for a, b in zip(lhs, rhs, strict=True))


def _parts(tiles: int, k: int) -> int:
    """Pieces that a peer's tiles travel in: a short GEMM sends in two, so that the first leaves early."""
    return 1 if k >= 4096 or tiles < 64 else 2


class _Run:
    """One call on one channel."""

    def __init__(self, channel: DeviceChannel, terms: _Sum, tables: _Tables, all_reduce: bool) -> None:
        self.channel = channel
        self.terms = terms
        self.tables = tables
        self.all_reduce = all_reduce
        self.tile_bytes = TILE_M * _TILE_N * _ITEM

    def launch(self, out: Tensor) -> None:
        channel, plan, terms = self.channel, self.tables.plan, self.terms
        dtype = out.dtype
        if channel.captured:
            service_kernel("tsk_open")(channel.context, channel.epoch, channel.site, ACK)
        staging = out.new_empty((channel.size - 1) * plan.tiles * TILE_M * _TILE_N)
        channel.issue([channel.fork(), channel.forked()])
        config = GemmConfig(
            str(dtype).removeprefix("torch."), terms.rhs[0].transposed, len(terms.lhs), terms.bias is not None, _TILE_N
        )
        pad = MAX_OPERANDS - len(terms.lhs)
        rights = [right.matrix for right in terms.rhs]
        kernel(reduce_kernel, config, self.all_reduce)(
            *terms.lhs,
            *[terms.lhs[0]] * pad,
            *rights,
            *[rights[0]] * pad,
            terms.bias if terms.bias is not None else out.view(-1)[: out.shape[1]],
            out,
            staging,
            channel.counters.counts,
            self.tables.rows,
            self.tables.order,
            channel.context,
            channel.counters.claims,
            plan.tiles,
            plan.parts,
            terms.factor,
            result_offset(plan.tiles, channel.size),
            RESULTS,
            channel.epoch,
            channel.site,
            ACK,
        )
        # The kernel stands in its queue before the copy stream starts to wait for its counts.
        steps: list[Step] = []
        for part in plan.copies:
            steps += self._travel(part, staging)
        channel.issue([*steps, *channel.join()])

    def _travel(self, part: Part, staging: Tensor) -> list[Step]:
        channel = self.channel
        count = channel.counters.counts.data_ptr() + 4 * part.counter
        steps = []
        if part.count:
            steps += [
                Step(kind=copies.WAIT, stream=SIDE, dst=count, value=part.count),
                Step(kind=copies.WRITE, stream=SIDE, dst=count, value=0),
                Step(
                    kind=copies.COPY,
                    stream=SIDE,
                    dst=channel.data(part.peer, part.place * self.tile_bytes),
                    src=staging.data_ptr() + part.first * self.tile_bytes,
                    bytes=part.count * self.tile_bytes,
                ),
            ]
        flag = channel.rank * self.tables.plan.parts + part.part
        return [*steps, channel.signal_step(part.peer, flag)]


def result_offset(tiles: int, size: int) -> int:
    """Bytes into a slot at which the result of an all_reduce lies, behind the partial tiles of all ranks."""
    return aligned(tiles * size * TILE_M * _TILE_N * _ITEM)


def _tables(channel: DeviceChannel, key: tuple[object, ...], make: Reduction) -> _Tables:
    device = channel.link.device
    rows = torch.tensor(make.rows, dtype=torch.int32, device=device).view(-1, 8)
    order = torch.tensor(make.order or [(0, 0, 0, 0)], dtype=torch.int32, device=device)
    tables = channel.link.tables[key] = _Tables(make, rows, order)
    return tables


def _tiles_of(rows: int, n: int) -> int:
    return -(-rows // TILE_M) * -(-n // _TILE_N)


@register_template("matmul_reduce_scatter", "nvlink")
class NvlinkGemmReduceScatter:
    """Sum over ranks of terms [M, N], scattered along the rank dimension of its rows."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return sum_refusal(problem, plan)

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
        if addends or terms_refusal(_gemms(lhs, rhs), plan) is not None:
            return -1
        inner = int(lhs[0].shape[0]) // (size * outer)
        tiles = outer * _tiles_of(inner, int(rhs[0].shape[1]))
        return size * tiles * TILE_M * _TILE_N * _ITEM

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
        outer: int,
    ) -> list[Tensor]:
        terms = _gather_terms(plan, channel.size, lhs, rhs, biases)
        m, n = terms.shape
        inner = m // (channel.size * outer)
        key = ("scatter", m, n, outer, terms.lhs[0].shape[1])
        tables = channel.link.tables.get(key)
        if tables is None:
            parts = _parts(outer * _tiles_of(inner, n), terms.lhs[0].shape[1])
            tables = _tables(channel, key, scatter_tiles(channel.rank, channel.size, outer, inner, n, _TILE_N, parts))
        out = terms.lhs[0].new_empty((outer * inner, n))
        _Run(channel, terms, tables, False).launch(out)
        return [out]


@register_template("matmul_all_reduce", "nvlink")
class NvlinkGemmAllReduce:
    """Sum over ranks of terms [M, N], to every rank."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return sum_refusal(problem, plan)

    def scratch_bytes(
        self,
        plan: Plan,
        size: int,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
    ) -> int:
        if addends or terms_refusal(_gemms(lhs, rhs), plan) is not None:
            return -1
        m, n = int(lhs[0].shape[0]), int(rhs[0].shape[1])
        return result_offset(-(-_tiles_of(m, n) // size), size) + m * n * _ITEM

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
    ) -> list[Tensor]:
        terms = _gather_terms(plan, channel.size, lhs, rhs, biases)
        m, n = terms.shape
        key = ("all", m, n, terms.lhs[0].shape[1])
        tables = channel.link.tables.get(key)
        if tables is None:
            tables = _tables(channel, key, all_reduce_tiles(channel.rank, channel.size, m, n, _TILE_N, 2))
        out = terms.lhs[0].new_empty((m, n))
        _Run(channel, terms, tables, True).launch(out)
        return [out]
