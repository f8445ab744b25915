"""all_to_all_permute: exchanges between ranks with the permutes around them in the copy, as in Ulysses sequence parallelism.

    q ─▶ (view, permute, clone)* ─▶ all_to_all ─▶ wait ─▶ (view, permute, clone)* ─▶ attention
    k ─▶ (view, permute, clone)* ─▶ all_to_all ─▶ wait ─▶ (view, permute, clone)* ─▶ attention
    dq, dk, dv ─▶ ...            ─▶ all_to_alls ─▶ ...                            ─▶ cat ─▶ mm

becomes one op: it reads what the producers computed where that lies, and writes what the readers want as they want it, a cat of several
exchanges included. Exchanges that one op reads, or that come from one op, are one op together. Nothing is computed: the bits are those
of the original ops. `shard_dim_alltoall` of DTensor and `deepspeed::dim_zero_all_to_all` are exchanges like any other.

Refuses: parts of different sizes, or of sizes that are known only at run time.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import Delivery, FusionProblem, Keep, Plan
from ..templates.all_to_all import Outputs, output_shapes
from .attention import attention_form, is_attention
from .collectives import Collective
from .describe import dtype_name, shape_text
from .exchanges import Exchange, Joined, Reading, Readings, Source, equal_blocks, find_readings, find_source, related
from .layout import Digit
from .matmuls import as_matmul
from .pattern import Context, Match, register_pattern
from .reductions import replace_collective
from .rewrite import Builder, erase_unused
from .sizes import Size, hint, known_eq, product

KIND = "all_to_all_permute"
aten = torch.ops.aten


def reference(plan: Plan, group_name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """inputs [R, f1, ..., fk] of each exchange -> the plan's outputs."""
    outputs = Outputs(plan.deliveries, plan.joins, [x.shape for x in inputs], inputs[0])
    for number, x in enumerate(inputs):
        outputs.deliver(number, 0, ops.all_to_all(x, group_name))
    return outputs.tensors


