"""The gather side: how matmuls read a gathered tensor, and who else reads it.

Everything is said in the gathered tensor's own digits. The fused op gathers into a *home* order `[P, R, Q]`: the order in which most
of the matmuls read it, so that they need no copy. Other readers get their value rebuilt from the home tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from ..problem import GatherUse, Keep
from .collectives import Collective
from .layout import (
    Digit,
    Digits,
    NotStrided,
    Prover,
    View,
    effective_cast,
    is_movement,
    merge,
    natural_order,
    same_digits,
)
from .matmuls import Matmul, as_matmul, operand_sides
from .rewrite import Builder, descendants
from .sizes import Size, divides, known_eq, product, quotient

aten = torch.ops.aten


@dataclass(frozen=True)
class Home:
    """Order of the gathered elements as the fused op lays them out: digits of `[P, R, Q]`, with `rank` among them."""

    digits: Digits
    rank: Digit

    @property
    def outer(self) -> Size:
        return product(d.size for d in self.digits[: self.digits.index(self.rank)])

    @property
    def inner(self) -> Size:
        return product(d.size for d in self.digits[self.digits.index(self.rank) + 1 :])

    @property
    def shard_digits(self) -> Digits:
        return tuple(d for d in self.digits if d != self.rank)

    @property
    def keeps_shard_order(self) -> bool:
        """True if a rank's shard is contiguous in home order, so that no copy has to permute it."""
        order = natural_order(self.shard_digits)
        return order == list(range(len(self.shard_digits)))

    def same(self, other: Sequence[Digit]) -> bool:
        return same_digits(merge(self.digits, self.rank), merge(other, self.rank))


@dataclass(frozen=True)
class Reader:
    """A matmul that reads the gathered tensor: which operand, and the digits of that operand's rows and columns."""

    matmul: Matmul
    side: Literal["lhs", "rhs"]
    operand: fx.Node
    rows: Digits
    cols: Digits
    rank: Digit
    dtype: torch.dtype

    @property
    def other(self) -> fx.Node:
        return self.matmul.rhs if self.side == "lhs" else self.matmul.lhs

    def orders(self) -> list[tuple[bool, Digits]]:
        return [(False, self.rows + self.cols), (True, self.cols + self.rows)]

    def use_of(self, home: Home) -> GatherUse | None:
        """How this matmul reads a tensor in home order, None if only a copy would let it."""
        for transposed, digits in self.orders():
            if home.same(digits):
                first = self.cols if transposed else self.rows
                axis: Literal["rows", "cols"] = "rows" if self.rank in first else "cols"
                return GatherUse(self.side, transposed, axis, str(self.dtype).removeprefix("torch."))
        return None


@dataclass
class Gathered:
    """What was proved about one all_gather."""

    chain: Chain
    readers: list[Reader] = field(default_factory=list)
    refusals: list[Keep] = field(default_factory=list)


def split_rank(digits: Digits, ranks: int, shard_numel: Size) -> tuple[Digits, Digit] | None:
    """`digits` with the rank digit split off from a longer digit, and that digit; None if there is none."""
    total = product([ranks, shard_numel])
    for i, digit in enumerate(digits):
        if known_eq(product([digit.size, digit.stride]), total) and divides(digit.stride, shard_numel):
            rank = Digit(ranks, shard_numel)
            inner = quotient(shard_numel, digit.stride)
            rest = () if known_eq(inner, 1) else (Digit(inner, digit.stride),)
            return (*digits[:i], rank, *rest, *digits[i + 1 :]), rank
    return None


