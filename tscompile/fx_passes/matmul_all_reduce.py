"""matmul_all_reduce: a sum of matmuls, reduced so that every rank has all of it.

    mm(x1, w1) + ... ─▶ (view, cast)* ─▶ all_reduce(sum | avg) ─▶ wait

Several all_reduces whose results are only added up are one: AR(a) + AR(b) = AR(a + b). Tensor parallelism without sequence
parallelism has three of them in each attention backward, one per projection.

Refuses: other reductions; a matmul result that something else reads too.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import Keep, Plan
from .collectives import Collective
from .describe import dtype_name
from .linear import Reduction, Sum
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

KIND = "matmul_all_reduce"
aten = torch.ops.aten


def reference(
    plan: Plan,
    group_name: str,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    addends: Sequence[Tensor],
) -> list[Tensor]:
    """[M, N] of each rank -> [M, N]; one all_reduce for each that the program had."""
    terms = ops.weighted_terms(plan, lhs, rhs, biases, addends)
    reduced: list[Tensor] = []
    for index in range(plan.collectives):
        mine = [t for t, owner in zip(terms, plan.term_group, strict=True) if owner == index]
        reduced.append(ops.all_reduce(sum(mine[1:], start=mine[0]), plan.reduce_op, group_name))
    total = sum(reduced[1:], start=reduced[0])
    return [total]


def fake(
    plan: Plan,
    ranks: int,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    addends: Sequence[Tensor],
) -> list[Tensor]:
    return [lhs[0].new_empty((lhs[0].shape[0], rhs[0].shape[1]), dtype=ops.dtype_of(plan.dtype))]


ops.define_op(KIND, "Tensor[] lhs, Tensor[] rhs, Tensor?[] biases, Tensor[] addends", fake=fake, reference=reference)


@register_pattern(KIND, anchor="all_reduce")
def find(context: Context, first: Collective) -> Match | Keep | None:
    members, top = added_up(context, first)
    sums: list[Sum] = []
    for member in members:
        total = reducing_terms(context, member)
        if isinstance(total, Sum):
            sums.append(total)
        elif member is first:
            return total
    if len(sums) < len(members):
        members, top, sums = [first], first.result, sums[:1]
    merged = merged_reduction(sums)
    if isinstance(merged, Keep) and len(members) > 1:
        members, top = [first], first.result
        merged = merged_reduction(sums[:1])
    if isinstance(merged, Keep):
        return merged
    reduction, term_group = merged
    plan = Plan(
        kind=KIND,
        site="",
        executor="",
        dtype=dtype_name(first.input.meta["val"].dtype),
        coefficients=coefficients(reduction),
        collectives=len(members),
        term_group=term_group,
        reduce_op="avg" if first.reduce_op == "avg" else "sum",
    )
    return Match(
        KIND,
        tuple(members),
        reduction_problem(KIND, first, reduction),
        plan,
        reduction_shapes("all_reduce", first, reduction),
        lambda ctx, final: _rewrite(ctx, members, top, reduction, final),
    )


def added_up(context: Context, first: Collective) -> tuple[list[Collective], fx.Node]:
    """The all_reduces whose results are only added to that of `first`, and the node that holds their sum."""
    by_result = {c.result: c for c in context.collectives.values() if c.kind == "all_reduce" and c.refusal is None}
    members, top = [first], first.result
    while len(top.users) == 1:
        add = next(iter(top.users))
        if add.target is not aten.add.Tensor or add.kwargs.get("alpha", 1) != 1:
            break
        others = [a for a in add.args if a is not top]
        other = by_result.get(others[0]) if len(others) == 1 and isinstance(others[0], fx.Node) else None
        if other is None or len(other.result.users) != 1 or not _alike(first, other):
            break
        members.append(other)
        top = add
    return members, top


def _alike(a: Collective, b: Collective) -> bool:
    x, y = a.input.meta["val"], b.input.meta["val"]
    same_call = (a.group, a.reduce_op) == (b.group, b.reduce_op)
    return same_call and x.dtype == y.dtype and tuple(x.shape) == tuple(y.shape)


def _rewrite(
    context: Context, members: Sequence[Collective], top: fx.Node, reduction: Reduction, plan: Plan
) -> fx.Node:
    builder, first = context.builder, members[0]
    value = first.input.meta["val"]
    sources = [*roots(reduction.matmuls), first.input]
    with builder.before(first.node):
        arguments = term_arguments(builder, reduction)
        node = builder.call(ops.op(KIND), *arguments, context.token, plan.dumps(), first.group, like=first.node)
        out = builder.call(operator.getitem, node, 0, like=first.node)
        new = in_order(builder, out, reduction.digits, value.shape, sources)
    if len(members) == 1:
        replace_collective(first, new)
        erase_unused(context.graph, [first.result, first.node])
    else:
        top.replace_all_uses_with(new)
        erase_unused(context.graph, [top])
    return node
