"""matmul_reduce_scatter and matmul_all_reduce over NVLink: one GEMM over all terms that sums in its epilogue.

Tiles that peers sum come first; the peers pull them while the rest is computed. Tiles that this rank sums come last (for an all_reduce
in parts, some parts later than the peers') and add what has landed to their accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...problem import FusionProblem, Gemm, Plan
from ..template import register_template, torch_dtype
from .channel import ACK, DATA_FLAGS, DeviceChannel, DeviceLink
from .jit import kernel
from .kernels.gemm import MAX_OPERANDS, GemmConfig
from .kernels.reduce import STAGES, reduce_kernel
from .operands import aligned_pointer, is_transposed, right_operand
from .refusal import sum_refusal, terms_refusal
from .tiles import TILE_M, Reduction, all_reduce_tiles, scatter_tiles
from .widths import Tiling, sum_tiling

_ITEM = 2  # bytes of an element
# Of an all_reduce: tiles of all ranks together in a part, and how many parts later than the peers' tiles the own ones come. 192 tiles
# are a wave of the SMs and the time in which it lands; smaller parts let sums leave earlier, but read the operands more often.
_PART, _LAG = 64, 3


class _Recipe:
    """What the calls of one site with the same shapes share: layout, tables, kernel arguments that do not change."""

    def __init__(
        self,
        link: DeviceLink,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        made: Reduction,
        width: int,
    ) -> None:
        self.dtype = torch_dtype(plan.dtype)
        self.transposed = is_transposed(rhs[0])
        coefficients = plan.coefficients or (1.0,) * len(lhs)
        factor = coefficients[0]
        self.weights = [c / factor for c in coefficients]
        self.factor = factor / (link.size if plan.reduce_op == "avg" else 1)
        self.has_bias = any(bias is not None for bias in biases)
        self.tiles = made.tiles
        self.rows, self.pulls, self.results = (
            torch.tensor(data, dtype=torch.int32, device=link.device).view(-1, 8)
            for data in (made.rows, made.pulls, made.results)
        )
        self.landing = link.size * made.tiles * TILE_M * width
        self.result_offset = (link.size - 1) * made.tiles * TILE_M * width * _ITEM
        config = GemmConfig(plan.dtype, self.transposed, len(lhs), self.has_bias, width, STAGES[width])
        self.kernel = kernel(reduce_kernel, config, plan.kind == "matmul_all_reduce")

    def run(
        self,
        channel: DeviceChannel,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        out: Tensor,
    ) -> None:
        channel.start()
        pad = MAX_OPERANDS - len(lhs)
        lefts = [self._left(a, weight) for a, weight in zip(lhs, self.weights, strict=True)]
        rights = [right_operand(b.to(self.dtype), self.transposed) for b in rhs]
        bias = self._bias(biases)
        landing = out.new_empty(self.landing)
        self.kernel(
            *lefts,
            *[lefts[0]] * pad,
            *rights,
            *[rights[0]] * pad,
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out.shape[0],
            channel.data(channel.rank),
            landing.data_ptr(),
            channel.landed,
            self.rows.data_ptr(),
            len(self.rows),
            self.pulls.data_ptr(),
            len(self.pulls),
            self.results.data_ptr(),
            len(self.results),
            channel.context,
            channel.counters,
            self.tiles,
            self.factor,
            self.result_offset,
            channel.epoch,
            channel.site,
            ACK,
        )
        channel.finish()

    def _left(self, a: Tensor, weight: float) -> Tensor:
        left = a.to(self.dtype).contiguous()
        return aligned_pointer(left if weight == 1 else left * weight)

    def _bias(self, biases: Sequence[Tensor | None]) -> Tensor | None:
        """One row for all terms."""
        if not self.has_bias:
            return None
        rows = [v.float() * weight for v, weight in zip(biases, self.weights, strict=True) if v is not None]
        return sum(rows[1:], start=rows[0]).to(self.dtype)


def _sum(
    channel: DeviceChannel,
    plan: Plan,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outer: int,
    rows: int,
    make: Callable[[int], Reduction],
) -> list[Tensor]:
    """The op's output [rows, N]; `make` gives the tables for a tile width where these shapes are new."""
    cache = channel.link.tables
    # A site's name says nothing of biases, and with symbolic sizes the same rows may come in other pieces.
    has_bias = tuple(bias is not None for bias in biases)
    key = (plan.site, outer, has_bias, lhs[0].shape, *[(b.shape, b.stride()) for b in rhs])
    recipe: _Recipe | None = cache.get(key)
    if recipe is None:
        width = _tiling(lhs, rhs, channel.size, outer, plan.kind == "matmul_all_reduce").width
        recipe = cache[key] = _Recipe(channel.link, plan, lhs, rhs, biases, make(width), width)
    out = lhs[0].new_empty((rows, rhs[0].shape[1]), dtype=recipe.dtype)
    recipe.run(channel, lhs, rhs, biases, out)
    return [out]


def _gemms(lhs: Sequence[Tensor], rhs: Sequence[Tensor]) -> tuple[Gemm, ...]:
    return tuple(Gemm(a.shape[0], b.shape[1], a.shape[1]) for a, b in zip(lhs, rhs, strict=True))


def _tiling(lhs: Sequence[Tensor], rhs: Sequence[Tensor], size: int, outer: int, all_reduce: bool) -> Tiling:
    pieces = 1 if all_reduce else size * outer
    k = sum(int(a.shape[1]) for a in lhs)
    return sum_tiling(int(lhs[0].shape[0]), int(rhs[0].shape[1]), k, size, pieces, all_reduce)


def _scratch(tiling: Tiling, size: int, all_reduce: bool) -> int:
    """Bytes of a slot: partial tiles for every peer, and for an all_reduce the sums; negative if there are more tiles than flags."""
    tiles = -(-tiling.tiles // size)
    if 2 * size * tiles > DATA_FLAGS:
        return -1
    return (size - 1 + all_reduce) * tiles * TILE_M * tiling.width * _ITEM


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
        return _scratch(_tiling(lhs, rhs, size, outer, False), size, False)

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
        m, n = lhs[0].shape[0], rhs[0].shape[1]
        inner = m // (channel.size * outer)
        return _sum(
            channel,
            plan,
            lhs,
            rhs,
            biases,
            outer,
            outer * inner,
            lambda width: scatter_tiles(channel.rank, channel.size, outer, inner, n, width),
        )


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
        return _scratch(_tiling(lhs, rhs, size, 1, True), size, True)

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
    ) -> list[Tensor]:
        m, n = lhs[0].shape[0], rhs[0].shape[1]
        return _sum(
            channel,
            plan,
            lhs,
            rhs,
            biases,
            1,
            m,
            lambda width: all_reduce_tiles(channel.rank, channel.size, m, n, width, _PART, _LAG),
        )
