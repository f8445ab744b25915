"""NVSHMEM for the ranks of this world: entered together or not at all, one arena per process, regions of it for groups.

Not for groups: provider.py takes regions of the arena for them. NVSHMEM can be initialised once per process and by all ranks
of the world together, while groups are formed by some ranks, at any time. So the world enters it once, after a muster, and
allocates one arena; after that a group needs nobody outside it: the ledger says which offsets are free, and PEs are global
ranks.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..errors import HeapError
from ..observe import log
from . import host
from .arena import Ledger, grains
from .muster import Muster, Worker, judge_alike, judge_ready

DEFAULT_HEAP_BYTES = 1 << 30
MUSTER_S = 20.0  # how long the ranks wait for each other before they do without NVSHMEM
INIT_S = 120.0  # how long the initialisation may take once all have come
_ALIKE = {
    "host": "are on different hosts",
    "state": "do not both start with NVSHMEM uninitialised",
    "version": "have different NVSHMEM versions",
}


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def local_facts(device: torch.device) -> dict[str, str]:
    """The host, and the UUID of the GPU `device`."""
    boot = _read("/proc/sys/kernel/random/boot_id")
    return {
        "host": f"{socket.gethostname()} {boot}",
        "gpu": str(torch.cuda.get_device_properties(device).uuid),
    }


def touch(device: torch.device) -> None:
    """Make `device` current in this thread and start CUDA there: NVSHMEM takes the device that it finds."""
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)


class World:
    """NVSHMEM in this process, for one life of the default process group.

    Args:
        store: shared by all ranks of the world, new in each life of the process group, and used for nothing else.
        rank: global rank.
        size: number of ranks of the world.
        device: the local GPU, with its index.
        heap_bytes: wanted size of the arena; the smallest that a rank wants counts.
        muster_s: bound of the wait for the other ranks, in seconds.
        init_s: bound of the initialisation, in seconds.
        load: gives the library.
        facts: gives what is compared between ranks: host and GPU.
        touch: starts CUDA in the calling thread.

    Attributes:
        ledger: leases of the arenas; None unless `enter` returned "".
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        device: torch.device,
        heap_bytes: int = DEFAULT_HEAP_BYTES,
        *,
        muster_s: float = MUSTER_S,
        init_s: float = INIT_S,
        load: Callable[[], host.Nvshmem] = host.load,
        facts: Callable[[torch.device], dict[str, str]] = local_facts,
        touch: Callable[[torch.device], None] = touch,
    ) -> None:
        self.rank = rank
        self.size = size
        self.ledger: Ledger | None = None
        self._store = store
        self._muster = Muster(store, rank, size)
        self._device = device
        self._heap_bytes = heap_bytes
        self._muster_s = muster_s
        self._init_s = init_s
        self._load = load
        self._facts = facts
        self._touch = touch
        self._library: host.Nvshmem | None = None
        self._refusal: str | None = None
        self._lock = threading.Lock()

    def enter(self) -> str:
        """Enter NVSHMEM together with all ranks; returns "" if that succeeded, else why the world does without it.

        The first call may wait, for `muster_s` and `init_s` at most; later calls return what the first one returned.

        Raises:
            HeapError: all ranks agreed to start NVSHMEM, and then it did not start in time.
        """
        with self._lock:
            if self._refusal is None:
                self._refusal = "NVSHMEM did not start on this rank"  # what later calls say if this one raises
                self._refusal = self._enter()
                log.info("NVSHMEM: %s", self._refusal or f"entered by {self.size} ranks")
            return self._refusal

    def _statement(self) -> dict[str, Any]:
        """This rank's position in the first stage."""
        try:
            library = self._library = self._load()
            facts = self._facts(self._device)
            state, nbytes = "new", grains(self._heap_bytes)
            if library.initialized():
                if library.position() != (self.rank, self.size):
                    pe, pes = library.position()
                    return {
                        "refusal": f"this program uses NVSHMEM already, as PE {pe} of {pes} in a world of {self.size}"
                    }
                state = "started elsewhere"
            if library.arena is not None:
                state, nbytes = "has an arena", library.arena[1]
            return {**facts, "state": state, "nbytes": nbytes, "version": library.version()}
        except (RuntimeError, AssertionError, OSError) as error:
            return {"refusal": str(error)}

    def _enter(self) -> str:
        own = self._statement()
        self._muster.post(0, own)
        ruling, posts = self._muster.settle(0, judge_alike(self.size, _ALIKE), self._muster_s)
        if not ruling.go:
            return ruling.reason
        gpus = [posts[rank]["gpu"] for rank in range(self.size)]
        shared = next((rank for rank in range(self.size) if gpus.index(gpus[rank]) != rank), None)
        if shared is not None:
            return f"ranks {gpus.index(gpus[shared])} and {shared} share one GPU"
        nbytes = min(int(post["nbytes"]) for post in posts.values())
        reason = self._start(str(own["state"]), nbytes)
        if not reason:
            assert self._library is not None and self._library.arena is not None
            self.ledger = Ledger(self._store, self.rank, self._library.arena[1])
        return reason

    def _start(self, state: str, nbytes: int) -> str:
        """Initialise and allocate; returns "" or why it failed on some rank. A peer may die meanwhile: nothing here waits for ever."""

        def action() -> None:
            assert self._library is not None
            self._touch(self._device)
            if state == "new":
                host.set_environment()
                self._library.initialize(self._exchange_uid(), self.rank, self.size)
            if self._library.arena is None:
                self._library.allocate(nbytes)

        deadline = time.monotonic() + self._init_s
        worker = Worker("tscompile-nvshmem", action)
        while worker.is_alive() and time.monotonic() < deadline:
            worker.join(0.02)
            ruling = self._muster.ruling(1)
            if ruling is not None and not ruling.go:
                return ruling.reason
        late = f"NVSHMEM did not start within {self._init_s:g} s" if worker.is_alive() else ""
        refusal = late or ("" if worker.error is None else str(worker.error))
        self._muster.post(1, {"refusal": refusal})
        ruling, _ = self._muster.settle(1, judge_ready(self.size), max(deadline - time.monotonic(), 1.0))
        if late:
            raise HeapError(
                f"{late} on rank {self.rank}: look for the first error in the logs of the other ranks; "
                "NVSHMEM_DEBUG=INFO says what it waits for"
            )
        return "" if ruling.go else ruling.reason

    def _exchange_uid(self) -> bytes:
        """The world's id: rank 0 makes it, the others read it. Only after the muster, since making it opens a socket."""
        assert self._library is not None
        if self.rank == 0:
            uid = self._library.unique_id()
            self._store.set("uid", uid.hex())
            return uid
        deadline = time.monotonic() + self._init_s
        while not self._store.check(["uid"]):
            if time.monotonic() > deadline:
                raise HeapError(f"rank 0 published no NVSHMEM id within {self._init_s:g} s: look at its log")
            time.sleep(0.005)
        return bytes.fromhex(self._store.get("uid").decode())

    def address(self, rank: int, offset: int) -> int:
        """Address of byte `offset` of the arena of `rank` (global), as mapped in this process; 0 if it is not mapped."""
        assert self._library is not None and self._library.arena is not None
        own = self._library.arena[0] + offset
        return own if rank == self.rank else self._library.peer_address(own, rank)


_current: tuple[weakref.ref[Any], World] | None = None
_current_lock = threading.Lock()  # forward and backward run in different threads


def current_world(device: torch.device, heap_bytes: int = DEFAULT_HEAP_BYTES) -> World:
    """The world of this life of the default process group; not entered yet unless somebody did. Waits for nobody.

    Args:
        device: the local GPU, with its index.
        heap_bytes: wanted size of the arena; counts in the first call of a life.
    """
    global _current
    group = distributed_c10d._get_default_group()
    with _current_lock:
        if _current is not None and _current[0]() is group:
            return _current[1]
        rank, size = dist.get_rank(), dist.get_world_size()
        store = dist.PrefixStore("tscompile/nvshmem", distributed_c10d._get_default_store())
        # Keys of an earlier life in the same store are not seen: each start of a rank is counted, and the ranks count alike.
        life = store.add(f"starts/{rank}", 1)
        world = World(dist.PrefixStore(str(life), store), rank, size, device, heap_bytes)
        _current = (weakref.ref(group), world)
        return world
