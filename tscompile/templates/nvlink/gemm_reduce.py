"""matmul_reduce_scatter and matmul_all_reduce over NVLink: one GEMM over all terms that sums in its epilogue.

Tiles that peers sum come first; the peers pull them while the rest is computed. Tiles that this rank sums come last (for an all_reduce
in parts, some parts later than the peers') and add what has landed to their accumulators. Small sums are pushed instead (sums.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...problem import FusionProblem, Gemm, Plan
from ..fresh import maker
from ..template import register_template, torch_dtype
from .call import Call
from .channel import MAIN, DeviceChannel, DeviceLink
from .jit import kernel
from .kernels.config import ITEM_BYTES, TILE_M, GemmConfig, depth, pulled_rows
from .lasting import lasting_tables
from .operands import is_transposed, lies, pointer_of
from .refusal import sum_refusal, terms_refusal
from .sums import PULL, SumPlan, terms_plan
from .tiles import Row, all_reduce_tiles, scatter_tiles, whole_tiles

# Of a reduce_scatter: tiles of all ranks together in a part. Peers in turn are up to 14 % faster than one after the other, measured at
# 512 to 8192 rows: the links of all of them are in use at any time.
_SCATTER_PART = 32
# Of an all_reduce: tiles of all ranks together in a part, and how many parts later than the peers' tiles the own ones come. 192 tiles
# are a wave of the SMs and the time in which it lands; smaller parts let sums leave earlier, but read the operands more often.
_PART, _LAG = 64, 3


class _Recipe:
    """What the calls of one site with the same layout share: tables, kernel, steps."""

    def __init__(
        self,
        link: DeviceLink,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        outer: int,
    ) -> None:
        self.link = link
        m, n = lhs[0].shape[0], rhs[0].shape[1]
        chosen = _chosen(plan, lhs, rhs, link.size, outer)
        form = _pulled if chosen.form == PULL else _pushed
        tables, self._landing, sizes = form(link, chosen, m, n, outer, _is_all_reduce(plan))
        self._dtype = torch_dtype(plan.dtype)
        self._transposed = is_transposed(rhs[0])
        coefficients = plan.coefficients or (1.0,) * len(lhs)
        self._weights = [c / coefficients[0] for c in coefficients]
        self._has_bias = any(bias is not None for bias in biases)
        self._tables = dict(zip(tables, lasting_tables(list(tables.values()), link.device), strict=True))
        rows = m if _is_all_reduce(plan) else m // link.size
        self._shape, self._strides = (rows, n), (n, 1)
        self._new = maker(lhs[0].device)
        self._fixed: dict[str, float] = {
            "M": m,
            "N": n,
            **{f"K{number}": a.shape[1] for number, a in enumerate(lhs)},
            "rows": rows,
            **{name: table.data_ptr() for name, table in self._tables.items()},
            **{f"{name}_entries": len(table) for name, table in self._tables.items()},
            **sizes,
            "scale": coefficients[0] / (link.size if plan.reduce_op == "avg" else 1),
        }
        self._kernel = kernel(*_kernel(plan, rhs, biases, chosen))
        place = self._kernel.place
        numbers = range(len(lhs))
        self._patched = {"V", "C", "landing", "epoch", *(f"{side}{number}" for side in "AB" for number in numbers)}
        # Of each term: places of its operands' addresses, whether they lie as the kernel takes them, and its weight.
        self._operands = [
            (n, place(f"A{n}"), place(f"B{n}"), lies(lhs[n], False), lies(rhs[n], self._transposed), self._weights[n])
            for n in numbers
        ]
        self._at_bias, self._at_out, self._at_landing, self._at_epoch = map(place, ("V", "C", "landing", "epoch"))
        self._calls: dict[int, Call] = {}

    def _call(self, channel: DeviceChannel) -> Call:
        """The steps of a call in the channel's slot."""
        values = self._kernel.values({**channel.values(), **self._fixed}, self._patched)
        if channel.captured:
            channel.link.pinned.append(self)
        return Call(channel, [self._kernel.step(values, MAIN)], [], [values])

    def run(
        self, channel: DeviceChannel, lhs: Sequence[Tensor], rhs: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Tensor:
        call = self._calls.get(channel.slot)
        if call is None:
            call = self._calls[channel.slot] = self._call(channel)
        (values,) = call.values
        alive: list[Tensor] = []  # what the kernel reads and nobody else holds, until it is enqueued
        dtype = self._dtype
        for number, left, right, a_lies, b_lies, weight in self._operands:
            a, b = lhs[number], rhs[number]
            if a.dtype is not dtype or weight != 1:
                a, a_lies = a.to(dtype) * weight, False
                alive.append(a)
            if b.dtype is not dtype:
                b, b_lies = b.to(dtype), False
                alive.append(b)
            values[left] = pointer_of(a, False, alive, a_lies)
            values[right] = pointer_of(b, self._transposed, alive, b_lies)
        if self._has_bias:
            bias = self._bias(biases)
            alive.append(bias)
            values[self._at_bias] = pointer_of(bias, False, alive)
        out = self._new(self._shape, self._strides, dtype)
        values[self._at_out], values[self._at_epoch] = out.data_ptr(), channel.epoch
        if self._landing:
            landing = self._new((self._landing,), (1,), dtype)  # free again behind the kernel, on its stream
            values[self._at_landing] = landing.data_ptr()
        channel.link.issue(call.steps)
        return out

    def _bias(self, biases: Sequence[Tensor | None]) -> Tensor:
        """One row for all terms."""
        if len(biases) == 1 and biases[0] is not None:
            return biases[0].to(self._dtype)
        rows = [v.float() * weight for v, weight in zip(biases, self._weights, strict=True) if v is not None]
        return sum(rows[1:], start=rows[0]).to(self._dtype)


_Tables = dict[str, list[Row]]


def _pulled(
    link: DeviceLink, chosen: SumPlan, m: int, n: int, outer: int, all_reduce: bool
) -> tuple[_Tables, int, dict[str, int]]:
    """Tables, elements of the landing zone, and sizes that kernels/reduce.py takes."""
    width, ranks = chosen.width, link.size
    if all_reduce:
        made = all_reduce_tiles(link.rank, ranks, m, n, width, _PART, _LAG)
    else:
        made = scatter_tiles(link.rank, ranks, outer, m // (ranks * outer), n, width, _SCATTER_PART)
    tile = TILE_M * width
    sizes = {"tiles": made.tiles, "result_offset": (ranks - 1) * made.tiles * tile * ITEM_BYTES}
    return {"table": made.rows, "pulls": made.pulls, "results": made.results}, ranks * made.tiles * tile, sizes


def _pushed(
    link: DeviceLink, chosen: SumPlan, m: int, n: int, outer: int, all_reduce: bool
) -> tuple[_Tables, int, dict[str, int]]:
    """The same for kernels/sum_push.py."""
    inner = m if all_reduce else m // (link.size * outer)
    sizes = {"inner": inner, "columns": -(-n // chosen.width), "share": chosen.share}
    return {"table": whole_tiles(m, n, chosen.width)}, 0, sizes


def _kernel(plan: Plan, rhs: Sequence[Tensor], biases: Sequence[Tensor | None], chosen: SumPlan) -> tuple[Any, ...]:
    """The kernel, as jit.py names it."""
    has_bias = any(bias is not None for bias in biases)
    width = chosen.width
    stages = depth(width, pulled_rows(width) * width if chosen.form == PULL else 0)
    config = GemmConfig(plan.dtype, is_transposed(rhs[0]), len(rhs), has_bias, width, stages, rows=chosen.rows)
    return ("reduce", config, _is_all_reduce(plan)) if chosen.form == PULL else ("sum_push", config, chosen.form)


def _is_all_reduce(plan: Plan) -> bool:
    return plan.kind == "matmul_all_reduce"


def _gemms(lhs: Sequence[Tensor], rhs: Sequence[Tensor]) -> tuple[Gemm, ...]:
    return tuple(Gemm(int(a.shape[0]), int(b.shape[1]), int(a.shape[1])) for a, b in zip(lhs, rhs, strict=True))


def _chosen(plan: Plan, lhs: Sequence[Tensor], rhs: Sequence[Tensor], size: int, outer: int) -> SumPlan:
    return terms_plan(_gemms(lhs, rhs), size, outer, _is_all_reduce(plan))


@register_template("matmul_reduce_scatter", "nvlink")
@register_template("matmul_all_reduce", "nvlink")
class NvlinkGemmReduce:
    """Sum over ranks of terms [M, N]: scattered along the rank dimension of its rows (outer, R, inner), or to every rank."""

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
        outer: int = 1,
    ) -> int:
        if addends or terms_refusal(_gemms(lhs, rhs), plan) is not None:
            return -1
        return _chosen(plan, lhs, rhs, size, outer).scratch_bytes

    def kernels(
        self,
        plan: Plan,
        size: int,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
        outer: int = 1,
    ) -> list[tuple[Any, ...]]:
        return [_kernel(plan, rhs, biases, _chosen(plan, lhs, rhs, size, outer))]

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        addends: Sequence[Tensor],
        outer: int = 1,
    ) -> list[Tensor]:
        recipe: _Recipe = channel.site.recipe
        if recipe is None or recipe.link is not channel.link:
            recipe = channel.site.recipe = _Recipe(channel.link, plan, lhs, rhs, biases, outer)
        return [recipe.run(channel, lhs, rhs, biases)]
