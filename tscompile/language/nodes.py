"""Which ranks of a group share a node: what algorithms of two levels are written against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Nodes:
    """The nodes of a group of ranks, as one rank sees them. Node i has the `ranks_per_node` ranks from i * ranks_per_node on.

    Nodes may be virtual, some GPUs or processes of one machine each: then schedules, flags and the order of sums are those of real
    nodes, and can be tested. What virtual nodes cannot show is the network: its speed, its transports and how they order writes, and
    what happens when it fails.

    Args:
        rank: of this rank in the group.
        size: ranks of the group.
        ranks_per_node: of every node.

    Raises:
        ValueError: nodes of `ranks_per_node` do not make up the group, or `rank` is not in it.
    """

    rank: int
    size: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}: it must be from 0 to {self.size - 1}")
        if self.ranks_per_node < 1 or self.size % self.ranks_per_node:
            raise ValueError(f"{self.size} ranks are no nodes of {self.ranks_per_node}: pass a divisor of {self.size}")

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return self.size // self.ranks_per_node

    @property
    def node(self) -> int:
        """Number of this rank's node."""
        return self.rank // self.ranks_per_node

    @property
    def local(self) -> int:
        """Number of this rank in its node."""
        return self.rank % self.ranks_per_node

    def rank_of(self, node: int, local: int) -> int:
        """The group rank that has number `local` in a node; both count modulo their ranges."""
        return node % self.count * self.ranks_per_node + local % self.ranks_per_node

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Group ranks of this rank's node, itself among them, in order."""
        return tuple(self.rank_of(self.node, local) for local in range(self.ranks_per_node))

    @property
    def counterparts(self) -> tuple[int, ...]:
        """Group ranks with this rank's number in each node, itself among them, in the order of nodes."""
        return tuple(self.rank_of(node, self.local) for node in range(self.count))
