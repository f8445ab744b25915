"""Where nvcc comes from.

TileLang compiles every CUDA kernel with nvcc, at run time, on the user's machine. It looks at $CUDA_HOME and $CUDA_PATH, then for
nvcc on PATH, then for the wheel `nvidia-cuda-nvcc` (13 or later: those for CUDA 12 bring no nvcc), then in /usr/local/cuda. With the
wheels of `tscompile[nvcc]` and no other CUDA in sight it needs no help. A CUDA_HOME that leads nowhere hides the wheels, and so does
an nvcc on PATH that is too old: `use_wheels()` is for that.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

from ..errors import TscompileError

_DISTRIBUTION = "nvidia-cuda-nvcc"
_TIMEOUT_S = 300.0
_loading = threading.RLock()


class ToolchainError(TscompileError):
    """No nvcc that can compile TileLang's kernels."""


def wheel_home() -> Path | None:
    """The CUDA directory that the NVIDIA wheels of this environment make up, if they hold an nvcc."""
    try:
        files = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == "nvcc"]
    return found[0].parent.parent if found else None


def use_wheels() -> Path:
    """Make TileLang use the nvcc of the wheels, whatever CUDA_HOME and PATH say: call it before tilelang is imported.

    Sets CUDA_HOME and puts nvcc first on PATH, for this process and those it starts.

    Returns:
        The CUDA directory of the wheels.

    Raises:
        ToolchainError: tilelang is imported already, or the wheels are not installed.
    """
    home = wheel_home()
    if home is None:
        raise ToolchainError("the nvcc wheels are not installed: pip install 'tscompile[nvcc]'")
    if "tilelang" in sys.modules and os.environ.get("CUDA_HOME") != str(home):
        raise ToolchainError("tilelang has looked for nvcc already: call use_wheels() before it is imported")
    os.environ["CUDA_HOME"] = str(home)
    os.environ["PATH"] = f"{home / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return home


def load_tilelang() -> None:
    """Import tilelang, one thread at a time.

    Its modules import one another in circles. Where two threads import it at once, CPython breaks the deadlock by handing one of them
    modules that are half made, and they stay so. So whatever may run in a thread calls this before it imports anything of tilelang.
    """
    with _loading:
        import_module("tilelang")


def nvcc() -> Path:
    """The nvcc that TileLang will call (imports tilelang).

    Raises:
        ToolchainError: there is none; the message says what to install.
    """
    load_tilelang()
    from tilelang.contrib.nvcc import get_nvcc_compiler

    try:
        found = Path(get_nvcc_compiler())
    except RuntimeError:
        found = Path()
    if not found.is_file():
        raise ToolchainError(
            "no nvcc: pip install 'tscompile[nvcc]', or set CUDA_HOME to a CUDA toolkit of version 12.4 or later"
        )
    return found


def nvcc_version() -> str:
    """The release of `nvcc()`, e.g. "13.0".

    Raises:
        ToolchainError: there is none, or it does not run.
    """
    command = [str(nvcc()), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    marker = "release "
    if done.returncode or marker not in done.stdout:
        raise ToolchainError(f"{command[0]} does not run: {done.stderr[-300:]}")
    return done.stdout.split(marker, 1)[1].split(",", 1)[0]


def run(command: list[str]) -> str:
    """Run a compiler; returns what it said.

    Raises:
        ToolchainError: it does not run, or failed; the message has its errors.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(
            f"{Path(command[0]).name} does not run or does not end: {error}: is the machine overloaded?"
        ) from error
    if done.returncode:
        said = done.stderr or done.stdout
        errors = "\n".join(line for line in said.splitlines() if "error" in line)  # among warnings without end
        raise ToolchainError(f"{' '.join(command)} failed: {errors or said[-3000:]}")
    return done.stdout + done.stderr
