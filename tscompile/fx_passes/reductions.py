"""What the reducing patterns share: their terms as op arguments, and how a result returns to the program's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..problem import FusionProblem, Keep
from .collectives import Collective
from .describe import dtype_name, shape_text
from .layout import Digit, Digits, NotStrided, natural_order
from .linear import Reduction, Sum, Term, addend_matrix, common_reduction, linear_terms
from .matmuls import Matmul
from .pattern import Context
from .rewrite import Builder
from .sizes import Size, hint, product

aten = torch.ops.aten


def reducing_terms(context: Context, collective: Collective) -> Sum | Keep | None:
    """The sum that `collective` reduces; None if no matmul is in it, Keep if its reduction is none that kernels do."""
    total = linear_terms(collective.input, context.prover, {collective.node})
    if isinstance(total, NotStrided) or not total.touches_matmul:
        return None
    if collective.reduce_op not in ("sum", "avg"):
        return Keep("reduce-op", f"the reduction is {collective.reduce_op}, only sum and avg can be fused")
    return total


def merged_reduction(sums: Sequence[Sum]) -> tuple[Reduction, tuple[int, ...]] | Keep:
    """The sums of several collectives as one reduction, and for each term which of the sums it belongs to."""
    everything = Sum(sums[0].node, [term for total in sums for term in total.terms])
    reduction = common_reduction(everything)
    if isinstance(reduction, Keep):
        return reduction
    owner = {id(term): i for i, total in enumerate(sums) for term in total.terms}
    return reduction, tuple(owner[id(t)] for t in (*reduction.matmuls, *reduction.addends))


def matmuls_of(reduction: Reduction) -> list[Matmul]:
    return [t.matmul for t in reduction.matmuls if t.matmul is not None]


def coefficients(reduction: Reduction) -> tuple[float, ...]:
    return tuple(t.coefficient for t in (*reduction.matmuls, *reduction.addends))


def reduction_problem(kind: str, collective: Collective, reduction: Reduction) -> FusionProblem:
    value = collective.input.meta["val"]
    return FusionProblem(
        kind=kind,
        group_size=collective.group_size,
        intra_host=collective.intra_host,
        device=value.device.type,
        dtype=dtype_name(value.dtype),
        comm_bytes=hint(product(value.shape)) * value.dtype.itemsize,
        gemms=tuple(m.gemm for m in matmuls_of(reduction)),
        gemm_dtypes=tuple(dtype_name(m.node.meta["val"].dtype) for m in matmuls_of(reduction)),
        reduce_op=collective.reduce_op,
    )


def reduction_shapes(verb: str, collective: Collective, reduction: Reduction) -> tuple[str, ...]:
    matmuls = (f"mm {shape_text(m.lhs)} @ {shape_text(m.rhs)}" for m in matmuls_of(reduction))
    return (*matmuls, f"{verb} {shape_text(collective.input)}")


def term_arguments(builder: Builder, reduction: Reduction) -> list[Any]:
    """[lhs], [rhs], [bias or None], [addends]: the tensor arguments of a reducing op."""
    matmuls = matmuls_of(reduction)
    addends = [addend_matrix(builder, t, reduction) for t in reduction.addends]
    return [
        [builder.matrix(m.lhs, m.batched) for m in matmuls],
        [builder.matrix(m.rhs, m.batched) for m in matmuls],
        [m.bias for m in matmuls],
        addends,
    ]


def in_order(
    builder: Builder,
    node: fx.Node,
    digits: Digits,
    shape: Sequence[Size],
    sources: Sequence[fx.Node],
    rank: Digit | None = None,
) -> fx.Node:
    """`node`, whose elements lie by falling stride of `digits`, permuted to the order of `digits` and reshaped to `shape`.

    rank: the digit that `digits` lack to tile the matmul's result, if it was scattered.
    """
    order = sorted_by_stride(digits, rank)
    if order != list(range(len(digits))):
        split = builder.reshape(node, [digits[i].size for i in order], sources)
        node = builder.call(aten.permute.default, split, [order.index(i) for i in range(len(digits))])
    return builder.reshape(node, shape, sources)


def sorted_by_stride(digits: Digits, rank: Digit | None = None) -> list[int]:
    """Indices of `digits` by falling stride; they tile the root, with or without the rank digit among them."""
    everything = digits if rank is None else (rank, *digits)
    order = natural_order(everything)
    assert order is not None, "the caller proved that the digits tile the result"
    return order if rank is None else [i - 1 for i in order if i > 0]


def replace_collective(collective: Collective, new: fx.Node) -> None:
    """`new` takes the place of the collective's result, waited for or not."""
    result = collective.result
    result.replace_all_uses_with(new)
    if collective.node is not result:
        collective.node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not result)


def roots(terms: Sequence[Term]) -> list[fx.Node]:
    return [t.root for t in terms]
