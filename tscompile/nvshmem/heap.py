"""The interface of a symmetric heap, and the channel through which one fused op uses it.

Not for memory mapping (shm.py) and not for agreement between ranks (lowering/vote.py). A heap belongs to one group (its rank
tuple); ranks in this package are indices within that group.

A heap has two parts. The arena holds data: `size` equal arenas, one owned by each rank, each split into two halves that
alternate with the parity of the epoch. The control words hold, for each rank: the epoch that it entered last, the graph that
it started last, the epoch from which the group runs the original ops (`downgrade`), and the record of an abort; and for each
pair of ranks a few flags per parity.

Why two halves suffice: every op receives from every peer. A rank reuses a half two epochs later; by then it has finished the
epoch in between, so every peer has entered that one, and therefore has finished reading the half.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import torch

from ..errors import PeerError

FLAGS_PER_PEER = 8  # signals that one rank may send another within one op
ALIGNMENT = 64  # of offsets in an arena, in bytes: a cache line
TICK_S = 0.05  # a wait comes up for air this often, to look at the peer's process and the clock


class WaitStatus(IntEnum):
    """How a bounded wait ended; the numbers are those of signals.c."""

    ARRIVED = 0
    TICK = 1
    DOWNGRADED = 2
    ABORTED = 3
    MISMATCH = 4


@dataclass(frozen=True)
class AbortRecord:
    """Why the group's fused ops ended: `guilty` is the index of the rank at fault, `writer` that of the rank that says so."""

    guilty: int
    writer: int
    text: str


class DowngradedError(Exception):
    """Not an error of the program: the ranks of the group run the original op of this epoch instead."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class HostWords(Protocol):
    """What the ranks of a group tell each other through shared host memory, beside their data.

    `entry` is `enter` for those whose site nobody will ask for, as one native call: it takes the epoch.
    """

    rank: int
    size: int
    entry: Callable[[int], int]

    def enter(self, epoch: int, name: str) -> bool:
        """Say that this rank has entered `epoch` at the site `name`. True if the group was aborted, or runs the original ops of
        this epoch."""
        ...

    def entered(self, peer: int) -> int:
        """The epoch that `peer` entered last, 0 if none."""
        ...

    def start(self, graph: int) -> None:
        """Say that the graph that this rank started as its `graph`-th one on the group needs no vote."""
        ...

    def started(self, peer: int) -> int:
        """The number that `peer` gave in its last `start`, 0 if none."""
        ...

    def site_of(self, peer: int, epoch: int) -> str:
        """Name of the site that `peer` gave when it entered `epoch`."""
        ...

    def alive(self, peer: int) -> bool:
        """False if the process of `peer` has ended."""
        ...

    def downgrade(self, epoch: int, reason: str) -> None:
        """From `epoch` on the ranks run the original ops; the lowest epoch that any rank wrote counts."""
        ...

    def downgraded(self) -> tuple[int, str] | None:
        """(epoch, reason) of the downgrade, None if there is none."""
        ...

    def abort(self, guilty: int, text: str) -> None:
        """End the waits of all ranks with an error."""
        ...

    def aborted(self) -> AbortRecord | None: ...


class GroupHeap(HostWords, Protocol):
    """Life cycle of a group's heap, whatever its memory: prepare, exchange of the posts, connect, release_names. The same steps
    replace its arenas by larger ones. `half_bytes` is what one call can use of an arena."""

    half_bytes: int

    @property
    def connected(self) -> bool: ...

    def prepare(self, half_bytes: int) -> dict[str, object]: ...

    def connect(self, peers: list[dict[str, object]]) -> None: ...

    def release_names(self) -> None: ...


class SymmetricHeap(HostWords, Protocol):
    """Symmetric memory that hosts read and write themselves. Offsets and sizes are in bytes."""

    half_bytes: int

    def view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Contiguous tensor over the arena of `owner`; `offset` counts from the arena's start and is a multiple of ALIGNMENT."""
        ...

    def signal(self, peer: int, flag: int, epoch: int, site: int, payload: int) -> None:
        """Release store of `epoch` into the flag that `peer` keeps for this rank; `site` and `payload` go along for checking."""
        ...

    def wait(self, peer: int, flag: int, epoch: int, site: int, payload: int, budget_s: float) -> WaitStatus:
        """Acquire wait until the flag of `peer` reaches `epoch`, for `budget_s` seconds at most."""
        ...


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment of arena offsets."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@lru_cache(maxsize=4096)
def site_hash(site: str) -> int:
    """Positive 62-bit number that stands for a site's name in flags."""
    return int.from_bytes(blake2b(site.encode(), digest_size=8).digest(), "little") >> 2


