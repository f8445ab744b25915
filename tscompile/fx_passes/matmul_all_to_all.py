"""matmul_all_to_all: projections whose results are exchanged, as the queries, keys and values of Ulysses sequence parallelism.

    x ─▶ mm ─▶ split ─▶ q ─▶ (view, permute, clone)* ─▶ all_to_all ─▶ wait ─▶ (view, permute, clone)* ─▶ attention
                      ├▶ k ─▶ ...
                      └▶ v ─▶ ...

becomes one op: the queries travel while keys and values are projected. One matmul makes what all of the exchanges send, or each has
its own. What is sent is read where the matmul has put it, and comes out as its readers want it, as in all_to_all_permute.

Leaves to all_to_all_permute: a projection that something else reads too, and exchanges with something in between that computes, a
rotary embedding or a norm.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from ..lowering import ops
from ..problem import Departure, Keep, Plan
from ..templates.all_to_all import output_shapes
from ..templates.attention import sent_shapes
from ..templates.gemm_all_to_all import views_sent
from .all_to_all_permute import Site, exchange_problem, find_site
from .all_to_all_permute import reference as exchanged
from .attention import is_attention
from .collectives import Collective
from .describe import dtype_name, shape_text
from .exchanges import Source, find_columns, find_producer, moves_bits
from .matmuls import Matmul, as_matmul
from .pattern import Context, Match, register_pattern
from .rewrite import erase_unused
from .sizes import Size, hint

KIND = "matmul_all_to_all"
_NEAR = 64  # ops among which a matmul is looked for, to say what stands between it and an exchange


def reference(
    plan: Plan,
    group_name: str,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
) -> list[Tensor]:
    """Results `[M, N]` of the matmuls; what the plan's departures take of them is exchanged -> the plan's outputs."""
    results = [ops.matmul(a, b, c).contiguous() for a, b, c in zip(lhs, rhs, biases, strict=True)]
    return exchanged(plan, group_name, views_sent(plan.departures, sizes, results))


def fake(
    plan: Plan,
    ranks: int,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
) -> list[Tensor]:
    shapes = output_shapes(plan.deliveries, plan.joins, sent_shapes(plan.departures, sizes))
    return [lhs[0].new_empty(shape) for shape in shapes]


ops.define_op(KIND, "Tensor[] lhs, Tensor[] rhs, Tensor?[] biases, SymInt[] sizes", fake=fake, reference=reference)


@dataclass(frozen=True)
class _Projections:
    """Exchanges, the matmuls that make what they send, and what each exchange takes of which; `grids` are the sizes for that."""

    site: Site
    matmuls: tuple[Matmul, ...]
    departures: tuple[Departure, ...]
    grids: tuple[Sequence[Size], ...]


@register_pattern(KIND, anchor="all_to_all", priority=-1)
def find(context: Context, anchor: Collective) -> Match | Keep | None:
    site = find_site(context, anchor)
    if not isinstance(site, Site):
        return None  # all_to_all_permute says why
    found = _projections(context, site)
    return _match(found) if isinstance(found, _Projections) else found


def _projections(context: Context, site: Site) -> _Projections | Keep | None:
    roots = [find_producer(exchange, context.prover) for exchange in site.exchanges]
    matmuls: dict[fx.Node, Matmul] = {}
    for root in roots:
        found = as_matmul(root)
        if found is None:
            return _between(root)
        if isinstance(found, Keep):
            return found
        if found.plus is not None or found.alpha != 1:
            return Keep("computed-between", "something is added to the matmul's result before it is exchanged")
        matmuls[root] = found
    sent = {collective.node for collective in site.collectives}
    if not all(_only_sent(root, sent) for root in matmuls):
        return Keep("result-read-elsewhere", "the matmul's result is also read by another op than its exchange")
    departures, grids = [], []
    numbers = {root: number for number, root in enumerate(matmuls)}
    for exchange, root in zip(site.exchanges, roots, strict=True):
        columns = find_columns(exchange, context.prover)
        departure = None if columns is None else _departure(*columns, numbers[root])
        if columns is None or departure is None:
            reason = "the ranks' blocks are no rows or columns of the matmul's result, as far as symbolic sizes show"
            return Keep("not-a-strided-view", reason)
        departures.append(departure)
        grids.append(columns[0].grid.sizes)
    return _Projections(site, tuple(matmuls.values()), tuple(departures), tuple(grids))


def _between(root: fx.Node) -> Keep | None:
    """What stands between a matmul and the exchange that sends `root`; None if there is no matmul near."""
    stack, seen = [root], {root}
    while stack and len(seen) < _NEAR:
        node = stack.pop(0)
        if as_matmul(node) is not None:
            reason = f"{root.target} stands between the matmul and the exchange: nothing can be sent before it has run"
            return Keep("computed-between", reason)
        if node.op != "call_function" or is_attention(node) or "c10d" in str(node.target):
            continue
        stack += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return None


def _only_sent(matmul: fx.Node, exchanges: set[fx.Node]) -> bool:
    """True if all readers of the matmul's result are these exchanges, through movement alone."""
    stack, seen = [matmul], {matmul}
    while stack:
        for user in stack.pop().users:
            if user in exchanges or user in seen:
                continue
            if not moves_bits(user):
                return False
            seen.add(user)
            stack.append(user)
    return True


def _departure(source: Source, columns: tuple[int, int], matmul: int) -> Departure | None:
    place = source.placement
    if any(len(dim) != 1 for dim in place.dims):
        return None
    fixed = dict(place.fixed)
    left = [factor for factor in range(len(source.grid.sizes)) if factor not in fixed]
    order = tuple(left.index(factor) for factor in place.factors)
    return Departure(matmul, len(source.grid.sizes), place.fixed, order, columns=columns)


def _match(found: _Projections) -> Match:
    site = found.site
    dtype = dtype_name(site.exchanges[0].dtype)
    deliveries, joins = site.deliveries()
    plan = Plan(KIND, "", "", dtype, deliveries=deliveries, joins=joins, departures=found.departures)
    problem = replace(
        exchange_problem(KIND, (site,)),
        gemms=tuple(matmul.gemm for matmul in found.matmuls),
        gemm_dtypes=tuple(dtype_name(matmul.dtype) for matmul in found.matmuls),
        grids=tuple(tuple(map(hint, grid)) for grid in found.grids),
    )
    shapes = (*(f"mm {shape_text(m.lhs)} @ {shape_text(m.rhs)}" for m in found.matmuls), *site.shapes)
    return Match(
        KIND, site.collectives, problem, plan, shapes, lambda ctx, final: _rewrite(ctx, found, final), gives_way=True
    )


def _rewrite(context: Context, found: _Projections, plan: Plan) -> fx.Node:
    builder, site = context.builder, found.site
    first = site.collectives[0]
    with builder.before(first.node):
        lhs = [builder.matrix(matmul.lhs, matmul.batched) for matmul in found.matmuls]
        rhs = [builder.matrix(matmul.rhs, matmul.batched) for matmul in found.matmuls]
        biases = [matmul.bias for matmul in found.matmuls]
        sizes = [builder.size(size, [*lhs, *rhs]) for grid in found.grids for size in grid]
        tail = (context.token, plan.dumps(), first.group)
        node = builder.call(ops.op(KIND), lhs, rhs, biases, sizes, *tail, like=found.matmuls[0].node)
        outs = [builder.call(operator.getitem, node, i, like=first.node) for i in range(len(plan.joins))]
        new = site.values(builder, outs, [*lhs, *rhs])
    site.replace(new)
    erase_unused(context.graph, site.nodes())
    return node
