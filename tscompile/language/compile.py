"""Compile a kernel for CUDA without a GPU, and look at what it becomes: generated source, PTX, cubin, registers and spills."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tilelang
import tvm
from tilelang.contrib.nvcc import default_compile_options

from . import linking, toolchain
from .launch_spec import LaunchSpec, launch_spec

_TRIES = 5
_parser = threading.Lock()


@dataclass(frozen=True)
class CudaArtifact:
    """A kernel compiled for CUDA.

    Attributes:
        source: the CUDA C++ that TileLang generated, without the prelude and TileLang's headers.
        ptx: what nvcc made of it.
        cubin: the ELF image.
        registers: per thread.
        spill_bytes: spill stores and loads, bytes per thread.
        stack_bytes: stack frame, bytes per thread.
        shared_bytes: shared memory of a block, static and dynamic.
        log: what ptxas said, its remarks among it.
    """

    source: str
    ptx: str
    cubin: bytes
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    log: str


def _largest(pattern: str, text: str) -> int:
    return max((int(number) for number in re.findall(pattern, text)), default=0)


def _lower(function: Any, arch: str, pass_configs: dict[str, Any] | None) -> Any:
    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    configs = linking.pass_configs(function, pass_configs) or {}
    with tvm.transform.PassContext(opt_level=3, config=configs), target:
        return tilelang.lower(function, target=target)


def parse(write: Callable[[], Any]) -> Any:
    """The prim_func that `write` makes, on any thread. TileLang parses Python source for it, and CPython 3.11 counts the depth of all
    parsers of a process in one place: where two threads parse at once, one gets a SystemError. So these take turns, and if another
    thread (Dynamo's, say) was in between, they try again."""
    with _parser:
        for _ in range(_TRIES - 1):
            try:
                return write()
            except SystemError as error:
                if "recursion depth" not in str(error):
                    raise
        return write()


def _options(source: str, way: linking.Linking) -> list[str]:
    nvshmem = linking.options(linking.checked(way)) if linking.MARK in source else []
    return [*default_compile_options(), *nvshmem]


def _ptx(source: str, arch: str, way: linking.Linking, folder: str) -> Path:
    cu, ptx = (Path(folder) / f"kernel.{suffix}" for suffix in ("cu", "ptx"))
    cu.write_text(source)
    command = [str(toolchain.nvcc()), "-ptx", "-O3", f"-arch={arch}", *_options(source, way)]
    toolchain.run([*command, "-o", str(ptx), str(cu)])
    return ptx


def _assemble(source: str, ptx: Path, arch: str, way: linking.Linking, cubin: Path) -> str:
    """Make the cubin; returns what ptxas said."""
    nvcc = toolchain.nvcc()
    if linking.MARK in source and way == "rdc":
        return linking.link(nvcc, ptx, arch, cubin)
    return toolchain.run([str(nvcc), "-cubin", "-Xptxas", "-v", f"-arch={arch}", "-o", str(cubin), str(ptx)])


def build_cubin(
    function: Any,
    arch: str = "sm_90a",
    pass_configs: dict[str, Any] | None = None,
    nvshmem: linking.Linking = "inline",
) -> tuple[bytes, LaunchSpec]:
    """The ELF image of a prim_func, and how to launch it without TileLang. Arguments and errors as `compile_cuda`."""
    lowered = _lower(function, arch, pass_configs)
    source = str(lowered.kernel_source)
    with tempfile.TemporaryDirectory(prefix="tscompile-") as folder:
        cubin = Path(folder) / "kernel.cubin"
        _assemble(source, _ptx(source, arch, nvshmem, folder), arch, nvshmem, cubin)
        return cubin.read_bytes(), launch_spec(lowered)


def compile_cuda(
    function: Any,
    arch: str = "sm_90a",
    pass_configs: dict[str, Any] | None = None,
    nvshmem: linking.Linking = "inline",
) -> CudaArtifact:
    """Compile a prim_func for CUDA and report on it; nothing is cached, nothing is loaded.

    Args:
        function: a `T.prim_func` with its prelude in it.
        arch: the GPU architecture.
        pass_configs: as `tilelang.compile` takes them.
        nvshmem: how NVSHMEM's device code gets into a kernel whose prelude has it: "inline", or "rdc" (see docs/language.md).

    Raises:
        ToolchainError: there is no nvcc, or the kernel does not compile or link; the message has the compiler's last words.
        HeapError: the kernel makes NVSHMEM calls, and NVSHMEM is not installed.
        ValueError: no such way to link, or pass configs that do not go with the kernel's calls.
    """
    lowered = _lower(function, arch, pass_configs)
    source = str(lowered.kernel_source)
    kernels = [kernel.attrs for kernel in lowered.device_mod.functions.values() if kernel.attrs is not None]
    dynamic = max(int(attrs.get("dyn_shared_memory_buf", 0)) for attrs in kernels)
    with tempfile.TemporaryDirectory(prefix="tscompile-") as folder:
        ptx, cubin = _ptx(source, arch, nvshmem, folder), Path(folder) / "kernel.cubin"
        log = _assemble(source, ptx, arch, nvshmem, cubin)
        return CudaArtifact(
            source=source[source.find('extern "C" __global__') :],
            ptx=ptx.read_text(),
            cubin=cubin.read_bytes(),
            registers=_largest(r"Used (\d+) registers", log),
            spill_bytes=sum(int(number) for number in re.findall(r"(\d+) bytes spill", log)),
            stack_bytes=_largest(r"(\d+) bytes stack frame", log),
            shared_bytes=_largest(r"(\d+) bytes smem", log) + dynamic,
            log=log,
        )
