"""Canonical matmuls: mm, addmm and bmm of batch 1 as `lhs [m, k] @ rhs [k, n] (+ bias)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..problem import Gemm, Keep
from .rewrite import Builder
from .sizes import hint, known_eq

aten = torch.ops.aten
TAKEN = "tscompile_site"  # node.meta key of a fused op and of the matmul results that it computes: the site's name

_UNSUPPORTED = (
    aten._scaled_mm.default,
    aten._int_mm.default,
    aten._grouped_mm.default,
    aten._scaled_grouped_mm.default,
)


@dataclass(frozen=True)
class Matmul:
    """One matmul node, `alpha * lhs @ rhs + bias + beta * plus`.

    bias is a vector [n]. plus is what else addmm adds: Inductor turns `x + a @ b` into addmm, so it may be a residual or another
    matmul. With `batched`, operands and result carry a leading dimension of size 1.
    """

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    bias: fx.Node | None = None
    plus: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0
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
    args: tuple[Any, ...] = node.args
    if node.target is aten.mm.default:
        return Matmul(node, args[0], args[1])
    if node.target in (aten.bmm.default, aten.baddbmm.default) and not known_eq(node.meta["val"].shape[0], 1):
        return Keep("batched-matmul", "a batched matmul (bmm) with a batch size other than 1")
    if node.target is aten.bmm.default:
        return Matmul(node, args[0], args[1], batched=True)
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return _as_addmm(node, *args[:3])
    if node.target in _UNSUPPORTED:
        return Keep("matmul-unsupported", f"{node.target} has no fused kernel")
    return None


def _as_addmm(node: fx.Node, added: fx.Node, lhs: fx.Node, rhs: fx.Node) -> Matmul | Keep:
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return Keep("scaled-addmm", "addmm with a symbolic alpha or beta")
    batched = node.target is aten.baddbmm.default
    shape = added.meta["val"].shape
    if alpha == beta == 1 and len(shape) == 1 and known_eq(shape[0], node.meta["val"].shape[-1]) and not batched:
        return Matmul(node, lhs, rhs, bias=added)
    return Matmul(node, lhs, rhs, plus=added, alpha=float(alpha), beta=float(beta), batched=batched)


def operand_sides(matmul: Matmul, operand: fx.Node) -> list[str]:
    """Which sides of the matmul read `operand`: [], ["lhs"], ["rhs"] or both."""
    return [side for side, node in (("lhs", matmul.lhs), ("rhs", matmul.rhs)) if node is operand]


def replace_matmul(builder: Builder, matmul: Matmul, out: fx.Node, site: str) -> None:
    """`out`, the result `[m, n]` of `lhs @ rhs + bias` as a fused op computes it, takes the place of the matmul."""
    out.meta[TAKEN] = site
    if matmul.batched:
        out = builder.call(aten.unsqueeze.default, out, 0)
        out.meta[TAKEN] = site
    if matmul.plus is not None:
        out = builder.call(aten.add.Tensor, out, matmul.plus, like=matmul.node)
    matmul.node.replace_all_uses_with(out)
