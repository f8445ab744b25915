"""Work for CUDA streams (copies, flags, events, kernels) as lists of steps that one native call issues (stream.c)."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from ..errors import HeapError
from . import native

COPY, COPY_ROWS, WRITE, RECORD, AWAIT, LAUNCH = range(6)
MAX_RANK, MAX_MAPS, MAX_PARAMETERS = 5, 12, 64


class Step(ctypes.Structure):
    """One step; kinds and their fields:

    COPY: `bytes` from `src` to `dst`. COPY_ROWS: `rows` rows of `bytes`, `src_pitch` and `dst_pitch` bytes apart.
    WRITE: `value` (32 bits) to address `dst`, after all earlier work of the stream.
    RECORD: event number `event`. AWAIT: the event. LAUNCH: the NativeKernel at address `src` with the values at address `dst`.
    `stream` is the number of the stream that the step is issued on.
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


class NativeMap(ctypes.Structure):
    """Arguments of cuTensorMapEncodeTiled; `tensor`, `dims` and the factors of `strides` are indices of values, -1 ends a list."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int32) for name in ("dtype", "rank", "tensor", "interleave", "swizzle", "promotion", "fill")),
        ("item_bytes", ctypes.c_uint32),
        ("dims", ctypes.c_int32 * MAX_RANK),
        ("strides", (ctypes.c_int32 * MAX_RANK) * MAX_RANK),
        ("box", ctypes.c_uint32 * MAX_RANK),
    ]


class NativeKernel(ctypes.Structure):
    """A loaded kernel and how its parameters are made of values: parameter i is value i, or map -1 - i if negative."""

    _fields_: ClassVar = [
        ("function", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("grid", "threads", "shared")),
        ("maps", ctypes.c_int32),
        ("parameters", ctypes.c_int32),
        ("parameter", ctypes.c_int32 * MAX_PARAMETERS),
        ("map", NativeMap * MAX_MAPS),
    ]


Steps = ctypes.Array[Step]
Values = ctypes.Array[ctypes.c_uint64]


class Driver:
    """The native calls.

    Args:
        path: what was built of stream.c.

    Raises:
        HeapError: no CUDA driver.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.tsc_event.restype = ctypes.c_void_p
        library.tsc_event_done.argtypes = [ctypes.c_void_p]
        library.tsc_issue.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        library.tsc_issue.restype = ctypes.c_int64
        library.tsc_load_kernel.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_void_p]
        if library.tsc_stream_load():
            raise HeapError("the CUDA driver (libcuda.so.1) cannot be loaded: install NVIDIA's driver")
        self._library = library
        self._issue = library.tsc_issue

    def event(self) -> int:
        """A new CUDA event in the current context."""
        event = self._library.tsc_event()
        if not event:
            raise HeapError("cannot create a CUDA event: set the device (torch.cuda.set_device) before the first step")
        return int(event)

    def is_done(self, event: int | None) -> bool:
        """Whether all work that the event was recorded behind has run."""
        return bool(self._library.tsc_event_done(event))

    def relax_captures(self) -> None:
        """Let the calling thread make driver calls while another thread captures a graph.

        Raises:
            HeapError: the driver refused.
        """
        if result := self._library.tsc_relax_captures():
            raise HeapError(f"CUDA does not let a thread look at events beside captures (CUresult {result})")

    def load_kernel(self, cubin: bytes, name: str, shared_bytes: int) -> int:
        """The kernel `name` of a cubin, loaded into the current context for good.

        Raises:
            HeapError: the driver refused it.
        """
        function = ctypes.c_void_p()
        result = self._library.tsc_load_kernel(cubin, name.encode(), shared_bytes, ctypes.byref(function))
        if result:
            raise HeapError(f"CUDA cannot load the kernel {name} (CUresult {result}): update NVIDIA's driver")
        return int(function.value or 0)

    def issue(
        self, steps: Steps, streams: ctypes.Array[ctypes.c_void_p], events: ctypes.Array[ctypes.c_void_p]
    ) -> None:
        """Issue all steps, in order.

        Raises:
            HeapError: the driver refused a step.
        """
        result = self._issue(steps, len(steps), streams, events)
        if result:
            number, code = result >> 32, result & 0xFFFFFFFF
            kind = ("copy", "copy", "flag", "event", "wait", "kernel")[steps[number - 1].kind]
            raise HeapError(f"CUDA refused a {kind} of a fused op (step {number} of {len(steps)}: CUresult {code})")


@lru_cache(maxsize=1)
def load() -> Driver:
    """The native calls of this process.

    Raises:
        HeapError: no C compiler, or no CUDA driver.
    """
    return Driver(native.build(Path(__file__).with_name("stream.c"), ("-ldl",)))


def steps_of(*steps: Step) -> Steps:
    return (Step * len(steps))(*steps)
