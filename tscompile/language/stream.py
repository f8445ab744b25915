"""What the host issues on a CUDA stream between the ranks of a SymmetricGroup: copies, signals, waits and barriers.

    ops = group.on_stream()
    ops.putmem_signal(inbox, x, arrived, epoch, to)      # copy engine, then the flag
    ops.wait_value(arrived, "ge", epoch, peer=source)    # the stream waits, the host does not
    ops.barrier_all()

Copies are the copy engine's, and take no SM. A signal that adds, a wait and a barrier are kernels of one warp: the stream-wait of
the driver has no bound, while these end after the group's time-out or when a rank has aborted, with a record that
`SymmetricGroup.check` reads. They work with memory of every provider, and can be captured in a CUDA graph once they have run
outside of one, since they are compiled and loaded then. On CPU ranks they run at once.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import HeapError
from ..nvshmem import stream as native

if TYPE_CHECKING:
    from .group import SymmetricGroup

_FLAGS = {torch.int32: "int32", torch.uint32: "uint32", torch.int64: "int64", torch.uint64: "uint64"}


class GroupStream:
    """Work of one rank on a stream, see `SymmetricGroup.on_stream`. Every call returns at once.

    Tensors called symmetric are of `SymmetricGroup.tensor`, or contiguous parts of such; `pe` is a rank of the group. A flag is one
    element of int32, uint32, int64 or uint64. Everything raises `HeapError` for a tensor that is not what it must be, or if the
    driver refuses.
    """

    def __init__(self, group: SymmetricGroup, stream: torch.cuda.Stream | None) -> None:
        self._group = group
        self._stream = stream

    def putmem(self, dst: torch.Tensor, src: torch.Tensor, pe: int) -> None:
        """Copy `src` to where `pe` keeps the symmetric tensor `dst`; same number of bytes, both contiguous."""
        self._copy(self._group.remote(dst, pe), src)

    def getmem(self, dst: torch.Tensor, src: torch.Tensor, pe: int) -> None:
        """Copy what `pe` keeps of the symmetric tensor `src` to `dst`; same number of bytes, both contiguous."""
        self._copy(dst, self._group.remote(src, pe))

    def putmem_signal(
        self,
        dst: torch.Tensor,
        src: torch.Tensor,
        flag: torch.Tensor,
        value: int,
        pe: int,
        op: Literal["set", "add"] = "set",
    ) -> None:
        """`putmem`, then `signal_op`: whoever sees the flag sees the bytes."""
        self.putmem(dst, src, pe)
        self.signal_op(flag, value, pe, op)

    def signal_op(self, flag: torch.Tensor, value: int, pe: int, op: Literal["set", "add"] = "set") -> None:
        """Set the symmetric flag of `pe`, or add to it, after all earlier work of the stream, which is visible to who sees it."""
        if op not in ("set", "add"):
            raise HeapError(f"op {op!r}: set or add")
        theirs = self._group.remote(flag, pe)
        if op == "set":
            self.write_value(theirs, value)
        else:
            self._launch(("signal", _kind(theirs), op), theirs.data_ptr(), _word(theirs, value))

    def write_value(self, flag: torch.Tensor, value: int) -> None:
        """Set a flag of 32 or 64 bits, of this rank or a view of a peer's, after all earlier work of the stream.

        `cuStreamWriteValue32` or `64`, whose fence makes the earlier work visible to who sees the value.
        """
        kind = _kind(flag)
        if not self._cuda:
            self._launch(("signal", kind, "set"), flag.data_ptr(), _word(flag, value))
        elif flag.element_size() == 4:
            self._issue(native.Step(kind=native.WRITE, dst=flag.data_ptr(), value=value % (1 << 32)))
        else:
            self._issue(native.Step(kind=native.WRITE64, dst=flag.data_ptr(), src=value % (1 << 64)))

    def wait_value(
        self,
        flag: torch.Tensor,
        compare: Literal["eq", "ne", "ge", "gt", "le", "lt", "epoch"],
        value: int,
        *,
        peer: int = -1,
        site: int = 0,
    ) -> None:
        """Have the stream wait until `flag compare value`, in the flag's signedness ("epoch": as `tl.wait`); acquire at system scope.

        Bounded: later work of the stream runs all the same once the wait was given up, so call `SymmetricGroup.check` before its
        results are trusted. `peer` (-1: not one rank) and `site` are for the record. `ValueError` for another comparison.
        """
        self._launch(("wait", _kind(flag), compare), flag.data_ptr(), _word(flag, value), peer, site)

    def barrier_all(self, *, site: int = 0) -> None:
        """Have the streams of all ranks meet; each makes the same calls. Bounded as `wait_value`.

        What a rank's stream did before is visible to what the others' do afterwards.
        """
        self._launch(("meet",), site)

    def cpengine_cpasync(
        self, dst: torch.Tensor, src: torch.Tensor, flag: torch.Tensor | None = None, value: int = 1
    ) -> None:
        """Copy `src` to `dst` by the copy engine, then set `flag`: any tensors that this rank can address, such as those of
        `SymmetricGroup.peers`. TileScale's name; `putmem_signal` names the peer instead."""
        self._copy(dst, src)
        if flag is not None:
            self.write_value(flag, value)

    @property
    def _cuda(self) -> bool:
        return self._group.device.type == "cuda"

    def _current(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._group.device)

    def _copy(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        num_bytes = dst.numel() * dst.element_size()
        if num_bytes != src.numel() * src.element_size() or not (dst.is_contiguous() and src.is_contiguous()):
            raise HeapError(
                f"{tuple(src.shape)} of {src.dtype} to {tuple(dst.shape)} of {dst.dtype}: both must be contiguous, and of as many bytes"
            )
        if dst.device != self._group.device or src.device != self._group.device:
            raise HeapError(f"a copy from {src.device} to {dst.device}: both must be on {self._group.device}")
        if not self._cuda:
            ctypes.memmove(dst.data_ptr(), src.data_ptr(), num_bytes)
        elif num_bytes:
            for tensor in (dst, src):  # it may be freed before the copy has run
                tensor.record_stream(self._current())
            self._issue(native.Step(kind=native.COPY, dst=dst.data_ptr(), src=src.data_ptr(), bytes=num_bytes))

    def _issue(self, step: native.Step) -> None:
        queues = native.Queues()
        queues.streams[0] = self._current().cuda_stream
        native.load().issue(native.steps_of(step), ctypes.c_void_p(ctypes.addressof(queues)))

    def _launch(self, form: tuple[str, ...], *arguments: int) -> None:
        from . import stream_kernels  # loads TileLang

        kernel: Any = stream_kernels.kernel("cuda" if self._cuda else "cpu", *form)
        with torch.cuda.stream(self._current()) if self._cuda else contextlib.nullcontext():
            kernel(self._group.context, *arguments)


def _kind(flag: torch.Tensor) -> str:
    """The dtype of a flag."""
    if flag.dtype not in _FLAGS or flag.numel() != 1:
        raise HeapError(f"{tuple(flag.shape)} of {flag.dtype}: a flag is one element of {', '.join(_FLAGS.values())}")
    return _FLAGS[flag.dtype]


def _word(flag: torch.Tensor, value: int) -> int:
    """`value` as what kernels take: 64 bits, signed."""
    bits = 8 * flag.element_size()
    word = value % (1 << bits)
    signed = flag.dtype in (torch.int32, torch.int64) or bits == 64
    return word - (1 << bits) if signed and word >> (bits - 1) else word
