"""The steps of a call: made once for a site, a layout and a slot, then patched and issued again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from ...nvshmem import stream
from ...nvshmem.stream import Step, Values, steps_of
from .channel import DONE, FORK, JOIN, MAIN, SIDE, DeviceChannel
from .mesh_tiles import Rectangle

SOURCE, EPOCH = 0, 1  # words of a call


@dataclass(frozen=True)
class Send:
    """Copies of the copy stream, and the flag that is set behind them."""

    copies: Sequence[Step]
    flag: Step

    @property
    def steps(self) -> list[Step]:
        return [*self.copies, self.flag]


def copy_step(number: int, target: int, copy: Rectangle) -> Step:
    """Step of stream `number` that does `copy`, from the caller's memory to what lies at address `target`."""
    return Step(
        kind=stream.COPY if copy.rows == 1 else stream.COPY_ROWS,
        stream=number,
        dst=target + copy.target,
        src=copy.source,
        bytes=copy.width,
        rows=copy.rows,
        dst_pitch=copy.target_pitch,
        src_pitch=copy.pitch,
    )


class Call:
    """The steps of a site's calls in one slot. Made once; what differs between calls is patched in before they are issued.

    Args:
        channel: the first of these calls.
        main: steps of the main stream.
        side: of the copy stream; they start when the main stream gets there, and it waits for them in the end.
        values: those that LAUNCH steps point at.
        early: before `side`, in parts that the caller issues one by one: each starts where the main stream is then.

    Attributes:
        words: set before the steps are issued: [SOURCE], the address that the copies' offsets into the caller's memory count from, and
            [EPOCH], which the flags of the copy stream take (in a captured call they read it when the graph runs).
        early: steps of the early parts. steps: all others. before, after: those before and behind the main stream's, for a call
            whose kernel is among another group's steps.
    """

    def __init__(
        self,
        channel: DeviceChannel,
        main: Sequence[Step],
        side: Sequence[Send],
        values: list[Values],
        early: Sequence[Sequence[Send]] = (),
    ) -> None:
        self.values = values
        opening, closing = [], []
        if channel.captured:
            self._opening = channel.link.opener.values(channel.values())
            opening = [channel.link.opener.step(self._opening, MAIN)]
        if side or early:
            closing = [
                Step(kind=stream.RECORD, stream=SIDE, event=JOIN),
                Step(kind=stream.AWAIT, stream=MAIN, event=JOIN),
            ]
        if not channel.captured:  # the watchdog's event belongs to no graph
            closing.append(Step(kind=stream.RECORD, stream=MAIN, event=DONE))
        # Sends before kernels that wait: with one hardware queue for all streams, they run in the order of their issue.
        self.words = (ctypes.c_uint64 * 2)()
        source, epoch = (ctypes.addressof(self.words) + 8 * word for word in (SOURCE, EPOCH))
        sends = [send for part in (*early, side) for send in part]
        copies = [step for send in sends for step in send.copies]
        for step in [*copies, *(step for step in main if step.kind != stream.LAUNCH)]:
            step.word = source
        for send in () if channel.captured else sends:
            send.flag.word = epoch
        parts = [_forked(sends) for sends in (*early, side)]
        parts[0] = [*opening, *parts[0]]
        self.early = [steps_of(*part) for part in parts[:-1]]
        self.steps = steps_of(*parts[-1], *main, *closing)
        self.before, self.after = steps_of(*parts[-1]), steps_of(*closing)


def _forked(sends: Sequence[Send]) -> list[Step]:
    """Steps that start `sends` where the main stream is."""
    if not sends:
        return []
    return [
        Step(kind=stream.RECORD, stream=MAIN, event=FORK),
        Step(kind=stream.AWAIT, stream=SIDE, event=FORK),
        *(step for send in sends for step in send.steps),
    ]
