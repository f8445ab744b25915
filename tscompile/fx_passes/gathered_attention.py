"""all_gather_attention: local queries attend to keys and values that are gathered along the sequence (context parallelism).

    k, v ─▶ all_gather ─▶ wait ─▶ (view, permute, split + cat, unbind)* ─▶ attention(q, ·, ·)
                                                                        └─▶ saved for backward, or read by another op

becomes one op that attends to the local keys while those of the peers arrive, and merges what the chunks give. Keys and values come
from one gather or two; each rank holds a stretch of the sequence, or several, as in zig-zag and striped orders. What else reads the
gathered tensors gets it from further outputs.

Refuses: masks other than `is_causal`; dropout; keys that are cast or computed after the gather; keys and values in different orders.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import ChunkedAttention, FusionProblem, Gemm, Keep, Plan
from ..templates.all_to_all import Outputs, output_shapes
from ..templates.gathered_attention import gathered_shapes, in_memory
from ..templates.key_chunks import attend, chunked, in_sequence, keys_view
from .all_to_all_permute import Site, choose_homes
from .attention import is_attention
from .collectives import Collective
from .describe import dtype_name, shape_text
from .exchanges import Exchange, find_readings, memory_dims
from .gathers import replace_size_readers, size_readers
from .key_order import find_gathered, find_pieces, keys_of
from .layout import walk_moved
from .pattern import Context, Match, register_pattern
from .rewrite import erase_unused
from .sizes import hint, known_eq, product

KIND = "all_gather_attention"
aten = torch.ops.aten


def reference(plan: Plan, group_name: str, query: Tensor, shards: Sequence[Tensor]) -> list[Tensor]:
    """query [B, heads, L, E], shards [f1, ..., fk] -> the results that the plan names, then the deliveries."""
    ranks, chunks = ops.group_size(group_name), chunked(plan)
    gathered = [ops.all_gather(x, ranks, group_name).view(ranks, *x.shape) for x in shards]
    outputs = Outputs(plan.deliveries, plan.joins, [x.shape for x in gathered], query)
    for number, x in enumerate(gathered):
        outputs.deliver(number, 0, x)
    whole = [in_sequence(chunks.order, [keys_view(k, block) for block in gathered[k.shard]]) for k in chunks.keys]
    results = attend(chunks, query, whole)
    return [*in_memory([results[number] for number in chunks.results], chunks.layouts), *outputs.tensors]


def fake(plan: Plan, ranks: int, query: Tensor, shards: Sequence[Tensor]) -> list[Tensor]:
    chunks = chunked(plan)
    parts = [keys_view(keys, shards[keys.shard]) for keys in chunks.keys]
    whole = [t.new_empty((*t.shape[:2], t.shape[2] * ranks, t.shape[3])) for t in parts]
    results = attend(chunks, query, whole)
    read = [results[number] for number in chunks.results]
    shapes = output_shapes(plan.deliveries, plan.joins, gathered_shapes(shards, ranks))
    return [
        *(r.new_empty([r.shape[d] for d in layout]) for r, layout in zip(read, chunks.layouts, strict=True)),
        *(query.new_empty(shape) for shape in shapes),
    ]


ops.define_op(KIND, "Tensor query, Tensor[] shards", fake=fake, reference=reference)


def arguments_of(node: fx.Node) -> dict[str, Any] | Keep:
    """Arguments of an attention op of aten by name, defaults included; or why no kernel takes it chunk by chunk of keys."""
    schema = getattr(node.target, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    if "query" not in names or "is_causal" not in names or schema is None:
        return Keep("no-kernel", f"no kernel takes {node.target} chunk by chunk of keys")
    given = {argument.name: argument.default_value for argument in schema.arguments}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    if given["dropout_p"]:
        return Keep("no-kernel", "dropout draws for all keys at once")
    if given.get("attn_mask") is not None or given.get("attn_bias") is not None:
        return Keep("no-kernel", "no kernel takes an attention with a mask of its own chunk by chunk of keys")
    if given.get("return_debug_mask"):
        return Keep("no-kernel", "no kernel returns the mask of an attention chunk by chunk of keys")
    return given


def results_of(node: fx.Node) -> dict[int, fx.Node] | Keep:
    """What is read of an attention's results, by number."""
    parts = {int(user.args[1]): user for user in node.users if user.target is operator.getitem}  # type: ignore[arg-type]
    if len(parts) != len(node.users):
        return Keep("no-kernel", "the results of the attention are read as a list")
    return dict(sorted(parts.items()))


@dataclass(frozen=True)
class KeySite:
    """An attention and the gathers of its keys and values; `site` has what else is read of these."""

    node: fx.Node
    query: fx.Node
    exchanges: tuple[Exchange, ...]
    site: Site
    chunks: ChunkedAttention
    parts: dict[int, fx.Node]


@register_pattern("all_gather_attention", anchor="all_gather", priority=-1)
def find(context: Context, gather: Collective) -> Match | Keep | None:
    reached = walk_moved(list(gather.node.users), lambda n: list(n.users))
    kept: Keep | None = None
    for node in (n for n in reached if is_attention(n)):
        found = _site(context, gather, node)
        if isinstance(found, KeySite):
            return _match(found)
        kept = kept or found
    return kept


