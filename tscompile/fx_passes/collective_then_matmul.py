"""Reductions whose result a matmul reads: recognised, and kept for a stated reason.

    x ─▶ all_reduce | reduce_scatter ─▶ wait ─▶ (view, cast)* ─▶ mm

Input gradients of a layer that gathers its output look like this. The matmul cannot start before its rows are reduced, and what
produces x is no matmul that could hide the exchange, so only splitting the reduction into chunks would overlap anything.
"""

from __future__ import annotations

from ..problem import Keep
from .collectives import Collective
from .gathers import movement_users
from .matmuls import as_matmul
from .pattern import Context, register_pattern

_NO_KERNEL = Keep("no-kernel", "no kernel overlaps this reduction with the matmul that reads its result")


def _read_by_matmul(collective: Collective) -> bool:
    members = [collective.node, *movement_users(collective.node)]
    return any(as_matmul(user) is not None for node in members for user in node.users)


@register_pattern("reduce_scatter_matmul", anchor="reduce_scatter", priority=1)
def find_reduce_scatter(context: Context, collective: Collective) -> Keep | None:
    return _NO_KERNEL if _read_by_matmul(collective) else None


@register_pattern("all_reduce_matmul", anchor="all_reduce", priority=1)
def find_all_reduce(context: Context, collective: Collective) -> Keep | None:
    return _NO_KERNEL if _read_by_matmul(collective) else None
