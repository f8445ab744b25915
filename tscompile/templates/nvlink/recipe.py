"""A call of matmuls with an operand that arrives in the slot: its steps, its outputs, and what follows its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...language.context import MAX_RANKS
from ...nvshmem.stream import Step, steps_of
from ...problem import GatherUse, Plan
from ..fresh import maker
from ..template import torch_dtype
from .call import EPOCH, SOURCE, Call, parcel_step, send_steps
from .channel import MAIN, DeviceChannel, DeviceLink
from .gather_blocks import BlocksLaunch
from .gather_rows import RowsLaunch
from .operands import pointer_of
from .panels import Parcel

# Of what a peer gets, at most, for one call of the driver to set all flags: a copy takes no longer than the call that would set its own
# flag, 3 us at 372 GB/s (projected.py, docs/dev/gpu.md), so the kernel waits no longer than it would for the host.
_TOGETHER_BYTES = 1 << 20


class Recipe:
    """What the calls of one site with the same layout share.

    What follows a call on the main stream may write where its copies read, so it must come behind them. In an eager call the copy
    stream sets a flag of this rank behind all copies, and the last kernel waits for it as for those of the peers (tiles.joined): to
    join the streams would take two calls of the driver. The stream itself writes such a flag and takes no SM, of which the kernel may
    hold all. In a captured call a flag is a copy, which within a GPU might take one: there the streams join.

    Args:
        full: shape [P, R*Q] of what is in the slot in the end.
        launches: the kernels. rest: indices of the uses that they do not serve, which torch multiplies.
        chunks: what copy engines send to each peer, and a flag behind each chunk; none if a kernel pushes.
        local: what is copied into the own slot.
        own: bytes from the address of the first tensor to this rank's own shard; None if kernels read that in the slot.
    """

    def __init__(
        self,
        link: DeviceLink,
        plan: Plan,
        full: tuple[int, int],
        launches: Sequence[RowsLaunch | BlocksLaunch],
        rest: Sequence[int],
        chunks: Sequence[Sequence[Parcel]],
        local: Sequence[Parcel],
        own: int | None = 0,
    ) -> None:
        self.link, self.rest = link, rest
        self.dtype = torch_dtype(plan.dtype)
        self._full, self._launches = full, launches
        self._chunks, self._local, self._own = chunks, local, own
        self._new = maker(link.device)
        self._calls: dict[int, Call] = {}

    def _call(self, channel: DeviceChannel) -> Call:
        """The steps of a call in the channel's slot."""
        known = channel.values()
        values = [launch.values(known, channel.captured) for launch in self._launches]
        local = [parcel_step(channel, parcel, channel.rank, MAIN) for parcel in self._local]
        launches = [launch.kernel.step(v, MAIN) for launch, v in zip(self._launches, values, strict=True)]
        # The flags of the last chunk are those of a gather. The previous rank's copies first, so that at any time every rank sends to
        # another one.
        peers = [(channel.rank - distance) % channel.size for distance in range(1, channel.size)]
        side: list[Step] = []
        for number, parcels in enumerate(reversed(self._chunks)):
            flag = number * MAX_RANKS + channel.rank
            side = send_steps(channel, [(peer, parcels, flag) for peer in peers], _TOGETHER_BYTES) + side
        joins = bool(side and launches) and not channel.captured
        if joins:
            side.append(channel.signal_step(channel.rank, channel.rank))
        if channel.captured:
            channel.link.pinned.append(self)
        return Call(channel, [*local, *launches], side, values, joins=joins)

    def run(
        self,
        channel: DeviceChannel,
        plan: Plan,
        tensors: Sequence[Tensor],
        others: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """tensors: what the parcels lie in, in the dtype that travels."""
        call = self._calls.get(channel.slot)
        if call is None:
            call = self._calls[channel.slot] = self._call(channel)
        epoch = channel.epoch
        alive: list[Tensor] = []  # copies, until the kernels are enqueued
        call.words[EPOCH] = epoch
        for number, tensor in enumerate(tensors, SOURCE):
            call.words[number] = pointer_of(tensor, False, alive, True)
        source = channel.data(channel.rank) if self._own is None else call.words[SOURCE] + self._own
        outputs: list[Any] = [None] * len(plan.uses)
        new, dtype = self._new, self.dtype
        gathered = new(self._full, (self._full[1], 1), dtype) if plan.return_gathered else None
        for number, launch in enumerate(self._launches):
            values = call.values[number]
            values[launch.shard], values[launch.epoch] = source, epoch
            if gathered is not None:
                values[launch.gathered] = gathered.data_ptr()
            for index, width, weight, result, bias in launch.operands:
                values[weight] = pointer_of(others[index], launch.transposed, alive, launch.lies)
                out = outputs[index] = new((launch.rows, width), (width, 1), dtype)
                values[result] = out.data_ptr()
                added = biases[index]
                if added is not None:
                    alive.append(added.to(dtype))
                    values[bias] = pointer_of(alive[-1], False, alive)
        channel.link.issue(call.steps)
        if self.rest:
            source_tensor = gathered if gathered is not None else channel.view(self._full, dtype)
            for index in self.rest:
                outputs[index] = _multiply(plan.uses[index], source_tensor, others[index], biases[index])
            if channel.captured:
                self._acknowledge(channel)
            elif gathered is None:  # they have read the slot: a next call on another stream must wait for them, too
                channel.link.issue(channel.link.done)
        if gathered is not None:
            outputs.append(gathered)
        return outputs

    def _acknowledge(self, channel: DeviceChannel) -> None:
        """Tell the peers that this captured call has read its slot."""
        closer = channel.link.closer
        values = closer.values(channel.values())
        channel.link.issue(steps_of(closer.step(values, MAIN)))


def _multiply(use: GatherUse, gathered: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    """The matmul of a use from the gathered tensor [P, R*Q]."""
    contracted = other.shape[0 if use.side == "lhs" else 1]
    columns = contracted if (use.side == "lhs") != use.transposed else gathered.numel() // contracted
    matrix = gathered.to(torch_dtype(use.dtype)).view(-1, columns)
    operand = matrix.t() if use.transposed else matrix
    a, b = (operand, other) if use.side == "lhs" else (other, operand)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
