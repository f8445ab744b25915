"""The ctypes layer: struct sizes, and the wrapper over a library that is a fake."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tscompile.errors import HeapError
from tscompile.nvshmem import host

from .fakes import FakeLibrary, Function, Network


def wrapped() -> tuple[host.Nvshmem, FakeLibrary]:
    library = FakeLibrary(Network(1), 0)
    return host.Nvshmem(library, "a fake"), library


def test_structs_have_the_sizes_of_the_headers() -> None:
    sizes = {s: ctypes.sizeof(s) for s in (host.InitAttr, host.InitArgs, host.UniqueId, host.UniqueIdArgs)}
    assert list(sizes.values()) == [144, 128, 128, 24]


def test_a_world_of_one() -> None:
    nvshmem, library = wrapped()
    assert nvshmem.version() == "3.4.5"
    assert not nvshmem.initialized()
    uid = nvshmem.unique_id()
    assert len(uid) == host.UID_BYTES
    nvshmem.initialize(uid, 0, 1)
    assert nvshmem.initialized()
    assert nvshmem.position() == (0, 1)
    nvshmem.allocate(1 << 16)
    assert nvshmem.arena is not None
    assert nvshmem.peer_address(nvshmem.arena[0] + 8, 0) == nvshmem.arena[0] + 8
    assert library.nvshmem_align.argtypes == [ctypes.c_size_t] * 2  # type: ignore[attr-defined]
    assert library.nvshmem_align.restype == ctypes.c_void_p  # type: ignore[attr-defined]


def test_failures_name_the_next_action() -> None:
    nvshmem, library = wrapped()
    library.init_code = 7
    with pytest.raises(HeapError, match=r"code 7.*NVSHMEM_DEBUG"):
        nvshmem.initialize(nvshmem.unique_id(), 0, 1)
    library.init_code, library.place = 0, (3, 4)
    with pytest.raises(HeapError, match="PE"):
        nvshmem.initialize(nvshmem.unique_id(), 0, 1)
    library.room = 0
    with pytest.raises(HeapError, match=r"tilescale\.heap_bytes"):
        nvshmem.allocate(1 << 20)
    library.nvshmemx_get_uniqueid = Function(lambda uid: 1)  # type: ignore[attr-defined]
    with pytest.raises(HeapError, match="IFNAME"):
        nvshmem.unique_id()
    with pytest.raises(HeapError, match="has no nvshmemx_init_status"):
        host.Nvshmem(SimpleNamespace(), "a fake")


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NVSHMEM_REMOTE_TRANSPORT", "NVSHMEM_DISABLE_NVLS", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "x")  # so that the test's end restores them
        monkeypatch.delenv(name)
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "ibrc")
    monkeypatch.setattr(os, "listdir", lambda path: ["lo"])
    host.set_environment()
    assert [os.environ.get(name) for name in names] == ["ibrc", "1", "lo"]
    monkeypatch.delenv("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME")
    monkeypatch.setattr(os, "listdir", lambda path: ["lo", "eth0"])
    host.set_environment()
    assert "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME" not in os.environ


def test_no_library_and_a_broken_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "SONAME", "libnvshmem_host_missing.so.3")
    monkeypatch.setattr(host, "wheel_library", lambda: None)
    with pytest.raises(HeapError, match="install a CUDA build of torch"):
        host.load.__wrapped__()
    broken = tmp_path / "lib.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(host, "wheel_library", lambda: broken)
    with pytest.raises(HeapError, match="reinstall the wheel"):
        host.load.__wrapped__()