def fake(plan: Plan, ranks: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [
        inputs[0].new_empty(shape) for shape in output_shapes(plan.deliveries, plan.joins, [x.shape for x in inputs])
    ]


ops.define_op(KIND, "Tensor[] inputs", fake=fake, reference=reference)


@dataclass(frozen=True)
class Site:
    """Exchanges of one op: what is sent, and what is read of them.

    homes: for each output of a single delivery, the reading that it is laid out for; joined outputs follow.
    """

    exchanges: tuple[Exchange, ...]
    sources: tuple[Source, ...]
    readings: Readings
    homes: tuple[Reading, ...]

    def number(self, reading: Reading) -> int:
        return self.exchanges.index(reading.exchange)

    def home(self, reading: Reading) -> int:
        """The output that `reading` is made from."""
        return next(i for i, home in enumerate(self.homes) if _key(home) == _key(reading))

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(exchange.collective for exchange in self.exchanges)

    @property
    def bytes(self) -> int:
        """What the exchanges move, in all."""
        return (
            sum(hint(product(c.input.meta["val"].shape)) for c in self.collectives) * self.exchanges[0].dtype.itemsize
        )

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(f"exchange {shape_text(c.input)}" for c in self.collectives)

    def deliveries(self) -> tuple[tuple[Delivery, ...], tuple[int, ...]]:
        """All of them, and of how many each output consists."""
        deliveries = [Delivery(self.number(h), h.memory_order(), h.placement.fixed) for h in self.homes]
        joins = [1] * len(deliveries)
        for joined in self.readings.joined:
            deliveries += [self._part(part, joined) for part in joined.parts]
            joins.append(len(joined.parts))
        return tuple(deliveries), tuple(joins)

    def _part(self, part: Reading, joined: Joined) -> Delivery:
        place = part.placement
        outer = sum(len(dim) for dim in place.dims[: joined.outer])
        return Delivery(self.number(part), place.factors, place.fixed, outer)

    def values(
        self, builder: Builder, outs: Sequence[fx.Node], sources: Sequence[fx.Node]
    ) -> list[tuple[fx.Node, fx.Node]]:
        """What is read, with what takes its place, made of the op's outputs; nothing is replaced yet."""
        orders = [home.memory_order() for home in self.homes]
        new: list[tuple[fx.Node, fx.Node]] = []
        for reading in self.readings.values:
            number = self.home(reading)
            value = value_of(builder, outs[number], orders[number], reading)
            if value.meta["val"].device.type == "cpu" and _flex_reads(reading.node):
                # Inductor's FlexAttention for CPU takes the sizes of a view's storage for those of the view (torch 2.13).
                value = builder.call(aten.clone.default, value)
            new.append((reading.node, value))
        for joined, out in zip(self.readings.joined, outs[len(self.homes) :], strict=True):
            new.append((joined.node, builder.reshape(out, joined.node.meta["val"].shape, sources)))
        return new

    def replace(self, new: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        results = {c.result: c for c in self.collectives}
        for old, value in new:
            if old in results:
                replace_collective(results[old], value)
            else:
                old.replace_all_uses_with(value)

    def nodes(self) -> list[fx.Node]:
        """What is of no use once its readings are replaced."""
        chains = [n for exchange in self.exchanges for n in reversed(exchange.chain)]
        return [*chains, *(n for c in self.collectives for n in (c.result, c.node))]


def _flex_reads(node: fx.Node) -> bool:
    forms = [attention_form(user) for user in node.users]
    return any(form is not None and form.name == "FlexAttention" for form in forms)


def _key(reading: Reading) -> tuple[object, ...]:
    return reading.exchange, reading.placement.fixed


def find_site(context: Context, anchor: Collective) -> Site | Keep | None:
    """The exchanges that are one op with `anchor`; None if nothing reads one of them."""
    shape = anchor.input.meta["val"].shape
    if known_eq(product(shape), 0):
        return Keep("empty", "a tensor without elements is exchanged")
    if not equal_blocks(anchor):
        return Keep(
            "symbolic-size", f"nothing says that {list(shape)} has blocks of one size for {anchor.group_size} ranks"
        )
    return site_of(context, related(context, anchor))


def site_of(context: Context, collectives: Sequence[Collective]) -> Site | Keep | None:
    """These exchanges as one op; None if nothing reads one of them. Their blocks are known to be equal."""
    exchanges = tuple(Exchange(collective) for collective in collectives)
    readings = find_readings(exchanges)
    sources = [find_source(exchange, context.prover) for exchange in exchanges]  # may refine the grids
    known = tuple(source for source in sources if source is not None)
    if len(known) < len(sources):
        return Keep("symbolic-size", "symbolic sizes do not show in which order the exchange reads its input")
    parts = [part for joined in readings.joined for part in joined.parts]
    if {r.exchange for r in (*readings.values, *parts)} != set(exchanges):
        return None
    return Site(exchanges, known, readings, choose_homes(readings))


def choose_homes(readings: Readings) -> tuple[Reading, ...]:
    """Of the readings that have the same elements, the one that the op lays out its output for."""
    homes: dict[tuple[object, ...], Reading] = {}
    for reading in readings.values:
        best = homes.get(_key(reading))
        if best is None or _preference(reading) > _preference(best):
            homes[_key(reading)] = reading
    return tuple(homes.values())


def _preference(reading: Reading) -> tuple[bool, bool]:
    """Attentions and matmuls get what they read without a copy."""
    computes = any(is_attention(user) or as_matmul(user) is not None for user in reading.node.users)
    return computes, not reading.placement.repeats


@register_pattern(KIND, anchor="all_to_all")
def find(context: Context, anchor: Collective) -> Match | Keep | None:
    site = find_site(context, anchor)
    if not isinstance(site, Site):
        return site
    dtype = dtype_name(site.exchanges[0].dtype)
    deliveries, joins = site.deliveries()
    plan = Plan(KIND, "", "", dtype, deliveries=deliveries, joins=joins)
    problem = exchange_problem(KIND, (site,))
    return Match(KIND, site.collectives, problem, plan, site.shapes, lambda ctx, final: _rewrite(ctx, site, final))


def exchange_problem(kind: str, sites: Sequence[Site], heads: int = 0) -> FusionProblem:
    first = sites[0].collectives[0]
    value = first.input.meta["val"]
    return FusionProblem(
        kind=kind,
        group_size=first.group_size,
        intra_host=first.intra_host,
        device=value.device.type,
        dtype=dtype_name(value.dtype),
        comm_bytes=sum(site.bytes for site in sites),
        gemms=(),
        exchanges=sum(len(site.exchanges) for site in sites),
        heads=heads,
    )


def _rewrite(context: Context, site: Site, plan: Plan) -> fx.Node:
    builder, collectives = context.builder, site.collectives
    first = collectives[0]
    # Everything is built before anything is replaced: a size that no graph value spells must leave the program as it was.
    with builder.before(first.node):
        inputs = [source.build(builder) for source in site.sources]
        node = builder.call(ops.op(KIND), inputs, context.token, plan.dumps(), first.group, like=first.node)
        outs = [builder.call(operator.getitem, node, i, like=first.node) for i in range(len(plan.joins))]
        new = site.values(builder, outs, inputs)
    site.replace(new)
    erase_unused(context.graph, site.nodes())
    return node


def value_of(builder: Builder, out: fx.Node, order: tuple[int, ...], reading: Reading) -> fx.Node:
    """What `reading` reads, from the output `out` whose factors lie in `order`."""
    shape: Sequence[Size] = reading.node.meta["val"].shape
    place = reading.placement
    if reading.memory_order() == order and not place.repeats:  # a view, whatever made it
        dims = reading.memory_dims()
        node = builder.reshape(out, [shape[d] for d in dims])
        if dims == list(range(len(dims))):
            return node
        return builder.call(aten.permute.default, node, [dims.index(d) for d in range(len(dims))])
    wanted = [f for dim in place.dims for f in dim]
    moved = [order.index(f) for f in wanted if isinstance(f, int)]
    node = out if moved == list(range(len(moved))) else builder.call(aten.permute.default, out, moved)
    for position, factor in enumerate(wanted):
        if isinstance(factor, Digit):
            node = builder.call(aten.unsqueeze.default, node, position)
    if place.repeats:
        sizes = [f.size if isinstance(f, Digit) else -1 for f in wanted]
        node = builder.call(aten.expand.default, node, [s if s == -1 else builder.size(s, [out]) for s in sizes])
    return builder.reshape(node, shape, [out])
