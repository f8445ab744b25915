"""One GPU group as templates see it: slots of symmetric memory, contexts for kernels, the copy stream, the epoch of a call.

Not for votes or errors of the host (lowering/group.py). docs/dev/gpu.md says why two slots suffice and what is different in a
captured call.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...language import context
from ...nvshmem import stream
from ...nvshmem.device import CONTROL_BYTES, SLOTS
from ...nvshmem.stream import Queues, Step, Steps, steps_of
from .kernels.config import DATA_FLAGS
from .lasting import lasting
from .launch import Kernel

FLAGS = 48 << 10  # of a slot, of 4 bytes each
_WORDS = SLOTS * FLAGS * 4  # where the control block's other words start
_ABORT, _CELLS, _ZERO = _WORDS, _WORDS + 256, _WORDS + 512  # eager calls pass their epoch: the word at _ZERO stays 0
ACK = FLAGS - 64  # first flag that tells a rank that a peer has read its slot; those below belong to data

MAIN, SIDE, ALARM = 0, 1, 2  # streams of a step
FORK, JOIN, DONE = 0, 1, 2  # events
_STUCK_S = 2.0


@dataclass(frozen=True)
class Record:
    """What a kernel wrote when it gave up: indices of this rank and the peer, the site's number, and the epochs of the flag."""

    rank: int
    peer: int
    site: int
    expected: int
    seen: int


class Site:
    """What the calls of one site with the same layout share: the site's number for records, and what its template keeps."""

    __slots__ = ("number", "recipe")

    def __init__(self, number: int) -> None:
        self.number = number
        self.recipe: Any = None


class Memory(Protocol):
    """Symmetric memory of a group; nvshmem/device.py has the providers."""

    rank: int
    size: int

    @property
    def addresses(self) -> Sequence[int]: ...

    def view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...


