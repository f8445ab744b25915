"""Uses of a gather that read gathered rows on the left: which of them share a kernel, who sends the shard, and the launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...nvshmem.stream import Values
from ...problem import Plan
from ..template import torch_dtype
from . import widths
from .channel import DeviceLink
from .jit import kernel
from .kernels.config import MAX_OPERANDS, GemmConfig, depth, loaded_rows
from .operands import is_transposed, lies
from .refusal import serves_use
from .tables import tables_of
from .tiles import gather_tiles

# The copy engine sends the shard while the kernel multiplies; or the kernel sends it itself.
_COPIED, _PUSHED = "all_gather", "gather_push"


@dataclass(frozen=True)
class Batch:
    """Uses that one kernel serves: the same layout and k, all with a bias or none.

    indices: of the uses among the plan's. name, config, collects: of the kernel, as jit.py takes them.
    """

    indices: tuple[int, ...]
    name: str
    config: GemmConfig
    collects: bool

    @property
    def kernel(self) -> tuple[Any, ...]:
        return self.name, self.config, self.collects


@dataclass(frozen=True)
class RowUses:
    """The uses of a plan that read gathered rows.

    pushed: the kernel of the first batch sends the shard and returns when those of all ranks are in the slot; the others read it there.
    rest: indices of the uses that are not among them.
    """

    batches: list[Batch]
    pushed: bool
    rest: list[int]


def row_uses(
    plan: Plan, ranks: int, shard: Sequence[int], others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> RowUses:
    """The uses of shards [P, Q] that read gathered rows, in batches."""
    groups: dict[tuple[bool, bool, int], list[int]] = {}
    rest: list[int] = []
    for index, (use, other, bias) in enumerate(zip(plan.uses, others, biases, strict=True)):
        if serves_use(use, plan.dtype, other.shape[0], other.shape[1]):
            groups.setdefault((is_transposed(other), bias is not None, other.shape[0]), []).append(index)
        else:
            rest.append(index)
    # Asked of sizes alone, not of batches: ranks send alike, also if their weights lie in memory in different ways.
    pushed = not rest and one_kernel([int(other.shape[0]) for other in others])
    if pushed:
        k = int(others[0].shape[0])
        pushed = widths.pushes(_rows(ranks, shard, k), [int(other.shape[1]) for other in others], k, ranks)
    batches: list[Batch] = []
    for (_, with_bias, _), group in groups.items():
        for first in range(0, len(group), MAX_OPERANDS):
            indices = tuple(group[first : first + MAX_OPERANDS])
            sends = pushed and not batches
            config = _config(plan.dtype, ranks, shard, [others[index] for index in indices], with_bias, sends)
            batches.append(Batch(indices, _PUSHED if sends else _COPIED, config, plan.return_gathered and not batches))
    return RowUses(batches, pushed, rest)


def one_kernel(contracted: Sequence[int]) -> bool:
    """True if matmuls of gathered rows over these k share a kernel, wherever their weights lie in memory in the same way."""
    return 1 <= len(contracted) <= MAX_OPERANDS and len(set(contracted)) == 1


def _rows(ranks: int, shard: Sequence[int], k: int) -> int:
    pieces, width = shard
    return pieces * (width // k) * ranks


def _config(
    dtype: str, ranks: int, shard: Sequence[int], weights: Sequence[Tensor], bias: bool, pushed: bool
) -> GemmConfig:
    """What the kernel of a batch is compiled for."""
    k, transposed = int(weights[0].shape[0]), is_transposed(weights[0])
    columns = [int(weight.shape[1]) for weight in weights]
    rows = _rows(ranks, shard, k)
    tile_n = widths.gather_width(rows, columns, k, ranks, transposed, pushed)
    return GemmConfig(dtype, transposed, len(weights), bias, tile_n, depth(tile_n), rows=loaded_rows(rows))


class RowsLaunch:
    """The kernel of a batch; prepared once for its layout.

    Args:
        uses: what the batch belongs to. shard: its shape [P, Q]. weights: of the batch.
        last: no later kernel or matmul of the call reads the slot.
        joins: it ends no sooner than the copies that send the shard, where no graph is captured.
    """

    def __init__(
        self,
        link: DeviceLink,
        uses: RowUses,
        batch: Batch,
        dtype: str,
        shard: Sequence[int],
        weights: Sequence[Tensor],
        *,
        last: bool,
        joins: bool,
    ) -> None:
        config, pieces, k = batch.config, shard[0], int(weights[0].shape[0])
        inner = shard[1] // k
        self.transposed = config.transposed
        self.lies = all(lies(weight, self.transposed) for weight in weights)
        self.rows = _rows(link.size, shard, k)
        columns = [int(weight.shape[1]) for weight in weights]
        made = gather_tiles(link.rank, link.size, pieces, inner, columns, config.tile_n, pushed=uses.pushed)
        self.spans = made.spans
        table = made.rows
        if uses.pushed and batch.name != _PUSHED:  # an earlier kernel of the call has waited for all shards
            table = [(*row[:6], 0, row[7]) for row in table]
        self._tables = tables_of(table, link, joins)
        slices, slice_steps = widths.pushed_slices(pieces * inner, k)
        self._fixed = {
            "tiles": len(table),
            "MR": pieces * inner,
            "rows": pieces * inner,
            "inner": inner,
            "slices": slices,
            "slice_steps": slice_steps,
            "M": self.rows,
            "K": k,
            "pieces": pieces,
            "shard_bytes": shard[1] * torch_dtype(dtype).itemsize,
            **{f"N{place}": width for place, width in enumerate(columns)},
        }
        if not last:
            self._fixed["ack"] = -1
        self.kernel = kernel(*batch.kernel)
        place = self.kernel.place
        self.shard, self.epoch, self.gathered = place("X"), place("epoch"), place("gathered")
        # Of each weight: its index among the op's, its width, and the places of its address, its result's and its bias's.
        self.operands = [
            (index, width, place(f"B{number}"), place(f"C{number}"), place(f"V{number}"))
            for number, (index, width) in enumerate(zip(batch.indices, columns, strict=True))
        ]

    def values(self, known: dict[str, int], captured: bool) -> Values:
        """Values of launches in one slot, but for those that change from call to call. captured: it is one of those of graphs."""
        patched = {
            "X",
            "epoch",
            "gathered",
            *(f"{kind}{number}" for kind in "BCV" for number in range(len(self.operands))),
        }
        table = self._tables[captured].data_ptr()
        return self.kernel.values({**known, "A": known["slot"], "table": table, **self._fixed}, patched)
