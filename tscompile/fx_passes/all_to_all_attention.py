"""all_to_all_attention: attention between exchanges, by groups of heads.

    q, k, v ─▶ all_to_alls ─▶ (view, permute)* ─▶ attention ─▶ (view, permute)* ─▶ all_to_all ─▶ ... (forward)
    dy      ─▶ all_to_all  ─▶ (view, permute)* ─▶ attention backward ─▶ (view, permute)* ─▶ all_to_alls ─▶ cat ─▶ ... (backward)

becomes one op: the attention of the first heads starts when they have arrived, and finished heads leave while the next are computed.
What else the program reads (operands saved for the backward, the logsumexp) are further outputs. The permutes are in the copies, as in
all_to_all_permute.

Leaves to all_to_all_permute: dropout, masks, heads that are repeated after the exchange, a single head per rank, checkpoints that save
the state of random numbers, FlexAttention and other attentions that no kernel takes by groups of heads.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import Attention, Departure, Keep, Operand, Plan, Result, Share
from ..templates.all_to_all import Outputs, output_shapes
from ..templates.attention import (
    Results,
    attend,
    attention_of,
    departing,
    grids,
    head_groups,
    heads_of,
    operands_of,
    sent_shapes,
)
from .all_to_all_permute import Site, exchange_problem, find_site
from .attention import Form, attention_form, result_of
from .collectives import Collective
from .describe import dtype_name, shape_text
from .exchanges import Reading, Source, alike, memory_dims
from .layout import identity, is_movement, walk_moved
from .pattern import Context, Match, register_pattern
from .rewrite import Builder, erase_unused, replace_uses
from .sizes import plain

KIND = "all_to_all_attention"
aten = torch.ops.aten


def reference(
    plan: Plan, group_name: str, inputs: Sequence[Tensor], local: Sequence[Tensor], sizes: Sequence[int]
) -> list[Tensor]:
    """What is received before the attention, its results, and what is received after it."""
    attention = attention_of(plan)
    received = Outputs(plan.deliveries, plan.joins, [x.shape for x in inputs], inputs[0])
    for number, x in enumerate(inputs):
        received.deliver(number, 0, ops.all_to_all(x, group_name))
    results = attend(attention, heads_of(attention, operands_of(attention, received.tensors, local), 0, 1))
    whole = Results(attention)
    whole.keep(results, 0, 1)
    shapes = grids(attention.departures, sizes)
    after = [departing(d, grid, results[d.result]) for d, grid in zip(attention.departures, shapes, strict=True)]
    outputs = Outputs(attention.deliveries, attention.joins, [x.shape for x in after], inputs[0])
    for number, x in enumerate(after):
        outputs.deliver(number, 0, ops.all_to_all(x, group_name))
    return [*received.tensors, *whole.tensors, *outputs.tensors]


def fake(
    plan: Plan, ranks: int, inputs: Sequence[Tensor], local: Sequence[Tensor], sizes: Sequence[int]
) -> list[Tensor]:
    attention, like = attention_of(plan), inputs[0]
    received = [like.new_empty(s) for s in output_shapes(plan.deliveries, plan.joins, [x.shape for x in inputs])]
    results = attend(attention, operands_of(attention, received, local))
    whole = [_fake_result(results[known.number], known.layout) for known in attention.results]
    after = sent_shapes(attention.departures, sizes)
    outputs = [like.new_empty(s) for s in output_shapes(attention.deliveries, attention.joins, after)]
    return [*received, *whole, *outputs]


def _fake_result(result: Tensor, layout: Sequence[int]) -> Tensor:
    return result.new_empty([result.shape[dim] for dim in layout]) if layout else result


ops.define_op(KIND, "Tensor[] inputs, Tensor[] local, SymInt[] sizes", fake=fake, reference=reference)


@dataclass(frozen=True)
class AttentionSite:
    """The attention with the exchanges on both sides; `attention` describes their layouts."""

    form: Form
    before: Site
    after: Site
    local: tuple[fx.Node, ...]
    attention: Attention
    heads: int

    @property
    def node(self) -> fx.Node:
        return self.form.node


@register_pattern(KIND, anchor="all_to_all", priority=-1)
def find(context: Context, anchor: Collective) -> Match | Keep | None:
    before = find_site(context, anchor)
    if not isinstance(before, Site):
        return None
    kept: Keep | None = None
    for node in dict.fromkeys(user for reading in before.readings.values for user in reading.node.users):
        form = attention_form(node)
        found = _site(context, before, form) if form is not None else None
        if isinstance(found, AttentionSite):
            return _match(found)
        kept = kept or found
    return kept


def _match(site: AttentionSite) -> Match:
    deliveries, joins = site.before.deliveries()
    dtype = dtype_name(site.before.exchanges[0].dtype)
    plan = Plan(KIND, "", "", dtype, deliveries=deliveries, joins=joins, attention=site.attention)
    query = site.node.all_input_nodes[0]
    shapes = (*site.before.shapes, f"{site.form.name} {shape_text(query)}", *site.after.shapes)
    collectives = (*site.before.collectives, *site.after.collectives)
    problem = exchange_problem(KIND, (site.before, site.after), site.heads)
    return Match(
        KIND, collectives, problem, plan, shapes, lambda ctx, final: _rewrite(ctx, site, final), gives_way=True
    )


def _site(context: Context, before: Site, form: Form) -> AttentionSite | Keep | None:
    """The exchanges around an attention; None if there are none after it, or others than its operands' before it."""
    if form.refusal is not None:
        return form.refusal
    after = _after(context, form.node, before.collectives[0])
    if after is None:
        return None
    with_heads = [node for node, share in zip(form.operands, form.shares, strict=True) if share != "whole"]
    counts = [plain(node.meta["val"].shape[1]) for node in with_heads]
    heads = gcd(*(count for count in counts if isinstance(count, int)))
    if not all(isinstance(count, int) for count in counts) or head_groups(heads) < 2:
        return Keep("no-kernel", "a rank has one head, or an unknown number of them: there are no groups of heads")
    homes = {home.node: number for number, home in enumerate(before.homes)}
    late = {n for c in before.collectives for n in context.after(c.node)}
    operands: list[Operand] = []
    local: list[fx.Node] = []
    dims: dict[int, int] = {}
    for node, share in zip(form.operands, form.shares, strict=True):
        number = homes.get(node) if share != "whole" else None
        if number is None:
            if node in late:
                return None
            operands.append(Operand(len(local), False, share=share))
            local.append(node)
            continue
        home = before.homes[number]
        dim = _head_dim(home)
        if dim is None or dims.setdefault(before.number(home), dim) != dim:
            return Keep("no-kernel", "the heads of the attention are no dim of the exchange before it")
        operands.append(_operand(home, number, share))
    departures = [_departure(form.node, source) for source in after.sources]
    deliveries, joins = after.deliveries()
    fixed = [(d.exchange, dim) for d in before.deliveries()[0] for dim, _ in d.fixed]
    if set(dims) != set(range(len(before.exchanges))) or any(item in dims.items() for item in fixed):
        return None
    found: list[Departure] = []
    for number, (source, departure) in enumerate(zip(after.sources, departures, strict=True)):
        if departure is None:
            return Keep("no-kernel", "the heads of the attention are no dim of the exchange after it")
        dim = next(i for i, d in enumerate(source.placement.dims) if d == (departure.heads,))
        if any(d.exchange == number and dim in dict(d.fixed) for d in deliveries):
            return None
        found.append(departure)
    results = _results(form.node, after)
    if isinstance(results, Keep):
        return results
    attention = Attention(
        form.op,
        form.arguments,
        tuple(operands),
        results,
        tuple(dims[number] for number in range(len(before.exchanges))),
        tuple(found),
        deliveries,
        joins,
    )
    return AttentionSite(form, before, after, tuple(local), attention, heads)


