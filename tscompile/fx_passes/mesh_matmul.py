"""mesh_matmul: a matmul of two gathered operands, each gathered in a group of its own, as on a 2-D mesh of ranks.

    a_shard ─▶ all_gather(row of the mesh)    ─▶ wait ─▶ (view, split + cat, permute, cast)* ─┐
                                                                                              mm ─▶ ...
    b_shard ─▶ all_gather(column of the mesh) ─▶ wait ─▶ (view, split + cat, permute, cast)* ─┘

becomes one op in which both gathers are under way at once. Where the contracted dim is what both gather, it is SUMMA, or Cannon's
algorithm on a square mesh; where rows and columns of the result are gathered, CPU ranks put the smaller operand together and multiply
the other one as it arrives, and GPUs multiply what has arrived of both. What else reads a gathered operand (the backward, say) gets it
from the op's further outputs.

Leaves to all_gather_matmul: gathers of one group; a gathered tensor that several matmuls read; operands that cross ranks in different
dtypes; a group of one rank; on GPUs symbolic sizes, and sizes where one fused gather beside NCCL's is predicted to be faster.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..lowering import mesh, ops
from ..problem import FusionProblem, GatherUse, Plan
from .all_gather_matmul import rebuildable, shard_in_order, uncast, wire_dtype
from .collectives import Collective, group_ranks
from .describe import dtype_name, shape_text
from .gathers import Gathered, Home, LiveOuts, Reader, analyse_gather, choose_home, replace_size_readers, scaled
from .layout import View
from .matmuls import TAKEN, Matmul
from .pattern import Context, Match, register_pattern
from .rewrite import Builder, UnresolvedSizeError, erase_unused
from .sizes import Size, divides, hint, product, quotient

KIND = "mesh_matmul"
aten = torch.ops.aten


def reference(
    plan: Plan,
    group_name: str,
    lhs: Tensor,
    rhs: Tensor,
    bias: Tensor | None,
    contracted: int,
    second_group: str,
    *raw: Tensor,
) -> list[Tensor]:
    """Shards [P, Q] of either operand -> [m, n], then those gathered operands [P, R*Q] that the plan returns.

    raw: both operands as the collectives gather them, [R, P, Q], if they are there already.
    """
    if not raw:
        pairs = ((lhs, group_name), (rhs, second_group))
        raw = tuple(ops.all_gather(shard, ops.group_size(name), name).view(-1, *shard.shape) for shard, name in pairs)
    gathered = [each.transpose(0, 1).reshape(each.shape[1], -1) for each in raw]
    operands = [_operand(use, each, contracted) for use, each in zip(plan.uses, gathered, strict=True)]
    returned = zip(gathered, (plan.return_gathered, plan.return_second), strict=True)
    return [ops.matmul(operands[0], operands[1], bias), *(each for each, wanted in returned if wanted)]


def _operand(use: GatherUse, gathered: Tensor, contracted: int) -> Tensor:
    """`[m, k]` or `[k, n]` as a view of the gathered tensor."""
    rows_contracted = (use.side == "lhs") == use.transposed
    matrix = gathered.reshape(contracted, -1) if rows_contracted else gathered.reshape(-1, contracted)
    return (matrix.t() if use.transposed else matrix).to(ops.dtype_of(use.dtype))


def fake(
    plan: Plan, ranks: int, lhs: Tensor, rhs: Tensor, bias: Tensor | None, contracted: int, second_group: str
) -> list[Tensor]:
    sizes = (ranks, ops.group_size(second_group))
    m, n = (product([*shard.shape, size]) // contracted for shard, size in zip((lhs, rhs), sizes, strict=True))
    outputs = [lhs.new_empty((m, n), dtype=ops.dtype_of(plan.uses[0].dtype))]
    for shard, size, wanted in zip((lhs, rhs), sizes, (plan.return_gathered, plan.return_second), strict=True):
        if wanted:
            outputs.append(shard.new_empty((shard.shape[0], size * shard.shape[1])))
    return outputs


ops.define_op(
    KIND,
    "Tensor lhs, Tensor rhs, Tensor? bias, SymInt contracted, str second_group",
    fake=fake,
    reference=reference,
    launch=mesh.launch,
)


@dataclass(frozen=True)
class Side:
    """One operand: its gather, what was proved about it, and how the matmul reads it."""

    gather: Collective
    found: Gathered
    reader: Reader
    home: Home
    live: LiveOuts
    wire: torch.dtype

    @property
    def use(self) -> GatherUse:
        use = self.reader.use_of(self.home)
        assert use is not None, "the home is this reader's own order"
        return use

    @property
    def leads(self) -> bool:
        """True if the contracted dim is what is gathered, and a rank's part of it is one block."""
        contracted = self.reader.cols if self.reader.side == "lhs" else self.reader.rows
        return bool(contracted) and contracted[0] == self.reader.rank


