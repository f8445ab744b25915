"""all_to_all_permute over shared memory: each element is written once by its sender and read once by the rank that wants it.

A rank copies the blocks for its peers from wherever they lie into its own arena, exchange by exchange, and signals each. Then it takes
its own block, and those for it from the peers' arenas, and writes them where its readers want them. Whatever permutation the program
asks for happens in these two copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from ..nvshmem.heap import FLAGS_PER_PEER, Channel, aligned
from ..problem import Delivery, FusionProblem, Plan
from .template import register_template, shm_refusal

Shape = list[int]


def _groups(parts: Sequence[Delivery], joins: Sequence[int]) -> list[Sequence[Delivery]]:
    """The deliveries that each output consists of."""
    found, start = [], 0
    for count in joins:
        found.append(parts[start : start + count])
        start += count
    return found


def output_shapes(parts: Sequence[Delivery], joins: Sequence[int], sent: Sequence[Sequence[int]]) -> list[Shape]:
    """An output of one delivery has its dims; a joined one is `[outer, sum of the rest]`. sent: shape of each exchange's input."""
    shapes = []
    for group in _groups(parts, joins):
        sizes = [[sent[part.exchange][dim] for dim in part.order] for part in group]
        if len(group) == 1:
            shapes.append(sizes[0])
        else:
            rest = [prod(size[part.outer :]) for size, part in zip(sizes, group, strict=True)]
            shapes.append([prod(sizes[0][: group[0].outer]), sum(rest)])
    return shapes


Part = tuple[int, int, int]  # of a dim of an exchange's input: (dim, start, length)


class Outputs:
    """The outputs of a call, in fresh memory, and where each delivery goes."""

    def __init__(
        self, parts: Sequence[Delivery], joins: Sequence[int], sent: Sequence[Sequence[int]], like: Tensor
    ) -> None:
        self.tensors = [like.new_empty(shape) for shape in output_shapes(parts, joins, sent)]
        self._targets: list[tuple[Delivery, int, Tensor]] = []
        for index, (group, out) in enumerate(zip(_groups(parts, joins), self.tensors, strict=True)):
            start = 0
            for part in group:
                size = [sent[part.exchange][dim] for dim in part.order]
                target = out
                if len(group) > 1:
                    width = prod(size[part.outer :])
                    target = out.narrow(1, start, width).view(size)
                    start += width
                self._targets.append((part, index, target))

    def places(self) -> Sequence[tuple[Delivery, int, Tensor]]:
        """Of each delivery: itself, the number of the output that it is in, and the view of it that has the dims of its `order`."""
        return self._targets

    def deliver(self, exchange: int, source: int, blocks: Tensor, only: Part | None = None) -> None:
        """Write what ranks `source`, `source + 1`, ... sent, `[ranks, f1, ..., fk]`, of one exchange, or `only` a part of it."""
        for part, _, target in self._targets:
            if part.exchange == exchange:
                count = blocks.shape[0]
                place = target.narrow(part.order.index(0), source, count)
                if only is None:
                    place.copy_(arranged(part, blocks))
                else:
                    dim, start, length = only
                    place.narrow(part.order.index(dim), start, length).copy_(arranged(part, blocks.narrow(*only)))


def arranged(part: Delivery, blocks: Tensor) -> Tensor:
    """`[ranks, f1, ..., fk]` as the delivery wants it: a view."""
    left = list(range(blocks.dim()))
    for dim, index in reversed(part.fixed):
        blocks = blocks.select(dim, index)
        left.remove(dim)
    return blocks.permute([left.index(dim) for dim in part.order])


@dataclass(frozen=True)
class Place:
    """Where every rank puts an exchange's input into its arena, and the flag that says that it is there."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    flag: int


def places_of(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Place]:
    """Exchanges of these shapes, one behind the other."""
    ends = accumulate(aligned(prod(shape) * dtype.itemsize) for shape in shapes)
    return [
        Place(start, tuple(shape), dtype, min(number, FLAGS_PER_PEER - 1))
        for number, (start, shape) in enumerate(zip((0, *ends), shapes, strict=False))
    ]


def arena_bytes(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
    """What they need of an arena."""
    return sum(aligned(prod(shape) * dtype.itemsize) for shape in shapes)


class Posts:
    """The exchanges of a call on their way: `post` each of them, in any order, then take what has `arrived`.

    The last flag is for all exchanges that have none of their own.
    """

    def __init__(self, channel: Channel, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        self._channel = channel
        self.places = places_of(shapes, dtype)
        self._missing = Counter(place.flag for place in self.places)
        channel.payload = sum(prod(shape) for shape in shapes) * dtype.itemsize

    def post(self, number: int, x: Tensor) -> None:
        """Copy what the peers get of `x`, `[R, ...]`, into the own arena, and signal."""
        place, channel = self.places[number], self._channel
        arena = channel.view(channel.rank, place.offset, place.shape, place.dtype)
        for peer in channel.peers():
            arena[peer].copy_(x[peer])
        self._missing[place.flag] -= 1
        if not self._missing[place.flag]:
            channel.signal_all(place.flag)

    def delivered(self, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The plan's outputs, once all are posted; own blocks come from `inputs`."""
        channel = self._channel
        outputs = Outputs(plan.deliveries, plan.joins, [place.shape for place in self.places], inputs[0])
        for number, x in enumerate(inputs):
            outputs.deliver(number, channel.rank, x.narrow(0, channel.rank, 1))
        for number, place in enumerate(self.places):
            for peer in channel.peers():
                outputs.deliver(number, peer, arrived(channel, place, peer).unsqueeze(0))
        return outputs.tensors


def post(channel: Channel, inputs: Sequence[Tensor]) -> Posts:
    """Post all of `inputs`."""
    posts = Posts(channel, [x.shape for x in inputs], inputs[0].dtype)
    for number, x in enumerate(inputs):
        posts.post(number, x)
    return posts


def arrived(channel: Channel, place: Place, peer: int) -> Tensor:
    """What `peer` sends this rank of an exchange, `[...]` in its arena, once it is there."""
    channel.wait(peer, place.flag)
    return channel.view(peer, place.offset, place.shape, place.dtype)[channel.rank]


@register_template("all_to_all_permute")
class ShmAllToAll:
    """inputs `[R, f1, ..., fk]`, dim 0 the destination, in any strides."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(self, plan: Plan, size: int, inputs: Sequence[Tensor]) -> int:
        return arena_bytes([x.shape for x in inputs], inputs[0].dtype)

    def run(self, channel: Channel, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
        return post(channel, inputs).delivered(plan, inputs)
