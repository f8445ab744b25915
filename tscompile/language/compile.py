"""Compile a kernel for CUDA without a GPU, and look at what it becomes: generated source, PTX, cubin, registers and spills."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tilelang
import tvm
from tilelang.contrib.nvcc import default_compile_options

from . import linking, toolchain
from .launch_spec import LaunchSpec, launch_spec

_TRIES = 5
_KERNEL = 'extern "C" __global__'
_QUIET = "-w"  # TileLang's headers and unused functions of a prelude make a thousand lines, a third of nvcc's time; nobody sees them
_parser = threading.Lock()


@dataclass(frozen=True)
class CudaArtifact:
    """A kernel compiled for CUDA.

    Attributes:
        source: the CUDA C++ that TileLang generated, without the prelude and TileLang's headers.
        ptx: what nvcc made of it.
        cubin: the ELF image; that of `compile_cuda_all` may hold other kernels too.
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


def lower(function: Any, arch: str = "sm_90a", pass_configs: dict[str, Any] | None = None) -> Any:
    """What TileLang makes of a prim_func: CUDA C++ and the module that launches it."""
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


def _ptx(source: str, arch: str, way: linking.Linking, folder: str) -> Path:
    cu, ptx = (Path(folder) / f"kernel.{suffix}" for suffix in ("cu", "ptx"))
    cu.write_text(source)
    nvshmem = linking.options(linking.checked(way)) if linking.MARK in source else []
    command = [str(toolchain.nvcc()), "-ptx", "-O3", _QUIET, f"-arch={arch}", *default_compile_options(), *nvshmem]
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
    lowered = lower(function, arch, pass_configs)
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
    (artifact,) = compile_cuda_all([function], arch, pass_configs, nvshmem)
    return artifact


def compile_cuda_all(
    functions: Iterable[Any],
    arch: str = "sm_90a",
    pass_configs: dict[str, Any] | None = None,
    nvshmem: linking.Linking = "inline",
) -> list[CudaArtifact]:
    """`compile_cuda` for many kernels, many times as fast: nvcc spends two seconds on TileLang's headers, and some tenths on a kernel.

    Kernels with the same prelude are compiled in one file. There they have a number behind their name, and share the cubin.
    """
    return compile_lowered([lower(function, arch, pass_configs) for function in functions], arch, nvshmem)


def compile_lowered(
    lowered: Sequence[Any], arch: str = "sm_90a", nvshmem: linking.Linking = "inline"
) -> list[CudaArtifact]:
    """`compile_cuda_all` for what `lower` returned."""
    kernels = [_kernel_of(each) for each in lowered]
    files: dict[tuple[str, ...], list[int]] = {}
    for index, kernel in enumerate(kernels):
        files.setdefault((kernel.head, *kernel.shared), []).append(index)
    made: dict[int, CudaArtifact] = {}
    for members in files.values():
        made.update(zip(members, _compile_file([kernels[index] for index in members], arch, nvshmem), strict=True))
    return [made[index] for index in range(len(kernels))]


@dataclass(frozen=True)
class _Kernel:
    """A kernel that TileLang wrote: headers, then declaration and body; how it declares dynamic shared memory, and bytes of it."""

    name: str
    head: str
    text: str
    shared: tuple[str, ...]
    dynamic: int


def _kernel_of(lowered: Any) -> _Kernel:
    ((name, attrs),) = (
        (str(var.name_hint), function.attrs)
        for var, function in lowered.device_mod.functions.items()
        if function.attrs is not None
    )
    head, kernel, rest = str(lowered.kernel_source).partition(_KERNEL)
    # In one file all kernels must declare it alike; its name is the same in all.
    shared = tuple(re.findall(r"extern __shared__.*", rest))
    return _Kernel(name, head, kernel + rest, shared, int(attrs.get("dyn_shared_memory_buf", 0)))


def _compile_file(kernels: list[_Kernel], arch: str, nvshmem: linking.Linking) -> list[CudaArtifact]:
    """Compile kernels with the same head in one file."""
    names = [kernel.name + (f"_{number}" if len(kernels) > 1 else "") for number, kernel in enumerate(kernels)]
    bodies = [re.sub(rf"\b{kernel.name}\b", name, kernel.text) for kernel, name in zip(kernels, names, strict=True)]
    source = "\n".join([kernels[0].head, *bodies])
    with tempfile.TemporaryDirectory(prefix="tscompile-") as folder:
        ptx, cubin = _ptx(source, arch, nvshmem, folder), Path(folder) / "kernel.cubin"
        log = _assemble(source, ptx, arch, nvshmem, cubin)
        text, image = ptx.read_text(), cubin.read_bytes()
    texts = _of_each(text, names, r"^\.visible \.entry {}\(")
    logs = _of_each(log, names, r"^.*Compiling entry function '{}'")
    return [
        CudaArtifact(
            source=kernel.text,
            ptx=texts[name],
            cubin=image,
            registers=_largest(r"Used (\d+) registers", logs[name]),
            spill_bytes=sum(int(number) for number in re.findall(r"(\d+) bytes spill", logs[name])),
            stack_bytes=_largest(r"(\d+) bytes stack frame", logs[name]),
            shared_bytes=_largest(r"(\d+) bytes smem", logs[name]) + kernel.dynamic,
            log=logs[name],
        )
        for kernel, name in zip(kernels, names, strict=True)
    ]


def _of_each(text: str, names: list[str], begins: str) -> dict[str, str]:
    """Cut a text where each name's part begins; what is before the first belongs to all."""
    starts = {name: re.search(begins.format(name), text, re.MULTILINE) for name in names}
    places = sorted((found.start(), name) for name, found in starts.items() if found)
    if len(places) < len(names):
        raise toolchain.ToolchainError(
            f"nvcc says nothing about {set(names) - {name for _, name in places}}: {text[-3000:]}"
        )
    ends = [place for place, _ in places[1:]] + [len(text)]
    head = text[: places[0][0]]
    return {name: head + text[place:end] for (place, name), end in zip(places, ends, strict=True)}