class DeviceLink:
    """What the calls of one group share. One per group and region; a larger region gets a new one.

    Args:
        memory: the group's region, of CONTROL_BYTES + SLOTS * slot_bytes on each rank, its control block zeroed on all ranks.
        slot_bytes: bytes of a slot.
        timeout_s: how long a kernel waits for a peer.
        opener, closer: kernels that open a captured call and acknowledge that it has read its slot (kernels/service.py).
    """

    def __init__(self, memory: Memory, slot_bytes: int, timeout_s: float, opener: Kernel, closer: Kernel) -> None:
        self.memory = memory
        self.rank = memory.rank
        self.size = memory.size
        self.slot_bytes = slot_bytes
        self.timeout_s = timeout_s
        self._index = torch.cuda.current_device()
        self.device = torch.device("cuda", self._index)
        self.driver = stream.load()
        self.opener, self.closer = opener, closer
        self.side = torch.cuda.Stream(priority=-1)
        self._alarm = torch.cuda.Stream(priority=-1)
        self._queues = Queues(
            (0, self.side.cuda_stream, self._alarm.cuda_stream), tuple(self.driver.event() for _ in range(3))
        )
        self._queues_pointer = ctypes.c_void_p(ctypes.addressof(self._queues))
        # torch.cuda.current_stream() takes ten times as long.
        self._raw_stream = torch._C._cuda_getCurrentRawStream
        self._is_capturing = torch._C._cuda_isCurrentStreamCapturing
        self.record = lasting(lambda: torch.zeros(8, dtype=torch.int64).pin_memory(), self.device)
        # Claims of a kernel, for eager and for captured calls; epochs of tiles that landed, for each slot.
        self.counters = [self._words(16) for _ in range(2)]
        self.landed = [self._words(DATA_FLAGS) for _ in range(SLOTS)]
        self.contexts = [self._context(slot) for slot in range(SLOTS)]
        self.context_addresses = [tensor.data_ptr() for tensor in self.contexts]
        self.counter_addresses = [tensor.data_ptr() for tensor in self.counters]
        self.landed_addresses = [tensor.data_ptr() for tensor in self.landed]
        self._after_last = steps_of(Step(kind=stream.AWAIT, stream=MAIN, event=DONE))
        self.done = steps_of(
            Step(kind=stream.RECORD, stream=MAIN, event=DONE)
        )  # what follows a call reads its slot as well
        self.record_word = ctypes.c_int64.from_address(self.record.data_ptr())
        self._stuck_at = 0
        self._stuck_since = 0.0
        self._eager = 0
        self._captured = 0
        self._current = 0  # stream of the last call
        self._last_stream: int | None = None  # that of the last eager one
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}
        self.pinned: list[Any] = []  # recipes whose tables a captured graph reads

    def address(self, owner: int, offset: int) -> int:
        return self.memory.addresses[owner] + offset

    def slot_offset(self, slot: int) -> int:
        return CONTROL_BYTES + slot * self.slot_bytes

    def _context(self, slot: int) -> torch.Tensor:
        own = self.memory.addresses[self.rank]
        bases = list(self.memory.addresses)
        words = context.fill(
            torch.empty(context.WORDS, dtype=torch.int64),
            rank=self.rank,
            size=self.size,
            timeout_ns=int(self.timeout_s * 1e9),
            epoch_cell=own + (_CELLS + 4 * slot if slot >= 2 else _ZERO),
            abort_word=own + _ABORT,
            abort_offset=_ABORT,
            record=self.record.data_ptr(),
            data=[base + self.slot_offset(slot) for base in bases],
            flags=[base + slot * FLAGS * 4 for base in bases],
            control=bases,
        )
        return lasting(lambda: words.to(self.device), self.device)

    def _words(self, count: int) -> torch.Tensor:
        return lasting(lambda: torch.zeros(count, dtype=torch.int32, device=self.device), self.device)

    def open(self, site: Site) -> DeviceChannel:
        """The next call of the group on the current stream."""
        current = self._raw_stream(self._index)
        if current != self._current:
            self._queues.streams[MAIN] = self._current = current
        if self._is_capturing():
            self._captured += 1
            return DeviceChannel(self, 2 + (self._captured & 1), 0, site)
        if self._last_stream != current:
            if self._last_stream is not None:  # calls of a group follow one another, also across streams
                self.issue(self._after_last)
            self._last_stream = current
        self._eager = number = self._eager + 1
        # Kernels take an int32 and compare modulo 2**32, so all 32 bits must count on.
        return DeviceChannel(self, number & 1, ((number + (1 << 31)) & 0xFFFFFFFF) - (1 << 31), site)

    @property
    def was_captured(self) -> bool:
        """A CUDA graph holds addresses of this region."""
        return self._captured > 0

    def issue(self, steps: Steps) -> None:
        self.driver.issue(steps, self._queues_pointer)

    def set_timeout(self, timeout_s: float) -> None:
        """Give later waits of kernels another bound, in seconds."""
        if timeout_s != self.timeout_s:
            self.timeout_s = timeout_s
            for words in self.contexts:
                words[context.TIMEOUT_NS] = int(timeout_s * 1e9)

    def has_record(self) -> bool:
        """A kernel of this rank has given up a wait, or seen that another rank did."""
        return bool(self.record_word.value)

    def read_record(self) -> Record:
        words = self.record.tolist()
        return Record(words[0] - 1, words[1], words[2], words[3], words[4])

    def is_idle(self) -> bool:
        """Nothing that this group has enqueued eagerly is still to run."""
        return self._eager == 0 or self.driver.is_done(self._queues.events[DONE])

    def is_stuck(self) -> bool:
        """The same call has been running for a while."""
        now = time.monotonic()
        if self._stuck_at != self._eager or not self._stuck_since:
            self._stuck_at, self._stuck_since = self._eager, now
        return now - self._stuck_since > _STUCK_S

    def stop(self) -> None:
        """Set the abort word of every rank, by copy engine: the kernels that wait need no SM to hear of it."""
        word = self.rank + 1
        steps = [
            Step(kind=stream.WRITE, stream=ALARM, dst=self.address(owner, _ABORT), value=word)
            for owner in range(self.size)
        ]
        with torch.cuda.device(self.device):
            self.issue(steps_of(*steps))

    def slot_view(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """Contiguous tensor over this rank's slot; cached."""
        key = (slot, shape, dtype, offset)
        found = self._views.get(key)
        if found is None:
            found = self.memory.view(self.rank, self.slot_offset(slot) + offset, shape, dtype)
            self._views[key] = found
        return found


class DeviceChannel:
    """One call. `epoch` is what kernels add to the slot's epoch cell."""

    __slots__ = ("epoch", "link", "site", "slot")

    def __init__(self, link: DeviceLink, slot: int, epoch: int, site: Site) -> None:
        self.link = link
        self.slot = slot
        self.epoch = epoch
        self.site = site

    @property
    def captured(self) -> bool:
        return self.slot >= 2

    @property
    def rank(self) -> int:
        return self.link.rank

    @property
    def size(self) -> int:
        return self.link.size

    def values(self) -> dict[str, int]:
        """What kernels are told of the group, the slot and the site; the epoch changes from call to call."""
        return {
            "context": self.link.context_addresses[self.slot],
            "counters": self.link.counter_addresses[self.slot >> 1],
            "landed": self.link.landed_addresses[self.slot],
            "slot": self.data(self.rank),
            "site": self.site.number,
            "ack": ACK,
            "epoch": 0,
        }

    def view(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        return self.link.slot_view(self.slot, shape, dtype, offset)

    def data(self, owner: int, offset: int = 0) -> int:
        """Address of `offset` bytes into the slot of `owner`, as mapped here."""
        return self.link.address(owner, self.link.slot_offset(self.slot) + offset)

    def signal_step(self, owner: int, flag: int) -> Step:
        """Step of the copy stream that sets a flag of `owner` to the epoch, after the stream's earlier copies."""
        address = self.link.address(owner, (self.slot * FLAGS + flag) * 4)
        if self.captured:  # the value is read when the graph runs
            cell = self.link.address(self.rank, _CELLS + 4 * self.slot)
            return Step(kind=stream.COPY, stream=SIDE, dst=address, src=cell, bytes=4)
        return Step(kind=stream.WRITE, stream=SIDE, dst=address)
