"""An exception in the main thread, for failures that no call of ours would report: a loop that only replays CUDA graphs."""

from __future__ import annotations

import ctypes
import threading

from ..errors import PeerError


def raise_in_main_thread(error: PeerError) -> None:
    """Raise a copy of `error` in the main thread before its next Python instruction. A thread inside a C call gets it afterwards."""

    # The interpreter makes the exception itself, from a class without arguments.
    def make(self: PeerError) -> None:
        PeerError.__init__(self, error.rank, error.site, str(error))

    late = type("PeerError", (PeerError,), {"__init__": make, "__module__": PeerError.__module__})
    main = threading.main_thread().ident
    assert main is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(late))
