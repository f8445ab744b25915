"""Editing a graph: nodes that carry their fake value from the start, and sizes as graph values."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .sizes import Size, known_eq, plain

aten = torch.ops.aten


class UnresolvedSizeError(Exception):
    """A symbolic size that no available graph value spells."""


class Builder:
    """Inserts nodes before a given node and computes their fake values; sources of symbolic sizes are searched in `sources`."""

    def __init__(self, graph: fx.Graph, fake_mode: Any) -> None:
        self.graph = graph
        self._fake_mode = fake_mode
        self._before: fx.Node | None = None

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        outer, self._before = self._before, node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._before = outer

    def call(self, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        """A call_function node with its meta["val"]; `like` passes on its stack trace."""
        node = self.graph.call_function(target, args)
        values = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], args)
        with self._fake_mode:
            node.meta["val"] = target(*values)
        if like is not None:
            for key in ("stack_trace", "nn_module_stack", "original_aten"):
                if key in like.meta:
                    node.meta[key] = like.meta[key]
        return node

    def size(self, size: Size, sources: Sequence[fx.Node]) -> Any:
        """`size` as a node argument: an int, or a node that computes it from dims of `sources`.

        Raises:
            UnresolvedSizeError: no product of neighbouring dims of a source or of a graph input equals it.
        """
        size = plain(size)
        if isinstance(size, int):
            return size
        # The graph's inputs come last: a symbol that no operand spells is usually a dim of one of them, or one itself.
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        for source in [*sources, *inputs]:
            value = source.meta.get("val")
            if isinstance(value, torch.SymInt) and known_eq(value, size):
                return source
            found = _spelled(size, value.shape) if isinstance(value, torch.Tensor) else None
            if found is not None:
                return self._product(source, found)
        raise UnresolvedSizeError(f"size {size} is not spelled by the shape of {[s.name for s in sources]} or an input")

    def _product(self, source: fx.Node, dims: range) -> Any:
        """The product of dims of `source`, as an int or a node; a static dim gets no node of its own."""
        result: Any = 1
        value: Size = 1
        for dim in dims:
            size = source.meta["val"].shape[dim]
            factor = size if isinstance(size, int) else self.call(aten.sym_size.int, source, dim)
            value = value * size
            if isinstance(result, fx.Node) or (isinstance(factor, fx.Node) and result != 1):
                result = self.graph.call_function(operator.mul, (result, factor))
                result.meta["val"] = value
            else:
                result = result * factor if isinstance(factor, int) else factor
        return result

    def shape(self, shape: Sequence[Size], sources: Sequence[fx.Node]) -> list[Any]:
        """`shape` as node arguments for reshape; one size that nothing spells may become -1."""
        args: list[Any] = []
        for size in shape:
            try:
                args.append(self.size(size, sources))
            except UnresolvedSizeError:
                if -1 in args:
                    raise
                args.append(-1)
        return args

    def reshape(self, node: fx.Node, shape: Sequence[Size], sources: Sequence[fx.Node] = ()) -> fx.Node:
        """`node` reshaped; no node if the shape is already right."""
        old = node.meta["val"].shape
        if len(old) == len(shape) and all(known_eq(a, b) for a, b in zip(old, shape, strict=True)):
            return node
        return self.call(aten.reshape.default, node, self.shape(shape, [node, *sources]))

    def matrix(self, node: fx.Node, batched: bool) -> fx.Node:
        """`node` as `[rows, cols]`; a batched operand has a leading dimension of size 1."""
        return self.call(aten.squeeze.dim, node, 0) if batched else node

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(torch.ops.prims.convert_element_type.default, node, dtype)


def _spelled(size: Size, shape: Sequence[Size]) -> range | None:
    """Neighbouring dims of `shape` whose product is `size`."""
    for start in range(len(shape)):
        total: Size = 1
        for end in range(start, len(shape)):
            total = total * shape[end]
            if known_eq(total, size):
                return range(start, end + 1)
    return None


def descendants(node: fx.Node) -> set[fx.Node]:
    """Every node that depends on `node`, itself included."""
    seen = {node}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return seen


def replace_uses(node: fx.Node, value: Any) -> None:
    """Put `value`, a node or a constant, in the place of `node` wherever that is an argument."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


def erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` that nothing uses any more, and what only they used; waits and collectives included.

    Plain dead-code elimination keeps a wait_tensor, which has side effects: the original collective would then still run, and a
    fused op would communicate twice.
    """
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.users or node.op in ("placeholder", "output") or node._erased:
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        stack.extend(inputs)
