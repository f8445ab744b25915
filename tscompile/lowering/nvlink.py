"""Executor of GPU groups: ops are enqueued on CUDA streams, and a watchdog looks after what was enqueued.

A launch returns long before its op has run, so failures come to light later: a kernel that gives up leaves a record in pinned host
memory, which the next launch and the watchdog read.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import torch

from ..errors import HeapError, PeerError
from ..language.toolchain import ToolchainError, nvcc
from ..nvshmem import stream
from ..nvshmem.device import NvlinkHeap
from ..nvshmem.heap import GroupHeap, HostChannel, site_hash
from ..nvshmem.world import DEFAULT_HEAP_BYTES
from ..observe import ledger, log
from ..problem import GroupMemory, Plan
from ..templates import Template
from ..templates.nvlink.channel import DeviceLink, Site
from ..templates.nvlink.jit import compiled, kernel
from .executors import Memo
from .interrupt import raise_in_main_thread

_LOOK_EVERY_S = 0.2
# A program that launches ops hears of a failure from the next launch; one that only replays graphs does not.
_RAISE_AFTER_S = 5.0
_MASK = 0x7FFFFFFF
_HEARSAY_S = 5 * _LOOK_EVERY_S  # a few rounds of the other rank's watchdog
# Launches of a site that are timed: events cost the host as much as the launch does, and the first ones warm up.
_TIMED = (5, 10, 20, 40, 80)


class _Site(Site):
    """A site of the executor's groups, with a stopwatch: a few launches are timed by CUDA events, without waiting for them."""

    __slots__ = ("launches", "name", "pending", "watched")

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number)
        self.name = name
        self.launches = 0
        self.pending: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self.watched = True  # there are launches to time, or times to read

    def due(self) -> bool:
        """Count a launch; True if it is one to time."""
        self.launches += 1
        if self.pending is not None and self.pending[1].query():
            first, last = self.pending
            self.pending = None
            ledger.measured(self.name, first.elapsed_time(last) * 1e3)
        self.watched = self.pending is not None or self.launches <= _TIMED[-1]
        return self.pending is None and self.launches in _TIMED


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class NvlinkExecutor:
    """Templates enqueue kernels and copies over NVLink."""

    name = "nvlink"
    shares = 4
    runs_ahead = True

    def __init__(self) -> None:
        self.link: DeviceLink | None = None
        # Links that may have work: replaced ones that a CUDA graph uses for as long as it is replayed, then the current one.
        self._links: list[DeviceLink] = []
        self.heap: NvlinkHeap | None = None
        self._stopped: DeviceLink | None = None  # its kernels have been told to give up
        self._stopped_at = 0.0
        self.raised = False  # the program has been told of the failure
        self.ranks: tuple[int, ...] = ()
        self._sites: dict[int, str] = {}
        self._joined: weakref.WeakSet[NvlinkExecutor] = weakref.WeakSet()

    def make_heap(self, ranks: tuple[int, ...], index: int, heap_bytes: int | None) -> NvlinkHeap:
        if not torch.cuda.is_available():
            raise HeapError("torch sees no GPU in this process: check CUDA_VISIBLE_DEVICES")
        try:
            nvcc()
        except ToolchainError as error:
            raise HeapError(f"kernels cannot be compiled: {error}") from error
        device = torch.device("cuda", torch.cuda.current_device())
        return NvlinkHeap(index, len(ranks), device, ranks=ranks, heap_bytes=heap_bytes or DEFAULT_HEAP_BYTES)

    def adopt(self, heap: GroupHeap, ranks: tuple[int, ...], timeout_s: float) -> None:
        assert isinstance(heap, NvlinkHeap)
        self.heap, self.ranks = heap, ranks
        if self.link is not None and self.link.memory is heap.memory:
            for link in self._links:
                link.set_timeout(timeout_s)
            return
        services = (kernel("service", name) for name in ("tsk_open", "tsk_acknowledge"))
        self.link = DeviceLink(heap.memory, heap.half_bytes, timeout_s, *services)
        self._links = [*(link for link in self._links if link.was_captured), self.link]
        heap.retire(keep=[link.memory for link in self._links])
        _watchdog.watch(self)

    def enter(self, heap: GroupHeap, epoch: int, site: str) -> bool:
        """Without the site's name: peers learn of a wrong site from the kernel's record, and this runs at every launch."""
        for link in self._links:
            if link.record_word.value:
                return True
        return heap.entry(epoch) != 0

    def channel(self, heap: GroupHeap, ranks: tuple[int, ...], epoch: int, site: str, timeout_s: float) -> HostChannel:
        return HostChannel(heap, ranks, epoch, site, timeout_s)

    def run(
        self, template: Template, channel: HostChannel | None, plan: Plan, args: tuple[Any, ...], memo: Memo
    ) -> list[torch.Tensor]:
        assert self.link is not None
        site = memo.kept
        if site is None:
            site = memo.kept = self._site(plan)
        call = self.link.open(site)
        if not site.watched or call.captured or not site.due():
            return template.run(call, plan, *args)
        return self._timed(site, template, call, plan, args)

    def run_joined(
        self, other: NvlinkExecutor, template: Template, plan: Plan, args: tuple[Any, ...], memo: Memo
    ) -> list[torch.Tensor]:
        assert self.link is not None and other.link is not None
        site = memo.kept
        if site is None:
            other._site(plan)
            site = memo.kept = self._site(plan)
        calls = self.link.open(site), other.link.open(site)
        if not site.watched or calls[0].captured or not site.due():
            return template.run(calls, plan, *args)
        return self._timed(site, template, calls, plan, args)

    def _site(self, plan: Plan) -> _Site:
        number = (site_hash(plan.site) & _MASK) or 1
        self._sites[number] = plan.site
        return _Site(number, plan.site)

    def _timed(
        self, site: _Site, template: Template, call: Any, plan: Plan, args: tuple[Any, ...]
    ) -> list[torch.Tensor]:
        first = _event()
        outputs = template.run(call, plan, *args)
        site.pending = first, _event()
        return outputs

    def join(self, other: NvlinkExecutor) -> None:
        self._joined.add(other)
        other._joined.add(self)

    def _tell_joined(self, text: str) -> None:
        """A rank of this group has failed, and this rank will not take part in ops of both groups any more."""
        for other in self._joined:
            heap = other.heap
            if heap is not None and heap.aborted() is None:
                heap.abort(
                    heap.rank, f"ops of ranks {list(self.ranks)} have ended, and some join them with others: {text}"
                )

    def settle(self) -> bool:
        if torch.cuda.is_current_stream_capturing():
            return False
        torch.cuda.synchronize()
        return True

    def ready(self) -> None:
        compiled()

    def failed(self) -> tuple[int, str] | None:
        link = next((link for link in self._links if link.has_record()), None)
        if link is None:
            return None
        found = link.read_record()
        if not found.site:
            return self._hearsay(found.peer)
        site = self._sites.get(found.site, f"number {found.site}")
        waited = f"{link.timeout_s:g} s"
        if found.peer == found.rank:  # kernels of gathers wait for their own copies as well (Recipe)
            return found.peer, (
                f"copies of rank {self.ranks[found.rank]} to its peers did not end within {waited} at site {site}: look for other "
                "programs that use its GPU or the links, or raise tilescale.timeout_s; outputs of that op are NaN"
            )
        return found.peer, (
            f"rank {self.ranks[found.peer]} did not send within {waited} what rank {self.ranks[found.rank]} waited for at site "
            f"{site} (its flag says epoch {found.seen} of {found.expected}): look for a rank that ended or runs another program "
            "path, or raise tilescale.timeout_s; outputs of that op are NaN"
        )

    def _hearsay(self, peer: int) -> tuple[int, str]:
        """This GPU was told to give up. The rank that told it knows whom it waited for, and its host says so within moments."""
        assert self.heap is not None
        patience = time.monotonic() + _HEARSAY_S
        while time.monotonic() < patience:
            record = self.heap.aborted()
            if record is not None:
                return record.guilty, record.text
            time.sleep(0.01)
        return peer, (
            f"rank {self.ranks[peer]} gave up waiting for a peer and ended the group's fused ops: look at its log for the "
            "first error; outputs of the ops that ran since are NaN"
        )

    def stop(self) -> None:
        for link in self._links:
            link.stop()

    def describe(self, heap: GroupHeap, ranks: tuple[int, ...]) -> GroupMemory:
        assert isinstance(heap, NvlinkHeap)
        return GroupMemory(ranks, heap.provider, heap.memory.nbytes, heap.provider_reason)

    def look(self) -> None:
        """One round of the watchdog: spread the news of a failure to the peers' hosts, and of theirs to this GPU."""
        heap, link = self.heap, self.link
        if heap is None or link is None:
            return
        failure = self.failed()
        if failure is not None and heap.aborted() is None:
            log.error("%s", failure[1])
            heap.abort(*failure)
        if self._joined:
            record = heap.aborted()
            if record is not None:
                self._tell_joined(record.text)
        # Replays of a captured graph are invisible here: a group with one may have work at any time.
        captured = any(each.was_captured for each in self._links)
        if link.is_idle() and not captured:
            return
        record = heap.aborted()
        if record is None:
            dead = next((peer for peer in range(heap.size) if peer != heap.rank and not heap.alive(peer)), None)
            # A peer may end after it has done its part; then what is enqueued here completes all the same.
            if dead is None or not link.is_stuck():
                return
            heap.abort(dead, f"the process of rank {self.ranks[dead]} has ended: look at its log for the first error")
        if self._stopped is not link:
            self._stopped, self._stopped_at = link, time.monotonic()
            self.stop()
        elif captured and not self.raised and time.monotonic() - self._stopped_at > _RAISE_AFTER_S:
            self.raised = True
            record = heap.aborted()
            assert record is not None
            raise_in_main_thread(PeerError(self.ranks[record.guilty], "a replayed graph", record.text))


class _Watchdog:
    """One thread per process that looks at every GPU group."""

    def __init__(self) -> None:
        self._executors: weakref.WeakSet[NvlinkExecutor] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, executor: NvlinkExecutor) -> None:
        with self._lock:
            self._executors.add(executor)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="tscompile-watchdog", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            stream.load().relax_captures()  # a program may capture a graph at any time
        except HeapError as error:
            log.warning("CUDA graphs that are captured now may fail: %s", error)
        while True:
            time.sleep(_LOOK_EVERY_S)
            with self._lock:
                executors = list(self._executors)
            for executor in executors:
                try:
                    executor.look()
                except (RuntimeError, OSError, HeapError) as error:
                    log.debug("watchdog: %r", error)


_watchdog = _Watchdog()
