"""The layout proof through an all_to_all: who sends what to whom, and in which order the readers want it.

An exchange sends `[R, n]`, block d to rank d, and receives `[R, n]`, block s from rank s: on rank r, element (s, i) of what is
received is element (r, i) of what rank s sent. So a reader's view of the received tensor, with the source rank's digit taken for the
destination's, is a view of the sent tensor, and through that of what the sender computed: its sizes and strides are what a copy between
the ranks needs, and its offset steps with the destination rank. `shard_dim_alltoall` is the same exchange with its permutes inside.

Whose graph it is does not matter: only the exchange's own rule says what depends on the rank.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from .collectives import Collective
from .cuts import Cuts, Placement, flat
from .layout import JOINS, Digit, Prover, View, carve, identity, is_movement, make_digits, walk_moved
from .pattern import Context
from .rewrite import Builder
from .sizes import Size, divides, hint, plain, product, quotient, remainder

aten = torch.ops.aten
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_SHARD_DIM = torch.ops._dtensor.shard_dim_alltoall.default


def moves_bits(node: fx.Node) -> bool:
    """True if `node` moves elements and leaves their bits alone."""
    return is_movement(node) and node.target not in _CASTS


class Exchange:
    """One all_to_all, with the grid of its `[R, n]` elements: factor 0 is the rank, the others cut a block.

    An all_gather is one that sends every rank the same block, so what is said of what is received holds for it, too.

    Attributes:
        chain: what moves the received elements on, in an order that is the same on every rank.
    """

    def __init__(self, collective: Collective) -> None:
        self.collective = collective
        self.ranks = collective.group_size
        sent = product(collective.input.meta["val"].shape)
        self.block: Size = sent if collective.kind == "all_gather" else quotient(sent, self.ranks)
        self.cuts = Cuts([1, self.block, product([self.ranks, self.block])])
        self.chain: dict[fx.Node, None] = {}
        stack = [collective.node]
        while stack:
            for user in stack.pop().users:
                if user not in self.chain and moves_bits(user):
                    self.chain[user] = None
                    stack.append(user)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.collective.input.meta["val"].dtype
        return dtype

    @property
    def _shard_dims(self) -> tuple[int, int] | None:
        """(gathered dim, scattered dim) of a shard_dim_alltoall."""
        node = self.collective.node
        if node.target is not _SHARD_DIM:
            return None
        rank = len(node.meta["val"].shape)
        return int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]

    def received(self) -> View:
        """The op's result as a view of what was received, `[R, n]` flat."""
        node = self.collective.node
        dims = self._shard_dims
        if dims is None:
            return identity(node)
        gathered, scattered = dims
        sizes = list(self.collective.input.meta["val"].shape)
        sizes[scattered] = quotient(sizes[scattered], self.ranks)
        strides = [product(sizes[d + 1 :]) for d in range(len(sizes))]
        views = [make_digits((size, stride)) for size, stride in zip(sizes, strides, strict=True)]
        views[gathered] = make_digits((self.ranks, self.block)) + views[gathered]
        return View(node, tuple(views))

    def sent(self, view: View) -> View | None:
        """`view` of the op's input as `[R, n]` in the order in which blocks are sent; None if it cuts across digits."""
        dims = self._shard_dims
        if dims is None:
            blocks = carve(view.digits, [self.ranks, self.block])
            return None if blocks is None else replace(view, dims=blocks)
        scattered = dims[1]
        size = view.shape[scattered]
        parts = carve(view.dims[scattered], [self.ranks, quotient(size, self.ranks)])
        if parts is None:
            return None
        rest = [parts[1] if d == scattered else digits for d, digits in enumerate(view.dims)]
        return replace(view, dims=(parts[0], flat(rest)))


def memory_dims(value: Tensor) -> list[int]:
    """Dims by falling stride; strides may be symbolic, since the order only says what lies well."""
    strides = [hint(stride, 0) for stride in value.stride()]
    return sorted(range(value.dim()), key=lambda d: -strides[d])


