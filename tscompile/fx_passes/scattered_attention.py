"""attention_reduce_scatter: the backward of an attention whose gradients of keys and values are summed over the ranks that hold them.

    dk, dv of attention backward ─▶ (view, permute, slice + cat, stack)* ─▶ reduce_scatter(sum | avg) ─▶ wait
    dq of the same                ─▶ ...

becomes one op that computes the gradients of a peer's keys and values, sends them, and goes on with the next peer's. One scatter takes
both gradients, or each has its own. The order of the sequence is what it was in the forward: a stretch per rank, zig-zag, striped.

Refuses: gradients that something else reads, too, or that are cast or computed with before the scatter; masks and dropout.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import ChunkedAttention, FusionProblem, Keep, Plan, Scatter
from ..templates.gathered_attention import in_memory
from ..templates.key_chunks import chunk_of, chunked, gradients
from ..templates.scattered_attention import block_shapes, blocks_of, named
from .attention import is_attention
from .collectives import Collective
from .cuts import Cuts
from .describe import dtype_name, shape_text
from .exchanges import memory_dims
from .gathered_attention import arguments_of, attention_gemms, in_program_order, results_of
from .key_order import MOST_PIECES, SEQUENCE
from .layout import JOINS, NotStrided, Prover, View, carve, identity, make_digits, merge, walk_moved
from .pattern import Context, Match, register_pattern
from .reductions import replace_collective
from .rewrite import erase_unused
from .sizes import Size, divides, hint, known_eq, plain, product, quotient

KIND = "attention_reduce_scatter"
aten = torch.ops.aten
_OPERANDS = ("grad_out", "grad_out_", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset")
_OF_KEYS = (1, 2)  # results of a backward op: gradients of the queries, the keys, the values


def reference(plan: Plan, group_name: str, operands: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """operands of the backward op -> the gradient of the queries, if it is read, then what each scatter returns."""
    ranks, chunks = ops.group_size(group_name), chunked(plan)
    whole = gradients(chunks, *named(chunks, operands))
    blocks = [
        blocks_of(chunks, sizes, [whole[0], *(chunk_of(chunks.order, rank, t) for t in whole[1:])])
        for rank in range(ranks)
    ]
    outs = []
    for number, shape in enumerate(block_shapes(chunks, sizes)):
        sent = torch.stack([found[number] for found in blocks])
        outs.append(ops.reduce_scatter(sent, plan.reduce_op, ranks, group_name).view(shape))
    return [*in_memory([whole[number] for number in chunks.results], chunks.layouts), *outs]


def fake(plan: Plan, ranks: int, operands: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    chunks = chunked(plan)
    query = named(chunks, operands)[0]["query"]
    return [
        *(query.new_empty([query.shape[dim] for dim in layout]) for layout in chunks.layouts),
        *(query.new_empty(shape) for shape in block_shapes(chunks, sizes)),
    ]


ops.define_op(KIND, "Tensor[] operands, SymInt[] sizes", fake=fake, reference=reference)


@dataclass(frozen=True)
class Sent:
    """A scatter, proved: `parts` of the attention's results, the factors of a rank's part of them, and their order in the result."""

    scatter: Collective
    parts: tuple[int, ...]
    sizes: tuple[Size, ...]
    order: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]  # as ChunkedAttention.order


@dataclass(frozen=True)
class GradientSite:
    node: fx.Node
    given: dict[str, Any]
    sent: tuple[Sent, ...]
    chunks: ChunkedAttention
    parts: dict[int, fx.Node]

    @property
    def scatters(self) -> tuple[Collective, ...]:
        return tuple(sent.scatter for sent in self.sent)


@register_pattern("attention_reduce_scatter", anchor="reduce_scatter", priority=-1)
def find(context: Context, anchor: Collective) -> Match | Keep | None:
    reached = walk_moved([anchor.input], lambda n: n.all_input_nodes)
    sources = (n.all_input_nodes[0] for n in reached if n.target is operator.getitem)
    node = next((n for n in sources if is_attention(n)), None)
    if node is None:
        return None
    found = _site(context, anchor, node)
    return found if isinstance(found, Keep) else _match(found)


def _site(context: Context, anchor: Collective, node: fx.Node) -> GradientSite | Keep:
    given = arguments_of(node)
    if isinstance(given, Keep):
        return given
    parts = results_of(node)
    if isinstance(parts, Keep):
        return parts
    if "logsumexp" not in given or any(number > max(_OF_KEYS) for number in parts):
        return Keep("no-kernel", "what is scattered are not the gradients of keys and values")
    of_keys = [parts[number] for number in _OF_KEYS if number in parts]
    scatters = [c for c in context.collectives.values() if _alike(c, anchor) and _feeds(of_keys, c)]
    sent: list[Sent] = []
    for scatter in scatters:
        proved = _prove(scatter, node, parts, context.prover)
        if isinstance(proved, Keep):
            return proved
        sent.append(proved)
    if sorted(number for one in sent for number in one.parts) != list(_OF_KEYS):
        return Keep("no-kernel", "the gradients of keys and values are not both scattered over the same ranks")
    if any(one.pieces != sent[0].pieces for one in sent):
        return Keep("not-the-sequence", "the gradients of keys and values are scattered in different orders")
    if not _is_closed(of_keys, scatters):
        return Keep(
            "result-read-elsewhere", "something else reads the gradients of keys or values before they are summed"
        )
    chunks = ChunkedAttention(
        str(node.target._opname),  # type: ignore[union-attr]
        bool(given["is_causal"]),
        given["scale"],
        sent[0].pieces,
        (0,) if 0 in parts else (),
        (tuple(memory_dims(parts[0].meta["val"])),) if 0 in parts else (),
        operands=tuple(name for name in _OPERANDS if isinstance(given.get(name), fx.Node)),
        scatters=tuple(Scatter(one.parts, len(one.sizes), one.order) for one in sent),
    )
    return GradientSite(node, given, tuple(sent), chunks, parts)


def _alike(scatter: Collective, anchor: Collective) -> bool:
    """True if `scatter` may be in one op with `anchor`."""
    same = (scatter.kind, scatter.group, scatter.reduce_op) == (anchor.kind, anchor.group, anchor.reduce_op)
    return same and scatter.refusal is None and scatter.reduce_op in ("sum", "avg")


def _feeds(sources: Sequence[fx.Node], scatter: Collective) -> bool:
    reached = walk_moved([scatter.input], lambda n: n.all_input_nodes)
    return any(source in reached for source in sources)


def _is_closed(sources: Sequence[fx.Node], scatters: Sequence[Collective]) -> bool:
    """True if what is moved from `sources` goes into the scatters, and nowhere else."""
    ends = {scatter.node for scatter in scatters}
    reached = walk_moved([user for source in sources for user in source.users], lambda n: list(n.users))
    cone = {n for scatter in scatters for n in walk_moved([scatter.input], lambda n: n.all_input_nodes)}
    return all(node in ends or node in cone for node in reached)


def _prove(scatter: Collective, node: fx.Node, results: dict[int, fx.Node], prover: Prover) -> Sent | Keep:
    """`scatter.input` as `[R, ...]` of the gradients, stacked if they are several: one tensor `[parts, B, heads, S, E]`."""
    reason = "the gradients of keys and values reach the scatter as no strided view"
    for parts in ((1,), (2,), (1, 2), (2, 1)):
        if any(number not in results for number in parts):
            continue
        shape = (len(parts), *results[parts[0]].meta["val"].shape)
        if any(not _same_shape(results[number], results[parts[0]]) for number in parts):
            continue
        view, numbers = _view(scatter.input, node, [results[number] for number in parts], prover)
        if isinstance(view, NotStrided):
            reason = f"the gradients of keys and values reach the scatter as no strided view: {view.reason}"
            continue
        if view.root is not node or not known_eq(product(d.size for d in view.digits), product(shape)):
            continue
        if view.casts:
            return Keep("lossy-casts", "the gradients of keys and values are cast before they are summed")
        found = _factors(view, shape, scatter.group_size)
        if isinstance(found, Keep):
            return found
        sizes, order, stripes = found
        pieces = _pieces(scatter.group_size, stripes, numbers)
        return pieces if isinstance(pieces, Keep) else Sent(scatter, parts, sizes, order, pieces)
    return Keep("not-a-strided-view", reason)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return all(known_eq(x, y) for x, y in zip(a.meta["val"].shape, b.meta["val"].shape, strict=True))


def _view(
    node: fx.Node, root: fx.Node, parts: Sequence[fx.Node], prover: Prover
) -> tuple[View | NotStrided, tuple[int, ...]]:
    """`node` as a view of the stacked `parts`; and where pieces of the sequence were put in another order before, their numbers."""
    numel = product(parts[0].meta["val"].shape)
    known: dict[fx.Node, View] = {}
    for i, part in enumerate(parts):
        offset = product([i, numel]) if i else 0
        known[part] = replace(identity(part), root=root, offset=offset)
    numbers: tuple[int, ...] = ()
    while True:
        view = prover.view(node, known)
        if isinstance(view, View):
            return view, numbers
        end = view.node
        found = _reordered(end, known)
        if end in known or found is None or (numbers and found[1] != numbers):
            return view, numbers
        whole, numbers = found
        known[end] = whole


def _reordered(node: fx.Node, known: dict[fx.Node, View]) -> tuple[View, tuple[int, ...]] | None:
    """A cat along the sequence of equal pieces of one of the gradients: that gradient, and the numbers of the pieces in this order."""
    dim = node.args[1] if len(node.args) > 1 else 0
    if node.target is not JOINS[0] or int(dim) % 4 != SEQUENCE:  # type: ignore[arg-type]
        return None
    views = [Prover(known).view(source) for source in node.all_input_nodes]
    pieces = [view for view in views if isinstance(view, View)]
    inputs: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    if len(pieces) != len(inputs):
        return None
    for part, whole in known.items():
        length = pieces[0].shape[SEQUENCE]
        if not known_eq(product([length, len(pieces)]), part.meta["val"].shape[SEQUENCE]):
            continue
        step = product([length, whole.dims[SEQUENCE][-1].stride]) if whole.dims[SEQUENCE] else 1
        offsets = [piece.offset - whole.offset for piece in pieces]
        numbers = [plain(quotient(offset, step)) if divides(step, offset) else -1 for offset in offsets]
        alike = all(_is_piece(piece, whole, length) for piece in pieces)
        if alike and sorted(n for n in numbers if isinstance(n, int)) == list(range(len(pieces))):
            return whole, tuple(n for n in numbers if isinstance(n, int))
    return None


def _is_piece(piece: View, whole: View, length: Size) -> bool:
    """True if `piece` is a stretch of the sequence of `whole`, whatever its offset."""
    cut = make_digits((length, whole.dims[SEQUENCE][-1].stride)) if whole.dims[SEQUENCE] else ()
    return piece.root is whole.root and piece.dims == (*whole.dims[:SEQUENCE], cut, *whole.dims[SEQUENCE + 1 :])


def _factors(view: View, shape: Sequence[Size], ranks: int) -> tuple[tuple[Size, ...], tuple[int, ...], int] | Keep:
    """Factors of a rank's part of `[parts, B, heads, S, E]`, their order in the scatter's result, and how many stripes it has of S."""
    nowhere = Keep("not-the-sequence", "the ranks do not own parts of the sequence of keys and values")
    blocks = carve(view.digits, [ranks, quotient(product(shape), ranks)])
    if blocks is None:
        return nowhere
    cut = replace(view, dims=(merge(blocks[0]), blocks[1]))
    strides = [product(shape[d + 1 :]) for d in range(len(shape))]
    whole = replace(view, dims=tuple(make_digits(pair) for pair in zip(shape, strides, strict=True)), offset=0)
    cuts = Cuts.of_shape(shape)
    if not cuts.cut_for(cut):
        return nowhere
    place, everything = cuts.place(cut), cuts.place(whole)
    if place is None or everything is None or place.fixed or place.repeats or len(place.dims[0]) != 1:
        return nowhere
    owner = place.dims[0][0]
    sequence = everything.dims[SEQUENCE + 1]
    if owner not in sequence or not isinstance(owner, int):
        return nowhere
    sizes = cuts.sizes
    stripes = plain(product(sizes[f] for f in sequence[: sequence.index(owner)] if isinstance(f, int)))
    if not isinstance(stripes, int):
        return Keep("symbolic-size", "symbolic sizes do not show in which order the ranks own the keys")
    left = [factor for factor in range(len(sizes)) if factor != owner]
    order = tuple(left.index(f) for f in place.dims[1] if isinstance(f, int))
    return tuple(sizes[factor] for factor in left), order, stripes


def _pieces(ranks: int, stripes: int, numbers: Sequence[int]) -> tuple[tuple[int, ...], ...] | Keep:
    """Which pieces of the sequence each rank owns; `numbers` of the pieces in the order that was cut, if it is not their own."""
    if numbers and (stripes > 1 or len(numbers) % ranks):
        return Keep("not-the-sequence", "the ranks own pieces of the sequence that are cut by others")
    if max(len(numbers), stripes * ranks) > MOST_PIECES:
        return Keep("not-the-sequence", "the ranks own many small parts of the sequence of keys and values")
    if numbers:
        each = len(numbers) // ranks
        return tuple(tuple(numbers[rank * each : (rank + 1) * each]) for rank in range(ranks))
    return tuple(tuple(stripe * ranks + rank for stripe in range(stripes)) for rank in range(ranks))


def _match(found: GradientSite) -> Match:
    first = found.scatters[0]
    query, key, value = (found.given[name].meta["val"] for name in ("query", "key", "value"))
    dtype = dtype_name(first.input.meta["val"].dtype)
    reduce_op = first.reduce_op
    plan = Plan(KIND, "", "", dtype, chunks=found.chunks, reduce_op="avg" if reduce_op == "avg" else "sum")
    forward = attention_gemms(query, hint(key.shape[2]), hint(value.shape[3]))
    problem = FusionProblem(
        kind=KIND,
        group_size=first.group_size,
        intra_host=first.intra_host,
        device=query.device.type,
        dtype=dtype,
        comm_bytes=sum(hint(product(c.input.meta["val"].shape)) for c in found.scatters) * query.dtype.itemsize,
        gemms=(*forward, *forward, forward[0]),  # five matmuls: the scores again, and four gradients
        reduce_op=reduce_op,
        exchanges=len(found.scatters),
        merged_bytes=hint(product(query.shape)) * 4,
    )
    shapes = (
        f"attention backward {shape_text(found.given['query'])}",
        *(f"scatter {shape_text(c.input)}" for c in found.scatters),
    )
    return Match(
        KIND, found.scatters, problem, plan, shapes, lambda ctx, final: _rewrite(ctx, found, final), gives_way=True
    )


def _rewrite(context: Context, found: GradientSite, plan: Plan) -> fx.Node:
    builder, chunks = context.builder, found.chunks
    operands = [found.given[name] for name in chunks.operands]
    of_keys = [found.parts[number] for number in _OF_KEYS]
    with builder.before(found.node):
        sizes = [builder.size(size, [found.given["key"], *operands]) for sent in found.sent for size in sent.sizes]
        tail = (context.token, plan.dumps(), found.scatters[0].group)
        node = builder.call(ops.op(KIND), operands, sizes, *tail, like=found.node)
        outs = [builder.call(operator.getitem, node, i, like=found.node) for i in range(len(node.meta["val"]) - 1)]
        count = len(chunks.results)
        values = zip(outs[:count], chunks.layouts, strict=True)
        results = [in_program_order(context, out, layout) for out, layout in values]
        new = [
            builder.reshape(out, scatter.node.meta["val"].shape, operands)
            for out, scatter in zip(outs[count:], found.scatters, strict=True)
        ]
    for number, result in zip(chunks.results, results, strict=True):
        found.parts[number].replace_all_uses_with(result)
    for scatter, value in zip(found.scatters, new, strict=True):
        replace_collective(scatter, value)
    ends = [n for scatter in found.scatters for n in (scatter.result, scatter.node)]
    erase_unused(context.graph, [*ends, *found.parts.values(), *of_keys, found.node])
    return node
