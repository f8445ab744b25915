"""What a pattern is, and the registry of patterns.

A pattern file holds its op (schema, fake, reference) and its matcher; importing it registers both. A matcher gets one collective and
answers None (not mine), Keep (mine, but refused: the reason goes to the report) or a Match that knows how to rewrite the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from ..problem import FusionProblem, Keep, Plan
from .collectives import Collective
from .layout import Prover
from .rewrite import Builder, descendants


@dataclass
class Context:
    """The graph under rewriting, with everything a matcher may ask."""

    graph: fx.Graph
    builder: Builder
    prover: Prover
    token: fx.Node
    collectives: dict[fx.Node, Collective]
    _after: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)

    def after(self, node: fx.Node) -> set[fx.Node]:
        """Every node that depends on `node`, itself included."""
        found = self._after.get(node)
        if found is None:
            found = self._after[node] = descendants(node)
        return found

    def edited(self) -> None:
        """The graph is another one now: what was found out about it is forgotten."""
        self.prover = Prover()
        self._after = {}


@dataclass(frozen=True)
class Match:
    """A site that can be fused.

    collectives: the original collectives it replaces; `anchor` is the one it was found from.
    plan: complete but for its site name and executor.
    rewrite: edits the graph for a finished plan and returns the fused op's node.
    gives_way: if it is not fused, another pattern may still fuse one of its collectives.
    """

    kind: str
    collectives: tuple[Collective, ...]
    problem: FusionProblem
    plan: Plan
    shapes: tuple[str, ...]
    rewrite: Callable[[Context, Plan], fx.Node]
    gives_way: bool = False


Finder = Callable[[Context, Collective], Match | Keep | None]


@dataclass(frozen=True)
class Pattern:
    """kind: the op's name; anchor: the kind of collective it starts from; priority: lower is asked first."""

    kind: str
    anchor: str
    priority: int
    find: Finder


_patterns: dict[str, Pattern] = {}


def register_pattern(kind: str, anchor: str, priority: int = 0) -> Callable[[Finder], Finder]:
    """Decorator for a matcher; a kind has one matcher."""

    def add(find: Finder) -> Finder:
        if kind in _patterns:
            raise ValueError(f"pattern {kind} is registered twice")
        _patterns[kind] = Pattern(kind, anchor, priority, find)
        return find

    return add


def patterns_for(anchor: str) -> list[Pattern]:
    return sorted((p for p in _patterns.values() if p.anchor == anchor), key=lambda p: (p.priority, p.kind))