@dataclass(frozen=True)
class Reading:
    """A value that readers want: a view of what one exchange received."""

    node: fx.Node
    exchange: Exchange
    view: View

    @property
    def placement(self) -> Placement:
        found = self.exchange.cuts.place(self.view)
        assert found is not None, "the grid was cut for this view"
        return found

    def memory_dims(self) -> list[int]:
        """The value's dims by falling stride in memory, as the program has it."""
        return memory_dims(self.node.meta["val"])

    def memory_order(self) -> tuple[int, ...]:
        """Factors in the order in which the value lies in memory."""
        dims = self.placement.dims
        return tuple(f for d in self.memory_dims() for f in dims[d] if isinstance(f, int))


@dataclass(frozen=True)
class Joined:
    """A cat or stack of readings of several exchanges; `outer` is the number of leading dims that they have in common."""

    node: fx.Node
    parts: tuple[Reading, ...]
    outer: int


@dataclass
class Readings:
    """Everything that something other than movement reads of some exchanges."""

    values: list[Reading] = field(default_factory=list)
    joined: list[Joined] = field(default_factory=list)


def find_readings(exchanges: Sequence[Exchange], besides: Collection[fx.Node] = ()) -> Readings:
    """Prove what is read; what is no strided view is left to the program, and read from what it is made of.

    Args:
        besides: readers that do not count.
    """
    by_node = {e.collective.node: e for e in exchanges}
    known = {e.collective.node: e.received() for e in exchanges}
    members = dict.fromkeys([n for e in exchanges for n in (e.collective.node, *e.chain)])
    prover = Prover(known)
    found = Readings()
    wanted = [node for node in members if any(u not in members and u not in besides for u in node.users)]
    done: set[fx.Node] = set()
    while wanted:
        node = wanted.pop(0)
        if node in done:
            continue
        done.add(node)
        own = by_node.get(node)
        if own is not None:
            done.add(own.collective.result)
            found.values.append(Reading(own.collective.result, own, known[node]))
            continue
        reading = _reading(node, prover, by_node)
        if reading is not None:
            found.values.append(reading)
            continue
        joined = _joined(node, prover, by_node) if node.target in JOINS else None
        if joined is not None:
            found.joined.append(joined)
        else:
            wanted.extend(source for source in node.all_input_nodes if source in members)
    return found


def _reading(node: fx.Node, prover: Prover, exchanges: dict[fx.Node, Exchange]) -> Reading | None:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    view = prover.view(node)
    if not isinstance(view, View) or view.casts or view.root not in exchanges:
        return None
    exchange = exchanges[view.root]
    if not exchange.cuts.cut_for(view, exchange.block):
        return None
    reading = Reading(node, exchange, view)
    return reading if 0 in reading.placement.factors else None  # else it reads what one rank sent


