"""Copy-engine work on CUDA streams as lists of steps that one native call issues (copies.c)."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from ..errors import HeapError
from . import native

COPY, COPY_ROWS, WRITE, RECORD, AWAIT = range(5)


class Step(ctypes.Structure):
    """One step; kinds and their fields:

    COPY: `bytes` from `src` to `dst`. COPY_ROWS: `rows` rows of `bytes`, `src_pitch` and `dst_pitch` bytes apart.
    WRITE: `value` (32 bits) to address `dst`, after all earlier work of the stream.
    RECORD: event number `event`. AWAIT: the event. `stream` is the number of the stream that the step is issued on.
    """

    _fields_: ClassVar = [
        ("kind", ctypes.c_int32),
        ("stream", ctypes.c_int32),
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("dst_pitch", ctypes.c_uint64),
        ("src_pitch", ctypes.c_uint64),
        ("value", ctypes.c_uint32),
        ("event", ctypes.c_uint32),
    ]


class CopyEngine:
    """The native calls.

    Raises:
        HeapError: no C compiler, or no CUDA driver.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(str(native.build(Path(__file__).with_name("copies.c"), ("-ldl",))))
        library.tsc_event.restype = ctypes.c_void_p
        library.tsc_event_done.argtypes = [ctypes.c_void_p]
        library.tsc_issue.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        if library.tsc_copies_load():
            raise HeapError("the CUDA driver (libcuda.so.1) cannot be loaded: install NVIDIA's driver")
        self._library = library

    def event(self) -> int:
        """A new CUDA event in the current context."""
        event = self._library.tsc_event()
        if not event:
            raise HeapError("cannot create a CUDA event: set the device (torch.cuda.set_device) before the first step")
        return int(event)

    def is_done(self, event: int | None) -> bool:
        """Whether all work that the event was recorded behind has run."""
        return bool(self._library.tsc_event_done(event))

    def issue(
        self, steps: ctypes.Array[Step], streams: ctypes.Array[ctypes.c_void_p], events: ctypes.Array[ctypes.c_void_p]
    ) -> None:
        """Issue all steps, in order.

        Raises:
            HeapError: the driver refused a step.
        """
        failed = ctypes.c_int(0)
        result = self._library.tsc_issue(steps, len(steps), streams, events, ctypes.byref(failed))
        if result:
            raise HeapError(
                f"CUDA refused a copy between GPUs (step {failed.value} of {len(steps)}: CUresult {result})"
            )


@lru_cache(maxsize=1)
def load() -> CopyEngine:
    return CopyEngine()
