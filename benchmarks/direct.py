"""Fused ops called by hand, through the real runtime: what the pass would put into a graph, without a graph.

For benchmarks and tests in which shapes matter and patterns do not. A `DirectOp` asks the planner, starts a graph of one
site (so that the ranks vote as they would for a compiled one), and then calls `torch.ops.tscompile.<kind>`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tscompile.fx_passes import patterns  # noqa: F401  (importing it registers the ops)
from tscompile.lowering import planner, runtime
from tscompile.observe import ledger
from tscompile.options import Options
from tscompile.problem import Delivery, Departure, FusionProblem, GatherUse, Gemm, Keep, Plan, Row
from tscompile.templates.attention import sent_shapes

COLLECTIVES = {
    "all_gather_matmul": "_c10d_functional.all_gather_into_tensor",
    "all_to_all_matmul": "_c10d_functional.all_to_all_single",
    "all_to_all_permute": "_c10d_functional.all_to_all_single",
    "matmul_all_to_all": "_c10d_functional.all_to_all_single",
    "mesh_matmul": "_c10d_functional.all_gather_into_tensor",
    "matmul_reduce_scatter": "_c10d_functional.reduce_scatter_tensor",
    "matmul_all_reduce": "_c10d_functional.all_reduce",
}


class NotFusedError(RuntimeError):
    """The planner keeps the original ops, or the ranks did not agree to run the fused one."""


@dataclass
class DirectOp:
    """One site. `call(*args)` returns its outputs without the token."""

    kind: str
    plan: Plan
    group_name: str
    token: Tensor
    manifest: str

    def __post_init__(self) -> None:
        self._op = getattr(torch.ops.tscompile, self.kind).default
        self._text = self.plan.dumps()
        torch.ops.tscompile.begin(self.token, self.manifest)
        for row in ledger.rows():
            if row.site == self.plan.site and row.decision != "fused":
                raise NotFusedError(f"[{row.code}] {row.reason}")

    def call(self, *args: Any) -> list[Tensor]:
        outputs: list[Tensor] = self._op(*args, self.token, self._text, self.group_name)
        return outputs[:-1]

    def begin_again(self) -> None:
        """What a compiled graph does at each start."""
        torch.ops.tscompile.begin(self.token, self.manifest)

    def launch(self, *args: Any) -> list[Tensor]:
        """The same without the dispatcher: what the runtime itself costs the host."""
        return runtime.launch(self.plan, self.group_name, args, _no_reference)


def _no_reference() -> list[Tensor]:
    raise NotFusedError("the ranks run the original ops by now")


class BoundOp:
    """An op with its arguments: a call without any. It reads the tensors anew each time."""

    def __init__(self, op: DirectOp, args: tuple[Any, ...]) -> None:
        self.op, self.args = op, args

    def __call__(self) -> list[Tensor]:
        return self.op.call(*self.args)


def prepare(
    plan: Plan,
    problem: FusionProblem,
    args: Sequence[Any],
    group: dist.ProcessGroup,
    timeout_s: float | None = None,
    second: dist.ProcessGroup | None = None,
) -> DirectOp:
    """Plan, vote, and return the op; every rank of the group calls this, and of the second one if there is one. `args` are those of
    the first call.

    Raises:
        NotFusedError: with the code and the reason that the report would show.
    """
    decision = planner.plan(problem, plan, Options.parse({"tilescale.fuse": "always"})[0])
    if isinstance(decision, Keep):
        raise NotFusedError(f"[{decision.code}] {decision.reason}")
    # A vote on an equal digest is not held again. A site for which another time is predicted runs in another form: another one.
    facts = [plan.dumps(), repr(problem), repr(decision), timeout_s]
    name = f"direct-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"
    plan = replace(plan, site=f"{name}/0:{plan.kind}", executor=decision.executor)
    row = Row(
        site=plan.site,
        graph=name,
        phase="inference",
        pattern=plan.kind,
        group=group.group_name,
        ranks=group.size(),
        collectives=[COLLECTIVES[plan.kind]] * (2 if second else 1),
        decision="fused",
        code="fused",
        reason="called by hand",
        dtype=problem.dtype,
        bytes=problem.comm_bytes,
    )
    entry = {
        "executor": plan.executor,
        "digest": hashlib.sha256(plan.dumps().encode()).hexdigest(),
        "sites": 1,
        "scratch_bytes": planner.prepare(plan, group.size(), args),
    }
    options = {"timeout_s": timeout_s, "heap_bytes": None, "verify": False}
    names = [each.group_name for each in (group, second) if each is not None]
    manifest = json.dumps(
        {
            "version": 1,
            "graph": name,
            "groups": dict.fromkeys(names, entry),
            "meshes": [{"groups": names, "sites": [plan.site]}] if second and plan.executor == "nvlink" else [],
            "rows": [row.to_dict()],
            "runtime": options,
        }
    )
    token = torch.zeros(1, dtype=torch.int64, device=problem.device)
    return DirectOp(plan.kind, plan, group.group_name, token, manifest)


def _problem(kind: str, x: Tensor, gemms: list[Gemm], elements: int, group: dist.ProcessGroup, **more: Any) -> Any:
    return FusionProblem(
        kind=kind,
        group_size=group.size(),
        intra_host=True,
        device=x.device.type,
        dtype=str(x.dtype).removeprefix("torch."),
        comm_bytes=elements * x.element_size(),
        gemms=tuple(gemms),
        **more,
    )


def all_gather_linear(
    shard: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    gathered: bool = False,
    plain_layout: bool = False,
    group: dist.ProcessGroup | None = None,
    timeout_s: float | None = None,
) -> BoundOp:
    """The rows of all ranks' `shard [m, k]`, times each weight: `[n, k]` as in nn.Linear, or `[k, n]` if `plain_layout`.

    The results of a call are one `[R * m, n]` per weight, then the gathered tensor as `[1, R * m * k]` if asked for.
    """
    group = group or dist.group.WORLD
    assert group is not None
    rows, k = shard.shape[0] * group.size(), shard.shape[1]
    others = [w if plain_layout else w.t() for w in weights]
    args = (shard.view(1, -1), others, list(biases or [None] * len(weights)))
    use = GatherUse("lhs", False, "rows", str(shard.dtype).removeprefix("torch."))
    plan = Plan("all_gather_matmul", "", "", use.dtype, uses=(use,) * len(others), return_gathered=gathered)
    gemms = [Gemm(rows, other.shape[1], k) for other in others]
    problem = _problem(plan.kind, shard, gemms, rows * k, group, return_gathered=gathered)
    return BoundOp(prepare(plan, problem, args, group, timeout_s), args)


def all_gather_matmul(
    shard: Tensor,
    uses: Sequence[GatherUse],
    others: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    gathered: bool = False,
    group: dist.ProcessGroup | None = None,
    timeout_s: float | None = None,
) -> BoundOp:
    """All ranks' `shard [P, Q]`, read by any mix of matmuls; each of `others` is the other operand of one.

    The results of a call are one matrix per use, then the gathered tensor as `[P, R * Q]` if asked for.
    """
    group = group or dist.group.WORLD
    assert group is not None
    elements = shard.numel() * group.size()
    args = (shard, list(others), list(biases or [None] * len(others)))
    dtype = str(shard.dtype).removeprefix("torch.")
    plan = Plan("all_gather_matmul", "", "", dtype, uses=tuple(uses), return_gathered=gathered)
    gemms = []
    for use, other in zip(uses, others, strict=True):
        k, free = other.shape if use.side == "lhs" else reversed(other.shape)
        m, n = (elements // k, free) if use.side == "lhs" else (free, elements // k)
        gemms.append(Gemm(m, n, k))
    problem = _problem(plan.kind, shard, gemms, elements, group, return_gathered=gathered, pieces=shard.shape[0])
    return BoundOp(prepare(plan, problem, args, group, timeout_s), args)


def mesh_matmul(
    lhs: Tensor,
    rhs: Tensor,
    uses: tuple[GatherUse, GatherUse],
    contracted: int,
    bias: Tensor | None = None,
    *,
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
    gathered: tuple[bool, bool] = (False, False),
    timeout_s: float | None = None,
) -> BoundOp:
    """Shards [P, Q] of both operands, the left one gathered in the first group and the right one in the second, multiplied.

    The results of a call are one matrix, then the gathered operands that are asked for, as `[P, R * Q]`.
    """
    row, column = groups
    dtype = str(lhs.dtype).removeprefix("torch.")
    plan = Plan("mesh_matmul", "", "", dtype, uses, return_gathered=gathered[0], return_second=gathered[1])
    plan = replace(plan, second_size=column.size())
    elements = [shard.numel() * group.size() for shard, group in zip((lhs, rhs), groups, strict=True)]
    m, n = (count // contracted for count in elements)
    problem = _problem(
        plan.kind,
        lhs,
        [Gemm(m, n, contracted)],
        elements[0],
        row,
        gemm_dtypes=(dtype,),
        return_gathered=gathered[0],
        return_second=gathered[1],
        pieces=lhs.shape[0],
        second_group_size=column.size(),
        second_comm_bytes=elements[1] * rhs.element_size(),
        second_pieces=rhs.shape[0],
    )
    args = (lhs, rhs, bias, contracted, column.group_name)
    return BoundOp(prepare(plan, problem, args, row, timeout_s, column), args)


def reduce_linear(
    kind: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reduce_op: str = "sum",
    plain_layout: bool = False,
    group: dist.ProcessGroup | None = None,
    timeout_s: float | None = None,
) -> BoundOp:
    """matmul_reduce_scatter or matmul_all_reduce of `x [m, k]` and a weight `[n, k]` (`[k, n]` if `plain_layout`)."""
    group = group or dist.group.WORLD
    assert group is not None
    rhs = weight if plain_layout else weight.t()
    args: tuple[Any, ...] = ([x], [rhs], [bias], [])
    if kind == "matmul_reduce_scatter":
        args = (*args, 1)
    dtype = str(x.dtype).removeprefix("torch.")
    plan = Plan(kind, "", "", dtype, coefficients=(1.0,), term_group=(0,), reduce_op=reduce_op)  # type: ignore[arg-type]
    (m, k), n = x.shape, rhs.shape[1]
    problem = _problem(kind, x, [Gemm(m, n, k)], m * n, group, reduce_op=reduce_op)
    return BoundOp(prepare(plan, problem, args, group, timeout_s), args)


def exchange(
    inputs: Sequence[Tensor],
    deliveries: Sequence[Delivery],
    joins: Sequence[int],
    *,
    group: dist.ProcessGroup | None = None,
    timeout_s: float | None = None,
) -> BoundOp:
    """all_to_all_permute of inputs `[R, f1, ..., fk]` in any strides; the results of a call are its outputs."""
    group = group or dist.group.WORLD
    assert group is not None
    x = inputs[0]
    dtype = str(x.dtype).removeprefix("torch.")
    plan = Plan("all_to_all_permute", "", "", dtype, deliveries=tuple(deliveries), joins=tuple(joins))
    elements = sum(each.numel() for each in inputs)
    problem = _problem(plan.kind, x, [], elements, group, exchanges=len(inputs))
    args = (list(inputs),)
    return BoundOp(prepare(plan, problem, args, group, timeout_s), args)


def exchange_matmul(
    inputs: Sequence[Tensor],
    others: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    returned: bool = False,
    group: dist.ProcessGroup | None = None,
    timeout_s: float | None = None,
) -> BoundOp:
    """all_to_all_matmul of inputs `[R, M, O, Q]` and right operands `[K, N]`.

    The results of a call are one `[M, N]` for each of these, then what was received, `[M, K]`, if asked for.
    """
    group = group or dist.group.WORLD
    assert group is not None
    x, elements = inputs[0], sum(each.numel() for each in inputs)
    dtype = str(x.dtype).removeprefix("torch.")
    use = GatherUse("lhs", False, "cols", dtype)
    plan = Plan("all_to_all_matmul", "", "", dtype, uses=(use,) * len(others), return_gathered=returned)
    problem = _problem(
        plan.kind,
        x,
        [Gemm(x.shape[1], other.shape[1], other.shape[0]) for other in others],
        elements,
        group,
        gemm_dtypes=(dtype,) * len(others),
        return_gathered=returned,
        pieces=sum(each.shape[1] * each.shape[2] for each in inputs),
        exchanges=len(inputs),
        panels_of=tuple((each.shape[2], each.shape[3]) for each in inputs),
        copied_bytes=sum(0 if each[0].is_contiguous() else each.numel() * each.element_size() for each in inputs),
    )
    args = (list(inputs), list(others), list(biases or [None] * len(others)))
    return BoundOp(prepare(plan, problem, args, group, timeout_s), args)


def matmul_exchange(
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    departures: Sequence[Departure],
    grids: Sequence[Sequence[int]],
    deliveries: Sequence[Delivery],
    joins: Sequence[int],
    biases: Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    timeout_s: float | None = None,
) -> BoundOp:
    """matmul_all_to_all of results `lhs [M, K] @ rhs [K, N]`; the results of a call are its outputs.

    Args:
        departures: what each exchange sends of which result. grids: for each the sizes that the columns are reshaped to.
    """
    group = group or dist.group.WORLD
    assert group is not None
    x = lhs[0]
    dtype = str(x.dtype).removeprefix("torch.")
    plan = Plan("matmul_all_to_all", "", "", dtype, deliveries=tuple(deliveries), joins=tuple(joins))
    plan = replace(plan, departures=tuple(departures))
    gemms = [Gemm(a.shape[0], b.shape[1], a.shape[1]) for a, b in zip(lhs, rhs, strict=True)]
    sizes = [size for grid in grids for size in grid]
    elements = sum(prod(shape) for shape in sent_shapes(departures, sizes))
    known = {"exchanges": len(departures), "grids": tuple(map(tuple, grids))}
    problem = _problem(plan.kind, x, gemms, elements, group, gemm_dtypes=(dtype,) * len(gemms), **known)
    args = (list(lhs), list(rhs), list(biases or [None] * len(lhs)), sizes)
    return BoundOp(prepare(plan, problem, args, group, timeout_s), args)
