"""The layout proof against really running the movement on index tensors: a wrong proof is the worst bug this project can have."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from tscompile.fx_passes.layout import (
    Digit,
    NotStrided,
    Prover,
    View,
    carve,
    effective_cast,
    merge,
    natural_order,
    same_digits,
)

aten = torch.ops.aten


class Chain:
    """A graph of movement ops, run on an index tensor while it is built."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.graph = fx.Graph()
        numel = int(torch.Size(shape).numel())
        self.root = self.graph.placeholder("x")
        self.root.meta["val"] = torch.empty(shape, device="meta")
        self.real: dict[fx.Node, Any] = {self.root: torch.arange(numel).view(shape)}

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        self.real[node] = target(*fx.map_arg(args, lambda n: self.real[n]))
        return node

    def split_cat(self, node: fx.Node, parts: int, split_dim: int, cat_dim: int) -> fx.Node:
        size = node.meta["val"].shape[split_dim] // parts
        pieces = self.call(aten.split.Tensor, node, size, split_dim)
        return self.call(aten.cat.default, [self.call(operator.getitem, pieces, i) for i in range(parts)], cat_dim)


def evaluate(view: View) -> torch.Tensor:
    """The root offsets that a view claims, as an index tensor of its shape."""
    offsets = torch.tensor(int(view.offset))
    shape: list[int] = []
    for dim in view.dims:
        index = torch.zeros(1, dtype=torch.int64)
        for digit in dim:
            index = (index[:, None] + torch.arange(int(digit.size)) * int(digit.stride)).flatten()
        offsets = offsets[..., None] + index
        shape.append(index.numel())
    return offsets.reshape(shape)


def check(chain: Chain, node: fx.Node) -> View:
    view = Prover().view(node)
    assert isinstance(view, View), view
    assert view.root is chain.root
    assert torch.equal(evaluate(view), chain.real[node])
    return view


