"""all_to_all_matmul: matmuls that read what was exchanged, with the source rank inside the contracted dim.

    o          ─▶ (view, permute)* ─▶ all_to_all  ─▶ (view, permute)*       ─▶ mm(·, w_o)    (after the attention of Ulysses)
    dq, dk, dv ─▶ (view, permute)* ─▶ all_to_alls ─▶ (view, permute)* ─▶ cat ─▶ mm(·, w_qkv)  (its gradients)

becomes one op: what a rank sends another is a panel of columns of the left operand, or several, and panels are multiplied as they
arrive, the own ones first. What else reads the exchanged tensor (a weight gradient, the backward of a forward graph) gets it from the
op's last output. Several exchanges that a cat joins are one op; the reference issues them in the order of the cat. Exchanges with a
matmul each are an op each.

Leaves to all_to_all_permute: exchanges whose result is the right operand, or whose ranks lie in its rows; casts before the matmul;
an operand of which some columns were not exchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import FusionProblem, GatherUse, Keep, Panels, Plan
from ..templates.all_to_all_gemm import Received, as_panels, panel_shapes, panels_of
from .all_to_all_permute import Site, find_site, site_of, value_of
from .collectives import Collective
from .cuts import Placement
from .describe import dtype_name, shape_text
from .exchanges import Reading, Source
from .gathers import movement_users
from .layout import Prover, View, identity, natural_order
from .matmuls import Matmul, as_matmul, operand_sides, replace_matmul
from .pattern import Context, Match, register_pattern
from .reductions import replace_collective
from .rewrite import Builder, erase_unused
from .sizes import Size, hint, known_eq, product

KIND = "all_to_all_matmul"
aten = torch.ops.aten


def reference(
    plan: Plan, group_name: str, inputs: Sequence[Tensor], others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """inputs [R, f1, ..., fk] of each exchange -> one [M, N] per matmul, then what was received, [M, K], if the plan returns it.

    They are exchanged as the program does, in its order: other ranks may run other ops in place of the same collectives.
    """
    received = Received(as_panels(plan, inputs))
    for number in sorted(range(len(inputs)), key=lambda n: plan.panels[n].issued if plan.panels else n):
        blocks = ops.all_to_all(inputs[number], group_name)
        for source, block in enumerate(panels_of(blocks, plan.panels[number]) if plan.panels else blocks):
            received.put(number, source, block)
    outputs = [ops.matmul(received.tensor, other, bias) for other, bias in zip(others, biases, strict=True)]
    return [*outputs, received.tensor] if plan.return_gathered else outputs


def fake(
    plan: Plan, ranks: int, inputs: Sequence[Tensor], others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    rows = panel_shapes(plan, inputs)[0][1]
    outputs = [other.new_empty((rows, other.shape[1])) for other in others]
    return [*outputs, inputs[0].new_empty((rows, others[0].shape[0]))] if plan.return_gathered else outputs


ops.define_op(KIND, "Tensor[] inputs, Tensor[] others, Tensor?[] biases", fake=fake, reference=reference)


@dataclass(frozen=True)
class Operand:
    """A left operand that exchanges deliver.

    panels: of each exchange, in the order of the columns; numbers: of those exchanges in the site.
    joined: the cat that puts it together, None if it is one exchange's.
    others: what else than by the matmuls is read of what was received: of one exchange its readings, else the cat.
    """

    site: Site
    panels: tuple[Panels, ...]
    numbers: tuple[int, ...]
    joined: fx.Node | None
    matmuls: tuple[Matmul, ...]
    others: tuple[fx.Node, ...]

    @property
    def returned(self) -> bool:
        return bool(self.others)

    @property
    def sources(self) -> list[Source]:
        return [self.site.sources[number] for number in self.numbers]

    def sizes(self) -> list[tuple[Size, Size, Size]]:
        """(M, O, Q) of each exchange."""
        found = []
        for number, panels in zip(self.numbers, self.panels, strict=True):
            grid = self.site.exchanges[number].cuts.sizes
            rows, outer, inner = (product(grid[f] for f in dims) for dims in (panels.rows, panels.outer, panels.inner))
            found.append((rows, outer, inner))
        return found


@register_pattern(KIND, anchor="all_to_all", priority=-1)
def find(context: Context, anchor: Collective) -> Match | Keep | None:
    together = find_site(context, anchor)
    if not isinstance(together, Site):
        return None  # all_to_all_permute says why
    found = _operand(context, together)
    if not isinstance(found, Operand) and len(together.exchanges) > 1:
        alone = site_of(context, [anchor])
        other = _operand(context, alone) if isinstance(alone, Site) else None
        found = other if isinstance(other, Operand) else found or other
    return _match(found) if isinstance(found, Operand) else found


def _operand(context: Context, site: Site) -> Operand | Keep | None:
    joined = site.readings.joined
    if not joined:
        return _single(context, site) if len(site.exchanges) == 1 else None
    if len(joined) > 1 or site.readings.values or len({p.exchange for p in joined[0].parts}) < len(joined[0].parts):
        return None
    (whole,) = joined
    numbers = tuple(site.number(part) for part in whole.parts)
    members = {whole.node: None, **movement_users(whole.node)}
    width = product(whole.node.meta["val"].shape[whole.outer :])
    prover = Prover({whole.node: identity(whole.node)})
    readers = [node for node in members if _is_whole(prover, node, whole.node, width)]
    matmuls = _matmuls(context, site, readers)
    if isinstance(matmuls, Keep) or not matmuls:
        return matmuls if isinstance(matmuls, Keep) else None
    panels = []
    for part in whole.parts:
        dims = part.placement.dims
        found = _panels(dims[: whole.outer], dims[whole.outer :], part.placement)
        if found is None:
            return None
        panels.append(found)
    others = _others([whole.node], members, matmuls)
    return Operand(site, tuple(panels), numbers, whole.node, tuple(matmuls), others)


def _is_whole(prover: Prover, node: fx.Node, whole: fx.Node, width: Size) -> bool:
    """True if `node` is `whole` as a matrix of `width` columns."""
    view = prover.view(node)
    if not isinstance(view, View) or view.casts or view.root is not whole or not known_eq(view.offset, 0):
        return False
    shape = node.meta["val"].shape
    in_order = natural_order(view.digits) == list(range(len(view.digits)))
    return in_order and known_eq(shape[-1], width) and (len(shape) == 2 or (len(shape) == 3 and known_eq(shape[0], 1)))


def _single(context: Context, site: Site) -> Operand | Keep | None:
    """The operand that most of its readers read is the first that a matmul does: the others are made of what was received."""
    found: Panels | None = None
    matmuls: list[Matmul] = []
    refusal: Keep | None = None
    for reading in site.readings.values:
        panels = _panels_of(reading)
        if panels is None or (found is not None and panels.order != found.order):
            continue
        made = _matmuls(context, site, [reading.node])
        if isinstance(made, Keep):
            refusal = refusal or made
        elif made:
            found = panels
            matmuls += made
    if found is None:
        return refusal
    (collective,), (exchange,) = site.collectives, site.exchanges
    members = dict.fromkeys([collective.node, *exchange.chain])
    others = _others([reading.node for reading in site.readings.values], members, matmuls, collective)
    return Operand(site, (found,), (0,), None, tuple(matmuls), others)


def _others(
    readings: Sequence[fx.Node],
    members: Mapping[fx.Node, None],
    matmuls: Sequence[Matmul],
    raw: Collective | None = None,
) -> tuple[fx.Node, ...]:
    """Those of `readings`, among the movement ops `members`, that something else than the matmuls needs."""
    taken = {matmul.node for matmul in matmuls}
    stack = [node for node in members if any(user not in members and user not in taken for user in node.users)]
    seen = dict.fromkeys(stack)
    while stack:
        node = stack.pop()
        if node in readings:
            continue
        for source in node.all_input_nodes:
            if source in members and source not in seen:
                seen[source] = None
                stack.append(source)
    if raw is not None and raw.node in seen:  # read before it is waited for, it stands for the result
        seen[raw.result] = None
    return tuple(node for node in readings if node in seen)


def _panels_of(reading: Reading) -> Panels | None:
    dims = reading.placement.dims
    return None if len(dims) < 2 or any(dims[:-2]) else _panels(dims[-2:-1], dims[-1:], reading.placement)


def _panels(
    rows: Sequence[tuple[object, ...]], columns: Sequence[tuple[object, ...]], placement: Placement
) -> Panels | None:
    """None if the rank lies in the rows, or the reader has only a part of what was received, or a part twice."""
    row_dims, column_dims = (tuple(f for dim in dims for f in dim if isinstance(f, int)) for dims in (rows, columns))
    if placement.fixed or placement.repeats or 0 not in column_dims:
        return None
    at = column_dims.index(0)
    return Panels(row_dims, column_dims[:at], column_dims[at + 1 :])


def _matmuls(context: Context, site: Site, operands: Sequence[fx.Node]) -> list[Matmul] | Keep:
    """The matmuls whose left operand is one of these nodes; Keep if there are only such that no kernel takes."""
    after = {node for collective in site.collectives for node in context.after(collective.node)}
    found: list[Matmul] = []
    refusal: Keep | None = None
    for operand in operands:
        for user in operand.users:
            matmul = as_matmul(user)
            if matmul is None:
                continue
            if isinstance(matmul, Keep):
                refusal = refusal or matmul
            elif operand_sides(matmul, operand) != ["lhs"]:
                continue
            elif (matmul.alpha, matmul.beta) != (1.0, 1.0):
                refusal = Keep("scaled-addmm", "addmm with alpha or beta other than 1 reads what was exchanged")
            elif matmul.rhs in after or (matmul.bias is not None and matmul.bias in after):
                reason = "the matmul's other operand is computed from what was exchanged"
                refusal = Keep("other-operand-depends", reason)
            else:
                found.append(matmul)
    return refusal if refusal is not None and not found else found


def _match(operand: Operand) -> Match:
    site = operand.site
    first = site.collectives[0]
    dtype = dtype_name(site.exchanges[0].dtype)
    sizes = operand.sizes()
    use = GatherUse("lhs", False, "cols", dtype)
    panels = tuple(replace(p, issued=number) for p, number in zip(operand.panels, operand.numbers, strict=True))
    plan = Plan(
        KIND, "", "", dtype, uses=(use,) * len(operand.matmuls), return_gathered=operand.returned, panels=panels
    )
    copied = 0
    for source, sent in zip(operand.sources, operand.panels, strict=True):
        if not source.lies_together(sent.sent):
            copied += hint(product(source.view.shape)) * site.exchanges[0].dtype.itemsize
    problem = FusionProblem(
        kind=KIND,
        group_size=first.group_size,
        intra_host=first.intra_host,
        device=first.input.meta["val"].device.type,
        dtype=dtype,
        comm_bytes=site.bytes,
        gemms=tuple(matmul.gemm for matmul in operand.matmuls),
        gemm_dtypes=(dtype,) * len(operand.matmuls),
        return_gathered=operand.returned,
        pieces=sum(hint(rows) * hint(outer) for rows, outer, _ in sizes),
        exchanges=len(site.exchanges),
        panels_of=tuple((hint(outer), hint(inner)) for _, outer, inner in sizes),
        copied_bytes=copied,
    )
    shapes = (*site.shapes, *(f"mm {shape_text(m.lhs)} @ {shape_text(m.rhs)}" for m in operand.matmuls))
    rewrite = lambda ctx, final: _rewrite(ctx, operand, final)  # noqa: E731
    return Match(KIND, site.collectives, problem, plan, shapes, rewrite, gives_way=True)


def _rewrite(context: Context, operand: Operand, plan: Plan) -> fx.Node:
    builder, site = context.builder, operand.site
    first = site.collectives[0]
    # Everything is built before anything is replaced: a size that no graph value spells must leave the program as it was.
    with builder.before(first.node):
        grids = [source.build(builder) for source in operand.sources]
        others = [builder.matrix(m.rhs, m.batched) for m in operand.matmuls]
        biases = [m.bias for m in operand.matmuls]
        tail = (context.token, plan.dumps(), first.group)
        node = builder.call(ops.op(KIND), grids, others, biases, *tail, like=first.node)
        count = len(operand.matmuls) + operand.returned
        outs = [builder.call(operator.getitem, node, i, like=first.node) for i in range(count)]
        new = _received(builder, operand, outs[-1], grids) if operand.returned else []
        for matmul, out in zip(operand.matmuls, outs, strict=False):
            replace_matmul(builder, matmul, out, plan.site)
    results = {c.result: c for c in site.collectives}
    for old, value in new:
        if old in results:
            replace_collective(results[old], value)
        else:
            old.replace_all_uses_with(value)
    erase_unused(context.graph, [*(m.node for m in operand.matmuls), *site.nodes()])
    return node


def _received(
    builder: Builder, operand: Operand, out: fx.Node, grids: Sequence[fx.Node]
) -> list[tuple[fx.Node, fx.Node]]:
    """What else is read, with what takes its place, made of the op's last output."""
    if operand.joined is not None:
        return [(operand.joined, builder.reshape(out, operand.joined.meta["val"].shape, grids))]
    (panels,), (grid,), site = operand.panels, grids, operand.site
    whole = builder.reshape(out, [grid.meta["val"].shape[f] for f in panels.order], [grid])
    return [
        (reading.node, value_of(builder, whole, panels.order, reading))
        for reading in site.readings.values
        if reading.node in operand.others
    ]