@register_pattern(KIND, anchor="all_gather", priority=-1)
def find(context: Context, gather: Collective) -> Match | None:
    one = _side(context, gather)
    other_gather = _gather_of(context, one.reader.other) if one is not None else None
    other = _side(context, other_gather) if other_gather is not None else None
    if one is None or other is None or one.reader.matmul.node is not other.reader.matmul.node:
        return None
    lhs, rhs = (one, other) if one.reader.side == "lhs" else (other, one)
    alike = lhs.wire == rhs.wire and lhs.reader.dtype == rhs.reader.dtype
    if not alike or group_ranks(lhs.gather.group) == group_ranks(rhs.gather.group):
        return None
    matmul = lhs.reader.matmul
    value = lhs.gather.node.meta["val"]
    uses = (lhs.use, rhs.use)
    returned = (bool(lhs.live.nodes), bool(rhs.live.nodes))
    plan = Plan(
        KIND,
        "",
        "",
        dtype_name(lhs.wire),
        uses,
        return_gathered=returned[0],
        return_second=returned[1],
        second_size=rhs.gather.group_size,
    )
    problem = FusionProblem(
        kind=KIND,
        group_size=lhs.gather.group_size,
        intra_host=lhs.gather.intra_host and rhs.gather.intra_host,
        device=value.device.type,
        dtype=dtype_name(lhs.wire),
        comm_bytes=_bytes(lhs),
        gemms=(matmul.gemm,),
        gemm_dtypes=(uses[0].dtype,),
        return_gathered=returned[0],
        return_second=returned[1],
        second_group_size=rhs.gather.group_size,
        second_comm_bytes=_bytes(rhs),
        pieces=hint(lhs.home.outer),
        second_pieces=hint(rhs.home.outer),
        static=all(isinstance(size, int) for each in (matmul.lhs, matmul.rhs) for size in each.meta["val"].shape),
        panels=lhs.leads and rhs.leads,
    )
    shapes = (
        f"gather {shape_text(lhs.gather.input)}",
        f"gather {shape_text(rhs.gather.input)}",
        f"mm {shape_text(matmul.lhs)} @ {shape_text(matmul.rhs)}",
    )
    return Match(
        KIND,
        (lhs.gather, rhs.gather),
        problem,
        plan,
        shapes,
        lambda ctx, final: _rewrite(ctx, lhs, rhs, matmul, final),
        gives_way=True,
    )


def _bytes(side: Side) -> int:
    return hint(product(side.gather.node.meta["val"].shape)) * side.wire.itemsize


def _gather_of(context: Context, operand: fx.Node) -> Collective | None:
    """The all_gather that `operand` is a view of."""
    view = context.prover.view(operand)
    found = context.collectives.get(view.root) if isinstance(view, View) else None
    if found is None or found.kind != "all_gather" or found.refusal is not None or found.group_size < 2:
        return None
    return found


def _side(context: Context, gather: Collective) -> Side | None:
    """A gather that one matmul reads, and no other."""
    found = analyse_gather(gather, context.prover)
    if len(found.readers) != 1 or found.refusals:
        return None
    home = choose_home(found.readers)
    live = LiveOuts(gather, found.chain, found.readers, context.prover, home)
    wire = wire_dtype(gather, found.readers)
    have: torch.dtype = gather.input.meta["val"].dtype
    if live.nodes and wire != have and not rebuildable(live, wire, gather):
        wire = have
    return Side(gather, found, found.readers[0], home, live, wire)


def _contracted(builder: Builder, sides: tuple[Side, Side], size: Size) -> Any:
    """The contracted size as an argument: read off a shard, or a multiple of a dim of one."""
    try:
        return builder.size(size, [side.gather.input for side in sides])
    except UnresolvedSizeError:
        for side in sides:
            ranks = side.gather.group_size
            if side.leads and divides(ranks, size):
                return scaled(builder, side.gather, builder.size(quotient(size, ranks), [side.gather.input]))
        raise


def _rewrite(context: Context, lhs: Side, rhs: Side, matmul: Matmul, plan: Plan) -> fx.Node:
    builder, sides = context.builder, (lhs, rhs)
    for side in sides:
        replace_size_readers(builder, side.gather, side.found.chain)
    # Everything is built before anything is replaced, as in all_gather_matmul.
    with builder.before(lhs.gather.node):
        shards = []
        for side in sides:
            source = uncast(side.gather.input)
            source = source if source.meta["val"].dtype == side.wire else builder.cast(side.gather.input, side.wire)
            shards.append(shard_in_order(context, source, side.home))
        contracted = _contracted(builder, sides, matmul.lhs.meta["val"].shape[-1])
        tail = (context.token, plan.dumps(), lhs.gather.group)
        node = builder.call(
            ops.op(KIND), *shards, matmul.bias, contracted, rhs.gather.group, *tail, like=lhs.gather.node
        )
        out = builder.call(operator.getitem, node, 0, like=matmul.node)
        index, rebuilt = 1, []
        for side in sides:
            if side.live.nodes:
                gathered = builder.call(operator.getitem, node, index, like=side.gather.node)
                rebuilt.append((side, side.live.rebuild(builder, gathered, side.gather.input)))
                index += 1
        out.meta[TAKEN] = plan.site
        if matmul.batched:
            out = builder.call(aten.unsqueeze.default, out, 0)
            out.meta[TAKEN] = plan.site
        if matmul.plus is not None:
            out = builder.call(aten.add.Tensor, out, matmul.plus, like=matmul.node)
        matmul.node.replace_all_uses_with(out)
        for side, pairs in rebuilt:
            side.live.replace(pairs)
    gone = [matmul.node]
    for side in sides:
        gone += [*reversed(side.found.chain), side.gather.result, side.gather.node]
    erase_unused(context.graph, gone)
    return node
