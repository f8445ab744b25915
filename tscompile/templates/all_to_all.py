"""all_to_all_permute over shared memory: each element is written once by its sender and read once by the rank that wants it.

A rank copies the blocks for its peers from wherever they lie into its own arena, exchange by exchange, and signals each. Then it takes
its own block, and those for it from the peers' arenas, and writes them where its readers want them. Whatever permutation the program
asks for happens in these two copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..nvshmem.heap import FLAGS_PER_PEER, Channel, aligned
from ..problem import Delivery, FusionProblem, Plan
from .template import register_template, shm_refusal

Shape = list[int]


def groups_of(plan: Plan) -> list[tuple[Delivery, ...]]:
    """The deliveries that each output consists of."""
    found, start = [], 0
    for count in plan.joins:
        found.append(plan.deliveries[start : start + count])
        start += count
    return found


def part_shape(part: Delivery, inputs: Sequence[Tensor]) -> Shape:
    return [inputs[part.exchange].shape[dim] for dim in part.order]


def output_shapes(plan: Plan, inputs: Sequence[Tensor]) -> list[Shape]:
    """An output of one delivery has its dims; a joined one is `[outer, sum of the rest]`."""
    shapes = []
    for parts in groups_of(plan):
        sizes = [part_shape(part, inputs) for part in parts]
        if len(parts) == 1:
            shapes.append(sizes[0])
        else:
            rest = [prod(size[part.outer :]) for size, part in zip(sizes, parts, strict=True)]
            shapes.append([prod(sizes[0][: parts[0].outer]), sum(rest)])
    return shapes


class Outputs:
    """The outputs of a call, in fresh memory, and where each delivery goes."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor]) -> None:
        self.tensors: list[Tensor] = []
        self._targets: list[tuple[Delivery, Tensor]] = []
        for parts, shape in zip(groups_of(plan), output_shapes(plan, inputs), strict=True):
            out = inputs[parts[0].exchange].new_empty(shape)
            self.tensors.append(out)
            start = 0
            for part in parts:
                size = part_shape(part, inputs)
                target = out
                if len(parts) > 1:
                    width = prod(size[part.outer :])
                    target = out.narrow(1, start, width).view(size)
                    start += width
                self._targets.append((part, target))

    def deliver(self, exchange: int, source: int, blocks: Tensor) -> None:
        """Write what ranks `source`, `source + 1`, ... sent, `[ranks, f1, ..., fk]`, of one exchange."""
        for part, target in self._targets:
            if part.exchange == exchange:
                count = blocks.shape[0]
                target.narrow(part.order.index(0), source, count).copy_(arranged(part, blocks))


def arranged(part: Delivery, blocks: Tensor) -> Tensor:
    """`[ranks, f1, ..., fk]` as the delivery wants it: a view."""
    left = list(range(blocks.dim()))
    for dim, index in reversed(part.fixed):
        blocks = blocks.select(dim, index)
        left.remove(dim)
    return blocks.permute([left.index(dim) for dim in part.order])


@register_template("all_to_all_permute")
class ShmAllToAll:
    """inputs `[R, f1, ..., fk]`, dim 0 the destination, in any strides."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(self, plan: Plan, size: int, inputs: Sequence[Tensor]) -> int:
        return sum(aligned(int(x.numel()) * x.element_size()) for x in inputs)

    def run(self, channel: Channel, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
        channel.payload = sum(x.numel() * x.element_size() for x in inputs)
        places: list[tuple[int, torch.Size, torch.dtype]] = []
        offset = 0
        for number, x in enumerate(inputs):
            places.append((offset, x.shape, x.dtype))
            arena = channel.view(channel.rank, offset, tuple(x.shape), x.dtype)
            for peer in channel.peers():
                arena[peer].copy_(x[peer])
            if _flag(number) == number or number == len(inputs) - 1:
                channel.signal_all(_flag(number))
            offset += aligned(x.numel() * x.element_size())
        outputs = Outputs(plan, inputs)
        for number, x in enumerate(inputs):
            outputs.deliver(number, channel.rank, x.narrow(0, channel.rank, 1))
        for number, (start, shape, dtype) in enumerate(places):
            for peer in channel.peers():
                channel.wait(peer, _flag(number))
                arena = channel.view(peer, start, tuple(shape), dtype)
                outputs.deliver(number, peer, arena.narrow(0, channel.rank, 1))
        return outputs.tensors


def _flag(exchange: int) -> int:
    """The flag that says that an exchange is there; the last one is for all that have none of their own."""
    return min(exchange, FLAGS_PER_PEER - 1)
