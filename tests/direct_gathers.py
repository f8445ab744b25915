"""Gathers that matmuls read in any way, called through the runtime without a graph: as direct_ops.py does for the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import direct
from tests.cases import GATHER_USES
from tests.direct_ops import LiveOp
from tscompile.fx_passes.all_gather_matmul import gathered_operand
from tscompile.problem import GatherUse

Use = tuple[str, bool, str]  # side, transposed, rank axis
ROWS: Use = ("lhs", False, "rows")
LEFT_SUM: Use = ("lhs", True, "rows")
RIGHT_SUM: Use = ("rhs", False, "rows")
RIGHT: Use = ("rhs", True, "rows")


@dataclass(frozen=True)
class Gather:
    """A gathered tensor of `pieces` blocks per rank, of `inner` rows (or columns), `width` across; `free`: size of the other operands.

    stored_transposed: the other operands lie column by column.
    """

    uses: tuple[Use, ...]
    pieces: int
    inner: int
    width: int
    free: int
    stored_transposed: bool = False
    bias: bool = False
    gathered: bool = False

    def __str__(self) -> str:
        names = ["-".join([side, *["t"] * transposed, axis]) for side, transposed, axis in self.uses]
        flags = [name for name in ("stored_transposed", "bias", "gathered") if getattr(self, name)]
        return " ".join(["+".join(names), f"{self.pieces}x{self.inner}x{self.width}x{self.free}", *flags])


class LiveGather(LiveOp):
    def __init__(self, shape: Gather, dtype: torch.dtype, device: torch.device, group: Any = None) -> None:
        self.shape, self.group = shape, group or dist.group.WORLD  # type: ignore[assignment]
        ranks, in_rows = self.group.size(), shape.uses[0][2] == "rows"
        p, q = (shape.pieces, shape.inner * shape.width) if in_rows else (shape.width * shape.pieces, shape.inner)
        self.x = torch.empty(p, q, dtype=dtype, device=device)
        name = str(dtype).removeprefix("torch.")
        self.uses = [GatherUse(*use, name) for use in shape.uses]  # type: ignore[arg-type]
        self.weights, self.biases = [], []
        for use in self.uses:
            along = shape.pieces * ranks * shape.inner
            k, span = (along, shape.width) if use.contracts_ranks else (shape.width, along)
            size = (k, shape.free) if use.side == "lhs" else (shape.free, k)
            weight = torch.empty(size[:: -1 if shape.stored_transposed else 1], dtype=dtype, device=device)
            self.weights.append(weight.t() if shape.stored_transposed else weight)
            columns = shape.free if use.side == "lhs" else span
            self.biases.append(torch.empty(columns, dtype=dtype, device=device) if shape.bias else None)
        self.refill()
        self.call = direct.all_gather_matmul(
            self.x, self.uses, self.weights, self.biases, gathered=shape.gathered, group=self.group
        )

    def refill(self) -> None:
        self.x.normal_()
        for weight in self.weights:
            weight.normal_().mul_(0.03)
        for bias in self.biases:
            if bias is not None:
                bias.normal_()

    def _original(self, dtype: torch.dtype) -> list[Tensor]:
        x, ranks = self.x.to(dtype), self.group.size()
        whole = torch.empty(ranks * x.shape[0], x.shape[1], dtype=dtype, device=x.device)
        dist.all_gather_into_tensor(whole, x, group=self.group)
        whole = whole.view(ranks, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)
        results = []
        for use, weight, bias in zip(self.uses, self.weights, self.biases, strict=True):
            other = weight.to(dtype)
            operand = gathered_operand(use, whole, other)
            left, right = (operand, other) if use.side == "lhs" else (other, operand)
            results.append(left @ right if bias is None else torch.addmm(bias.to(dtype), left, right))
        return [*results, whole] if self.shape.gathered else results


_INNER, _WIDTH, _FREE, _ODD = 256, 520, 392, 37
UNSERVED = Gather((RIGHT,), 1, _ODD, _WIDTH, _FREE)  # whose result has no aligned rows: the original ops


def sweep(tiny: bool) -> list[Gather]:
    """Every use in every layout, mixes, and sizes that are no multiples of a tile or of a step of k."""
    inner, width, free = (8, 16, 24) if tiny else (_INNER, _WIDTH, _FREE)
    shapes = []
    for number, use in enumerate(use for use in GATHER_USES if use != ROWS):
        for stored_transposed in (False, True):
            pieces = 3 if stored_transposed == bool(number % 2) else 1
            shapes.append(Gather((use,), pieces, inner, width, free, stored_transposed, bias=number % 3 == 0))
    odd = 5 if tiny else _ODD
    return [
        *shapes,
        Gather((LEFT_SUM,), 2, odd, width, free),  # rows of a rank that end within a step of k
        Gather((RIGHT_SUM,), 1, inner + odd, width, free, stored_transposed=True),
        Gather((RIGHT_SUM,), 5, 72, width, free),
        Gather((("lhs", False, "cols"),), 2, 72, width, free, stored_transposed=True),
        Gather((RIGHT,), 2, 3 * inner + 8, width, free, bias=True),  # columns of a rank that end within a tile
        Gather((RIGHT,), 1, 8, width, free),
        Gather((RIGHT,), 1, odd, width, free) if tiny else UNSERVED,
        Gather((LEFT_SUM,), 2, inner, width, free, gathered=True),
        Gather((LEFT_SUM, LEFT_SUM), 1, inner, width, free),
        Gather((LEFT_SUM, RIGHT, RIGHT_SUM), 2, inner, width, free, gathered=True),
        Gather((ROWS, LEFT_SUM), 2, inner, width, free),
        Gather((LEFT_SUM, RIGHT), 1, odd, width, free),  # the second follows on the slot
        Gather((ROWS,), 3, odd, width, free, bias=True),  # pieces of rows, which the kernel itself pushes on GPUs
        Gather((ROWS, ROWS), 2, inner, width, free, gathered=True),
    ]
