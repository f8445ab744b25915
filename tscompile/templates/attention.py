"""all_to_all_attention over shared memory: the attention takes groups of heads as they arrive, and their results leave at once.

A rank writes the blocks for its peers into its arena, head group by head group, and signals each group. For each group it then waits
for the peers' parts of it, computes the attention of these heads, writes the parts of the result that others want into its arena
and signals. The results of the peers are collected at the end, again group by group. Heads are independent of one another, so the
attention of a group is the plain op on a slice of its operands.

Slices have the strides of the whole. Most kernels take any, with exceptions that read wrong elements and say nothing: the backward
of flash attention takes the logsumexp to be contiguous, and that of memory-efficient attention takes rows of the output to be as far
apart as in a tensor without gaps (flash_api.cpp and kernel_backward.h of torch). cuDNN is told the strides of the logsumexp, and does
not take every layout of it. Such operands are copied for each group (`Operand.share`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..nvshmem.heap import FLAGS_PER_PEER, Channel, aligned
from ..problem import Argument, Attention, Departure, FusionProblem, Plan, Share
from .all_to_all import Outputs, Part
from .template import register_template, shm_refusal

MOST_GROUPS = FLAGS_PER_PEER // 2  # a flag for each before the attention, and one after it


def attention_of(plan: Plan) -> Attention:
    assert plan.attention is not None, "the pattern says what is computed"
    return plan.attention


def head_groups(heads: int) -> int:
    """The largest number of equal groups for which there are flags."""
    return max(count for count in range(1, MOST_GROUPS + 1) if heads % count == 0)


def operands_of(attention: Attention, received: Sequence[Tensor], local: Sequence[Tensor]) -> list[Tensor]:
    """The attention's tensors `[B, heads, ...]` as views of what is received, or as they are."""
    found = []
    for operand in attention.operands:
        if not operand.received:
            found.append(local[operand.index])
            continue
        out, sizes, start = received[operand.index], [], 0
        for count in operand.counts:
            sizes.append(prod(out.shape[start : start + count]))
            start += count
        found.append(out.view(sizes).permute(operand.order))
    return found


def heads_of(attention: Attention, operands: Sequence[Tensor], group: int, groups: int) -> list[Tensor]:
    """What the attention of one of `groups` equal groups of heads reads of each operand; views where its kernel takes any strides."""
    return [_share(x, known.share, group, groups) for x, known in zip(operands, attention.operands, strict=True)]


def _share(x: Tensor, share: Share, group: int, groups: int) -> Tensor:
    if share == "whole":
        return x
    heads = x.shape[1] // groups
    found = x.narrow(1, group * heads, heads)
    if share == "rows":
        return found.transpose(1, 2).contiguous().transpose(1, 2)
    return found.contiguous() if share == "packed" else found


def attend(attention: Attention, operands: Sequence[Tensor]) -> tuple[Any, ...]:
    """The original op, for all heads or for those of a group: its results, tensors `[B, heads, ...]` first."""
    op: Any = getattr(torch.ops.aten, attention.op).default
    results: tuple[Any, ...] = op(**{known.name: _value(known, operands) for known in attention.arguments})
    return results


def _value(argument: Argument, operands: Sequence[Tensor]) -> Any:
    if argument.source == "operand":
        return operands[argument.value]
    if argument.source == "size":
        number, dim = argument.value
        return operands[number].shape[dim]
    return argument.value


def grids(departures: Sequence[Departure], sizes: Sequence[int]) -> list[list[int]]:
    """Of an op's `sizes`, the shape that each exchange gives to what it sends of a result."""
    found, start = [], 0
    for departure in departures:
        found.append(list(sizes[start : start + departure.sizes]))
        start += departure.sizes
    return found


def sent_shape(departure: Departure, grid: Sequence[int]) -> list[int]:
    left = _left(departure)
    return [grid[left[dim]] for dim in departure.order]


def sent_shapes(departures: Sequence[Departure], sizes: Sequence[int]) -> list[list[int]]:
    """`[R, f1, ..., fk]` of what each exchange sends."""
    return [sent_shape(d, grid) for d, grid in zip(departures, grids(departures, sizes), strict=True)]


def departing(departure: Departure, grid: Sequence[int], result: Tensor, heads: int | None = None) -> Tensor:
    """What an exchange sends, `[R, f1, ..., fk]`, of a result that has `heads` of all heads: a view if its strides allow that."""
    shape = list(grid)
    if heads is not None:
        shape[departure.heads] = heads
    sent = result.reshape(shape)
    for dim, index in reversed(departure.fixed):
        sent = sent.select(dim, index)
    return sent.permute(departure.order)


def _left(departure: Departure) -> list[int]:
    fixed = {dim for dim, _ in departure.fixed}
    return [dim for dim in range(departure.sizes) if dim not in fixed]


def heads_sent(departure: Departure) -> int:
    """The dim of what is sent that is the heads."""
    return departure.order.index(_left(departure).index(departure.heads))