def _site(context: Context, anchor: Collective, node: fx.Node) -> KeySite | Keep:
    given = arguments_of(node)
    if isinstance(given, Keep):
        return given
    if "logsumexp" in given:
        return Keep(
            "no-kernel", "no kernel starts the backward of an attention before all keys and values are gathered"
        )
    parts = results_of(node)
    if isinstance(parts, Keep):
        return parts
    if not all(isinstance(part.meta["val"], Tensor) for part in parts.values()):
        return Keep("no-kernel", "the program reads sizes that the attention returns")
    query, tensors = given["query"], (given["key"], given["value"])
    gathers = [c for c in context.collectives.values() if _alike(c, anchor)]
    near = walk_moved(list(tensors), lambda n: n.all_input_nodes)
    exchanges = {c.node: Exchange(c) for c in gathers if c.node in near}
    after = [context.after(gather) for gather in exchanges]
    if any(query in late or any(g.all_input_nodes[0] in late for g in exchanges) for late in after):
        return Keep("no-kernel", "the queries, or one of two gathers, wait for gathered keys or values")
    gathered = [find_gathered(tensor, context.prover, exchanges) for tensor in tensors]
    known = [found for found in gathered if not isinstance(found, Keep)]
    if len(known) < 2:
        return next(found for found in gathered if isinstance(found, Keep))
    used = tuple(exchange for exchange in exchanges.values() if any(k.exchange is exchange for k in known))
    sized = {
        reader for exchange in used for n in (exchange.collective.node, *exchange.chain) for reader in size_readers(n)
    }
    readings = find_readings(used, besides={node, *sized})
    pieces = [find_pieces(found) for found in known]
    orders = [found for found in pieces if not isinstance(found, Keep)]
    if len(orders) < 2:
        return next(found for found in pieces if isinstance(found, Keep))
    if orders[0].order != orders[1].order:
        return Keep("not-the-sequence", "keys and values are in different orders")
    if any(found.repeated for found in orders) and "efficient" in str(node.target):
        return Keep(
            "repeated", "memory-efficient attention wants as many heads of keys as of queries, so they are repeated"
        )
    chunks = ChunkedAttention(
        str(node.target._opname),  # type: ignore[union-attr]
        bool(given["is_causal"]),
        given["scale"],
        orders[0].order,
        tuple(parts),
        tuple(tuple(memory_dims(part.meta["val"])) for part in parts.values()),
        tuple(keys_of(found, used.index(k.exchange)) for found, k in zip(orders, known, strict=True)),
    )
    return KeySite(node, query, used, Site(used, (), readings, choose_homes(readings)), chunks, parts)


def _alike(gather: Collective, anchor: Collective) -> bool:
    """True if `gather` may be in one op with `anchor`."""
    same = gather.kind == anchor.kind and gather.group == anchor.group and gather.refusal is None
    value, first = gather.input.meta["val"], anchor.input.meta["val"]
    return same and value.dtype == first.dtype and not known_eq(product(value.shape), 0)


def attention_gemms(query: Tensor, keys: int, width: int) -> tuple[Gemm, ...]:
    """The two matmuls of an attention as the cost model counts them."""
    batch, heads, rows, head_dim = (hint(size) for size in query.shape)
    return Gemm(batch * heads * rows, keys, head_dim), Gemm(batch * heads * rows, width, keys)


def _match(found: KeySite) -> Match:
    first = found.exchanges[0].collective
    deliveries, joins = found.site.deliveries()
    dtype = dtype_name(found.exchanges[0].dtype)
    plan = Plan(
        KIND, "", "", dtype, deliveries=deliveries, joins=joins, chunks=found.chunks, return_gathered=bool(joins)
    )
    query, key, value = (n.meta["val"] for n in found.node.all_input_nodes[:3])
    held = found.site.bytes
    problem = FusionProblem(
        kind=KIND,
        group_size=first.group_size,
        intra_host=first.intra_host,
        device=query.device.type,
        dtype=dtype,
        comm_bytes=held * first.group_size,
        gemms=attention_gemms(query, hint(key.shape[2]), hint(value.shape[3])),
        return_gathered=bool(joins),
        exchanges=len(found.exchanges),
        merged_bytes=hint(product(query.shape[:3])) * hint(value.shape[3]) * 4,
    )
    gathers = (f"gather {shape_text(exchange.collective.input)}" for exchange in found.exchanges)
    shapes = (*gathers, f"attention {shape_text(found.query)}")
    collectives = found.site.collectives
    return Match(
        KIND, collectives, problem, plan, shapes, lambda ctx, final: _rewrite(ctx, found, final), gives_way=True
    )


def _rewrite(context: Context, found: KeySite, plan: Plan) -> fx.Node:
    builder, site = context.builder, found.site
    for exchange in found.exchanges:
        replace_size_readers(builder, exchange.collective, exchange.chain)
    with builder.before(found.node):
        shards = [builder.reshape(e.collective.input, e.cuts.sizes[1:]) for e in found.exchanges]
        tail = (context.token, plan.dumps(), found.exchanges[0].collective.group)
        node = builder.call(ops.op(KIND), found.query, shards, *tail, like=found.node)
        outs = [builder.call(operator.getitem, node, i, like=found.node) for i in range(len(node.meta["val"]) - 1)]
        count = len(found.chunks.results)
        values = zip(outs[:count], found.chunks.layouts, strict=True)
        results = [in_program_order(context, out, layout) for out, layout in values]
        new = site.values(builder, outs[count:], shards)
    for part, result in zip(found.parts.values(), results, strict=True):
        part.replace_all_uses_with(result)
    site.replace(new)
    erase_unused(context.graph, [*found.parts.values(), found.node, *site.nodes()])
    return node


def in_program_order(context: Context, node: fx.Node, layout: Sequence[int]) -> fx.Node:
    """A result whose dims lie in memory as `layout` says, with its dims as the program has them."""
    back = [list(layout).index(dim) for dim in range(len(layout))]
    return node if back == list(range(len(back))) else context.builder.call(aten.permute.default, node, back)
