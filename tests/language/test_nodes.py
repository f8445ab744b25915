"""Which ranks share a node."""

from __future__ import annotations

import pytest

import tscompile.language as tl


@pytest.mark.parametrize(("size", "per_node"), [(1, 1), (4, 2), (6, 3), (6, 2), (8, 8), (8, 1)])
def test_ranks_have_one_place_each(size: int, per_node: int) -> None:
    everybody = [tl.Nodes(rank, size, per_node) for rank in range(size)]
    for rank, nodes in enumerate(everybody):
        assert nodes.rank_of(nodes.node, nodes.local) == rank and nodes.count * per_node == size
        assert nodes.rank_of(nodes.node + nodes.count, nodes.local - per_node) == rank
        assert [everybody[other].node for other in nodes.neighbours] == [nodes.node] * per_node
        assert [everybody[other].local for other in nodes.counterparts] == [nodes.local] * nodes.count
        assert [everybody[other].node for other in nodes.counterparts] == list(range(nodes.count))
        assert set(nodes.neighbours) & set(nodes.counterparts) == {rank}


@pytest.mark.parametrize(
    ("rank", "size", "per_node", "message"),
    [
        (0, 6, 4, "6 ranks are no nodes of 4: pass a divisor of 6"),
        (0, 6, 0, "6 ranks are no nodes of 0"),
        (6, 6, 2, "rank 6 of 6: it must be from 0 to 5"),
    ],
)
def test_nodes_that_do_not_make_up_the_group(rank: int, size: int, per_node: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tl.Nodes(rank, size, per_node)
