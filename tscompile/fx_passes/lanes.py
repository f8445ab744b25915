"""The order of fused ops: one token per lane, threaded through the ops of a graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from ..lowering import ops
from ..problem import Plan
from .collectives import group_ranks

Ranks = tuple[int, ...]


def find_lanes(groups: Sequence[tuple[str, ...]]) -> dict[Ranks, Ranks]:
    """For each set of ranks that fused ops work on, one set that stands for its lane.

    The ops of a lane run in one order. Groups that have an op in common share a lane, so that the op has the same place among the
    ops of either. By ranks, not by name: several names may denote one group, and its ops share buffers and epochs.

    Args:
        groups: for each op, the names of the groups that it works on.
    """
    lanes: dict[Ranks, Ranks] = {}
    for names in groups:
        found = [lanes.setdefault(ranks, ranks) for ranks in map(group_ranks, names)]
        lanes.update({ranks: found[0] for ranks, lane in lanes.items() if lane in found})
    return lanes


def chain_tokens(
    graph: fx.Graph, token: fx.Node, fused: Sequence[tuple[fx.Node, Plan]], graph_id: str
) -> list[tuple[fx.Node, Plan]]:
    """Thread tokens through the fused ops of a sorted graph, in its order, and name their sites; returns them in that order."""
    plans = dict(fused)
    lanes = find_lanes([ops.groups_of(node.args) for node in plans])
    tokens: dict[Ranks, fx.Node] = {}
    chained: list[tuple[fx.Node, Plan]] = []
    for node in list(graph.nodes):
        if node not in plans:
            continue
        plan = replace(plans[node], site=f"{graph_id}/{plans[node].site}")
        group = ops.groups_of(node.args)[0]
        lane = lanes[group_ranks(group)]
        node.args = (*node.args[:-3], tokens.get(lane, token), plan.dumps(), group)
        with graph.inserting_after(node):
            tokens[lane] = graph.call_function(operator.getitem, (node, len(node.meta["val"]) - 1))
            tokens[lane].meta["val"] = node.meta["val"][-1]
        chained.append((node, plan))
    return chained