def factorizations(size: int) -> list[tuple[int, ...]]:
    found = [(size,)]
    found += [(a, size // a) for a in range(1, size + 1) if size % a == 0]
    found += [
        (a, b, size // (a * b))
        for a in range(2, size)
        if size % a == 0
        for b in range(2, size // a)
        if size // a % b == 0
    ]
    return found


@st.composite
def moves(draw: st.DrawFn, chain: Chain, node: fx.Node) -> fx.Node:
    shape = tuple(node.meta["val"].shape)
    kind = draw(st.sampled_from(["reshape", "permute", "slice", "select", "split_cat", "unsqueeze", "expand", "stack"]))
    if kind == "reshape":
        return chain.call(
            aten.reshape.default, node, draw(st.sampled_from(factorizations(int(torch.Size(shape).numel()))))
        )
    if kind == "unsqueeze":
        return chain.call(aten.unsqueeze.default, node, draw(st.integers(0, len(shape))))
    if not shape:
        return node
    dim = draw(st.integers(0, len(shape) - 1))
    size = shape[dim]
    if kind == "permute":
        return chain.call(aten.permute.default, node, draw(st.permutations(range(len(shape)))))
    if kind == "slice":
        start = draw(st.integers(0, size - 1))
        return chain.call(aten.slice.Tensor, node, dim, start, draw(st.integers(start + 1, size)))
    if kind == "select" and len(shape) > 1:
        return chain.call(aten.select.int, node, dim, draw(st.integers(-size, size - 1)))
    if kind == "expand" and size == 1:
        return chain.call(aten.expand.default, node, [*shape[:dim], 3, *shape[dim + 1 :]])
    if kind == "split_cat":
        parts = draw(st.sampled_from([p for p in (1, 2, 3, 4) if size % p == 0]))
        return chain.split_cat(node, parts, dim, draw(st.integers(0, len(shape) - 1)))
    if kind == "stack" and size <= 4:
        rows = chain.call(aten.unbind.int, node, dim)
        picked = [chain.call(operator.getitem, rows, i) for i in range(size)]
        return chain.call(aten.stack.default, picked, draw(st.integers(0, len(shape) - 1)))
    return node


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_chains_are_proved_right_or_not_at_all(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(8, 6), (4, 4, 6), (12,), (2, 3, 4, 2), (16, 3), (1, 8, 4)]))
    chain = Chain(shape)
    node = chain.root
    for _ in range(data.draw(st.integers(1, 6))):
        node = data.draw(moves(chain, node))
        if chain.real[node].numel() > 4096:
            break
    view = Prover().view(node)
    if isinstance(view, View):
        assert torch.equal(evaluate(view), chain.real[node])


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_gather_along_dim_1_has_the_rank_in_the_middle(ranks: int, batch: int) -> None:
    chain = Chain((ranks * batch, 6, 8))  # gathered along dim 0: [R*B, S/R, D]
    moved = chain.split_cat(chain.root, ranks, 0, 1)
    rows = chain.call(aten.reshape.default, moved, [batch * ranks * 6, 8])
    view = check(chain, rows)
    shard = batch * 6 * 8
    assert same_digits(
        merge(view.dims[0], Digit(ranks, shard)),
        [d for d in (Digit(batch, 48), Digit(ranks, shard), Digit(6, 8)) if d.size != 1],
    )


def test_slices_and_cat_spell_the_same_movement_as_split() -> None:
    chain = Chain((8, 3, 5))
    pieces = [chain.call(aten.slice.Tensor, chain.root, 0, 2 * i, 2 * i + 2) for i in range(4)]
    sliced = check(chain, chain.call(aten.cat.default, pieces, 1))
    other = Chain((8, 3, 5))
    split = check(other, other.split_cat(other.root, 4, 0, 1))
    assert sliced.dims == split.dims


def test_a_reversed_cat_has_a_negative_stride() -> None:
    chain = Chain((6, 4))
    pieces = chain.call(aten.split.Tensor, chain.root, 2, 0)
    back = [chain.call(operator.getitem, pieces, i) for i in (2, 1, 0)]
    view = check(chain, chain.call(aten.cat.default, back, 0))
    assert view.dims[0][0] == Digit(3, -8)


def ulysses(chain: Chain, spelling: str) -> fx.Node:
    """After the exchange, [P, b, s, h, d] by source rank, to [b, h, P*s, d], in the spellings of three libraries."""
    call = chain.call
    if spelling == "deepspeed":  # permute, clone, reshape, permute
        moved = call(aten.clone.default, call(aten.permute.default, chain.root, [1, 0, 2, 3, 4]))
        return call(aten.permute.default, call(aten.reshape.default, moved, [2, 12, 5, 7]), [0, 2, 1, 3])
    if spelling == "cat":  # split by source, cat along the sequence, transpose
        parts = call(aten.unbind.int, chain.root, 0)
        moved = call(aten.cat.default, [call(operator.getitem, parts, i) for i in range(4)], 1)
        return call(aten.transpose.int, moved, 1, 2)
    moved = call(aten.permute.default, chain.root, [1, 3, 0, 2, 4])  # one permute
    return call(aten.reshape.default, moved, [2, 5, 12, 7])


def test_spellings_of_one_movement_have_one_view() -> None:
    views = []
    for spelling in ("deepspeed", "cat", "permute"):
        chain = Chain((4, 2, 3, 5, 7))
        views.append(check(chain, ulysses(chain, spelling)))
    assert views[0].dims == views[1].dims == views[2].dims


def refusals() -> dict[str, Callable[[Chain], fx.Node]]:
    def two_roots(chain: Chain) -> fx.Node:
        other = chain.graph.placeholder("y")
        other.meta["val"], chain.real[other] = chain.root.meta["val"], chain.real[chain.root]
        return chain.call(aten.cat.default, [chain.root, other], 0)

    def swapped(chain: Chain) -> fx.Node:
        parts = chain.call(aten.split.Tensor, chain.root, 2, 0)
        return chain.call(aten.cat.default, [chain.call(operator.getitem, parts, i) for i in (0, 2, 1)], 0)

    def cut(chain: Chain) -> fx.Node:
        return chain.call(aten.reshape.default, chain.call(aten.permute.default, chain.root, [1, 0]), [3, 8])

    def step(chain: Chain) -> fx.Node:
        return chain.call(aten.slice.Tensor, chain.root, 0, 0, 6, 2)

    return {"two roots": two_roots, "swapped pieces": swapped, "cut digits": cut, "step": step}


@pytest.mark.parametrize("name", refusals())
def test_what_is_no_strided_view_is_refused(name: str) -> None:
    chain = Chain((6, 4))
    assert isinstance(Prover().view(refusals()[name](chain)), NotStrided)


def test_symbolic_sizes_are_proved_without_guards() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:  # [4*b, s, 16] -> rows [b*4*s, 16]
        batch, s = x.shape[0] // 4, x.shape[1]
        pieces = aten.split.Tensor(x, batch, 0)
        return aten.reshape.default(aten.cat.default(list(pieces), 1), [batch * 4 * s, 16])

    gm = make_fx(program, tracing_mode="symbolic")(torch.zeros(4 * 3, 10, 16))
    node = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    env = node.meta["val"].shape[0].node.shape_env
    guards = len(env.guards)
    view = Prover().view(node)
    assert isinstance(view, View), view
    assert len(env.guards) == guards
    assert [str(d.size) for d in view.dims[0]][1] == "4"
    assert natural_order(view.digits) is not None


def test_carve_splits_and_joins_digits() -> None:
    assert carve([Digit(6, 4), Digit(4, 1)], [2, 12]) == ((Digit(2, 12),), (Digit(3, 4), Digit(4, 1)))
    assert carve([Digit(2, 3), Digit(3, 1)], [3, 2]) == ((Digit(3, 2),), (Digit(2, 1),))
    assert carve([Digit(2, 100), Digit(3, 1)], [3, 2]) is None
    assert carve([Digit(2, 1)], [3]) is None


def test_lossy_cast_chains_are_told_apart() -> None:
    chain = Chain((4,))

    def cast_through(*dtypes: torch.dtype) -> torch.dtype | None:
        node = chain.root
        for dtype in dtypes:
            node = chain.graph.call_function(torch.ops.prims.convert_element_type.default, (node, dtype))
            node.meta["val"] = torch.empty((4,), device="meta", dtype=dtype)
        view = Prover().view(node)
        assert isinstance(view, View)
        return effective_cast(view)

    assert cast_through(torch.bfloat16) is torch.bfloat16
    assert cast_through(torch.float64, torch.bfloat16) is torch.bfloat16
    assert cast_through(torch.bfloat16, torch.float32) is None
