"""all_to_all_permute over NVLink: one kernel pushes to the peers what they want, and lays out what they push as its readers want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...problem import FusionProblem, Plan
from ..all_to_all import output_shapes
from ..fresh import maker
from ..template import register_template
from .call import Call
from .channel import MAIN, DeviceChannel, DeviceLink
from .exchange import ExchangeLaunch, aligned_inputs
from .kernels.config import SMS
from .legs import Batches, Leg, batches_of, worded
from .refusal import exchange_refusal


@register_template("all_to_all_permute", "nvlink")
class NvlinkAllToAll:
    """inputs `[R, f1, ..., fk]`, dim 0 the destination, in any strides."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return exchange_refusal(problem, plan)

    def scratch_bytes(self, plan: Plan, size: int, inputs: Sequence[Tensor]) -> int:
        found = prepared(plan, inputs, size)
        return -1 if found is None else found[1].scratch_bytes(size)

    def kernels(self, plan: Plan, size: int, inputs: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [("exchange", SMS)]

    def run(self, channel: DeviceChannel, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
        recipe: _Recipe = channel.site.recipe
        if recipe is None or recipe.link is not channel.link:
            recipe = channel.site.recipe = _Recipe(channel.link, plan, inputs)
        return recipe.run(channel, inputs)


def prepared(plan: Plan, inputs: Sequence[Tensor], ranks: int) -> tuple[list[Leg], Batches, bool] | None:
    """Legs in words, their batches, and whether inputs must be copied first; None if the kernel cannot serve these sizes.

    None on all ranks or on none: whatever the strides are, contiguous inputs have the last word.
    """
    copied = False
    legs = worded(plan.deliveries, plan.joins, inputs)
    if legs is None:
        copied = True
        legs = worded(plan.deliveries, plan.joins, [x.new_empty(x.shape, device="meta") for x in inputs])
    if legs is None:
        return None
    return legs, batches_of([leg.words for leg in legs], ranks), copied


class _Recipe:
    """What the calls of one site with the same layout share."""

    def __init__(self, link: DeviceLink, plan: Plan, inputs: Sequence[Tensor]) -> None:
        self.link = link
        found = prepared(plan, inputs, link.size)
        assert found is not None, "scratch_bytes says so"
        legs, batches, self._copied = found
        self._dtype = inputs[0].dtype
        self._new = maker(inputs[0].device)
        shapes = output_shapes(plan.deliveries, plan.joins, [x.shape for x in inputs])
        self._outputs = [(tuple(shape), strides_of(shape)) for shape in shapes]
        self._launch = ExchangeLaunch(link, legs, batches)
        self._calls: dict[int, Call] = {}

    def run(self, channel: DeviceChannel, inputs: Sequence[Tensor]) -> list[Tensor]:
        call = self._calls.get(channel.slot)
        if call is None:
            values = self._launch.values(channel.values())
            call = self._calls[channel.slot] = Call(channel, [self._launch.step(values, MAIN)], [], [values])
            if channel.captured:
                channel.link.pinned.append(self)
        inputs = aligned_inputs(inputs, self._copied)
        outputs = [self._new(shape, strides, self._dtype) for shape, strides in self._outputs]
        self._launch.patch(call.values[0], inputs, outputs, channel.epoch)
        channel.link.issue(call.steps)
        return outputs


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    strides, size = [], 1
    for extent in reversed(shape):
        strides.append(size)
        size *= max(extent, 1)
    return tuple(reversed(strides))