def full_view(view: View, ranks: int, shard_numel: Size) -> tuple[tuple[Digits, ...], Digit] | NotStrided:
    """Digits per dim of a view that holds every gathered element once, with the rank digit; NotStrided otherwise."""
    dims: list[Digits] = []
    rank: Digit | None = None
    for dim in view.dims:
        split = split_rank(dim, ranks, shard_numel) if rank is None else None
        if split is None:
            dims.append(dim)
        else:
            dims.append(split[0])
            rank = split[1]
    if rank is None:
        return NotStrided("the rank dimension is cut or permuted into another dimension", view.root)
    everything = tuple(d for dim in dims for d in dim)
    if natural_order(everything) is None or not known_eq(view.offset, 0):
        return NotStrided("it reads only a part of the gathered tensor, or a part twice", view.root)
    return tuple(dims), rank


# Sets of nodes are dicts: they iterate in graph order on every rank, where a set would follow addresses.
Chain = dict[fx.Node, None]


def movement_users(node: fx.Node) -> Chain:
    """Movement ops that `node` reaches through movement ops only, in an order that is the same on every rank."""
    chain: Chain = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in chain and is_movement(user):
                chain[user] = None
                stack.append(user)
    return chain


def analyse_gather(gather: Collective, prover: Prover) -> Gathered:
    """Find every matmul behind `gather` and prove how it reads the gathered tensor."""
    chain = movement_users(gather.node)
    found = Gathered(chain)
    shard_numel = product(gather.input.meta["val"].shape)
    after = descendants(gather.node)
    for source in [gather.node, *chain]:
        for user in source.users:
            if user in chain:
                continue
            matmul = as_matmul(user)
            if matmul is None:
                continue
            result = matmul if isinstance(matmul, Keep) else _reader(matmul, source, gather, shard_numel, after, prover)
            if isinstance(result, Keep):
                found.refusals.append(result)
            elif result is not None:
                found.readers.append(result)
    return found


def _reader(
    matmul: Matmul, operand: fx.Node, gather: Collective, shard_numel: Size, after: set[fx.Node], prover: Prover
) -> Reader | Keep | None:
    sides = operand_sides(matmul, operand)
    if len(sides) != 1:
        return Keep("both-operands", "both operands of the matmul come from the same gather") if sides else None
    side: Literal["lhs", "rhs"] = "lhs" if sides[0] == "lhs" else "rhs"
    other = matmul.rhs if side == "lhs" else matmul.lhs
    if (matmul.alpha, matmul.beta) != (1.0, 1.0):
        return Keep("scaled-addmm", "addmm with alpha or beta other than 1 reads the gathered tensor")
    if other in after or (matmul.bias is not None and matmul.bias in after):
        return Keep("other-operand-depends", "the matmul's other operand is computed from the gathered tensor itself")
    view = prover.view(operand)
    if isinstance(view, NotStrided):
        return Keep("not-a-strided-view", f"the gathered tensor reaches the matmul as no strided view: {view.reason}")
    dims = full_view(view, gather.group_size, shard_numel)
    if isinstance(dims, NotStrided):
        return Keep("not-a-strided-view", dims.reason)
    digits, rank = dims
    rows, cols = digits[-2:]
    if any(digits[:-2]):
        return Keep("batched-matmul", "the gathered tensor is spread over the batch dimension of a matmul")
    dtype = effective_cast(view)
    if dtype is None:
        return Keep("lossy-casts", "the gathered tensor is cast more than once on its way to the matmul")
    return Reader(matmul, side, operand, rows, cols, rank, dtype)


def choose_home(readers: Sequence[Reader]) -> Home:
    """The order that lets most readers read without a copy; a shard that needs no permutation breaks ties."""
    homes = [Home(digits, reader.rank) for reader in readers for _, digits in reader.orders()]
    return max(homes, key=lambda h: (sum(r.use_of(h) is not None for r in readers), h.keeps_shard_order))


def size_readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is aten.sym_size.int]


