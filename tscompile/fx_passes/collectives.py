"""Canonical collectives: one record per collective op of a graph, whatever overload wrote it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..problem import Keep
from .sizes import Size, known_eq

_c10d = torch.ops._c10d_functional
_KINDS: dict[Any, str] = {
    _c10d.all_gather_into_tensor.default: "all_gather",
    _c10d.reduce_scatter_tensor.default: "reduce_scatter",
    _c10d.all_reduce.default: "all_reduce",
    _c10d.all_reduce_.default: "all_reduce",
    _c10d.all_to_all_single.default: "all_to_all",
    torch.ops._dtensor.shard_dim_alltoall.default: "all_to_all",
}
# Ops of other packages, known by name: nothing of those packages is imported. DeepSpeed's takes (input, group name), exchanges equal
# blocks of dim 0 and has finished when it returns.
_FOREIGN = {"deepspeed.dim_zero_all_to_all.default": "all_to_all"}
_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "symm_mem", "_dtensor")
_NOT_COLLECTIVES = ("wait_tensor", "mesh_get_process_group")


@dataclass(frozen=True)
class Collective:
    """A collective in a graph.

    node: the op; wait: its wait_tensor, if the graph has one (selective checkpointing may save the op's result un-waited, and some ops
        need none).
    kind: "all_gather" | "reduce_scatter" | "all_reduce" | "all_to_all" | "other".
    group: process group name; "" if the graph does not say it as a constant (`refusal` tells why).
    """

    node: fx.Node
    wait: fx.Node | None
    kind: str
    group: str
    group_size: int
    reduce_op: str
    refusal: Keep | None = None

    @property
    def intra_host(self) -> bool:
        return intra_host(group_ranks(self.group))

    @property
    def op_name(self) -> str:
        return str(self.node.target).removesuffix(".default")

    @property
    def input(self) -> fx.Node:
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return source

    @property
    def result(self) -> fx.Node:
        return self.wait if self.wait is not None else self.node


def is_collective(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    known = target.namespace in _NAMESPACES and not any(name in str(target) for name in _NOT_COLLECTIVES)
    return known or str(target) in _FOREIGN


def find_collectives(graph: fx.Graph) -> list[Collective]:
    """Every collective of the graph, in graph order."""
    return [_canonical(node) for node in graph.nodes if is_collective(node)]


def _canonical(node: fx.Node) -> Collective:
    kind = _KINDS.get(node.target) or _FOREIGN.get(str(node.target), "other")
    waits = [user for user in node.users if user.target is _c10d.wait_tensor.default]
    wait = waits[0] if len(waits) == 1 else None
    group = node.args[-1] if node.args else ""
    reduce_op = str(node.args[1]) if kind in ("all_reduce", "reduce_scatter") else ""
    refusal = None
    if len(waits) > 1:
        refusal = Keep("waited-twice", "the collective is waited for more than once")
    if not isinstance(group, str):
        refusal = Keep(
            "group-not-constant",
            "the process group is a value of the graph (compile_on_one_rank), not a constant name",
        )
        group = ""
    elif kind == "other":
        refusal = Keep("unknown-collective", f"{node.target} is not one of the collectives that patterns start from")
    elif node.target is _c10d.all_to_all_single.default and not _even(node):
        refusal = Keep(
            "uneven-splits", "the peers exchange parts of different sizes, or of sizes that are known only at run time"
        )
    return Collective(node, wait, kind, group, len(group_ranks(group)), reduce_op, refusal)


def _even(node: fx.Node) -> bool:
    """True if an all_to_all_single is known to send and receive parts of one size."""
    splits: list[Any] = [*node.args[1], *node.args[2]]  # type: ignore[misc]
    sizes: list[Size] = [split.meta["val"] if isinstance(split, fx.Node) else split for split in splits]
    return all(known_eq(size, sizes[0]) for size in sizes[1:])


def group_ranks(group: str) -> tuple[int, ...]:
    """Global ranks of the group, () if it does not exist here (a graph read outside its job). Not for the graph itself."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    if not group:
        return ()
    try:
        found = c10d._resolve_process_group(group)  # type: ignore[arg-type, unused-ignore]
        return tuple(dist.get_process_group_ranks(found))
    except (RuntimeError, ValueError, KeyError):
        return ()


def intra_host(ranks: tuple[int, ...]) -> bool:
    """True unless torchrun's numbering says that the ranks are on several hosts; what is true at run time is voted on."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    return not local or len({rank // local for rank in ranks}) <= 1
