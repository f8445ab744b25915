"""The steps of a call: made once for a site, a layout and a slot, then patched and issued again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

from ...nvshmem import stream
from ...nvshmem.stream import Step, Values, steps_of
from .channel import DONE, FORK, JOIN, MAIN, SIDE, DeviceChannel
from .panels import Parcel

EPOCH, SOURCE = 0, 1  # words of a call; further sources follow


class Sent(Step):
    """A copy of a tensor that comes with the call: its `src` counts from the address in word SOURCE + `source`."""

    def __init__(self, *, source: int = 0, **fields: int) -> None:
        super().__init__(**fields)
        self.source = source


def parcel_step(channel: DeviceChannel, parcel: Parcel, owner: int, number: int) -> Sent:
    """Step of stream `number` that copies what goes to `owner` to its place in the slot of that rank."""
    return Sent(
        kind=stream.COPY if parcel.rows == 1 else stream.COPY_ROWS,
        stream=number,
        dst=channel.data(owner, parcel.target),
        src=parcel.source + owner * parcel.step,
        bytes=parcel.width,
        rows=parcel.rows,
        dst_pitch=parcel.target_pitch,
        src_pitch=parcel.pitch,
        source=parcel.tensor,
    )


def send_steps(
    channel: DeviceChannel, sends: Iterable[tuple[int, Sequence[Parcel], int]], together_bytes: int | None
) -> list[Step]:
    """Steps of the copy stream that send parcels to peers, and set a flag of each behind what it gets.

    The stream orders a flag behind all copies that were issued before it, so flags may as well follow the last copy: one call of the
    driver then sets all of them (stream.c), where each would cost the host as much as a copy. But a peer waits for what others get.

    Args:
        sends: (peer, parcels, flag of the peer), in order.
        together_bytes: flags follow the last copy if no peer gets more bytes in one of the `sends`; None: however many. Those of a
            captured call are copies, which are no fewer behind the last one, so each follows its own.
    """
    sends = list(sends)
    most = max((sum(parcel.rows * parcel.width for parcel in parcels) for _, parcels, _ in sends), default=0)
    together = not channel.captured and (together_bytes is None or most <= together_bytes)
    steps: list[Step] = []
    flags: list[Step] = []
    for peer, parcels, flag in sends:
        steps += [parcel_step(channel, parcel, peer, SIDE) for parcel in parcels]
        (flags if together else steps).append(channel.signal_step(peer, flag))
    return steps + flags


class Call:
    """The steps of a site's calls in one slot. Made once; what differs between calls is patched in before they are issued.

    Args:
        channel: the first of these calls.
        main: steps of the main stream.
        side: steps of the copy stream, copies and the flags behind them; they start when the main stream gets there, and it waits for
            them in the end.
        values: those that LAUNCH steps point at.
        early: more steps of the copy stream, in parts that the caller issues one by one before all others: each starts where the main
            stream is then.
        joins: steps of the main stream wait for all of the copy stream.

    Attributes:
        words: set before the steps are issued: [EPOCH], which the flags of the copy stream take (in a captured call they read it when
            the graph runs), and from [SOURCE] on the addresses of the tensors that are sent.
        early: steps of the early parts. steps: all others. before, after: those before and behind the main stream's, for a call
            whose kernel is among another group's steps.
    """

    def __init__(
        self,
        channel: DeviceChannel,
        main: Sequence[Step],
        side: Sequence[Step],
        values: list[Values],
        early: Sequence[Sequence[Step]] = (),
        joins: bool = False,
    ) -> None:
        self.values = values
        opening, closing = [], []
        if channel.captured:
            self._opening = channel.link.opener.values(channel.values())
            opening = [channel.link.opener.step(self._opening, MAIN)]
        if (side or early) and not joins:
            closing = [
                Step(kind=stream.RECORD, stream=SIDE, event=JOIN),
                Step(kind=stream.AWAIT, stream=MAIN, event=JOIN),
            ]
        if not channel.captured:  # the watchdog's event belongs to no graph
            closing.append(Step(kind=stream.RECORD, stream=MAIN, event=DONE))
        sending = [step for part in (*early, side) for step in part]
        sent = [step for step in (*sending, *main) if isinstance(step, Sent)]
        self.words = (ctypes.c_uint64 * (SOURCE + 1 + max((step.source for step in sent), default=0)))()
        for copy in sent:
            copy.word = ctypes.addressof(self.words) + 8 * (SOURCE + copy.source)
        for step in sending:
            if step.kind == stream.WRITE:
                step.word = ctypes.addressof(self.words) + 8 * EPOCH
        # Sends before kernels that wait: with one hardware queue for all streams, they run in the order of their issue.
        parts = [[*_forked(part), *part] for part in (*early, side)]
        parts[0] = [*opening, *parts[0]]
        self.early = [steps_of(*part) for part in parts[:-1]]
        self.steps = steps_of(*parts[-1], *main, *closing)
        self.before, self.after = steps_of(*parts[-1]), steps_of(*closing)


def _forked(part: Sequence[Step]) -> list[Step]:
    """Steps behind which the copy stream is where the main stream is, if there is anything to copy."""
    if not part:
        return []
    return [Step(kind=stream.RECORD, stream=MAIN, event=FORK), Step(kind=stream.AWAIT, stream=SIDE, event=FORK)]
