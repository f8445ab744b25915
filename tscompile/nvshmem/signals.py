"""Loads signals.c: the few atomic operations on shared memory that Python does not have."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import cast

from . import native


class SignalLibrary:
    """Typed access to signals.c. Addresses are integers."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        address, number = ctypes.c_void_p, ctypes.c_int64
        library.tsc_load.argtypes, library.tsc_load.restype = [address], number
        library.tsc_store.argtypes, library.tsc_store.restype = [address, number], None
        library.tsc_enter.argtypes = [address, number, address, address]
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

    def enter(self, entered: int, epoch: int, abort: int, downgrade: int) -> bool:
        """Store the epoch; True if the group has ended, or runs the original ops of it."""
        return bool(self._library.tsc_enter(entered, epoch, abort, downgrade))

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
        HeapError: as `native.build`.
    """
    return SignalLibrary(native.build(Path(__file__).with_name("signals.c")))
