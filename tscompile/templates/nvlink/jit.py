"""Compiled kernels, by name and configuration: in the user's cache directory, made once per host, and ahead of need.

What is cached is a cubin and its launch spec, so a process that finds both does not import TileLang for them.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ... import language
from ...errors import HeapError, TscompileError
from ...language.launch_spec import LaunchSpec, TensorMap
from ...language.toolchain import load_tilelang
from ...nvshmem import stream
from ...nvshmem.native import cache_dir
from ...observe import log
from .launch import Kernel

_WORKERS = 4  # compilations at a time and rank: nvcc takes seconds, lowering some tenths of one
_SUFFIXES = (".py", ".h")


@lru_cache(maxsize=1)
def _sources() -> str:
    """Digest of everything that a kernel is made of."""
    digest = sha256(version("tilelang").encode())
    folders = (Path(language.__file__).parent, Path(__file__).with_name("kernels"))
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in _SUFFIXES):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _build(name: str, args: tuple[Any, ...]) -> tuple[bytes, LaunchSpec]:
    """Compile `<name>_kernel(*args)` of kernels/<name>.py."""
    load_tilelang()
    from ...language.compile import build_cubin, parse

    def write() -> Any:  # importing the module parses, too: its macros
        return getattr(importlib.import_module(f"{__package__}.kernels.{name}"), f"{name}_kernel")(*args)

    function = parse(write)
    from .kernels.gemm import PASS_CONFIGS

    return build_cubin(function, pass_configs=PASS_CONFIGS)


def artifact(name: str, *args: Any) -> tuple[bytes, LaunchSpec]:
    """Cubin and launch spec of a kernel: `kept` for `<name>_kernel(*args)` of kernels/<name>.py."""
    return kept(name, f"{name}{args}", lambda: _build(name, args))


def kept(name: str, recipe: str, build: Callable[[], tuple[bytes, LaunchSpec]]) -> tuple[bytes, LaunchSpec]:
    """What `build` makes. One process of a host compiles it, the others wait and read what it left.

    Args:
        name: of the files in the cache directory.
        recipe: all that the kernel is made of, beside tscompile's own files.
        build: compiles it.

    Raises:
        ToolchainError: there is no nvcc, or it failed; the message has its output.
        HeapError: no cache directory that can be written.
    """
    key = sha256(f"{_sources()} {recipe}".encode()).hexdigest()[:32]
    folder = cache_dir() / "kernels"
    try:
        folder.mkdir(exist_ok=True)
        with FileLock(str(folder / f"{name}-{key}.lock")):
            return _read_or_build(folder / f"{name}-{key}", recipe, build)
    except OSError as error:
        raise HeapError(
            f"no compiled kernel can be kept in {folder} ({error}): make room, or set XDG_CACHE_HOME"
        ) from error


def _read_or_build(path: Path, recipe: str, build: Callable[[], tuple[bytes, LaunchSpec]]) -> tuple[bytes, LaunchSpec]:
    try:
        return path.with_suffix(".cubin").read_bytes(), _parse(path.with_suffix(".json").read_text())
    except FileNotFoundError:
        log.debug("compiling %s", recipe)
    cubin, spec = build()
    for suffix, content in ((".cubin", cubin), (".json", json.dumps(asdict(spec)).encode())):
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(content)
        os.replace(scratch, path.with_suffix(suffix))
    return cubin, spec


def _parse(text: str) -> LaunchSpec:
    raw = json.loads(text)
    maps = {name: TensorMap(**_tuples(fields)) for name, fields in raw.pop("maps").items()}
    return LaunchSpec(maps=maps, **_tuples(raw))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""

    def convert(value: Any) -> Any:
        return tuple(convert(item) for item in value) if isinstance(value, list) else value

    return {name: convert(value) for name, value in fields.items()}


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WORKERS, thread_name_prefix="tscompile-nvcc")


_futures: dict[tuple[Any, ...], Future[tuple[bytes, LaunchSpec]]] = {}
_lock = threading.Lock()


def compile_ahead(name: str, *args: Any) -> Future[tuple[bytes, LaunchSpec]]:
    """Have a kernel compiled in the background, again if that has failed."""

    def work() -> tuple[bytes, LaunchSpec]:
        if not threading.main_thread().is_alive():
            raise TscompileError("the program has ended")
        return artifact(name, *args)

    with _lock:
        future = _futures.get((name, *args))
        if future is None or (future.done() and future.exception() is not None):
            future = _futures[name, *args] = _pool().submit(work)
        return future


def compiled() -> None:
    """Wait for everything that is compiled in the background.

    Raises:
        HeapError: a compilation failed; it is said once, and tried again where the kernel is asked for.
    """
    for key, future in list(_futures.items()):
        error = future.exception()
        if error is not None:
            _futures.pop(key, None)
            raise HeapError(f"a kernel cannot be compiled: {error}") from error


def kernel(name: str, *args: Any) -> Kernel:
    """`<name>_kernel(*args)` of kernels/<name>.py, loaded into the current CUDA context.

    Raises:
        ToolchainError, HeapError: as `artifact`; or the driver does not load the kernel.
    """
    return _loaded(torch.cuda.current_device(), name, args)


@lru_cache(maxsize=256)
def _loaded(device: int, name: str, args: tuple[Any, ...]) -> Kernel:
    cubin, spec = compile_ahead(name, *args).result()
    return Kernel(spec, stream.load().load_kernel(cubin, spec.kernel, spec.shared_bytes))
