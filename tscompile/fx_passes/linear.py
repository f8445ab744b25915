"""The reduction side: what is summed over ranks, as a list of terms.

Reductions are linear, so the walk upstream from a reducing collective goes through movement ops, casts, add, sub and scaling
by constants. `dY1 @ W1 + dY3 @ W3 -> split + cat -> reduce_scatter` is two matmul terms under one view: every Llama backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..problem import Keep
from .layout import (
    Digits,
    NotStrided,
    Prover,
    View,
    carve,
    effective_cast,
    identity,
    is_movement,
    make_digits,
    merge,
    natural_order,
    same_digits,
)
from .matmuls import Matmul, as_matmul
from .rewrite import Builder
from .sizes import known_eq

aten = torch.ops.aten
_MAX_TERMS = 32


@dataclass(frozen=True)
class Term:
    """coefficient * view(root); `matmul` if the root is a matmul that the fused op can take over."""

    root: fx.Node
    view: View
    coefficient: float
    matmul: Matmul | None
    refusal: Keep | None = None


@dataclass
class Sum:
    """`node` as a sum of terms; `cone` holds every node between the roots (inclusive) and `node`."""

    node: fx.Node
    terms: list[Term] = field(default_factory=list)
    cone: set[fx.Node] = field(default_factory=set)

    @property
    def touches_matmul(self) -> bool:
        return any(t.matmul is not None or t.refusal is not None for t in self.terms)


def linear_terms(node: fx.Node, prover: Prover, consumers: set[fx.Node]) -> Sum | NotStrided:
    """`node` as a sum of terms. `consumers` are the nodes that may read `node` itself (the collective)."""
    total = Sum(node)
    _add_cone(node, total.cone)
    failure = _collect((), 1.0, prover, total)
    if failure is not None:
        return failure
    escaping = _escaping(total, consumers)
    # What addmm adds stands among the terms on its own. If its whole result is needed elsewhere too, the parts cannot be told
    # apart any more, and no term may be taken over.
    whole = any(t.matmul is not None and t.matmul.plus is not None and t.root in escaping for t in total.terms)
    total.terms = [_owned(term, escaping, whole) for term in total.terms]
    return total


# A path is the choice made at every linear op on the way up: (the op, the operand that was followed).
Path = tuple[tuple[fx.Node, fx.Node], ...]


def _collect(path: Path, scale: float, prover: Prover, total: Sum) -> NotStrided | None:
    """Append the terms below the end of `path`; their views are those of `total.node`."""
    view = _view_along(total.node, path, prover)
    if isinstance(view, NotStrided):
        return view
    parts = _linear_parts(view.root)
    if parts is None or len(total.terms) >= _MAX_TERMS:
        found = as_matmul(view.root)
        matmul = found if isinstance(found, Matmul) else None
        refusal = found if isinstance(found, Keep) else None
        alpha = matmul.alpha if matmul is not None else 1.0
        total.terms.append(Term(view.root, view, scale * alpha, matmul, refusal))
        if matmul is None or matmul.plus is None:
            return None
        parts = [(matmul.plus, matmul.beta)]
    for operand, factor in parts:
        _add_cone(operand, total.cone)
        failure = _collect((*path, (view.root, operand)), scale * factor, prover, total)
        if failure is not None:
            return failure
    return None


def _view_along(node: fx.Node, path: Path, prover: Prover) -> View | NotStrided:
    """`node` as a view of the tensor at the end of `path`: movement proved from the innermost operand outwards."""
    known: dict[fx.Node, View] = {}
    for op, operand in reversed(path):
        inner = prover.view(operand, known)
        if isinstance(inner, NotStrided):
            if known:
                return inner
            inner = identity(operand)
        known = {op: _broadcast(inner, op)}
    return prover.view(node, known)


def _linear_parts(node: fx.Node) -> list[tuple[fx.Node, float]] | None:
    """`node` as sum of factor * operand over tensors, None if it is no linear combination."""
    args: tuple[Any, ...] = node.args
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        if not (isinstance(args[0], fx.Node) and isinstance(args[1], fx.Node)):
            return None
        if not all(isinstance(a.meta.get("val"), torch.Tensor) for a in args[:2]):
            return None
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            return None
        return [(args[0], 1.0), (args[1], float(alpha) * (1.0 if node.target is aten.add.Tensor else -1.0))]
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(args[1], (int, float)):
        return [(args[0], float(args[1]))]
    if node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(args[1], (int, float)) and args[1]:
        return [(args[0], 1.0 / float(args[1]))]
    if node.target is aten.neg.default:
        return [(args[0], -1.0)]
    return None


def _broadcast(view: View, like: fx.Node) -> View:
    """`view` expanded to the shape of `like`, as add does."""
    shape = like.meta["val"].shape
    dims: list[Digits] = [make_digits((size, 0)) for size in shape[: len(shape) - len(view.dims)]]
    for size, old, digits in zip(shape[len(dims) :], view.shape, view.dims, strict=True):
        dims.append(digits if known_eq(size, old) else make_digits((size, 0)))
    result = replace(view, dims=tuple(dims))
    dtype = like.meta["val"].dtype
    before = view.casts[-1] if view.casts else view.root.meta["val"].dtype
    return result if before == dtype else replace(result, casts=(*view.casts, dtype))


def _add_cone(node: fx.Node, cone: set[fx.Node]) -> None:
    """Add `node` and what it is moved from, up to and with the first ops that are no movement."""
    stack = [node]
    while stack:
        top = stack.pop()
        if top not in cone:
            cone.add(top)
            if is_movement(top):
                stack.extend(
                    n for n in top.all_input_nodes if isinstance(n.meta.get("val"), (torch.Tensor, tuple, list))
                )


def _escaping(total: Sum, consumers: set[fx.Node]) -> set[fx.Node]:
    """Nodes of the cone that something outside it reads, and everything in the cone that they are computed from."""
    stack = [
        n for n in total.cone if any(u not in total.cone and not (n is total.node and u in consumers) for u in n.users)
    ]
    escaping: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in escaping:
            escaping.add(node)
            stack.extend(source for source in node.all_input_nodes if source in total.cone)
    return escaping


def _owned(term: Term, escaping: set[fx.Node], none_is: bool) -> Term:
    if term.matmul is None or not (none_is or term.root in escaping):
        return term
    reason = "the matmul's result is also read by another op before it is reduced"
    return replace(term, matmul=None, refusal=Keep("result-read-elsewhere", reason))


@dataclass(frozen=True)
class Reduction:
    """A sum whose matmul terms share one view: order of the reduced tensor in digits of the matmuls' result `[M, N]`."""

    matmuls: tuple[Term, ...]
    addends: tuple[Term, ...]
    digits: Digits

    @property
    def result(self) -> torch.Tensor:
        value: torch.Tensor = self.matmuls[0].root.meta["val"]
        return value


