"""Work for CUDA streams (copies, flags, events, kernels) as lists of steps that one native call issues (stream.c)."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from ..errors import HeapError
from . import host, native

COPY, COPY_ROWS, WRITE, RECORD, AWAIT, LAUNCH, WRITE64 = range(7)
QUEUES = 3
MAX_RANK, MAX_MAPS, MAX_PARAMETERS = 5, 12, 64


class Step(ctypes.Structure):
    """One step; kinds and their fields:

    COPY: `bytes` from `src` to `dst`. COPY_ROWS: `rows` rows of `bytes`, `src_pitch` and `dst_pitch` bytes apart.
    WRITE: `value` (32 bits) to address `dst`, after all earlier work of the stream. WRITE64: `src` (64 bits), likewise.
    RECORD: event number `event`. AWAIT: the event. LAUNCH: the NativeKernel at address `src` with the values at address `dst`.
    `stream` is the number of the stream that the step is issued on. `word`, if not 0, is the address of a 64-bit word that is read when
    the step is issued, and added to `src` of a copy, or counts instead of `value`.
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
        ("word", ctypes.c_uint64),
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
    """A loaded kernel and how its parameters are made of values: parameter i is value i, or map -1 - i if negative.

    Behind the `values` of a launch there is room for the maps that are made of them: ALIGN_WORDS of 64 bits, and MADE_WORDS for each.
    """

    _fields_: ClassVar = [
        ("function", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("grid", "threads", "shared")),
        *((name, ctypes.c_int32) for name in ("values", "maps", "parameters")),
        ("parameter", ctypes.c_int32 * MAX_PARAMETERS),
        ("map", NativeMap * MAX_MAPS),
    ]


class Queues(ctypes.Structure):
    """The streams and events that steps name by number."""

    _fields_: ClassVar = [("streams", ctypes.c_void_p * QUEUES), ("events", ctypes.c_void_p * QUEUES)]


MADE_WORDS, ALIGN_WORDS = 32, 7
Values = ctypes.Array[ctypes.c_uint64]


class Steps:
    """Steps in one block of memory, and the arguments that name it in the native call."""

    __slots__ = ("count", "items", "pointer")

    def __init__(self, items: ctypes.Array[Step]) -> None:
        self.items = items
        self.pointer, self.count = ctypes.c_void_p(ctypes.addressof(items)), ctypes.c_int(len(items))


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
        library.tsc_issue.restype = (
            ctypes.c_int64
        )  # takes ctypes objects: to convert arguments takes as long as the call
        address = ctypes.c_void_p
        library.tsc_load_kernel.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint32, address, address]
        library.tsc_has_nvshmem.argtypes = [address]
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
        """The kernel `name` of a cubin, loaded into the current context for good; if it makes NVSHMEM calls, ready to make them.

        Raises:
            HeapError: the driver refused it, or NVSHMEM did.
        """
        function, module = ctypes.c_void_p(), ctypes.c_void_p()
        outputs = ctypes.byref(function), ctypes.byref(module)
        result = self._library.tsc_load_kernel(cubin, name.encode(), shared_bytes, *outputs)
        if result:
            raise HeapError(f"CUDA cannot load the kernel {name} (CUresult {result}): update NVIDIA's driver")
        self.initialize_module(int(module.value or 0))
        return int(function.value or 0)

    def initialize_module(self, module: int) -> bool:
        """Whether a loaded CUmodule makes NVSHMEM calls; if it does, its state is initialised.

        Raises:
            HeapError: as `Nvshmem.initialize_module`.
        """
        if not self._library.tsc_has_nvshmem(module):
            return False
        host.load().initialize_module(module)
        return True

    def issue(self, steps: Steps, queues: ctypes.c_void_p) -> None:
        """Issue all steps, in order; `queues` points to the Queues that they name.

        Raises:
            HeapError: the driver refused a step.
        """
        result = self._issue(steps.pointer, steps.count, queues)
        if result:
            number, code = result >> 32, result & 0xFFFFFFFF
            kind = ("copy", "copy", "flag", "event", "wait", "kernel", "flag")[steps.items[number - 1].kind]
            raise HeapError(f"CUDA refused a {kind} (step {number} of {len(steps.items)}: CUresult {code})")


@lru_cache(maxsize=1)
def load() -> Driver:
    """The native calls of this process.

    Raises:
        HeapError: no C compiler, or no CUDA driver.
    """
    return Driver(native.build(Path(__file__).with_name("stream.c"), ("-ldl",)))


def steps_of(*steps: Step) -> Steps:
    return Steps((Step * len(steps))(*steps))