def _joined(node: fx.Node, prover: Prover, exchanges: dict[fx.Node, Exchange]) -> Joined | None:
    value = node.meta["val"]
    inputs: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    parts = [_reading(source, prover, exchanges) for source in inputs]
    if not value.is_contiguous() or any(part is None or part.placement.repeats for part in parts):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return Joined(node, tuple(part for part in parts if part is not None), int(dim) % value.dim())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Source:
    """What a rank sends: `view` of the producer's tensor has the dims (destination rank, factors of a block ...)."""

    view: View
    grid: Cuts  # of the producer's tensor
    placement: Placement

    def build(self, builder: Builder) -> fx.Node:
        """`[R, f1, ..., fk]` as a view of the producer's tensor, with nodes that copy nothing where its strides allow that."""
        root, place = self.view.root, self.placement
        node = builder.reshape(root, self.grid.sizes)
        left = list(range(len(self.grid.sizes)))
        for factor, index in reversed(place.fixed):
            node = builder.call(aten.select.int, node, left.index(factor), index)
            left.remove(factor)
        order = [left.index(f) for f in place.factors]
        if order != list(range(len(order))):
            node = builder.call(aten.permute.default, node, order)
        return builder.reshape(node, [product(d.size for d in dim) for dim in self.view.dims], [root])

    def lies_together(self, order: Sequence[int]) -> bool:
        """True if what goes to one rank lies in one piece, in this order of the block's dims; by size hints."""
        sizes = [hint(size) for size in self.grid.sizes]
        whole = self.grid.place(identity(self.view.root))
        assert whole is not None, "the grid was cut from this tensor"
        strides = dict.fromkeys(range(len(sizes)), 0)
        for factors, stride in zip(whole.dims, self.view.root.meta["val"].stride(), strict=True):
            step = hint(stride)
            for factor in reversed([f for f in factors if isinstance(f, int)]):
                strides[factor] = step
                step *= sizes[factor]
        expected = 1
        for factor in reversed([f for dim in order for f in self.placement.dims[dim] if isinstance(f, int)]):
            if sizes[factor] != 1 and strides[factor] != expected:
                return False
            expected *= sizes[factor]
        return True


def find_source(exchange: Exchange, prover: Prover) -> Source | None:
    """The producer's tensor behind an exchange; the exchange's input as it is where movement before it is no strided view.

    None only where symbolic sizes do not show that the input is what its dims say.
    """
    source = exchange.collective.input
    return _source(exchange, _producer(source, prover)) or _source(exchange, identity(source))


def find_producer(exchange: Exchange, prover: Prover) -> fx.Node:
    """The nearest node behind an exchange that does not just move what it sends."""
    return _producer(exchange.collective.input, prover).root


def find_columns(exchange: Exchange, prover: Prover) -> tuple[Source, tuple[int, int]] | None:
    """Of an exchange of a matrix's elements: its source with `grid` and `placement` in some neighbouring columns of that matrix, and
    these, (first, number).

    A projection to 32 heads of queries and 8 of keys and of values has no grid that all three fit; the columns of each have one.
    """
    view = _producer(exchange.collective.input, prover)
    shape: Sequence[Size] = view.root.meta["val"].shape
    rows, width = shape[-2:]
    columns = _columns(view, width)
    if columns is None:
        return None
    first, number = columns
    skipped = plain(view.offset - first)
    digits = [
        tuple(Digit(d.size, _without(d.stride, width, number)) for d in dim) if number != width else dim
        for dim in view.dims
    ]
    narrowed = replace(view, dims=tuple(digits), offset=_without(skipped, width, number))
    source = _source(exchange, narrowed, (rows, number))
    return None if source is None else (source, columns)


def _without(stride: Size, width: Size, number: int) -> Size:
    """A stride over rows of `width` as one over rows of `number`; a stride within a row stays."""
    return product([quotient(stride, width), number]) if divides(width, stride) else stride


def _columns(view: View, width: Size) -> tuple[int, int] | None:
    """(first, number) of the columns of a matrix, `width` in all, among which `view` reads; None if they are no constants."""
    first = plain(remainder(view.offset, width))
    if not isinstance(width, int) or not isinstance(first, int):
        return None
    end = first + 1
    for digit in view.digits:
        size, stride = plain(digit.size), plain(digit.stride)
        if divides(width, stride):
            continue
        if not isinstance(size, int) or not isinstance(stride, int) or stride < 0:
            return 0, width
        end += (size - 1) * stride
    return (first, end - first) if end <= width else (0, width)


def _producer(node: fx.Node, prover: Prover) -> View:
    """`node` as a view of the nearest ancestor that is not just moved: casts, and joins of several tensors, end the way."""
    known: dict[fx.Node, View] = {}
    stack, seen = [node], {node}
    while stack:
        top = stack.pop()
        if top.target in _CASTS:
            known[top] = identity(top)
        elif is_movement(top):
            stack.extend(n for n in top.all_input_nodes if n not in seen)
            seen.update(top.all_input_nodes)
    while True:
        view = prover.view(node, known)
        if isinstance(view, View):
            return view
        end = view.node
        if end in known or not isinstance(end.meta.get("val"), torch.Tensor):
            return identity(node)
        known[end] = identity(end)


