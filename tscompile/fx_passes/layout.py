"""The layout proof: what a chain of movement ops does to its elements, whatever ops it is spelled with.

A value is proved to be a strided view of one root tensor:

    value[i0, i1, ...] = cast(root.flatten()[offset + sum of digit * stride])

where every index is a mixed-radix number whose digits carry their own stride, outermost digit first. `split > getitem > cat`
of a gather along dim 1 is then the index `s = (rank digit, position digit)`, exactly as one `permute` would have written it, and
a matcher reads the digits instead of the ops. Strides are in elements of the root in row-major order; its storage does not
matter. A stride may be 0 (expand) or negative (a reversed cat).

Digits are computed forward, op by op, on exact sizes; nothing is sampled, so a proof is a proof. Symbolic sizes go through the
same arithmetic (sizes.py) and never add a guard. A chain that is no strided view of one root ends in `NotStrided`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from .sizes import Size, divides, known_eq, known_le, product, quotient, remainder

aten = torch.ops.aten
Digits = tuple["Digit", ...]


@dataclass(frozen=True)
class Digit:
    """One digit of an index: `size` values, each step moves `stride` elements in the root."""

    size: Size
    stride: Size


@dataclass(frozen=True)
class View:
    """A tensor value as a strided view of `root`; `dims[d]` are the digits of index d, size-1 digits left out."""

    root: fx.Node
    dims: tuple[Digits, ...]
    offset: Size = 0
    casts: tuple[torch.dtype, ...] = ()

    @property
    def digits(self) -> Digits:
        """Digits of the flattened value, outermost first."""
        return tuple(digit for dim in self.dims for digit in dim)

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(product(d.size for d in dim) for dim in self.dims)


@dataclass(frozen=True)
class NotStrided:
    """The proof ended at `node`, for this reason."""

    reason: str
    node: fx.Node


Value = View | NotStrided | tuple["Value", ...]


class _NotStridedError(Exception):
    pass


def make_digits(*pairs: tuple[Size, Size]) -> Digits:
    return tuple(Digit(size, stride) for size, stride in pairs if not known_eq(size, 1))


def identity(node: fx.Node) -> View:
    """`node` as a view of itself."""
    shape = node.meta["val"].shape
    dims = [make_digits((size, product(shape[d + 1 :]))) for d, size in enumerate(shape)]
    return View(node, tuple(dims))


def merge(digits: Sequence[Digit], apart: Digit | None = None) -> Digits:
    """Join neighbours that are one longer digit; `apart` (the rank digit) is never joined with another."""
    merged: list[Digit] = []
    for digit in digits:
        if merged and digit != apart and merged[-1] != apart:
            last = merged[-1]
            if known_eq(last.stride, product([digit.size, digit.stride])):
                merged[-1] = Digit(product([last.size, digit.size]), digit.stride)
                continue
        merged.append(digit)
    return tuple(merged)


def same_digits(a: Sequence[Digit], b: Sequence[Digit]) -> bool:
    return len(a) == len(b) and all(
        known_eq(x.size, y.size) and known_eq(x.stride, y.stride) for x, y in zip(a, b, strict=True)
    )


def natural_order(digits: Sequence[Digit]) -> list[int] | None:
    """Indices of `digits` from the largest stride to stride 1 if they tile the root exactly once, else None.

    A bijection onto `[0, product of sizes)` is what "a permutation of the whole root" means.
    """
    left = list(range(len(digits)))
    order: list[int] = []
    expected: Size = 1
    while left:
        found = next((i for i in left if known_eq(digits[i].stride, expected)), None)
        if found is None:
            return None
        left.remove(found)
        order.insert(0, found)
        expected = product([expected, digits[found].size])
    return order


def carve(digits: Sequence[Digit], shape: Sequence[Size]) -> tuple[Digits, ...] | None:
    """Regroup flattened digits into dims of `shape`: what reshape does. None if some size cuts across digits."""
    stack = list(digits)
    dims: list[Digits] = []
    for size in reversed(shape):
        taken: list[Digit] = []
        missing = size
        while not known_eq(missing, 1):
            if not stack:
                return None
            digit = stack.pop()
            if known_eq(digit.size, missing) or divides(digit.size, missing):
                taken.insert(0, digit)
                missing = quotient(missing, digit.size)
            elif divides(missing, digit.size):
                taken.insert(0, Digit(missing, digit.stride))
                stack.append(Digit(quotient(digit.size, missing), product([digit.stride, missing])))
                missing = 1
            elif stack and known_eq(stack[-1].stride, product([digit.size, digit.stride])):
                outer = stack.pop()
                stack.append(Digit(product([outer.size, digit.size]), digit.stride))
            else:
                return None
        dims.insert(0, tuple(taken))
    return None if stack else tuple(dims)


def _narrow(digits: Digits, start: Size, length: Size) -> tuple[Digits, Size]:
    """Digits and offset of `index[start : start + length]`; raises if the range cuts across digits."""
    if not digits:
        return (), 0
    outer, rest = digits[0], digits[1:]
    inner = product(d.size for d in rest)
    if divides(inner, start) and divides(inner, length):
        first = quotient(start, inner) if not known_eq(start, 0) else 0
        offset = product([first, outer.stride]) if not known_eq(first, 0) else 0
        return make_digits((quotient(length, inner), outer.stride)) + rest, offset
    position = remainder(start, inner)
    if known_le(position + length, inner):
        narrowed, offset = _narrow(rest, position, length)
        return narrowed, offset + (start // inner) * outer.stride
    raise _NotStridedError("a slice cuts across the digits of an index")


def _join(pieces: Sequence[View], dim: int) -> View:
    """`cat(pieces, dim)` as one view: equal pieces at equally spaced offsets, or neighbours that continue one another."""
    first = pieces[0]
    if any(p.root is not first.root for p in pieces):
        raise _NotStridedError("cat joins several tensors")
    if any(p.casts != first.casts for p in pieces):
        raise _NotStridedError("cat joins pieces that were cast differently")
    if len(pieces) == 1:
        return first
    step = pieces[1].offset - first.offset
    alike = all(
        len(p.dims) == len(first.dims) and all(same_digits(a, b) for a, b in zip(p.dims, first.dims, strict=True))
        for p in pieces
    )
    if alike and all(known_eq(b.offset - a.offset, step) for a, b in pairwise(pieces)):
        digits = make_digits((len(pieces), step)) + first.dims[dim]
        return replace(first, dims=(*first.dims[:dim], digits, *first.dims[dim + 1 :]))
    size: Size = 0
    stride: Size | None = None
    for piece in pieces:
        digits = piece.dims[dim]
        others = [same_digits(a, b) for i, (a, b) in enumerate(zip(piece.dims, first.dims, strict=True)) if i != dim]
        if len(digits) > 1 or not all(others):
            raise _NotStridedError("the pieces of a cat are no single strided view")
        if digits:
            if stride is not None and not known_eq(stride, digits[0].stride):
                raise _NotStridedError("the pieces of a cat have different strides")
            stride = digits[0].stride
    for piece in pieces:
        if stride is None or not known_eq(piece.offset - first.offset, size * stride):
            raise _NotStridedError("the pieces of a cat are out of order or apart")
        size = size + piece.shape[dim]
    digits = make_digits((size, stride if stride is not None else 1))
    return replace(first, dims=(*first.dims[:dim], digits, *first.dims[dim + 1 :]))


def _shape(node: fx.Node) -> Sequence[Size]:
    shape: Sequence[Size] = node.meta["val"].shape
    return shape


def _dim(view: View, dim: Any) -> int:
    return int(dim) % max(len(view.dims), 1)


def _reshape(node: fx.Node, view: View) -> Value:
    dims = carve(view.digits, _shape(node))
    if dims is None:
        raise _NotStridedError("a reshape cuts across the digits of an index")
    return replace(view, dims=dims)


def _permute(node: fx.Node, view: View) -> Value:
    order: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    return replace(view, dims=tuple(view.dims[_dim(view, d)] for d in order))


def _transpose(node: fx.Node, view: View) -> Value:
    dims = list(view.dims)
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, len(dims) - 1)
    i, j = _dim(view, a), _dim(view, b)
    dims[i], dims[j] = dims[j], dims[i]
    return replace(view, dims=tuple(dims))


def _unsqueeze(node: fx.Node, view: View) -> Value:
    at = int(node.args[1]) % (len(view.dims) + 1)  # type: ignore[arg-type]
    return replace(view, dims=(*view.dims[:at], (), *view.dims[at:]))


def _expand(node: fx.Node, view: View) -> Value:
    shape = _shape(node)
    added = len(shape) - len(view.dims)
    dims: list[Digits] = [make_digits((size, 0)) for size in shape[:added]]
    for size, old, digits in zip(shape[added:], view.shape, view.dims, strict=True):
        dims.append(digits if known_eq(size, old) else make_digits((size, 0)))
    return replace(view, dims=tuple(dims))


def _narrowed(view: View, dim: int, start: Size, length: Size) -> View:
    digits, offset = _narrow(view.dims[dim], start, length)
    return replace(view, dims=(*view.dims[:dim], digits, *view.dims[dim + 1 :]), offset=view.offset + offset)


def _slice(node: fx.Node, view: View) -> Value:
    dim = _dim(view, node.args[1] if len(node.args) > 1 else 0)
    start: Any = node.args[2] if len(node.args) > 2 else 0
    if len(node.args) > 4 and node.args[4] != 1:
        raise _NotStridedError("a slice with a step")
    start = 0 if start is None else start.meta["val"] if isinstance(start, fx.Node) else start
    if isinstance(start, int) and start < 0:
        start = start + view.shape[dim]
    return _narrowed(view, dim, start, _shape(node)[dim])


def _select(node: fx.Node, view: View) -> Value:
    dim, index = _dim(view, node.args[1]), node.args[2]
    if not isinstance(index, int):
        raise _NotStridedError("select by a symbolic index")
    narrowed = _narrowed(view, dim, index if index >= 0 else index + view.shape[dim], 1)
    return replace(narrowed, dims=narrowed.dims[:dim] + narrowed.dims[dim + 1 :])


def _split(node: fx.Node, view: View) -> Value:
    dim = _dim(view, node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0))
    parts: list[Value] = []
    start: Size = 0
    for part in node.meta["val"]:
        parts.append(_narrowed(view, dim, start, part.shape[dim]))
        start = start + part.shape[dim]
    return tuple(parts)


def _unbind(node: fx.Node, view: View) -> Value:
    dim = _dim(view, node.args[1] if len(node.args) > 1 else 0)
    parts = [_narrowed(view, dim, i, 1) for i in range(len(node.meta["val"]))]
    return tuple(replace(p, dims=p.dims[:dim] + p.dims[dim + 1 :]) for p in parts)


def _cast(node: fx.Node, view: View) -> Value:
    dtype = node.meta["val"].dtype
    before = view.casts[-1] if view.casts else view.root.meta["val"].dtype
    return view if dtype == before else replace(view, casts=(*view.casts, dtype))


def _same(node: fx.Node, view: View) -> Value:
    return view


MOVEMENTS: dict[Any, Callable[[fx.Node, View], Value]] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten._to_copy.default: _cast,
    torch.ops.prims.convert_element_type.default: _cast,
    torch.ops._c10d_functional.wait_tensor.default: _same,
}
JOINS = (aten.cat.default, aten.stack.default)


def is_movement(node: fx.Node) -> bool:
    """True if `node` only moves (or casts) elements of its inputs."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and isinstance(source.meta.get("val"), (tuple, list)) and is_movement(source)
    return node.target in MOVEMENTS or node.target in JOINS


