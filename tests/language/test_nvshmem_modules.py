"""NVSHMEM's state in modules that are loaded: initialised by whoever loads them, or an error. The CUDA driver and NVSHMEM are stubs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tvm_ffi

from tests.nvshmem.fakes import FakeLibrary, Network
from tests.templates.nvlink.stub_gpu import StubDriver
from tscompile.errors import HeapError, TscompileError
from tscompile.language import modules
from tscompile.nvshmem import host, stream

MODULE = 0xABCD1230


class Loader:
    """Stubs: `state` says whether modules hold NVSHMEM's state; `library` is NVSHMEM's."""

    def __init__(self) -> None:
        self.driver, self.library = StubDriver(), FakeLibrary(Network(1), 0)
        self.nvshmem = host.Nvshmem(self.library, "a fake")
        self._bytes = ctypes.c_int.in_dll(self.driver._library, "stub_state_bytes")

    def state(self, there: bool) -> None:
        self._bytes.value = 776 * there

    def start(self) -> None:
        self.nvshmem.initialize(self.nvshmem.unique_id(), 0, 1)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    made = Loader()
    monkeypatch.setattr(stream, "load", lambda: made.driver)
    monkeypatch.setattr(host, "load", lambda: made.nvshmem)
    yield made
    made.state(False)


def test_tvm_s_hook(loader: Loader) -> None:
    hook = tvm_ffi.get_global_func("runtime.nvshmem.cumodule_init")
    before = modules._calls
    hook(ctypes.c_void_p(MODULE))
    assert modules._calls == before + 1 and loader.library.modules == []  # a kernel without NVSHMEM
    loader.state(True)
    with pytest.raises(RuntimeError, match=r"loaded before NVSHMEM has started: make a tl.SymmetricGroup"):
        hook(ctypes.c_void_p(MODULE))
    loader.start()
    hook(ctypes.c_void_p(MODULE))
    assert loader.library.modules == [MODULE]
    loader.library.module_code = 3
    with pytest.raises(
        RuntimeError, match=r"NVSHMEM 3\.4\.5 refuses a kernel's module \(code 3\): compile the kernel anew"
    ):
        hook(ctypes.c_void_p(MODULE))


def test_the_hook_leaves_other_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where our own native code cannot be built: mainline TileLang goes on."""

    def fails() -> None:
        raise HeapError("no C compiler")

    monkeypatch.setattr(stream, "load", fails)
    tvm_ffi.get_global_func("runtime.nvshmem.cumodule_init")(ctypes.c_void_p(MODULE))


def test_kernels_that_are_launched_through_the_driver(loader: Loader) -> None:
    loader.driver.load_kernel(b"cubin", "kernel", 0)
    assert loader.library.modules == []
    loader.state(True)
    with pytest.raises(HeapError, match="loaded before NVSHMEM has started"):
        loader.driver.load_kernel(b"cubin", "kernel", 0)
    loader.start()
    loader.driver.load_kernel(b"cubin", "kernel", 0)
    assert len(loader.library.modules) == 1


def test_a_kernel_of_tilelang(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def launch(*args: int) -> int:
        ran.append(args[0])
        return 5

    kernel = modules.NvshmemKernel(launch)
    assert kernel.__name__ == "launch"
    with pytest.raises(HeapError, match=r"NVSHMEM has not started: make a tl.SymmetricGroup"):
        kernel(1)
    assert ran == []
    loader.start()
    monkeypatch.setattr(modules, "_calls", 0)
    with pytest.raises(TscompileError, match=r"import tscompile.language before the first TileLang kernel"):
        kernel(2)
    monkeypatch.setattr(modules, "_calls", 1)
    assert kernel(3) == 5 and ran == [2, 3]


def test_an_error_of_the_hook_comes_out_as_it_is(loader: Loader) -> None:
    hook = tvm_ffi.get_global_func("runtime.nvshmem.cumodule_init")
    loader.start()
    loader.state(True)
    loader.library.module_code = 3
    kernel = modules.NvshmemKernel(lambda: hook(ctypes.c_void_p(MODULE)))
    with pytest.raises(HeapError, match="refuses a kernel's module"):
        kernel()

    def other() -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        modules.NvshmemKernel(other)()


def test_what_was_registered_before_is_called_too(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(modules, "_previous", seen.append)
    modules._loaded(SimpleNamespace(value=MODULE))
    assert [module.value for module in seen] == [MODULE]  # type: ignore[attr-defined]


def test_the_mark_is_in_the_header() -> None:
    """What tells a kernel with NVSHMEM in its prelude from one without."""
    folder = Path(modules.__file__).parent
    texts = {path.name: modules.linking.MARK in path.read_text() for path in folder.glob("cuda*.h")}
    assert texts.pop("cuda_nvshmem.h") and not any(texts.values())
