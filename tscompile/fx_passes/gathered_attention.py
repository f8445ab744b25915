"""Context parallelism: attention on gathered keys and values, and the scatter of their gradients: recognised, and kept.

    k, v ─▶ all_gather ─▶ wait ─▶ (view, split + cat, unbind)* ─▶ attention
    attention backward ─▶ (slice + cat, stack)* ─▶ reduce_scatter ─▶ wait

Every rank keeps its queries and needs all keys and values; pieces of the sequence may be put in another order on the way (zig-zag
for causal masks). An attention that takes keys and values piece by piece as they arrive would hide the gather; there is no kernel for
that yet.
"""

from __future__ import annotations

from ..problem import Keep
from .attention import fed_by_attention, feeds_attention
from .collectives import Collective
from .pattern import Context, register_pattern


@register_pattern("all_gather_attention", anchor="all_gather", priority=2)
def find_all_gather(context: Context, gather: Collective) -> Keep | None:
    if not feeds_attention(gather.node):
        return None
    return Keep("no-kernel", "no kernel starts the attention before all keys and values are gathered")


@register_pattern("attention_reduce_scatter", anchor="reduce_scatter", priority=2)
def find_reduce_scatter(context: Context, scatter: Collective) -> Keep | None:
    if not fed_by_attention(scatter.input):
        return None
    return Keep("no-kernel", "no kernel sends gradients of keys and values while others are computed")