class Results:
    """What is returned of an attention, put together of its groups of heads, in the memory order that the plan says."""

    def __init__(self, attention: Attention) -> None:
        self._results = attention.results
        self.tensors: list[Tensor] = []

    def keep(self, results: Sequence[Any], group: int, groups: int) -> None:
        """Those of one group of heads; what has no heads is the first call's."""
        if not self.tensors:
            self.tensors = [_whole(results[known.number], known.layout, groups) for known in self._results]
        for whole, known in zip(self.tensors, self._results, strict=True):
            if known.layout:
                result = results[known.number]
                heads = result.shape[1]
                whole.narrow(known.layout.index(1), group * heads, heads).copy_(result.permute(known.layout))


def _whole(result: Tensor, layout: tuple[int, ...], groups: int) -> Tensor:
    """Memory for a result with all of its heads; the result itself if it has none."""
    if not layout:
        return result
    shape = list(result.shape)
    shape[1] *= groups
    return result.new_empty([shape[dim] for dim in layout])


class _Arenas:
    """The exchanges of a call, those before the attention first, as they lie one behind the other in each rank's arena.

    Args:
        shapes: `[R, f1, ..., fk]` of each; heads: which dim are the heads.
        groups: of heads.
    """

    def __init__(
        self, channel: Channel, shapes: Sequence[Sequence[int]], heads: Sequence[int], groups: int, dtype: torch.dtype
    ) -> None:
        self._channel, self._shapes, self._heads, self._groups, self._dtype = channel, shapes, heads, groups, dtype
        self._places: list[int] = []
        offset = 0
        for shape in shapes:
            self._places.append(offset)
            offset += aligned(prod(shape) * dtype.itemsize)

    def part(self, number: int, group: int) -> Part:
        """Of an exchange, what belongs to a group of heads."""
        dim = self._heads[number]
        length = self._shapes[number][dim] // self._groups
        return dim, group * length, length

    def _whole(self, owner: int, number: int) -> Tensor:
        return self._channel.view(owner, self._places[number], tuple(self._shapes[number]), self._dtype)

    def write(self, number: int, group: int, blocks: Tensor, ranks: Sequence[int]) -> None:
        """The group's heads of what is sent to `ranks`, `[R, f1, ..., fk]`, into this rank's arena."""
        own = self._whole(self._channel.rank, number).narrow(*self.part(number, group))
        for rank in ranks:
            own[rank].copy_(blocks[rank])

    def block(self, owner: int, number: int) -> Tensor:
        """What `owner` sends to this rank, `[1, f1, ..., fk]`."""
        return self._whole(owner, number).narrow(0, self._channel.rank, 1)


@register_template("all_to_all_attention")
class ShmAttention:
    """inputs `[R, f1, ..., fk]` of the exchanges before the attention; local: its other operands."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(
        self, plan: Plan, size: int, inputs: Sequence[Tensor], local: Sequence[Tensor], sizes: Sequence[int]
    ) -> int:
        attention = attention_of(plan)
        width = inputs[0].element_size()
        shapes = [*(list(x.shape) for x in inputs), *sent_shapes(attention.departures, sizes)]
        return sum(aligned(int(prod(shape)) * width) for shape in shapes)

    def run(
        self,
        channel: Channel,
        plan: Plan,
        inputs: Sequence[Tensor],
        local: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> list[Tensor]:
        attention, groups = attention_of(plan), int(plan.schedule.split()[0])
        after = sent_shapes(attention.departures, sizes)
        shapes = [*(list(x.shape) for x in inputs), *after]
        heads = [*attention.heads, *(heads_sent(departure) for departure in attention.departures)]
        arenas = _Arenas(channel, shapes, heads, groups, inputs[0].dtype)
        channel.payload = sum(prod(shape) for shape in shapes)
        peers, everyone = list(channel.peers()), [channel.rank, *channel.peers()]
        for group in range(groups):
            for number, x in enumerate(inputs):
                arenas.write(number, group, x.narrow(*arenas.part(number, group)), peers)
            channel.signal_all(group)
        received = Outputs(plan.deliveries, plan.joins, [x.shape for x in inputs], inputs[0])
        outputs = Outputs(attention.deliveries, attention.joins, after, inputs[0])
        operands = operands_of(attention, received.tensors, local)
        whole = Results(attention)
        for group in range(groups):
            for rank in everyone:
                if rank != channel.rank:
                    channel.wait(rank, group)
                for number, x in enumerate(inputs):
                    block = x.narrow(0, rank, 1) if rank == channel.rank else arenas.block(rank, number)
                    received.deliver(number, rank, block, arenas.part(number, group))
            results = attend(attention, heads_of(attention, operands, group, groups))
            for number, (departure, grid) in enumerate(
                zip(attention.departures, grids(attention.departures, sizes), strict=True), len(inputs)
            ):
                result = results[departure.result]
                arenas.write(number, group, departing(departure, grid, result, result.shape[1]), everyone)
            channel.signal_all(MOST_GROUPS + group)
            whole.keep(results, group, groups)
        for group in range(groups):
            for rank in everyone:
                if rank != channel.rank:
                    channel.wait(rank, MOST_GROUPS + group)
                for number in range(len(after)):
                    there = number + len(inputs)
                    outputs.deliver(number, rank, arenas.block(rank, there), arenas.part(there, group))
        return [*received.tensors, *whole.tensors, *outputs.tensors]
