"""Compiled kernels by configuration. One rank of a host compiles, the others load what it left in TileLang's cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from typing import Any

from filelock import FileLock

from ...nvshmem.native import cache_dir
from ...observe import log
from .kernels.gemm import GemmConfig, compile_kernel

Build = Callable[[GemmConfig, bool], Any]


@lru_cache(maxsize=256)
def kernel(build: Build, config: GemmConfig, flag: bool) -> Callable[..., None]:
    """The compiled kernel of `build(config, flag)`, as a function of its arguments that launches on the current stream.

    Raises:
        RuntimeError: nvcc failed; the message has its output.
    """
    name = f"{build.__name__}{config}{flag}"
    with FileLock(str(cache_dir() / f"{sha256(name.encode()).hexdigest()[:16]}.lock")):
        log.debug("compiling %s", name)
        return entry(compile_kernel(build(config, flag)))


def entry(compiled: Any) -> Callable[..., None]:
    """The native function of a compiled kernel: what TileLang's own wrapper calls after it has looked for outputs to allocate."""
    executable = compiled.adapter.get_exportable_executable()
    module = executable.jit() if hasattr(executable, "jit") else executable
    function: Callable[..., None] = module.main
    return function
