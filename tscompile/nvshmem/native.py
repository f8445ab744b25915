"""Builds the few C files of this package, once per source, compiler flags and machine type, into the user's cache directory."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from ..errors import HeapError

_FLAGS = ("-O2", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 60.0


def _compiler() -> str | None:
    """The C compiler to use: $CC if it is a plain command that exists, else cc, gcc or clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    return None


def cache_dir() -> Path:
    """A directory of this user alone: code is loaded from it."""
    for path in (user_cache_path("tscompile"), Path(tempfile.gettempdir()) / f"tscompile-{os.getuid()}"):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(path, os.W_OK) and path.stat().st_uid == os.getuid():
            return path
    raise HeapError("no writable cache directory for native code: set XDG_CACHE_HOME to a directory of your own")


def _compile(source: Path, target: Path, libraries: tuple[str, ...]) -> None:
    compiler = _compiler()
    if compiler is None:
        raise HeapError("no C compiler: install gcc, or set CC to one")
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    command = [compiler, *_FLAGS, "-o", str(scratch), str(source), *libraries]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise HeapError(
                f"the C compiler failed: run `{' '.join(command)}` and mend what it says: {done.stderr[-500:]}"
            )
        os.replace(scratch, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HeapError(f"the C compiler {compiler} does not run ({error}): set CC to one that does") from error
    finally:
        scratch.unlink(missing_ok=True)


def build(source: Path, libraries: tuple[str, ...] = (), headers: tuple[Path, ...] = ()) -> Path:
    """Path of the shared library made of a C file, compiled if need be.

    Args:
        source: the C file.
        libraries: linker flags such as "-ldl".
        headers: what it includes from this package; the library is built anew when one of them changes.

    Raises:
        HeapError: there is no C compiler, or no place to put the result; the message says what to do.
    """
    what = (*_FLAGS, *libraries, platform.machine(), platform.system())
    text = b"".join(path.read_bytes() for path in (source, *headers))
    tag = sha256(text + " ".join(what).encode()).hexdigest()[:16]
    target = cache_dir() / f"{source.stem}-{tag}.so"
    if not target.exists():
        with FileLock(str(target) + ".lock"):
            if not target.exists():
                _compile(source, target, libraries)
    return target
