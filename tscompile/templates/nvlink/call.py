"""The steps of a call: made once for a site, a layout and a slot, then patched and issued again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from ...nvshmem import stream
from ...nvshmem.stream import Step, Values, steps_of
from .channel import DONE, FORK, JOIN, MAIN, SIDE, DeviceChannel

SOURCE, EPOCH = 0, 1  # words of a call


class Call:
    """The steps of a site's calls in one slot. Made once; what differs between calls is patched in before they are issued.

    Args:
        channel: the first of these calls.
        main: steps of the main stream.
        side: steps of the copy stream, copies and flags in turn; they start when the main stream gets there, and it waits for them
            in the end.
        values: those that LAUNCH steps point at.

    Attributes:
        words: set before the steps are issued: [SOURCE], the address that the copies' offsets into the caller's memory count from, and
            [EPOCH], which the flags of the copy stream take (in a captured call they read it when the graph runs).
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
        # Sends before kernels that wait: with one hardware queue for all streams, they run in the order of their issue.
        self.words = (ctypes.c_uint64 * 2)()
        source, epoch = (ctypes.addressof(self.words) + 8 * word for word in (SOURCE, EPOCH))
        for step in [*side[::2], *(step for step in main if step.kind != stream.LAUNCH)]:
            step.word = source
        for step in () if channel.captured else side[1::2]:
            step.word = epoch
        self.steps = steps_of(*opening, *side, *main, *closing)
        self.before, self.after = steps_of(*opening, *side), steps_of(*closing)
