"""all_gather_matmul: matmuls that read a gathered tensor, on either side, plain or transposed, in any order of dims.

    x_shard ─▶ all_gather ─▶ wait ─▶ (view, split + cat, permute, cast)* ─▶ mm(·, w1), mm(·, w2), mm(·ᵀ, dy), mm(a, ·ᵀ) ...
                                                                       └─▶ saved for backward, or read by another op

becomes one op that computes with the local shard while the peers' shards arrive. Where the rank dimension is an output dimension of the
matmul (activations gathered along the sequence, weights gathered by FSDP) its output is filled block by block; where it is
contracted (weight gradients) the products are accumulated. What else reads the gathered tensor gets it from the op's last output.

Refuses: a matmul whose other operand is computed from the gathered tensor; a slice of the gathered tensor; batched matmuls.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..lowering import ops
from ..problem import FusionProblem, GatherUse, Keep, Plan
from .collectives import Collective
from .describe import dtype_name, shape_text
from .gathers import Gathered, Home, LiveOuts, Reader, analyse_gather, choose_home, replace_size_readers
from .layout import natural_order
from .matmuls import replace_matmul
from .pattern import Context, Match, register_pattern
from .rewrite import UnresolvedSizeError, erase_unused
from .sizes import hint, product

KIND = "all_gather_matmul"
aten = torch.ops.aten


def gathered_operand(use: GatherUse, gathered: Tensor, other: Tensor) -> Tensor:
    """The matmul operand `[m, k]` or `[k, n]` as a view of the gathered tensor, given its other operand."""
    contracted = other.shape[0] if use.side == "lhs" else other.shape[1]
    if (use.side == "lhs") != use.transposed:
        matrix = gathered.reshape(-1, contracted)
    else:
        matrix = gathered.reshape(contracted, -1)
    return matrix.t() if use.transposed else matrix


def reference(
    plan: Plan, group_name: str, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """shard [P, Q] -> one [m, n] per use, then the gathered [P, R*Q] if the plan returns it."""
    ranks = ops.group_size(group_name)
    outer, inner = shard.shape
    raw = ops.all_gather(shard, ranks, group_name)
    gathered = raw.view(ranks, outer, inner).transpose(0, 1).reshape(outer, ranks * inner)
    outputs: list[Tensor] = []
    for use, other, bias in zip(plan.uses, others, biases, strict=True):
        operand = gathered_operand(use, gathered, other).to(ops.dtype_of(use.dtype))
        pair = (operand, other) if use.side == "lhs" else (other, operand)
        outputs.append(ops.matmul(*pair, bias))
    return [*outputs, gathered] if plan.return_gathered else outputs


def fake(
    plan: Plan, ranks: int, shard: Tensor, others: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    total = product([shard.shape[0], ranks, shard.shape[1]])
    outputs: list[Tensor] = []
    for use, other in zip(plan.uses, others, strict=True):
        contracted, free = (other.shape[0], other.shape[1]) if use.side == "lhs" else (other.shape[1], other.shape[0])
        gathered_free = total // contracted
        size = (gathered_free, free) if use.side == "lhs" else (free, gathered_free)
        outputs.append(other.new_empty(size, dtype=ops.dtype_of(use.dtype)))
    if plan.return_gathered:
        outputs.append(shard.new_empty((shard.shape[0], ranks * shard.shape[1])))
    return outputs


ops.define_op(KIND, "Tensor shard, Tensor[] others, Tensor?[] biases", fake=fake, reference=reference)


@register_pattern(KIND, anchor="all_gather")
def find(context: Context, gather: Collective) -> Match | Keep | None:
    found = analyse_gather(gather, context.prover)
    if not found.readers:
        return found.refusals[0] if found.refusals else None
    home = choose_home(found.readers)
    readers = [r for r in found.readers if r.use_of(home) is not None]
    wire = wire_dtype(gather, readers)
    live = LiveOuts(gather, found.chain, readers, context.prover, home)
    if live.nodes and wire != gather.input.meta["val"].dtype and not rebuildable(live, wire, gather):
        wire = gather.input.meta["val"].dtype
    uses = tuple(use for r in readers if (use := r.use_of(home)) is not None)
    value = gather.node.meta["val"]
    plan = Plan(kind=KIND, site="", executor="", dtype=dtype_name(wire), uses=uses, return_gathered=bool(live.nodes))
    problem = FusionProblem(
        kind=KIND,
        group_size=gather.group_size,
        intra_host=gather.intra_host,
        device=value.device.type,
        dtype=dtype_name(wire),
        comm_bytes=hint(product(value.shape)) * wire.itemsize,
        gemms=tuple(r.matmul.gemm for r in readers),
        gemm_dtypes=tuple(use.dtype for use in uses),
        return_gathered=bool(live.nodes),
        pieces=hint(home.outer),
    )
    shapes = (
        f"gather {shape_text(gather.input)}",
        *(f"mm {shape_text(r.matmul.lhs)} @ {shape_text(r.matmul.rhs)}" for r in readers),
    )
    return Match(
        KIND,
        (gather,),
        problem,
        plan,
        shapes,
        lambda ctx, final: _rewrite(ctx, gather, found, readers, home, live, wire, final),
    )


def wire_dtype(gather: Collective, readers: Sequence[Reader]) -> torch.dtype:
    """The narrowest dtype that carries every bit the readers use: casts commute with moving elements."""
    have: torch.dtype = gather.input.meta["val"].dtype
    before = uncast(gather.input)
    narrow = before.meta["val"].dtype
    wanted = {r.dtype for r in readers}
    if len(wanted) == 1 and (dtype := next(iter(wanted))).itemsize < min(have.itemsize, narrow.itemsize):
        return dtype
    return narrow if narrow.itemsize < have.itemsize else have


def uncast(node: fx.Node) -> fx.Node:
    """`node`, or what it was exactly up-cast from."""
    if node.target is torch.ops.prims.convert_element_type.default:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        wide, narrow = node.meta["val"].dtype, source.meta["val"].dtype
        if wide.is_floating_point and narrow.is_floating_point and torch.promote_types(wide, narrow) == wide:
            return source
    return node


def rebuildable(live: LiveOuts, wire: torch.dtype, gather: Collective) -> bool:
    """True if every live-out can be had from the narrow wire dtype without losing bits."""
    exact = uncast(gather.input).meta["val"].dtype == wire
    return exact or all(node.meta["val"].dtype == wire for node in live.nodes)


def _rewrite(
    context: Context,
    gather: Collective,
    found: Gathered,
    readers: Sequence[Reader],
    home: Home,
    live: LiveOuts,
    wire: torch.dtype,
    plan: Plan,
) -> fx.Node:
    builder = context.builder
    replace_size_readers(builder, gather, found.chain)
    # Everything is built before anything is replaced: a size that no graph value spells must leave the program as it was.
    with builder.before(gather.node):
        source = uncast(gather.input)
        source = source if source.meta["val"].dtype == wire else builder.cast(gather.input, wire)
        shard = shard_in_order(context, source, home)
        others = [builder.matrix(r.other, r.matmul.batched) for r in readers]
        node = builder.call(
            ops.op(KIND),
            shard,
            others,
            [r.matmul.bias for r in readers],
            context.token,
            plan.dumps(),
            gather.group,
            like=gather.node,
        )
        rebuilt = (
            live.rebuild(builder, _output(context, node, len(readers), gather.node), gather.input) if live.nodes else []
        )
        for i, reader in enumerate(readers):
            replace_matmul(builder, reader.matmul, _output(context, node, i, reader.matmul.node), plan.site)
        live.replace(rebuilt)
    erase_unused(context.graph, [*(r.matmul.node for r in readers), *reversed(found.chain), gather.result, gather.node])
    return node


def _output(context: Context, node: fx.Node, index: int, like: fx.Node) -> fx.Node:
    return context.builder.call(operator.getitem, node, index, like=like)


def shard_in_order(context: Context, source: fx.Node, home: Home) -> fx.Node:
    """The local shard as [P, Q] in home order."""
    builder = context.builder
    if not home.keeps_shard_order:
        digits = home.shard_digits
        order = natural_order(digits)
        assert order is not None
        split = builder.reshape(source, [digits[i].size for i in order])
        source = builder.call(aten.permute.default, split, [order.index(i) for i in range(len(order))])
    try:
        return builder.reshape(source, [home.outer, home.inner])
    except UnresolvedSizeError as error:
        raise UnresolvedSizeError(f"the shard's blocks: {error}") from None
