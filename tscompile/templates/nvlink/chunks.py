"""Calls whose kernels are torch's own: what a peer sends travels by copy engine, and the main stream waits for it between them.

A call has steps to begin, a send per peer (fork, copies, flag), a wait per peer (a kernel of one warp, with a bound), and an end. All
sends are issued before the first wait, and copy engines need no SM, so nobody waits in a circle: take the first call that does not end
on some rank. Whatever came before it has ended everywhere, so every rank gets to its sends, and all its waits end.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...nvshmem import stream
from ...nvshmem.stream import Step, Steps, Values, steps_of
from .channel import DONE, FORK, JOIN, MAIN, SIDE, DeviceChannel
from .jit import kernel

KERNELS: list[tuple[str, ...]] = [("service", "tsk_wait_rank"), ("spoil",)]


@dataclass(frozen=True)
class Piece:
    """Bytes that a send copies: from `source`, the number of a tensor of the call, or from `offset` in the own slot if that is
    None; to `target` in the peer's slot."""

    bytes: int
    target: int
    source: int | None = None
    offset: int = 0


class ChunkCall:
    """The steps of a site's calls in one slot: made once, patched for each call, issued in parts.

    Args:
        channel: the first of these calls.
        pieces: for each rank, what is sent to it.
        sources: number of tensors of a call that pieces are copied from.
    """

    def __init__(self, channel: DeviceChannel, pieces: Sequence[Sequence[Piece]], sources: int = 0) -> None:
        self._link, self._rank = channel.link, channel.rank
        self._words = (ctypes.c_uint64 * (1 + sources))()  # the epoch, then the address of each source
        self._sends = {peer: self._send(channel, peer, pieces[peer]) for peer in peers(channel)}
        waiter = kernel("service", "tsk_wait_rank")
        self._epoch = waiter.place("epoch")
        self._waiting: dict[int, Values] = {
            peer: waiter.values({**channel.values(), "ack": peer}) for peer in peers(channel)
        }
        self._waits = {peer: steps_of(waiter.step(values, MAIN)) for peer, values in self._waiting.items()}
        self._spoiler = kernel("spoil")
        self._context = channel.values()["context"]
        closing = [Step(kind=stream.RECORD, stream=SIDE, event=JOIN), Step(kind=stream.AWAIT, stream=MAIN, event=JOIN)]
        self._opening: Steps | None = None
        if channel.captured:
            opener, closer = self._link.opener, self._link.closer
            self._service = opener.values(channel.values()), closer.values(channel.values())
            self._opening = steps_of(opener.step(self._service[0], MAIN))
            closing.append(closer.step(self._service[1], MAIN))
            self._link.pinned.append(self)
        else:  # the watchdog's event belongs to no graph
            closing.append(Step(kind=stream.RECORD, stream=MAIN, event=DONE))
        self._closing = steps_of(*closing)

    def _send(self, channel: DeviceChannel, peer: int, pieces: Sequence[Piece]) -> Steps:
        steps = [Step(kind=stream.RECORD, stream=MAIN, event=FORK), Step(kind=stream.AWAIT, stream=SIDE, event=FORK)]
        words = ctypes.addressof(self._words)
        for piece in pieces:
            step = Step(kind=stream.COPY, stream=SIDE, dst=channel.data(peer, piece.target), bytes=piece.bytes)
            if piece.source is None:
                step.src = channel.data(channel.rank, piece.offset)
            else:
                step.word = words + 8 * (1 + piece.source)
            steps.append(step)
        flag = channel.signal_step(peer, channel.rank)
        if not channel.captured:
            flag.word = words
        return steps_of(*steps, flag)

    def begin(self, channel: DeviceChannel, sources: Sequence[Tensor] = ()) -> None:
        """Start a call; the tensors must be contiguous and live until `end`."""
        epoch = channel.epoch
        self._words[0] = epoch & 0xFFFFFFFF
        for number, tensor in enumerate(sources, 1):
            self._words[number] = tensor.data_ptr()
        for values in self._waiting.values():
            values[self._epoch] = epoch
        if self._opening is not None:
            self._link.issue(self._opening)

    def send(self, peer: int) -> None:
        """Send `peer` its pieces, behind what the main stream has done so far."""
        self._link.issue(self._sends[peer])

    def wait(self, peer: int) -> None:
        """Have the main stream wait for what `peer` sends."""
        self._link.issue(self._waits[peer])

    def end(self, outputs: Sequence[Tensor]) -> None:
        """Finish the call: the outputs, contiguous, are NaN if it was aborted."""
        spoiling = []
        for output in outputs:
            values = {"context": self._context, "out": output.data_ptr(), "bytes": output.nbytes}
            spoiling.append(self._spoiler.values(values))
        if spoiling:
            self._link.issue(steps_of(*(self._spoiler.step(values, MAIN) for values in spoiling)))
        self._link.issue(self._closing)


def peers(channel: DeviceChannel) -> Iterator[int]:
    """The other ranks in the order in which a rank hears of them: it is the next rank that sends to this one first."""
    return ((channel.rank + step) % channel.size for step in range(1, channel.size))


def receivers(channel: DeviceChannel) -> Iterator[int]:
    """The other ranks, the previous one first, so that at any time every rank sends to another one."""
    return ((channel.rank - step) % channel.size for step in range(1, channel.size))


def floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of an op's outputs that can be NaN."""
    return [tensor for tensor in tensors if tensor.dtype.is_floating_point]


def sendable(tensor: Tensor) -> Tensor:
    """`tensor` contiguous and aligned for the copy engine and for the peers' kernels."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
