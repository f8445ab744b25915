"""all_to_all_matmul over shared memory: what a rank received is multiplied panel by panel, as it arrives.

A rank copies what its peers get into its own arena and signals, exchange by exchange. Then it multiplies its own panels, and those of
the peers in ring order, where they lie. What was received is put together only if the program wants it, or if the matmuls are in a
16-bit type (a sum of rounded partial sums would be less exact).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from ..nvshmem.heap import Channel
from ..problem import FusionProblem, Panels, Plan
from .all_to_all import arena_bytes, arrived, post
from .arithmetic import MIN_PIECE, RunningSum, is_low_precision, multiply
from .template import register_template, shm_refusal


def as_panels(plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What exchanges send, `[R, f1, ..., fk]` in the program's order, as `[R, M, O, Q]`: views where strides allow that.

    Without panels in the plan the inputs have these dims.
    """
    if not plan.panels:
        return list(inputs)
    return [panels_of(x, panels) for x, panels in zip(inputs, plan.panels, strict=True)]


def panel_shapes(plan: Plan, inputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Shapes of `as_panels`, without the copies that these may take."""
    if not plan.panels:
        return [tuple(x.shape) for x in inputs]
    return [_panel_shape(x, panels) for x, panels in zip(inputs, plan.panels, strict=True)]


def _panel_shape(x: Tensor, panels: Panels) -> tuple[int, ...]:
    groups = (panels.rows, panels.outer, panels.inner)
    return x.shape[0], *(prod(x.shape[dim] for dim in dims) for dims in groups)


def panels_of(x: Tensor, panels: Panels) -> Tensor:
    """The panels of one exchange, or of what was received of it."""
    return x.permute(0, *panels.sent).reshape(_panel_shape(x, panels))


def _columns(sent: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """`(O, R, Q)` of each exchange."""
    return [(x.shape[2], x.shape[0], x.shape[3]) for x in sent]


class Received:
    """The left operand `[M, K]`, in fresh memory: of each exchange `[O, R, Q]` columns, one behind the other.

    sent: what each exchange sends, `[R, M, O, Q]`; shapes count.
    """

    def __init__(self, sent: Sequence[Tensor]) -> None:
        layouts = _columns(sent)
        widths = [prod(layout) for layout in layouts]
        self.tensor = sent[0].new_empty((sent[0].shape[1], sum(widths)))
        parts = self.tensor.split(widths, 1)
        self._places = [part.unflatten(1, layout) for part, layout in zip(parts, layouts, strict=True)]

    def put(self, number: int, source: int, block: Tensor) -> None:
        """Of exchange `number`, the block `[M, O, Q]` of rank `source`."""
        self._places[number][:, :, source].copy_(block)


class _PanelProduct:
    """One matmul, panel by panel."""

    def __init__(self, sent: Sequence[Tensor], other: Tensor, bias: Tensor | None) -> None:
        self.out = other.new_empty((sent[0].shape[1], other.shape[1]))
        self._sum = RunningSum(self.out, bias)
        layouts = _columns(sent)
        parts = other.split([prod(layout) for layout in layouts], 0)
        self._others = [part.unflatten(0, layout) for part, layout in zip(parts, layouts, strict=True)]

    def add(self, number: int, source: int, block: Tensor) -> None:
        """Of exchange `number`, the block `[M, O, Q]` of rank `source`."""
        others = self._others[number][:, source]  # [O, Q, N]
        if block.shape[1] == 1 or block.shape[2] < MIN_PIECE:
            self._sum.add(block.flatten(1), others.flatten(0, 1))
            return
        for piece, other in enumerate(others):
            self._sum.add(block[:, piece], other)


@register_template("all_to_all_matmul")
class ShmAllToAllGemm:
    """inputs as `as_panels` takes them, dim 0 the destination, in any strides; others `[K, N]`."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(
        self, plan: Plan, size: int, inputs: Sequence[Tensor], others: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> int:
        return arena_bytes([x.shape for x in inputs], inputs[0].dtype)

    def run(
        self,
        channel: Channel,
        plan: Plan,
        inputs: Sequence[Tensor],
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        inputs = as_panels(plan, inputs)
        places = post(channel, inputs).places
        late = is_low_precision(inputs[0].dtype)
        received = Received(inputs) if late or plan.return_gathered else None
        products = [] if late else [_PanelProduct(inputs, *pair) for pair in zip(others, biases, strict=True)]

        def take(number: int, source: int, block: Tensor) -> None:
            if received is not None:
                received.put(number, source, block)
            for product in products:
                product.add(number, source, block)

        for number, x in enumerate(inputs):
            take(number, channel.rank, x[channel.rank])
        for number, place in enumerate(places):
            for peer in channel.peers():
                take(number, peer, arrived(channel, place, peer))
        outputs = [product.out for product in products]
        if late and received is not None:
            for other, bias in zip(others, biases, strict=True):
                outputs.append(other.new_empty((received.tensor.shape[0], other.shape[1])))
                multiply(outputs[-1], received.tensor, other, bias)
        if plan.return_gathered and received is not None:
            outputs.append(received.tensor)
        return outputs