def walk_moved(start: Sequence[fx.Node], step: Callable[[fx.Node], Sequence[fx.Node]]) -> list[fx.Node]:
    """`start` and what is reached from it by stepping on from nodes that move elements; in the order of discovery."""
    seen = dict.fromkeys(start)
    stack = list(start)
    while stack:
        node = stack.pop()
        if is_movement(node):
            for other in step(node):
                if other not in seen:
                    seen[other] = None
                    stack.append(other)
    return list(seen)


class Prover:
    """Proves layouts on one state of a graph; make a new one after the graph was edited.

    Args:
        known: what is known of some nodes; proofs end there.
    """

    def __init__(self, known: Mapping[fx.Node, View] | None = None) -> None:
        self._proved: dict[fx.Node, Value] = dict(known) if known else {}

    def view(self, node: fx.Node, known: Mapping[fx.Node, View] | None = None) -> View | NotStrided:
        """`node` as a view of the first ancestor that is no movement op, or of what `known` says an ancestor is."""
        memo: dict[fx.Node, Value] = dict(known) if known else self._proved
        value = self._value(node, memo)
        if isinstance(value, tuple):
            return NotStrided("a list of tensors", node)
        return value

    def _value(self, node: fx.Node, memo: dict[fx.Node, Value]) -> Value:
        # Iterative: chains are as long as the user made them, Python's stack is not.
        stack = [node]
        while stack:
            top = stack[-1]
            if top in memo:
                stack.pop()
                continue
            if not is_movement(top):
                memo[top] = self._root(top)
                continue
            waiting = [
                n for n in top.all_input_nodes if n not in memo and isinstance(_val(n), (torch.Tensor, tuple, list))
            ]
            if waiting:
                stack.extend(waiting)
                continue
            memo[top] = self._apply(top, memo)
        return memo[node]

    @staticmethod
    def _root(node: fx.Node) -> Value:
        if not isinstance(_val(node), torch.Tensor):
            return NotStrided("not a tensor", node)
        if any(known_eq(size, 0) for size in _shape(node)):
            return NotStrided("a tensor without elements", node)
        return identity(node)

    @staticmethod
    def _apply(node: fx.Node, memo: Mapping[fx.Node, Value]) -> Value:
        try:
            if node.target in JOINS:
                return _apply_join(node, memo)
            source: fx.Node = node.args[0]  # type: ignore[assignment]
            value = memo[source]
            if isinstance(value, NotStrided):
                return value
            if node.target is operator.getitem:
                return value[node.args[1]] if isinstance(value, tuple) else NotStrided("getitem of a tensor", node)  # type: ignore[index]
            if isinstance(value, tuple):
                return NotStrided("a list of tensors", node)
            return MOVEMENTS[node.target](node, value)
        except _NotStridedError as error:
            return NotStrided(str(error), node)