def _source(exchange: Exchange, view: View, shape: Sequence[Size] | None = None) -> Source | None:
    """shape: of what the view's strides are of, if that is not the root as a whole."""
    sent = exchange.sent(view)
    grid = Cuts.of_shape(view.root.meta["val"].shape if shape is None else shape)
    if sent is None or not grid.cut_for(sent):
        return None
    while True:
        dims = carve(sent.digits, exchange.cuts.sizes)
        cut = None if dims is None else replace(sent, dims=dims)
        if cut is None or not grid.cut_for(cut):
            return None
        placement = grid.place(cut)
        if placement is None or placement.repeats:
            return None
        finer = _finer(exchange, grid, placement)
        if not finer:
            return Source(cut, grid, placement)
        if not exchange.cuts.insert(finer, exchange.block):
            return None


def _finer(exchange: Exchange, grid: Cuts, placement: Placement) -> list[Size]:
    """Where a factor of the block consists of several factors of the producer's tensor: cut points that make them one each."""
    sizes = grid.sizes
    points: list[Size] = []
    for number, dim in enumerate(placement.dims[1:], 1):
        point = exchange.cuts.stride(number)
        for factor in reversed(dim[1:]):
            assert isinstance(factor, int)
            point = product([point, sizes[factor]])
            points.append(point)
    return points


def related(context: Context, anchor: Collective) -> list[Collective]:
    """The exchanges that may be one op with `anchor`, itself included, in graph order.

    They are read by one op (an attention, a cat of gradients) or come from one op, are of one group, and none waits for another.
    """
    found = {anchor.node: context.after(anchor.node)}
    queue = [anchor]
    while queue:
        for node in _neighbours(Exchange(queue.pop())):
            other = context.collectives.get(node)
            if other is None or node in found or not alike(other, anchor):
                continue
            after = context.after(node)
            if all(node not in those and first not in after for first, those in found.items()):
                found[node] = after
                queue.append(other)
    return [c for node, c in context.collectives.items() if node in found]


def equal_blocks(collective: Collective) -> bool:
    """True if the input is known to have a block of one size for every rank."""
    node, ranks = collective.node, collective.group_size
    shape = collective.input.meta["val"].shape
    if node.target is not _SHARD_DIM:
        return divides(ranks, product(shape))
    gathered, scattered = (int(dim) % len(shape) for dim in node.args[1:3])  # type: ignore[arg-type]
    return gathered != scattered and divides(ranks, shape[scattered])


def alike(a: Collective, b: Collective) -> bool:
    """True if `a` is an exchange that may be in one op with the exchange `b`: of the same group and dtype."""
    dtypes = [c.input.meta["val"].dtype for c in (a, b)]
    return a.kind == b.kind and a.group == b.group and a.refusal is None and dtypes[0] == dtypes[1] and equal_blocks(a)


def _neighbours(exchange: Exchange) -> list[fx.Node]:
    """Nodes that are read where this exchange is read, or come from where it comes from, through movement alone."""
    members = [exchange.collective.node, *exchange.chain]
    ends = [u for n in members for u in n.users if u.op == "call_function" and u not in exchange.chain]
    ends += [n for n in exchange.chain if n.target in JOINS]
    near = walk_moved([source for end in ends for source in end.all_input_nodes], lambda n: n.all_input_nodes)
    origins = [n for n in walk_moved([exchange.collective.input], lambda n: n.all_input_nodes) if not is_movement(n)]
    for node in list(origins):
        if node.target is operator.getitem:  # one of the results of an op
            origins += [user for part in node.all_input_nodes for user in part.users]
    return near + walk_moved([user for node in origins for user in node.users], lambda n: list(n.users))