def _after(context: Context, attention: fx.Node, anchor: Collective) -> Site | None:
    """The exchanges that send results of an attention, and nothing else, as `anchor` does in front of it."""
    parts = [user for user in attention.users if user.target is operator.getitem]
    reached = walk_moved([user for part in parts for user in part.users], lambda n: list(n.users))
    first = next((c for node, c in context.collectives.items() if node in reached and alike(c, anchor)), None)
    site = find_site(context, first) if first is not None else None
    if not isinstance(site, Site) or any(source.view.root not in parts for source in site.sources):
        return None
    return site


def _head_dim(home: Reading) -> int | None:
    """The dim of the exchange that is the heads of what it delivers, dim 1 of `[B, heads, ...]`."""
    dims = home.placement.dims
    if home.placement.repeats or len(dims[1]) != 1 or dims[1][0] == 0:
        return None
    dim = dims[1][0]
    return dim if isinstance(dim, int) else None


def _operand(home: Reading, number: int, share: Share) -> Operand:
    memory = home.memory_dims()
    counts = tuple(len(home.placement.dims[dim]) for dim in memory)
    return Operand(number, True, counts, tuple(memory.index(dim) for dim in range(len(memory))), share)


def _results(node: fx.Node, after: Site) -> tuple[Result, ...] | Keep:
    """What the program reads of an attention beside what the exchanges `after` it send."""
    sent = {collective.node for collective in after.collectives}
    found: dict[int, Result] = {}
    for part in node.users:
        if part.target is not operator.getitem:
            return Keep("no-kernel", "the results of the attention are not read one by one")
        number = _number(part)
        what = result_of(node, number)
        if what == "plain" or not part.users or not _read(part, sent):
            continue
        if what is None:
            return Keep("no-kernel", f"nothing says how result {number} of the attention is put together of its heads")
        value = node.meta["val"][number]
        found[number] = Result(number, tuple(memory_dims(value)) if what == "heads" else ())
    return tuple(found[number] for number in sorted(found))


