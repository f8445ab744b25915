"""Registration of the fused ops: one `tscompile::<kind>` per pattern, and `tscompile::begin`.

Every op ends in `Tensor token, str plan, str group_name` and returns its outputs followed by a new token, which the next op of
the group takes: this fixes the order of the group's ops without any knowledge of the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from ..problem import Plan
from ..templates.fresh import maker
from . import runtime

_lib = torch.library.Library("tscompile", "DEF")
_c10d = torch.ops._c10d_functional

Reference = Callable[..., list[Tensor]]
Fake = Callable[..., list[Tensor]]
_kinds: set[str] = set()


def group_size(group_name: str) -> int:
    return int(c10d._resolve_process_group(group_name).size())  # type: ignore[arg-type, unused-ignore]


def define_op(
    kind: str, inputs: str, *, fake: Fake, reference: Reference, launch: Callable[..., list[Tensor]] | None = None
) -> None:
    """Register `tscompile::<kind>(<inputs>, Tensor token, str plan, str group_name) -> Tensor[]`.

    fake(plan, ranks, *inputs) and reference(plan, group_name, *inputs) return the outputs without the token. The reference is made
    of c10d and aten ops only and issues the collectives that the program had, in their order. `launch` stands in for
    runtime.launch and may hand the reference more. A str among the inputs is the name of a further group that the op works on.
    """
    if kind in _kinds:
        raise ValueError(f"op {kind} is registered twice")
    _kinds.add(kind)
    _lib.define(
        f"{kind}({inputs}, Tensor token, str plan, str group_name) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
    )

    def run(*args: Any) -> list[Tensor]:
        *tensors, token, plan_text, group_name = args
        plan = Plan.loads(plan_text)
        outputs = (launch or runtime.launch)(
            plan, group_name, tuple(tensors), lambda *gathered: reference(plan, group_name, *tensors, *gathered)
        )
        return [*outputs, maker(token.device)((1,), (1,), torch.int64)]

    def run_fake(*args: Any) -> list[Tensor]:
        *tensors, token, plan_text, group_name = args
        return [*fake(Plan.loads(plan_text), group_size(group_name), *tensors), torch.empty_like(token)]

    _lib.impl(kind, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tscompile::{kind}", run_fake, lib=_lib)


def groups_of(args: Sequence[Any]) -> tuple[str, ...]:
    """Names of the groups that a fused op with these arguments works on: first the one that every op has."""
    return (args[-1], *(arg for arg in args[:-3] if isinstance(arg, str)))


def op(kind: str) -> Any:
    return getattr(torch.ops.tscompile, kind).default


# `begin` is declared to write its token: an op without users that mutates nothing would be dropped as dead code.
_lib.define("begin(Tensor(a!) token, str manifest) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_lib.impl("begin", lambda token, manifest: runtime.begin(manifest), "CompositeExplicitAutograd")
torch.library.register_fake("tscompile::begin", lambda token, manifest: None, lib=_lib)


def all_gather(x: Tensor, ranks: int, group_name: str) -> Tensor:
    """`[n, ...]` of each rank -> `[ranks * n, ...]`."""
    result: Tensor = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.contiguous(), ranks, group_name))
    return result


def reduce_scatter(x: Tensor, reduce_op: str, ranks: int, group_name: str) -> Tensor:
    """`[ranks * n, ...]` -> `[n, ...]`, reduced over ranks."""
    result: Tensor = _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x.contiguous(), reduce_op, ranks, group_name))
    return result


def all_to_all(x: Tensor, group_name: str) -> Tensor:
    """Block d of dim 0, `[R, ...]`, to rank d -> block s from rank s."""
    splits = [1] * x.shape[0]
    result: Tensor = _c10d.wait_tensor(_c10d.all_to_all_single(x.contiguous(), splits, splits, group_name))
    return result


def all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    result: Tensor = _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), reduce_op, group_name))
    return result


def dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def matmul(lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(lhs, rhs) if bias is None else torch.addmm(bias, lhs, rhs)


def weighted_terms(
    plan: Plan,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    addends: Sequence[Tensor],
) -> list[Tensor]:
    """Each term of a sum `[M, N]` in the plan's dtype, its coefficient applied: matmuls first, then addends."""
    dtype = dtype_of(plan.dtype)
    terms = [matmul(a, b, c).to(dtype) for a, b, c in zip(lhs, rhs, biases, strict=True)]
    terms += [addend.to(dtype) for addend in addends]
    return [t if c == 1 else t * c for t, c in zip(terms, plan.coefficients, strict=True)]
