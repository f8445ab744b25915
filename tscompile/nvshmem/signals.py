"""Builds and loads signals.c: the few atomic operations on shared memory that Python does not have.

The library is compiled once per source, compiler and machine type into the user's cache directory.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import cast

from filelock import FileLock
from platformdirs import user_cache_path

from ..errors import HeapError

_SOURCE = Path(__file__).with_name("signals.c")
_FLAGS = ("-O2", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 60.0


def _compiler() -> str | None:
    """The C compiler to use: $CC if it is a plain command that exists, else cc, gcc or clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    return None


def _cache_dir() -> Path:
    """A directory of this user alone: code is loaded from it."""
    for path in (user_cache_path("tscompile"), Path(tempfile.gettempdir()) / f"tscompile-{os.getuid()}"):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(path, os.W_OK) and path.stat().st_uid == os.getuid():
            return path
    raise HeapError("no writable cache directory for the signal library: set XDG_CACHE_HOME to a directory of your own")


def _build(target: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise HeapError("no C compiler: install gcc, or set CC to one")
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    command = [compiler, *_FLAGS, "-o", str(scratch), str(_SOURCE)]
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


class SignalLibrary:
    """Typed access to signals.c. Addresses are integers."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        address, number = ctypes.c_void_p, ctypes.c_int64
        library.tsc_load.argtypes, library.tsc_load.restype = [address], number
        library.tsc_store.argtypes, library.tsc_store.restype = [address, number], None
        library.tsc_signal.argtypes, library.tsc_signal.restype = [address, number, number, number], None
        library.tsc_wait.argtypes = [address, address, address, number, number, number, number, number]
        library.tsc_wait.restype = ctypes.c_int
        library.tsc_lower.argtypes, library.tsc_lower.restype = [address, number], None
        library.tsc_claim.argtypes, library.tsc_claim.restype = [address, number], None
        self._library = library

    def load(self, word: int) -> int:
        return cast(int, self._library.tsc_load(word))

    def store(self, word: int, value: int) -> None:
        self._library.tsc_store(word, value)

    def signal(self, flag: int, epoch: int, site: int, payload: int) -> None:
        self._library.tsc_signal(flag, epoch, site, payload)

    def wait(
        self, flag: int, downgrade: int, abort: int, epoch: int, site: int, payload: int, spin_ns: int, budget_ns: int
    ) -> int:
        return cast(int, self._library.tsc_wait(flag, downgrade, abort, epoch, site, payload, spin_ns, budget_ns))

    def lower(self, word: int, value: int) -> None:
        """`*word = min(*word, value)`, atomically."""
        self._library.tsc_lower(word, value)

    def claim(self, word: int, value: int) -> None:
        """Set the word if it is 0, atomically."""
        self._library.tsc_claim(word, value)


@lru_cache(maxsize=1)
def load() -> SignalLibrary:
    """The library, compiled if need be.

    Raises:
        HeapError: there is no C compiler, or no place to put the result; the message says what to do.
    """
    tag = sha256(
        _SOURCE.read_bytes() + " ".join((*_FLAGS, platform.machine(), platform.system())).encode()
    ).hexdigest()[:16]
    target = _cache_dir() / f"signals-{tag}.so"
    if not target.exists():
        with FileLock(str(target) + ".lock"):
            if not target.exists():
                _build(target)
    return SignalLibrary(target)