def _apply_join(node: fx.Node, memo: Mapping[fx.Node, Value]) -> Value:
    values = [memo[n] for n in node.args[0]]  # type: ignore[union-attr, index]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    pieces: list[View] = []
    for value in values:
        if isinstance(value, NotStrided):
            return value
        if isinstance(value, tuple):
            return NotStrided("a list of tensors", node)
        pieces.append(value)
    at = int(dim) % len(_shape(node))  # type: ignore[arg-type]
    if node.target is aten.stack.default:
        pieces = [replace(p, dims=(*p.dims[:at], (), *p.dims[at:])) for p in pieces]
    return _join(pieces, at)


def _val(node: fx.Node) -> Any:
    return node.meta.get("val")


def effective_cast(view: View) -> torch.dtype | None:
    """The one dtype that `view.casts` amount to, or None if an intermediate cast loses bits that the last one has."""
    start: torch.dtype = view.root.meta["val"].dtype
    if not view.casts:
        return start
    final = view.casts[-1]
    narrowest = start if _holds(final, start) else final
    return final if all(_holds(cast, narrowest) for cast in view.casts[:-1]) else None


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """True if every value of `narrow` is exact in `wide`."""
    return wide == narrow or (
        wide.is_floating_point and narrow.is_floating_point and torch.promote_types(wide, narrow) == wide
    )
