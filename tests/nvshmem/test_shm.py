"""The shared-memory heap and its signals, with several ranks in one process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tscompile.errors import HeapError, PeerError
from tscompile.nvshmem import native, shm, signals
from tscompile.nvshmem.heap import Channel, DowngradedError, WaitStatus, aligned, site_hash


def own_segments() -> list[str]:
    return [path.name for path in shm.SHM_DIR.glob(f"{shm.PREFIX}*-{os.getpid()}-*")]


def connected(size: int, half_bytes: int = 8192) -> list[shm.ShmHeap]:
    heaps = [shm.ShmHeap(rank, size) for rank in range(size)]
    grow(heaps, half_bytes)
    return heaps


def grow(heaps: list[shm.ShmHeap], half_bytes: int) -> None:
    posts = [heap.prepare(half_bytes) for heap in heaps]
    for heap in heaps:
        heap.connect(posts)
    for heap in heaps:
        heap.release_names()


def test_peers_see_what_is_written_and_signalled() -> None:
    heaps = connected(3)
    heaps[0].view(2, 64, (2, 3), torch.float32).copy_(torch.arange(6.0).view(2, 3))
    heaps[0].signal(2, 1, 1, 77, 24)
    assert heaps[2].wait(0, 1, 1, 77, 24, 1.0) == WaitStatus.ARRIVED
    assert heaps[2].view(2, 64, (6,), torch.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert heaps[2].wait(0, 1, 1, 78, 24, 1.0) == WaitStatus.MISMATCH
    assert heaps[2].wait(0, 1, 3, 77, 24, 0.01) == WaitStatus.TICK  # same parity, later epoch
    assert heaps[2].wait(1, 1, 1, 77, 24, 0.0) == WaitStatus.TICK
    assert not own_segments()


def test_growth_keeps_control_words_and_old_views() -> None:
    heaps = connected(2, 100)
    before = heaps[1].view(0, 0, (4,), torch.int64)
    before.fill_(5)
    heaps[0].enter(7, "site")
    grow(heaps, 1 << 20)
    assert [heap.half_bytes for heap in heaps] == [1 << 20] * 2
    assert heaps[1].entered(0) == 7
    assert heaps[1].site_of(0, 7) == "site"
    assert before.tolist() == [5] * 4
    heaps[0].view(1, (2 << 20) - 64, (8,), torch.float64).fill_(1)
    assert heaps[1].view(1, (2 << 20) - 64, (8,), torch.float64).sum() == 8
    assert not own_segments()


def test_views_can_be_written_in_and_out_of_inference_mode() -> None:
    with torch.inference_mode():
        heaps = connected(2)
        inside = heaps[0].view(0, 0, (4, 4), torch.float32)
        torch.mm(torch.ones(4, 4), torch.ones(4, 4), out=inside)
    outside = heaps[0].view(0, 0, (4, 4), torch.float32)
    torch.mm(torch.ones(4, 4), torch.ones(4, 4), out=outside)
    assert outside.sum() == 64


def test_a_wait_ends_when_the_signal_comes() -> None:
    heaps = connected(2)
    threading.Timer(0.2, lambda: heaps[1].signal(0, 0, 1, 5, 0)).start()
    start = time.monotonic()
    while heaps[0].wait(1, 0, 1, 5, 0, 0.05) == WaitStatus.TICK:
        assert time.monotonic() - start < 5
    assert time.monotonic() - start >= 0.15


def test_the_first_text_of_a_rank_that_aborts_stays() -> None:
    """Its watchdog and its next launch may both say something: what came first knows more."""
    heaps = connected(2)
    heaps[0].abort(1, "the process of rank 6 has ended")
    heaps[0].abort(0, "rank 4 gave up")
    for heap in heaps:
        record = heap.aborted()
        assert record is not None and (record.guilty, record.text) == (1, "the process of rank 6 has ended")


def enter(channel: Channel) -> None:
    """As a launch does."""
    if channel.words.enter(channel.epoch, channel.site):
        channel.check()


def test_downgrade_and_abort_end_waits_of_all_ranks() -> None:
    heaps = connected(3)
    channels = [Channel(heap, (4, 6, 8), 3, "layer/0", 5.0) for heap in heaps]
    assert heaps[1].downgraded() is None
    heaps[2].downgrade(4, "later")
    enter(channels[0])
    heaps[2].downgrade(3, "because")
    with pytest.raises(DowngradedError, match="because"):
        channels[0].wait(1)
    with pytest.raises(DowngradedError):
        enter(channels[1])
    error = channels[2].fail(1, "rank 6 is gone")
    assert (error.rank, error.site) == (6, "layer/0")
    with pytest.raises(PeerError, match="rank 6 is gone"):
        channels[0].wait(2)


def test_a_wait_names_the_peer_that_is_late_and_the_one_at_another_site() -> None:
    heaps = connected(2)
    here, there = (Channel(heap, (0, 1), 1, f"site{heap.rank}", 0.2) for heap in heaps)
    enter(here)
    with pytest.raises(PeerError, match="did not answer") as late:
        here.wait(1)
    assert late.value.rank == 1
    heaps = connected(2)
    here, there = (Channel(heap, (0, 1), 1, f"site{heap.rank}", 0.2) for heap in heaps)
    enter(here)
    enter(there)
    there.signal_all()
    with pytest.raises(PeerError, match="rank 1 runs site site1 where rank 0 runs site0"):
        here.wait(1)


def test_segments_of_dead_processes_are_removed(tmp_path: Path) -> None:
    code = "from tscompile.nvshmem.shm import Segment; import os; print(Segment.create(4096).name); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    alive = shm.Segment.create(4096)
    dead, foreign = done.stdout.strip(), f"{shm.PREFIX}something else"
    for name in (dead, alive.name, foreign):
        (tmp_path / name).touch()
    assert shm.remove_stale(tmp_path) == [dead]
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, foreign}
    shm.remove_stale()  # unless another process has done so
    assert not (shm.SHM_DIR / dead).exists() and (shm.SHM_DIR / alive.name).exists()
    alive.unlink()


def test_lack_of_room_is_an_error_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    heap = shm.ShmHeap(0, 2)
    monkeypatch.setattr(shm, "_allocate", full)
    with pytest.raises(HeapError, match=r"no room in /dev/shm: needs 4 MiB, has \d+ MiB: enlarge it"):
        heap.prepare(2 << 20)
    heap.release_names()
    assert not own_segments()
    with pytest.raises(HeapError, match="cannot map"):
        shm.Segment.open(f"{shm.PREFIX}1-2-3-4", 4096)
    with pytest.raises(HeapError, match="no name of a shared segment"):
        shm.Segment.open("../etc/passwd", 4096)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_compiler", lambda: None)
    with pytest.raises(HeapError, match="no C compiler: install gcc"):
        signals.load.__wrapped__()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(HeapError, match="the C compiler failed: run"):
        signals.load.__wrapped__()
    monkeypatch.delenv("CC")
    assert signals.load.__wrapped__() is not None
    assert [path.suffix for path in (tmp_path / "tscompile").iterdir()].count(".so") == 1


def test_process_start() -> None:
    assert shm.process_start(os.getpid()) is not None
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert shm.process_start(child.pid) is None  # a zombie
    child.wait()
    assert shm.process_start(child.pid) is None


def test_numbers() -> None:
    assert [aligned(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert 0 <= site_hash("a") != site_hash("b")


def test_exit_with_live_views() -> None:
    code = (
        "import torch\nfrom tests.nvshmem.test_shm import connected\n"
        "heaps = connected(2)\nkept = heaps[0].view(1, 0, (8,), torch.float32)\n"
        "import builtins\nbuiltins.kept_longer = kept\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
