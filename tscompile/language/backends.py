"""TileLang's execution backends: which of them run kernels that use these primitives, and why the others cannot.

The primitives are CUDA C++, inlined into a kernel's text by `prelude`, so every backend that compiles CUDA C++ serves: "tvm_ffi" and
"cython" by nvcc, "nvrtc" by NVIDIA's run-time compiler. docs/tilescale.md has the table, from compiling with each of them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Literal

import tilelang  # noqa: F401  (it brings tvm)
import tvm

from ..errors import BackendError

Backend = Literal["auto", "tvm_ffi", "cython", "nvrtc", "cutedsl"]

SERVING = {"cuda": ("tvm_ffi", "cython", "nvrtc"), "cpu": ("cython",)}
"""Per target the backends that work, the default one first."""

_REASONS = {
    "cutedsl": (
        "it turns a kernel into Python for the CuTe DSL and drops the CUDA C++ of the prelude, so the primitives do not exist there",
        'use "tvm_ffi", "cython" or "nvrtc"; kernels without these primitives may go on using it',
    ),
    "torch": ("it is for Apple's GPUs", 'use "tvm_ffi", "cython" or "nvrtc"'),
}


def refusal(backend: str, reason: str, action: str) -> BackendError:
    return BackendError(backend, f"execution backend {backend!r} cannot be used: {reason}: {action}")


def choose(backend: str | None, target: Literal["cuda", "cpu"]) -> str:
    """The execution backend that is meant, where it can serve these kernels at all; whether it can here, `check` says.

    Args:
        backend: as TileLang names it. "auto" and None: what TILELANG_EXECUTION_BACKEND says, else the default of the target.
        target: of the kernels.

    Raises:
        BackendError: it cannot; the message has the reason and what to do.
    """
    source = ""
    if backend is None or backend == "auto":
        from tilelang import env

        backend = str(env.get_default_execution_backend() or "auto").lower()
        source = " (named by TILELANG_EXECUTION_BACKEND)"
    if backend == "auto":
        return SERVING[target][0]
    if backend in SERVING[target]:
        return backend
    if target == "cpu" and backend in (*SERVING["cuda"], *_REASONS):
        action = "unset it for CPU ranks" if source else 'leave it out for "cpu"'
        raise refusal(backend, f'TileLang compiles its C target with "cython" only{source}', action)
    if backend in _REASONS:
        reason, action = _REASONS[backend]
        raise refusal(backend, reason + source, action)
    raise refusal(backend, f"TileLang has none of this name{source}", f"use one of {', '.join(SERVING[target])}")


def check(backend: str, target: Literal["cuda", "cpu"]) -> None:
    """Look for what a backend needs on this machine, before TileLang fails in the middle of it. "tvm_ffi" needs no GPU to compile.

    Raises:
        BackendError: it lacks something; the message says what, and how to get it.
    """
    if target == "cpu" or backend == "tvm_ffi":
        return
    if backend == "nvrtc":
        _check_nvrtc()
    import torch

    if not torch.cuda.is_available():
        reason = "it loads a kernel as soon as it is compiled, and there is no GPU with a driver here"
        raise refusal(
            backend, reason, 'compile on a machine with a GPU, or with "tvm_ffi", which loads at the first launch'
        )


def refuse_linking(backend: str) -> None:
    """Refuse a backend for kernels with NVSHMEM's calls, whose modules must be initialised when they are loaded.

    Raises:
        BackendError: it is not "tvm_ffi", the one that hands over what it loads.
    """
    if backend != "tvm_ffi":
        reason = "kernels with NVSHMEM's calls must be initialised when they are loaded, and it does not hand them over"
        raise refusal(backend, reason, 'use "tvm_ffi" for them')


def _check_nvrtc() -> None:
    install = "pip install 'tscompile[nvrtc]'"
    try:
        importlib.import_module("cuda.bindings.driver")
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise refusal("nvrtc", f"the Python bindings of CUDA are missing ({error})", install) from error
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # what the bindings raise differs from release to release
        raise refusal("nvrtc", f"libnvrtc cannot be loaded ({str(error).splitlines()[0]})", install) from error
    from tilelang.env import CUDA_HOME
    from tilelang.jit.adapter.nvrtc.include_paths import discover_cuda_include_paths

    home = CUDA_HOME or "/usr/local/cuda"
    folders = [Path(folder) for folder in discover_cuda_include_paths(home)]
    for header in ("cuda_runtime.h", "cuda/std/cstdint"):
        if not any((folder / header).is_file() for folder in folders):
            action = f"set CUDA_HOME to a CUDA toolkit, or call tl.use_wheels() before tilelang is imported ({install})"
            raise refusal("nvrtc", f"there is no {header} under {home}", action)


def refuse_target() -> None:
    """Refuse to write a primitive into a kernel for a target that has none of them, where TileLang says which target that is
    (`tilelang.jit(target=...)` does, while it runs the kernel's Python).

    Raises:
        BackendError: the target is TileLang's "cutedsl".
    """
    target = tvm.target.Target.current(allow_none=True)
    if target is not None and "cutedsl" in target.keys:
        raise refusal("cutedsl", *_REASONS["cutedsl"])
