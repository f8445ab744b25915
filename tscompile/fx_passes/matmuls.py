"""Canonical matmuls: mm, addmm and bmm of batch 1 as `lhs [m, k] @ rhs [k, n] (+ bias)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..problem import Gemm, Keep
from .sizes import hint, known_eq

aten = torch.ops.aten
TAKEN = "tscompile_site"  # node.meta key: this value is a matmul result that a fused site computes

_UNSUPPORTED = (
    aten._scaled_mm.default,
    aten._int_mm.default,
    aten._grouped_mm.default,
    aten.baddbmm.default,
    aten._scaled_grouped_mm.default,
)


@dataclass(frozen=True)
class Matmul:
    """One matmul node; with `batched`, operands and result carry a leading dimension of size 1."""

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    bias: fx.Node | None = None
    batched: bool = False

    @property
    def gemm(self) -> Gemm:
        m, n = self.node.meta["val"].shape[-2:]
        return Gemm(hint(m), hint(n), hint(self.lhs.meta["val"].shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype


def as_matmul(node: fx.Node) -> Matmul | Keep | None:
    """The canonical form of `node`, None if it is no matmul, Keep if it is one that no kernel takes."""
    if TAKEN in node.meta:
        return Keep("matmul-taken", f"its matmul is already fused in site {node.meta[TAKEN]}")
    if node.op != "call_function":
        return None
    args = node.args
    if node.target is aten.mm.default:
        return Matmul(node, args[0], args[1])  # type: ignore[arg-type]
    if node.target is aten.addmm.default:
        if any(float(node.kwargs.get(name, 1)) != 1.0 for name in ("alpha", "beta")):  # type: ignore[arg-type]
            return Keep("scaled-addmm", "addmm with alpha or beta other than 1")
        bias: fx.Node = args[0]  # type: ignore[assignment]
        n = node.meta["val"].shape[1]
        if bias.meta["val"].dim() != 1 or not known_eq(bias.meta["val"].shape[0], n):
            return Keep("bias-not-1d", "addmm adds a tensor that is no bias vector")
        return Matmul(node, args[1], args[2], bias)  # type: ignore[arg-type]
    if node.target is aten.bmm.default:
        if not known_eq(node.meta["val"].shape[0], 1):
            return Keep("batched-matmul", "a batched matmul (bmm) with a batch size other than 1")
        return Matmul(node, args[0], args[1], batched=True)  # type: ignore[arg-type]
    if node.target in _UNSUPPORTED:
        return Keep("matmul-unsupported", f"{node.target} has no fused kernel")
    return None


def operand_sides(matmul: Matmul, operand: fx.Node) -> list[str]:
    """Which sides of the matmul read `operand`: [], ["lhs"], ["rhs"] or both."""
    return [side for side, node in (("lhs", matmul.lhs), ("rhs", matmul.rhs)) if node is operand]
