"""matmul_reduce_scatter and matmul_all_reduce over NVLink: one GEMM over all terms that sums in its epilogue.

Tiles that peers sum come first; the peers pull them while the rest is computed. Tiles that this rank sums come last (for an all_reduce
in parts, one part later than the peers') and add what has landed to their accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...problem import FusionProblem, Gemm, Plan
from ..template import register_template, torch_dtype
from .channel import ACK, DATA_FLAGS, DeviceChannel
from .jit import kernel
from .kernels.gemm import MAX_OPERANDS, GemmConfig
from .kernels.reduce import reduce_kernel
from .operands import Right, aligned_pointer, right_operand
from .refusal import sum_refusal, terms_refusal
from .tiles import TILE_M, Reduction, all_reduce_tiles, scatter_tiles

_TILE_N = 256
_ITEM = 2  # bytes of an element
_PARTS = 4  # of an all_reduce: more let sums leave earlier, but make more tiles wait for their landing


@dataclass(frozen=True)
class _Tables:
    tiles: int
    rows: Tensor
    pulls: Tensor


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


def _launch(channel: DeviceChannel, terms: _Sum, tables: _Tables, out: Tensor, all_reduce: bool) -> None:
    channel.start()
    dtype = out.dtype
    elements = TILE_M * _TILE_N
    config = GemmConfig(
        str(dtype).removeprefix("torch."), terms.rhs[0].transposed, len(terms.lhs), terms.bias is not None, _TILE_N
    )
    pad = MAX_OPERANDS - len(terms.lhs)
    rights = [right.matrix for right in terms.rhs]
    kernel(reduce_kernel, config, all_reduce)(
        *terms.lhs,
        *[terms.lhs[0]] * pad,
        *rights,
        *[rights[0]] * pad,
        terms.bias if terms.bias is not None else out.view(-1)[: out.shape[1]],
        out,
        channel.view((slot_tiles(tables.tiles, channel.size, all_reduce) * elements,), dtype),
        out.new_empty(channel.size * tables.tiles * elements),
        channel.landed,
        tables.rows,
        tables.pulls,
        channel.context,
        channel.counters,
        tables.tiles,
        terms.factor,
        (channel.size - 1) * tables.tiles * elements,
        channel.epoch,
        channel.site,
        ACK,
    )
    channel.finish()


def slot_tiles(tiles: int, size: int, all_reduce: bool) -> int:
    """Tiles of a slot: partial ones for every peer, and for an all_reduce the sums."""
    return (size - 1 + all_reduce) * tiles


def _tables(channel: DeviceChannel, key: tuple[object, ...], make: Callable[[], Reduction]) -> _Tables:
    tables: _Tables | None = channel.link.tables.get(key)
    if tables is None:
        made = make()
        rows, pulls = (
            torch.tensor(data, dtype=torch.int32, device=channel.link.device).view(-1, 8)
            for data in (made.rows, made.pulls)
        )
        tables = channel.link.tables[key] = _Tables(made.tiles, rows, pulls)
    return tables


def _tiles_of(rows: int, n: int) -> int:
    return -(-rows // TILE_M) * -(-n // _TILE_N)


def _scratch(tiles: int, size: int, all_reduce: bool) -> int:
    """Bytes of a slot; negative if there are more tiles than flags."""
    if 2 * size * tiles > DATA_FLAGS:
        return -1
    return slot_tiles(tiles, size, all_reduce) * TILE_M * _TILE_N * _ITEM


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
        return _scratch(outer * _tiles_of(inner, int(rhs[0].shape[1])), size, False)

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
        key = ("scatter", m, n, outer)
        tables = _tables(channel, key, lambda: scatter_tiles(channel.rank, channel.size, outer, inner, n, _TILE_N))
        out = terms.lhs[0].new_empty((outer * inner, n))
        _launch(channel, terms, tables, out, False)
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
        return _scratch(-(-_tiles_of(m, n) // size), size, True)

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
        key = ("all", m, n)
        tables = _tables(channel, key, lambda: all_reduce_tiles(channel.rank, channel.size, m, n, _TILE_N, _PARTS))
        out = terms.lhs[0].new_empty((m, n))
        _launch(channel, terms, tables, out, True)
        return [out]
