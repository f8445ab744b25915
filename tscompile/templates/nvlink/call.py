"""The steps of a call: made once for a site, a layout and a slot, then patched and issued again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from ...nvshmem import stream
from ...nvshmem.stream import Step, Values, steps_of
from .channel import DONE, FORK, JOIN, MAIN, SIDE, DeviceChannel

EPOCH, SOURCE = 0, 1  # words of a call; further sources follow


class Sent(Step):
    """A copy of a tensor that comes with the call: its `src` counts from the address in word SOURCE + `source`."""

    def __init__(self, *, source: int = 0, **fields: int) -> None:
        super().__init__(**fields)
        self.source = source


class Call:
    """The steps of a site's calls in one slot. Made once; what differs between calls is patched in before they are issued.

    Args:
        channel: the first of these calls.
        main: steps of the main stream.
        side: steps of the copy stream, copies and the flags behind them; they start when the main stream gets there, and it waits for
            them in the end.
        values: those that LAUNCH steps point at.

    Attributes:
        words: set before the steps are issued: [EPOCH], which the flags of the copy stream take (in a captured call they read it when
            the graph runs), and from [SOURCE] on the addresses of the tensors that are sent.
        steps: all of them. before, after: those before and behind the main stream's, for a call whose kernel is among another
            group's steps.
    """

    def __init__(
        self, channel: DeviceChannel, main: Sequence[Step], side: Sequence[Step], values: list[Values]
    ) -> None:
        self.values = values
        opening, closing = [], []
        if channel.captured:
            self._opening = channel.link.opener.values(channel.values())
            opening = [channel.link.opener.step(self._opening, MAIN)]
        if side:
            opening += [
                Step(kind=stream.RECORD, stream=MAIN, event=FORK),
                Step(kind=stream.AWAIT, stream=SIDE, event=FORK),
            ]
            closing = [
                Step(kind=stream.RECORD, stream=SIDE, event=JOIN),
                Step(kind=stream.AWAIT, stream=MAIN, event=JOIN),
            ]
        if not channel.captured:  # the watchdog's event belongs to no graph
            closing.append(Step(kind=stream.RECORD, stream=MAIN, event=DONE))
        sent = [step for step in (*side, *main) if isinstance(step, Sent)]
        self.words = (ctypes.c_uint64 * (SOURCE + 1 + max((step.source for step in sent), default=0)))()
        for copy in sent:
            copy.word = ctypes.addressof(self.words) + 8 * (SOURCE + copy.source)
        for step in side:
            if step.kind == stream.WRITE:
                step.word = ctypes.addressof(self.words) + 8 * EPOCH
        # Sends before kernels that wait: with one hardware queue for all streams, they run in the order of their issue.
        self.steps = steps_of(*opening, *side, *main, *closing)
        self.before, self.after = steps_of(*opening, *side), steps_of(*closing)
