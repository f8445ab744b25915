"""Symmetric heap in POSIX shared memory, for the CPU ranks of one host.

Each rank owns two segments under /dev/shm: a small one with control words, made once, and the arena, made anew when it grows.
A segment's name is removed as soon as all peers have mapped it, so nothing stays behind, even after kill -9; what a process
leaves that dies before that moment is removed by the next heap that is created (the name carries the owner's pid and start
time).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import threading
from pathlib import Path

import torch

from ..errors import HeapError
from . import signals
from .heap import FLAGS_PER_PEER, AbortRecord, WaitStatus

SHM_DIR = Path("/dev/shm")
PREFIX = "tscompile-"

_NEVER = 2**62
_SPIN_NS = 30_000  # about what a signal takes between busy cores; longer would rob a rank that shares the core

# Control segment, in bytes: words of its owner, two site names, one record per writer, flags per parity and writer.
_ENTERED, _STARTED, _DOWNGRADE, _DOWNGRADE_BY, _ABORT = 64, 128, 192, 200, 256
_SITES, _SITE_BYTES = 512, 512
_RECORDS, _RECORD_BYTES = 2048, 2048  # downgrade text in the first half, abort record in the second
_FLAG_BYTES = 64


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, None if it has ended (a zombie counts as ended)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def process_is_alive(pid: int, start: int) -> bool:
    """Whether the process that started at `start` still runs; without /proc (`start` is 0) as far as signals can tell."""
    if start:
        return process_start(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def remove_stale(directory: Path = SHM_DIR) -> list[str]:
    """Remove segments whose owner has ended, of this pid namespace; returns their names."""
    removed = []
    for path in directory.glob(PREFIX + "*"):
        parts = path.name[len(PREFIX) :].split("-")
        if len(parts) != 4 or not all(part.isdigit() for part in parts[:3]) or int(parts[0]) != _pid_namespace():
            continue
        if not process_is_alive(int(parts[1]), int(parts[2])):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path.name)
    return removed


def free_bytes() -> int:
    """Room left in /dev/shm."""
    stat = os.statvfs(SHM_DIR)
    return stat.f_bavail * stat.f_frsize


def _allocate(fd: int, nbytes: int) -> None:
    """Reserve the pages now: a lack of room is an error here, where it would be a SIGBUS in the middle of an op."""
    os.posix_fallocate(fd, 0, nbytes)


class Segment:
    """One mapped file under /dev/shm. The mapping lives as long as this object and the tensors over it."""

    def __init__(self, name: str, fd: int, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        populate = getattr(mmap, "MAP_POPULATE", 0)
        self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | populate)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        pid = os.getpid()
        name = f"{PREFIX}{_pid_namespace()}-{pid}-{process_start(pid) or 0}-{secrets.token_hex(6)}"
        path = SHM_DIR / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HeapError(f"cannot create files in {SHM_DIR} ({error.strerror}): mount a tmpfs there") from error
        try:
            _allocate(fd, nbytes)
            return cls(name, fd, nbytes)
        except (OSError, ValueError) as error:
            path.unlink(missing_ok=True)
            mib = 1 << 20
            raise HeapError(
                f"no room in {SHM_DIR}: needs {-(-nbytes // mib)} MiB, has {free_bytes() // mib} MiB: "
                "enlarge it (docker run --shm-size) or lower tilescale.heap_bytes"
            ) from error
        finally:
            os.close(fd)

    @classmethod
    def open(cls, name: str, nbytes: int) -> Segment:
        if "/" in name or not name.startswith(PREFIX):
            raise HeapError(f"{name!r} is no name of a shared segment: run the same tscompile on every rank")
        try:
            fd = os.open(SHM_DIR / name, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HeapError(
                f"cannot map a peer's segment ({error.strerror}): give the ranks one /dev/shm and user"
            ) from error
        try:
            if os.fstat(fd).st_size != nbytes:
                raise HeapError("a peer's segment has another size: run the same tscompile on every rank")
            return cls(name, fd, nbytes)
        except (OSError, ValueError) as error:
            raise HeapError(f"cannot map a peer's segment ({error}): raise the limit of mapped memory") from error
        finally:
            os.close(fd)

    def unlink(self) -> None:
        """Remove the name; the memory goes with the last mapping. Quiet if it is gone already."""
        with contextlib.suppress(OSError):
            (SHM_DIR / self.name).unlink()

    def bytes_tensor(self) -> torch.Tensor:
        """uint8 tensor over the whole segment, usable in and out of inference mode."""
        with torch.inference_mode(False), torch.device("cpu"):
            return torch.frombuffer(self._map, dtype=torch.uint8)


def control_bytes(size: int) -> int:
    """Size of the control segment of one rank in a group of `size`."""
    return _RECORDS + size * (_RECORD_BYTES + 2 * FLAGS_PER_PEER * _FLAG_BYTES)


class ShmHeap:
    """SymmetricHeap over POSIX shared memory.

    It is built in three steps, between which the ranks talk through their store: `prepare` makes this rank's segments and
    returns their names, `connect` maps the peers', `release_names` removes this rank's names once everyone has mapped them.
    The same steps replace the arena by a larger one later.

    Args:
        rank: index of this rank in the group.
        size: number of ranks.

    Raises:
        HeapError: no C compiler, or no room for the control segment.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.half_bytes = 0
        self._aborts = threading.Lock()  # taken for good by the first abort of this rank
        self._signals = signals.load()
        remove_stale()
        own = Segment.create(control_bytes(size))
        self._control: list[Segment | None] = [None] * size
        self._control[rank] = own
        self._pids: list[tuple[int, int]] = [(0, 0)] * size
        self._next: Segment | None = None
        self._arena: list[torch.Tensor] = []
        self._typed: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._signals.store(own.address + _DOWNGRADE, _NEVER)
        self._own = own.address
        self.entry = self._signals.entry(self._own + _ENTERED, self._own + _ABORT, self._own + _DOWNGRADE)
        self._spin_ns = _SPIN_NS if size <= len(os.sched_getaffinity(0)) else 0

    @property
    def connected(self) -> bool:
        return all(segment is not None for segment in self._control)

    def prepare(self, half_bytes: int) -> dict[str, object]:
        """Make this rank's next arena; returns what peers need to map this rank's segments.

        Raises:
            HeapError: no room in /dev/shm.
        """
        self.discard()
        half = max(mmap.PAGESIZE, -(-half_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._next = Segment.create(2 * half)
        own = self._control[self.rank]
        assert own is not None
        pid = os.getpid()
        return {
            "control": own.name,
            "arena": self._next.name,
            "arena_bytes": 2 * half,
            "pid": pid,
            "start": process_start(pid) or 0,
        }

    def connect(self, peers: list[dict[str, object]]) -> None:
        """Map the segments that every rank's `prepare` described, in rank order, and use the new arenas from now on.

        If they differ in size, the smallest counts.

        Raises:
            HeapError: a segment cannot be mapped; the old arenas stay in use.
        """
        assert self._next is not None
        tensors = []
        for rank, peer in enumerate(peers):
            if self._control[rank] is None:
                self._control[rank] = Segment.open(str(peer["control"]), control_bytes(self.size))
            nbytes = int(str(peer["arena_bytes"]))
            segment = self._next if rank == self.rank else Segment.open(str(peer["arena"]), nbytes)
            tensors.append(segment.bytes_tensor())
            self._pids[rank] = (int(str(peer["pid"])), int(str(peer["start"])))
        self._arena = tensors
        self._typed = {}
        self.half_bytes = min(int(str(peer["arena_bytes"])) for peer in peers) // 2

    def release_names(self) -> None:
        """Remove the names of this rank's segments: every peer has mapped them, or will not."""
        own = self._control[self.rank]
        if own is not None:
            own.unlink()
        self.discard()

    def discard(self) -> None:
        """Forget the segment that `prepare` made last, unless `connect` has taken it into use."""
        if self._next is not None:
            self._next.unlink()
            self._next = None

    def _address(self, rank: int) -> int:
        segment = self._control[rank]
        assert segment is not None
        return segment.address

    def _flag(self, owner: int, writer: int, flag: int, epoch: int) -> int:
        base = self._address(owner) + _RECORDS + self.size * _RECORD_BYTES
        return base + (((epoch & 1) * self.size + writer) * FLAGS_PER_PEER + flag) * _FLAG_BYTES

    def view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        base = self._typed.get((owner, dtype))
        if base is None:
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
                base = self._arena[owner].view(dtype)
            self._typed[owner, dtype] = base
        strides = [1] * len(shape)
        for dim in range(len(shape) - 2, -1, -1):
            strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
        return base.as_strided(shape, strides, offset // base.element_size())

    def signal(self, peer: int, flag: int, epoch: int, site: int, payload: int) -> None:
        self._signals.signal(self._flag(peer, self.rank, flag, epoch), epoch, site, payload)

    def wait(self, peer: int, flag: int, epoch: int, site: int, payload: int, budget_s: float) -> WaitStatus:
        own = self._own
        address = self._flag(self.rank, peer, flag, epoch)
        budget_ns = int(budget_s * 1e9)
        return WaitStatus(
            self._signals.wait(address, own + _DOWNGRADE, own + _ABORT, epoch, site, payload, self._spin_ns, budget_ns)
        )

    def enter(self, epoch: int, name: str) -> bool:
        own = self._own
        if name:
            text = name.encode()[: _SITE_BYTES - 1] + b"\0"
            ctypes.memmove(own + _SITES + (epoch & 1) * _SITE_BYTES, text, len(text))
        return bool(self.entry(epoch))

    def entered(self, peer: int) -> int:
        return self._signals.load(self._address(peer) + _ENTERED)

    def start(self, graph: int) -> None:
        self._signals.store(self._own + _STARTED, graph)

    def started(self, peer: int) -> int:
        return self._signals.load(self._address(peer) + _STARTED)

    def site_of(self, peer: int, epoch: int) -> str:
        raw = ctypes.string_at(self._address(peer) + _SITES + (epoch & 1) * _SITE_BYTES, _SITE_BYTES)
        return raw.split(b"\0", 1)[0].decode(errors="replace")

    def alive(self, peer: int) -> bool:
        return process_is_alive(*self._pids[peer])

    def _write_record(self, owner: int, part: int, guilty: int, text: str) -> None:
        """Record of this rank in the control segment of `owner`: guilty rank, then text."""
        room = _RECORD_BYTES // 2
        raw = guilty.to_bytes(8, "little") + text.encode()[: room - 9] + b"\0"
        ctypes.memmove(self._address(owner) + _RECORDS + self.rank * _RECORD_BYTES + part * room, raw, len(raw))

    def _read_record(self, writer: int, part: int) -> tuple[int, str]:
        room = _RECORD_BYTES // 2
        raw = ctypes.string_at(self._own + _RECORDS + writer * _RECORD_BYTES + part * room, room)
        return int.from_bytes(raw[:8], "little"), raw[8:].split(b"\0", 1)[0].decode(errors="replace")

    def downgrade(self, epoch: int, reason: str) -> None:
        for owner in range(self.size):
            self._write_record(owner, 0, 0, reason)
            self._signals.claim(self._address(owner) + _DOWNGRADE_BY, self.rank + 1)
            self._signals.lower(self._address(owner) + _DOWNGRADE, epoch)

    def downgraded(self) -> tuple[int, str] | None:
        epoch = self._signals.load(self._own + _DOWNGRADE)
        if epoch == _NEVER:
            return None
        writer = self._signals.load(self._own + _DOWNGRADE_BY) - 1
        return epoch, self._read_record(writer, 0)[1]

    def abort(self, guilty: int, text: str) -> None:
        if not self._aborts.acquire(blocking=False):  # the first text may be the one that counts: it stays
            return
        for owner in range(self.size):
            self._write_record(owner, 1, guilty, text)
            self._signals.claim(self._address(owner) + _ABORT, self.rank + 1)

    def aborted(self) -> AbortRecord | None:
        writer = self._signals.load(self._own + _ABORT) - 1
        if writer < 0:
            return None
        guilty, text = self._read_record(writer, 1)
        return AbortRecord(guilty, writer, text)
