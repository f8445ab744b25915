"""matmul_all_gather: a matmul whose result is gathered, along any dim (a column-parallel layer with gathered output).

    mm(x, w) ─▶ (view, cast)* ─▶ all_gather ─▶ wait ─▶ (split + cat)*

The op computes its result in row blocks and sends each while the next is computed. The gathered tensor comes out in the order in which
the program reads it, so the split and cat of a gather along the last dim are gone.

Refuses: sums; a matmul result that something else reads too; a permuted result.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import Axis, FusionProblem, Keep, Plan
from .collectives import Collective
from .describe import dtype_name, shape_text
from .gathers import Home, LiveOuts, full_view, movement_users, replace_size_readers
from .layout import Digit, NotStrided, View, identity, natural_order
from .linear import linear_terms
from .matmuls import TAKEN, Matmul
from .pattern import Context, Match, register_pattern
from .rewrite import erase_unused
from .sizes import Size, divides, hint, known_eq, product, quotient

KIND = "matmul_all_gather"
aten = torch.ops.aten


def reference(plan: Plan, group_name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, outer: int) -> list[Tensor]:
    """[M, N] -> rows: [outer * R * inner, N] for M = outer * inner; cols: [M, outer * R * inner] for N = outer * inner."""
    ranks = ops.group_size(group_name)
    local = ops.matmul(lhs, rhs, bias).to(ops.dtype_of(plan.dtype))
    m, n = local.shape
    blocks = outer if plan.rank_axis == "rows" else m * outer
    raw = ops.all_gather(local.reshape(blocks, -1), ranks, group_name)
    gathered = raw.view(ranks, blocks, -1).transpose(0, 1)
    return [gathered.reshape(-1, n) if plan.rank_axis == "rows" else gathered.reshape(m, -1)]


def fake(plan: Plan, ranks: int, lhs: Tensor, rhs: Tensor, bias: Tensor | None, outer: int) -> list[Tensor]:
    m, n = lhs.shape[0], rhs.shape[1]
    size = (m * ranks, n) if plan.rank_axis == "rows" else (m, n * ranks)
    return [lhs.new_empty(size, dtype=ops.dtype_of(plan.dtype))]


ops.define_op(KIND, "Tensor lhs, Tensor rhs, Tensor? bias, SymInt outer", fake=fake, reference=reference)


@dataclass(frozen=True)
class Placement:
    """How the op lays the gathered tensor out: the rank dimension inside the rows or the columns of the result."""

    home: Home
    axis: Axis
    outer: Size


@register_pattern(KIND, anchor="all_gather", priority=1)
def find(context: Context, gather: Collective) -> Match | Keep | None:
    total = linear_terms(gather.input, context.prover, {gather.node})
    if isinstance(total, NotStrided) or not total.touches_matmul:
        return None
    if len(total.terms) != 1 or total.terms[0].coefficient != 1:
        return Keep("sum-before-gather", "a sum is gathered; only the result of one matmul can be fused with a gather")
    term = total.terms[0]
    if term.matmul is None:
        return term.refusal
    matmul = term.matmul
    order = natural_order(term.view.digits)
    if order != list(range(len(term.view.digits))) or not known_eq(term.view.offset, 0):
        return Keep("not-a-strided-view", "the matmul's result is permuted or cut before it is gathered")
    placement = _placement(context, gather, matmul)
    value = gather.node.meta["val"]
    plan = Plan(kind=KIND, site="", executor="", dtype=dtype_name(value.dtype), rank_axis=placement.axis)
    problem = FusionProblem(
        kind=KIND,
        group_size=gather.group_size,
        intra_host=gather.intra_host,
        device=value.device.type,
        dtype=dtype_name(value.dtype),
        comm_bytes=hint(product(value.shape)) * value.dtype.itemsize,
        gemms=(matmul.gemm,),
    )
    shapes = (f"mm {shape_text(matmul.lhs)} @ {shape_text(matmul.rhs)}", f"gather {shape_text(gather.input)}")
    return Match(
        KIND, (gather,), problem, plan, shapes, lambda ctx, final: _rewrite(ctx, gather, matmul, placement, final)
    )


def _placement(context: Context, gather: Collective, matmul: Matmul) -> Placement:
    """The order in which the program reads the gathered tensor, if the op can write it, else the collective's own."""
    ranks, numel = gather.group_size, product(gather.input.meta["val"].shape)
    m, n = matmul.node.meta["val"].shape[-2:]
    for node in movement_users(gather.node):
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        view = context.prover.view(node)
        dims = full_view(view, ranks, numel) if isinstance(view, View) else None
        if dims is None or isinstance(dims, NotStrided):
            continue
        home = Home(tuple(d for dim in dims[0] for d in dim), dims[1])
        if home.keeps_shard_order and not known_eq(home.outer, 1):
            placed = _place(home, m, n)
            if placed is not None:
                return placed
    raw = full_view(identity(gather.node), ranks, numel)
    assert not isinstance(raw, NotStrided), "a gather's own result holds every element once"
    home = Home(tuple(d for dim in raw[0] for d in dim), Digit(ranks, numel))
    return Placement(home, "rows", 1)


def _place(home: Home, m: Size, n: Size) -> Placement | None:
    inner = home.inner
    if divides(n, inner) and divides(quotient(inner, n), m):
        return Placement(home, "rows", home.outer)
    if divides(inner, n):
        return Placement(home, "cols", quotient(n, inner))
    return None


def _rewrite(context: Context, gather: Collective, matmul: Matmul, placement: Placement, plan: Plan) -> fx.Node:
    builder = context.builder
    chain = movement_users(gather.node)
    live = LiveOuts(gather, chain, [], context.prover, placement.home)

    replace_size_readers(builder, gather, chain)
    with builder.before(gather.node):
        outer = builder.size(placement.outer, [matmul.node, gather.input])
        lhs, rhs = (builder.matrix(operand, matmul.batched) for operand in (matmul.lhs, matmul.rhs))
        arguments = (lhs, rhs, matmul.bias, outer, context.token, plan.dumps(), gather.group)
        node = builder.call(ops.op(KIND), *arguments, like=gather.node)
        out = builder.call(operator.getitem, node, 0, like=gather.node)
        out.meta[TAKEN] = plan.site
        live.replace(live.rebuild(builder, out, gather.input))
    erase_unused(context.graph, [*reversed(chain), gather.result, gather.node])
    return node