class HostChannel:
    """One epoch of one group, as its host sees it: the start of the op, and how it may fail.

    Args:
        heap: the group's heap.
        ranks: global rank of each index, for messages.
        epoch: number of this op, the same on all ranks.
        site: the site's name.
        timeout_s: how long a rank waits for one signal.
    """

    def __init__(self, heap: HostWords, ranks: tuple[int, ...], epoch: int, site: str, timeout_s: float) -> None:
        self.words = heap
        self.rank = heap.rank
        self.size = heap.size
        self.ranks = ranks
        self.epoch = epoch
        self.site = site
        self.timeout_s = timeout_s

    def check(self) -> None:
        """Raise DowngradedError or PeerError if the group will not finish this epoch."""
        record = self.words.aborted()
        if record is not None:
            raise self.peer_error(record)
        downgrade = self.words.downgraded()
        if downgrade is not None and downgrade[0] <= self.epoch:
            raise DowngradedError(downgrade[1])

    def fail(self, guilty: int, text: str) -> PeerError:
        """Abort the group, naming the rank at fault, and return the error to raise. The first abort of a group wins."""
        self.words.abort(guilty, f"{text} [seen by rank {self.ranks[self.rank]} at site {self.site}]")
        record = self.words.aborted()
        return self.peer_error(record if record is not None else AbortRecord(guilty, self.rank, text))

    def peer_error(self, record: AbortRecord) -> PeerError:
        message = (
            f"{record.text}. The fused ops of ranks {list(self.ranks)} stay refused until the process group is "
            f"initialised again (this rank was at site {self.site})"
        )
        return PeerError(self.ranks[record.guilty], self.site, message)


class Channel(HostChannel):
    """One epoch of one group, as a template on the host sees it: views of the epoch's halves, signals, bounded waits."""

    def __init__(self, heap: SymmetricHeap, ranks: tuple[int, ...], epoch: int, site: str, timeout_s: float) -> None:
        super().__init__(heap, ranks, epoch, site, timeout_s)
        self.site_hash = site_hash(site)
        self.heap = heap
        self._base = (epoch & 1) * heap.half_bytes
        self.payload = 0

    def peers(self) -> Iterator[int]:
        """The other ranks, the next one first, so that no rank is everybody's first destination."""
        for step in range(1, self.size):
            yield (self.rank + step) % self.size

    def view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Contiguous tensor at `offset` bytes into this epoch's half of the arena of `owner`. Valid until the op returns."""
        return self.heap.view(owner, self._base + offset, shape, dtype)

    def signal(self, peer: int, flag: int = 0) -> None:
        """Tell `peer` that everything this rank wrote so far for `flag` may be read."""
        self.heap.signal(peer, flag, self.epoch, self.site_hash, self.payload)

    def signal_all(self, flag: int = 0) -> None:
        for peer in self.peers():
            self.heap.signal(peer, flag, self.epoch, self.site_hash, self.payload)

    def ready(self, peer: int, flag: int = 0) -> bool:
        """True if the signal is there already; never blocks and never raises."""
        return self.heap.wait(peer, flag, self.epoch, self.site_hash, self.payload, 0.0) == WaitStatus.ARRIVED

    def wait(self, peer: int, flag: int = 0) -> None:
        """Wait for `signal(flag)` of `peer`.

        Raises:
            DowngradedError: the ranks run the original op of this epoch.
            PeerError: the peer died, runs another site or did not answer in time, or a rank has aborted the group.
        """
        deadline = 0.0
        budget = TICK_S
        while True:
            status = self.heap.wait(peer, flag, self.epoch, self.site_hash, self.payload, budget)
            if status == WaitStatus.ARRIVED:
                return
            if status == WaitStatus.MISMATCH:
                other = self.heap.site_of(peer, self.epoch)
                detail = (
                    f"rank {self.ranks[peer]} runs site {other} where rank {self.ranks[self.rank]} runs {self.site}"
                )
                if other == self.site:
                    detail = f"rank {self.ranks[peer]} sends another number of bytes than rank {self.ranks[self.rank]} expects"
                advice = (
                    "make every rank run the same graphs on the same shapes, or disable fusion with backend='inductor'"
                )
                raise self.fail(peer, f"{detail}: {advice}")
            if status != WaitStatus.TICK:
                self.check()
                continue
            now = time.monotonic()
            if not deadline:
                deadline = now - TICK_S + self.timeout_s
            budget = min(TICK_S, max(deadline - now, 0.0))
            if not self.heap.alive(peer):
                if self.ready(peer, flag):  # it sent this, finished and left
                    return
                self.check()  # somebody may know more about the cause
                raise self.fail(
                    peer, f"the process of rank {self.ranks[peer]} has ended: look at its log for the first error"
                )
            if now >= deadline:
                raise self.fail(peer, self._late(peer))

    def _late(self, peer: int) -> str:
        reached = self.heap.entered(peer)
        where = f"it entered the op (epoch {reached})" if reached >= self.epoch else "it never entered the op"
        return (
            f"rank {self.ranks[peer]} did not answer within {self.timeout_s:g} s, its process is alive and {where}: "
            "look for a rank that runs another program path, or raise tilescale.timeout_s"
        )
