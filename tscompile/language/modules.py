"""NVSHMEM in modules that TVM loads: its hook, and TileLang's compile callback for kernels that are linked.

TVM passes each CUmodule that it loads to the global function `runtime.nvshmem.cumodule_init`, which it looks up once per process,
when the first kernel of any kind is launched. So the hook must be there by then: importing this module registers it.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import tvm_ffi
from tilelang.contrib import nvcc as tilelang_nvcc
from tilelang.contrib.nvcc import default_compile_options
from tilelang.cuda import backend
from tilelang.transform import PassConfigKey

from ..errors import HeapError, TscompileError
from ..nvshmem import host, stream
from ..observe import log
from . import linking, toolchain

_HOOK = "runtime.nvshmem.cumodule_init"
_COMPILE = "tilelang_callback_cuda_compile"
_lock = threading.Lock()
_calls = 0
_refusal: HeapError | None = None  # tvm_ffi passes on the text of an error, and RuntimeError as its class
_previous = tvm_ffi.get_global_func(_HOOK, allow_missing=True)


def _loaded(module: Any) -> None:
    """TVM's hook: whatever was registered before is called too."""
    global _calls, _refusal
    with _lock:
        _calls += 1
    if _previous is not None:
        _previous(module)
    try:
        driver = stream.load()
    except (
        HeapError
    ) as error:  # kernels without NVSHMEM run all the same; those with it look at their state, and give up
        log.debug("no module is looked at for NVSHMEM: %s", error)
        return
    try:
        driver.initialize_module(int(getattr(module, "value", module) or 0))
    except HeapError as error:
        _refusal = error
        raise


tvm_ffi.register_global_func(_HOOK, f=_loaded, override=True)


def _flags(configs: Any) -> list[str]:
    flags = (configs or {}).get(PassConfigKey.TL_DEVICE_COMPILE_FLAGS) or []
    return [str(flag) for flag in flags]


def _compile(code: str, target: Any, pass_config: Any = None) -> bytearray:
    """TileLang's callback, with the steps that relocatable code needs; other kernels are compiled as ever."""
    flags = _flags(pass_config)
    if "-rdc=true" not in flags:
        return bytearray(backend.tilelang_callback_cuda_compile(code, target, pass_config))
    arch = f"sm_{tilelang_nvcc.get_target_arch_and_code(target)[0]}"
    nvcc = toolchain.nvcc()
    with tempfile.TemporaryDirectory(prefix="tscompile-") as folder:
        cu, ptx, cubin = (Path(folder) / f"kernel.{suffix}" for suffix in ("cu", "ptx", "cubin"))
        cu.write_text(code)
        command = [str(nvcc), "-ptx", "-O3", f"-arch={arch}", *default_compile_options(), *flags]
        toolchain.run([*command, "-o", str(ptx), str(cu)])
        linking.link(nvcc, ptx, arch, cubin)
        return bytearray(cubin.read_bytes())


class NvshmemKernel:
    """A compiled TileLang kernel that makes NVSHMEM calls: called as the kernel is, and with all its attributes.

    A call raises `HeapError` if NVSHMEM has not started in this process, and `TscompileError` if TVM did not hand over the kernel's
    module to be initialised; no PE is addressed then.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        global _refusal
        stream.load()
        if not host.load().initialized():
            raise HeapError("NVSHMEM has not started: make a tl.SymmetricGroup on GPUs before the first kernel runs")
        try:
            result = self._kernel(*args, **kwargs)
        except RuntimeError as error:
            refusal, _refusal = _refusal, None
            if refusal is None:
                raise
            raise refusal from error
        if not _calls:
            raise TscompileError(
                "TVM loaded this kernel without NVSHMEM, and the kernel gave up: import tscompile.language before the first TileLang "
                "kernel of the process is launched"
            )
        return result


def link_where_asked() -> None:
    """Have TileLang's compile callback link the kernels whose flags ask for relocatable code."""
    tvm_ffi.register_global_func(_COMPILE, f=_compile, override=True)
