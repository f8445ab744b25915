"""Loads signals.c: the few atomic operations on shared memory that Python does not have."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, cast

from . import native


class _Entry(ctypes.Structure):
    """What tsc_enter takes."""

    _fields_: ClassVar = [
        ("epoch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("entered", "abort", "downgrade")),
    ]


class SignalLibrary:
    """Typed access to signals.c. Addresses are integers."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        address, number = ctypes.c_void_p, ctypes.c_int64
        library.tsc_load.argtypes, library.tsc_load.restype = [address], number
        library.tsc_store.argtypes, library.tsc_store.restype = [address, number], None
        # It never blocks, so it need not give up the GIL; and it takes a ctypes object, which needs no conversion. Either takes as
        # long as the call.
        self._enter = ctypes.PyDLL(str(path)).tsc_enter
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

    def entry(self, entered: int, abort: int, downgrade: int) -> Callable[[int], int]:
        """A function that stores an epoch in the word `entered`; not 0 if the group has ended, or runs the original ops of it. For one
        thread at a time."""
        words = _Entry(0, entered, abort, downgrade)
        native, pointer = self._enter, ctypes.byref(words)

        def enter(epoch: int) -> int:
            words.epoch = epoch
            return cast(int, native(pointer))

        return enter

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
