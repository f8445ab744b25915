"""matmul_reduce_scatter: a sum of matmuls whose rows or columns are scattered over the ranks as they are reduced.

    c1 * mm(x1, w1) + c2 * mm(x2, w2) + ... (+ bias, + other tensors)
        ─▶ (view, split + cat, permute, cast)* ─▶ reduce_scatter(sum | avg) ─▶ wait

The sums of two or three matmuls are the input gradients of a gated MLP and of separate q, k, v projections. The op computes the rows
(or columns) of the next rank first and its own last, so that every partial travels while the next is computed.

Refuses: other reductions; a matmul result that something else reads too; owners that are spread over rows and columns at once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import Axis, Keep, Plan
from .collectives import Collective
from .describe import dtype_name
from .layout import Digit, Digits, carve, merge
from .linear import Reduction
from .pattern import Context, Match, register_pattern
from .reductions import (
    coefficients,
    in_order,
    merged_reduction,
    reducing_terms,
    reduction_problem,
    reduction_shapes,
    replace_collective,
    roots,
    term_arguments,
)
from .rewrite import erase_unused
from .sizes import Size, divides, hint, product, quotient

KIND = "matmul_reduce_scatter"
aten = torch.ops.aten


def reference(
    plan: Plan,
    group_name: str,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    addends: Sequence[Tensor],
    outer: int,
) -> list[Tensor]:
    """rows: [outer * R * inner, N] -> [outer * inner, N]; cols: [M, outer * R * inner] -> [M, outer * inner]."""
    ranks = ops.group_size(group_name)
    terms = ops.weighted_terms(plan, lhs, rhs, biases, addends)
    total = sum(terms[1:], start=terms[0])
    m, n = total.shape
    blocks = outer if plan.rank_axis == "rows" else m * outer
    by_rank = total.reshape(blocks, ranks, -1).transpose(0, 1).contiguous()
    own = ops.reduce_scatter(by_rank, plan.reduce_op, ranks, group_name)
    return [own.reshape(-1, n) if plan.rank_axis == "rows" else own.reshape(m, -1)]


def fake(
    plan: Plan,
    ranks: int,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    addends: Sequence[Tensor],
    outer: int,
) -> list[Tensor]:
    m, n = lhs[0].shape[0], rhs[0].shape[1]
    size = (m // ranks, n) if plan.rank_axis == "rows" else (m, n // ranks)
    return [lhs[0].new_empty(size, dtype=ops.dtype_of(plan.dtype))]


ops.define_op(
    KIND,
    "Tensor[] lhs, Tensor[] rhs, Tensor?[] biases, Tensor[] addends, SymInt outer",
    fake=fake,
    reference=reference,
)


@dataclass(frozen=True)
class Scatter:
    """Where the owner of an element stands in the matmul's result [M, N]: axis = (outer, R, inner)."""

    axis: Axis
    outer: Size
    rank: Digit
    rest: Digits  # digits of the scattered tensor, in the program's order


def scatter_of(reduction: Reduction, ranks: int, numel: Size) -> Scatter | Keep:
    dims = carve(reduction.digits, [ranks, quotient(numel, ranks)]) if divides(ranks, numel) else None
    owner = merge(dims[0]) if dims is not None else ()
    if dims is None or len(owner) != 1:
        return Keep("owner-not-one-digit", "the ranks own no evenly spaced rows or columns of the matmul's result")
    rank, rest = owner[0], dims[1]
    m, n = reduction.result.shape[-2:]
    if divides(n, rank.stride):
        inner = quotient(rank.stride, n)
        if divides(product([ranks, inner]), m):
            return Scatter("rows", quotient(m, product([ranks, inner])), rank, rest)
    span = product([ranks, rank.stride])
    if divides(span, n):
        return Scatter("cols", quotient(n, span), rank, rest)
    return Keep("owner-not-one-digit", "a rank's part of the matmul's result is neither whole rows nor whole columns")


@register_pattern(KIND, anchor="reduce_scatter")
def find(context: Context, scatter: Collective) -> Match | Keep | None:
    total = reducing_terms(context, scatter)
    if total is None or isinstance(total, Keep):
        return total
    merged = merged_reduction([total])
    if isinstance(merged, Keep):
        return merged
    reduction, term_group = merged
    value = scatter.input.meta["val"]
    where = scatter_of(reduction, scatter.group_size, product(value.shape))
    if isinstance(where, Keep):
        return where
    plan = Plan(
        kind=KIND,
        site="",
        executor="",
        dtype=dtype_name(value.dtype),
        rank_axis=where.axis,
        coefficients=coefficients(reduction),
        term_group=term_group,
        reduce_op="avg" if scatter.reduce_op == "avg" else "sum",
    )
    return Match(
        KIND,
        (scatter,),
        replace(reduction_problem(KIND, scatter, reduction), pieces=hint(where.outer)),
        plan,
        reduction_shapes("scatter", scatter, reduction),
        lambda ctx, final: _rewrite(ctx, scatter, reduction, where, final),
    )


def _rewrite(context: Context, scatter: Collective, reduction: Reduction, where: Scatter, plan: Plan) -> fx.Node:
    builder = context.builder
    sources = [scatter.input, *roots(reduction.matmuls)]
    with builder.before(scatter.node):
        arguments = term_arguments(builder, reduction)
        outer = builder.size(where.outer, sources)
        node = builder.call(
            ops.op(KIND), *arguments, outer, context.token, plan.dumps(), scatter.group, like=scatter.node
        )
        out = builder.call(operator.getitem, node, 0, like=scatter.node)
        new = in_order(builder, out, where.rest, scatter.node.meta["val"].shape, sources, where.rank)
    replace_collective(scatter, new)
    erase_unused(context.graph, [scatter.result, scatter.node])
    return node