def common_reduction(total: Sum) -> Reduction | Keep:
    """The fusable form of a sum, or why there is none."""
    matmuls = tuple(t for t in total.terms if t.matmul is not None)
    addends = tuple(t for t in total.terms if t.matmul is None)
    if not matmuls:
        return next(t.refusal for t in total.terms if t.refusal is not None)
    digits = matmuls[0].view.digits
    order = natural_order(digits)
    if order is None or not known_eq(matmuls[0].view.offset, 0):
        return Keep("not-a-strided-view", "only a part of the matmul's result is reduced, or a part of it twice")
    for term in total.terms:
        if effective_cast(term.view) is None:
            return Keep("lossy-casts", "a term of the sum is cast more than once before it is reduced")
    for term in matmuls[1:]:
        same_shape = all(
            known_eq(a, b)
            for a, b in zip(term.root.meta["val"].shape[-2:], matmuls[0].root.meta["val"].shape[-2:], strict=True)
        )
        if not same_shape or not same_digits(merge(term.view.digits), merge(digits)):
            return Keep("terms-differ", "the summed matmuls are laid out differently (one is transposed, say)")
    for term in addends:
        if addend_digits(term, digits) is None:
            return Keep("addend-layout", "a tensor is added to the matmul in another layout than the matmul's")
    return Reduction(matmuls, addends, digits)


def addend_digits(term: Term, digits: Digits) -> tuple[Digits, Digits] | None:
    """An addend on the matmul's result: the result's digits by falling stride, and for each the addend's digit there.

    A digit over which the addend is broadcast has stride 0. None if the addend lies in another order than the result.
    """
    parts = carve(term.view.digits, [d.size for d in digits])
    order = natural_order(digits)
    if parts is None or order is None or not known_eq(term.view.offset, 0):
        return None
    single = [merge(part) for part in parts]
    if any(len(part) != 1 for part in single):
        return None
    own = tuple(single[i][0] for i in order)
    there = [d for d in own if not known_eq(d.stride, 0)]
    return (tuple(digits[i] for i in order), own) if natural_order(there) == list(range(len(there))) else None


def addend_matrix(builder: Builder, term: Term, reduction: Reduction) -> fx.Node:
    """The addend as a node `[M, N]` in the layout of the matmul's result, expanded where it is broadcast."""
    sources = [reduction.matmuls[0].root, term.root]
    found = addend_digits(term, reduction.digits)
    assert found is not None, "common_reduction accepted the addend"
    full, own = found
    node = term.root
    if any(known_eq(d.stride, 0) for d in own):
        node = builder.reshape(node, [1 if known_eq(d.stride, 0) else d.size for d in own], sources)
        node = builder.call(aten.expand.default, node, builder.shape([d.size for d in full], sources))
    return builder.reshape(node, reduction.result.shape[-2:], sources)