class LiveOuts:
    """Readers of a gathered tensor other than the fused matmuls, and how they get their value back."""

    def __init__(self, gather: Collective, chain: Chain, fused: Sequence[Reader], prover: Prover, home: Home) -> None:
        self._gather = gather
        self._home = home
        self.nodes: list[fx.Node] = []  # full views that must be rebuilt
        gone = {reader.matmul.node for reader in fused}
        operands = {reader.matmul.node: reader.operand for reader in fused}
        members = dict.fromkeys([gather.node, *chain])
        wanted = [
            node
            for node in members
            if any(
                user not in chain and not (user in gone and operands[user] is node) and user not in size_readers(node)
                for user in node.users
            )
        ]
        ranks, numel = gather.group_size, product(gather.input.meta["val"].shape)
        done: set[fx.Node] = set()
        while wanted:
            node = wanted.pop()
            if node in done:
                continue
            done.add(node)
            if node is gather.node or node is gather.wait:
                self.nodes.append(gather.result)
                continue
            view = prover.view(node) if isinstance(node.meta.get("val"), torch.Tensor) else None
            dims = full_view(view, ranks, numel) if isinstance(view, View) else None
            if isinstance(view, View) and isinstance(dims, tuple) and effective_cast(view) is not None:
                digits = tuple(d for dim in dims[0] for d in dim)
                if home.same(digits):
                    self.nodes.append(node)
                    continue
            # Not in home order: this op stays, and what it reads is rebuilt instead.
            wanted.extend(source for source in node.all_input_nodes if source in members)
        self.nodes = list(dict.fromkeys(self.nodes))

    def rebuild(self, builder: Builder, gathered: fx.Node, shard: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Every live-out with its new value, made from `gathered` `[P, R*Q]` in home order; nothing is replaced yet."""
        pairs: list[tuple[fx.Node, fx.Node]] = []
        for node in self.nodes:
            value = node.meta["val"]
            if node is self._gather.result and not self._home.same(_raw_digits(self._home)):
                new = self._raw(builder, gathered, shard)
            else:
                new = builder.reshape(gathered, value.shape, [shard])
            pairs.append((node, builder.cast(new, value.dtype)))
        return pairs

    def replace(self, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        for node, new in pairs:
            node.replace_all_uses_with(new)
            if node is self._gather.wait:
                self._gather.node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not self._gather.wait)

    def _raw(self, builder: Builder, gathered: fx.Node, shard: fx.Node) -> fx.Node:
        """The gathered tensor in the collective's own order: rank first, then the shard's elements."""
        home = self._home
        natural = natural_order(home.digits)
        assert natural is not None
        split = builder.reshape(gathered, [d.size for d in home.digits], [shard])
        moved = builder.call(aten.permute.default, split, natural)
        return builder.reshape(moved, self._gather.node.meta["val"].shape, [shard])


def _raw_digits(home: Home) -> Digits:
    order = natural_order(home.digits)
    assert order is not None
    return tuple(home.digits[i] for i in order)


def replace_size_readers(builder: Builder, gather: Collective, chain: Chain) -> None:
    """Sizes that were read off the gathered tensor are computed from its shard, so that nothing needs the tensor itself."""
    for node in [gather.node, *chain]:
        for reader in size_readers(node):
            size = reader.meta["val"]
            shape = gather.input.meta["val"].shape
            with builder.before(reader):
                new = builder.size(_times(size, shape, gather.group_size), [gather.input])
                if not isinstance(size, int) and not any(known_eq(size, s) for s in shape):
                    new = scaled(builder, gather, new)
            reader.replace_all_uses_with(new)
            builder.graph.erase_node(reader)


def _times(size: Size, shape: Sequence[Size], ranks: int) -> Size:
    if isinstance(size, int) or any(known_eq(size, s) for s in shape):
        return size
    return quotient(size, ranks)


def scaled(builder: Builder, gather: Collective, node: fx.Node) -> fx.Node:
    """A size times the number of ranks."""
    value = node.meta["val"] * gather.group_size
    multiple = builder.graph.call_function(operator.mul, (node, gather.group_size))
    multiple.meta["val"] = value
    return multiple
