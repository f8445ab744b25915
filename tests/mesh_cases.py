"""Calls of mesh_matmul with their true results, for every rank (i, j) of a mesh of rows x columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from tscompile.problem import GatherUse, Plan

Axis = Literal["rows", "cols"]


@dataclass(frozen=True)
class Layout:
    """How an operand is gathered and read: its tensor G is [pieces, R, inner] where R lies in the columns of the matrix, and
    [pieces, R, inner * width] where it lies in its rows."""

    transposed: bool
    axis: Axis
    pieces: int = 1


# Of either operand: the contracted dim is gathered as blocks (panels), or in pieces; or the other dim is gathered.
LHS = {
    "panels": Layout(False, "cols"),
    "panels, transposed": Layout(True, "rows"),
    "pieces": Layout(True, "rows", 2),
    "rows": Layout(False, "rows"),
    "rows, transposed": Layout(True, "cols"),
    "rows, pieces": Layout(False, "rows", 2),
}
RHS = {
    "panels": Layout(False, "rows"),
    "panels, transposed": Layout(True, "cols"),
    "pieces": Layout(False, "rows", 2),
    "columns": Layout(False, "cols"),
    "columns, transposed": Layout(True, "rows"),
}


@dataclass
class MeshCase:
    """plan and, per rank (i, j): arguments before the second group's name, and outputs in float64."""

    plan: Plan
    args: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)
    truth: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def args_on(self, device: torch.device | str, rank: tuple[int, int]) -> tuple[Any, ...]:
        return tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in self.args[rank])

    def check(self, rank: tuple[int, int], outputs: list[Tensor]) -> None:
        assert len(outputs) == len(self.truth[rank])
        for output, truth in zip(outputs, self.truth[rank], strict=True):
            assert output.shape == truth.shape
            assert output.is_contiguous()
            # Of 16 bits the result is rounded once; the order of a long sum is the ranks' own business.
            order = 8 if output.dtype.itemsize > 2 else 1
            limit = 2 * torch.finfo(output.dtype).eps * max(1.0, truth.abs().max().item()) * order
            assert (output.cpu().double() - truth).abs().max().item() <= limit


def _matrix(gathered: Tensor, layout: Layout, side: str, contracted: int) -> Tensor:
    columns_contracted = (side == "lhs") != layout.transposed
    matrix = gathered.reshape(-1, contracted) if columns_contracted else gathered.reshape(contracted, -1)
    return matrix.t() if layout.transposed else matrix


def mesh_case(
    rows: int,
    columns: int,
    lhs: Layout,
    rhs: Layout,
    *,
    schedule: str = "summa",
    dtype: str = "float32",
    bias: bool = False,
    returned: tuple[bool, bool] = (False, False),
    seed: int = 0,
    scale: int = 1,
    wide: int = 1,
) -> MeshCase:
    """The left operand is gathered along a row of the mesh (over j), the right one along a column (over i). scale, wide: factors of
    the contracted size and of the others."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    contracted, free = 2 * rows * columns * scale, 4 * rows * columns * wide

    def shard(ranks: int) -> Tensor:
        return torch.randn(contracted * free // ranks, generator=generator).to(kind)

    left = {rank: shard(columns) for rank in product(range(rows), range(columns))}
    right = {rank: shard(rows) for rank in product(range(rows), range(columns))}
    term = torch.randn(free, generator=generator).to(kind) if bias else None
    uses = (
        GatherUse("lhs", lhs.transposed, lhs.axis, dtype),
        GatherUse("rhs", rhs.transposed, rhs.axis, dtype),
    )
    plan = Plan(
        "mesh_matmul",
        f"mesh{seed}",
        "shm",
        dtype,
        uses=uses,
        return_gathered=returned[0],
        return_second=returned[1],
        second_size=rows,
        schedule=schedule,
    )
    case = MeshCase(plan)
    for i, j in left:
        whole = []
        for layout, side, shards in (
            (lhs, "lhs", [left[i, c] for c in range(columns)]),
            (rhs, "rhs", [right[r, j] for r in range(rows)]),
        ):
            wide = contracted if (side == "lhs") != layout.transposed else free
            # P of [P, R, Q]: the rows of the matrix times the pieces of its columns, if R lies in the columns
            p = layout.pieces if layout.axis == "rows" else contracted * free // wide * layout.pieces
            whole.append(torch.stack([each.view(p, -1) for each in shards], 1).flatten(1))
        a, b = (
            _matrix(g, layout, side, contracted)
            for g, layout, side in zip(whole, (lhs, rhs), ("lhs", "rhs"), strict=True)
        )
        shapes = [each.shape[0] for each in whole]
        case.args[i, j] = (left[i, j].view(shapes[0], -1), right[i, j].view(shapes[1], -1), term, contracted)
        out = a.double() @ b.double()
        outputs = [out if term is None else out + term.double()]
        outputs += [each.double() for each, wanted in zip(whole, returned, strict=True) if wanted]
        case.truth[i, j] = outputs
    return case