def _read(node: fx.Node, sent: set[fx.Node]) -> bool:
    """True unless all that becomes of `node`, through movement, is sent."""
    others = [user for user in node.users if user not in sent]
    return not node.users or any(not is_movement(user) or _read(user, sent) for user in others)


def _departure(attention: fx.Node, source: Source) -> Departure | None:
    root, place = source.view.root, source.placement
    whole = source.grid.place(identity(root))
    number = _number(root)
    if result_of(attention, number) != "heads" or whole is None or len(whole.dims[1]) != 1 or len(place.dims[0]) != 1:
        return None
    heads = whole.dims[1][0]
    if not isinstance(heads, int) or heads not in place.factors or place.dims[0] == (heads,):
        return None
    fixed = dict(place.fixed)
    left = [factor for factor in range(len(source.grid.sizes)) if factor not in fixed]
    order = tuple(left.index(factor) for factor in place.factors)
    return Departure(number, len(source.grid.sizes), place.fixed, order, heads)


def _rewrite(context: Context, site: AttentionSite, plan: Plan) -> fx.Node:
    builder, before, after = context.builder, site.before, site.after
    first = before.collectives[0]
    with builder.before(first.node):
        inputs = [source.build(builder) for source in before.sources]
        sizes = [builder.size(size, inputs) for source in after.sources for size in source.grid.sizes]
        tail = (context.token, plan.dumps(), first.group)
        node = builder.call(ops.op(KIND), inputs, list(site.local), sizes, *tail, like=site.node)
        outs = [builder.call(operator.getitem, node, i, like=site.node) for i in range(len(node.meta["val"]) - 1)]
        count, returned = len(plan.joins), site.attention.results
        received, computed, sent = outs[:count], outs[count : count + len(returned)], outs[count + len(returned) :]
        new = before.values(builder, received, inputs)
        last = after.values(builder, sent, inputs)
        parts = list(site.node.users)
        values: dict[int, Any] = {
            result.number: _laid_out(builder, out, result) for result, out in zip(returned, computed, strict=True)
        }
        for part in parts:
            if part.users and result_of(site.node, _number(part)) == "plain":
                size = site.node.meta["val"][_number(part)]
                values[_number(part)] = size if size is None else builder.size(size, inputs)
    before.replace(new)
    for part in parts:
        if _number(part) in values:
            replace_uses(part, values[_number(part)])
    after.replace(last)
    erase_unused(context.graph, [*before.nodes(), site.node, *parts, *after.nodes()])
    return node


def _laid_out(builder: Builder, out: fx.Node, result: Result) -> fx.Node:
    """A result as the program had it, of the output that holds its dims in the order of memory."""
    back = [result.layout.index(dim) for dim in range(len(result.layout))]
    return out if back == sorted(back) else builder.call(aten.permute.default, out, back)


def _number(part: fx.Node) -> int:
    """Which one of an op's results this getitem reads."""
    return int(part.args[1])  # type: ignore[arg-type]
