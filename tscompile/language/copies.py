"""Transfers between ranks that the host asks for: by the GPU's copy engine, each followed by a flag."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from ..nvshmem import stream
from .group import SymmetricGroup


class CopyEngine:
    """Sends parts of this rank's symmetric memory to other ranks, in order, beside the kernels of the current stream.

        engine.fork()                                       # what was written before may be sent
        engine.put(peer, keys[begin:end], arrived[me], 7)   # a kernel at the peer waits until its arrived[me] is 7
        attention(...)                                      # runs meanwhile, and waits for what the peers send
        engine.join()                                       # what follows may overwrite keys

    On a GPU the copy engine does it, on a stream of its own. It needs no SM, so a kernel whose blocks all wait for what peers send
    cannot keep this rank from sending. A copy and its flag take it some microseconds however small: send megabytes. On CPU ranks `put`
    itself copies. Not for captured graphs: flags would hold the same value in every replay.

    Args:
        group: whose memory it sends.

    Raises:
        HeapError: no C compiler, or no CUDA driver.
    """

    def __init__(self, group: SymmetricGroup) -> None:
        self._group = group
        self._stream: torch.cuda.Stream | None = None
        if group.device.type == "cuda":
            self._stream = torch.cuda.Stream(group.device, priority=-1)
            self._driver = stream.load()
            self._queues = stream.Queues((self._stream.cuda_stream, None, None), (None, None, None))

    def fork(self) -> None:
        """What `put` sends from now on is what the current stream has written so far, and may be written to peers after it."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._group.device))

    def put(self, rank: int, source: torch.Tensor, flag: torch.Tensor, value: int) -> None:
        """Copy `source` to where `rank` keeps the same elements, then set `flag` there, with release semantics.

        Args:
            rank: group rank of the receiver.
            source: of `SymmetricGroup.tensor`, or a part of one without gaps.
            flag: one int32 of `SymmetricGroup.tensor`.
            value: set at the receiver, modulo 2^32.

        Raises:
            HeapError: `source` or `flag` is not symmetric, or has gaps, or CUDA refused the copy.
            ValueError: `flag` is not one int32.
        """
        if flag.dtype != torch.int32 or flag.numel() != 1:
            raise ValueError(f"a flag is one int32, not {flag.numel()} of {flag.dtype}")
        there, flag_there = self._group.remote(source, rank), self._group.remote(flag, rank)
        if self._stream is None:
            ctypes.memmove(there, source.data_ptr(), source.nbytes)
            _primitives().tsl_x_st_release_sys_u32(ctypes.c_uint64(flag_there), ctypes.c_uint32(value & 0xFFFFFFFF))
            return
        copy = stream.Step(kind=stream.COPY, dst=there, src=source.data_ptr(), bytes=source.nbytes)
        write = stream.Step(kind=stream.WRITE, dst=flag_there, value=value & 0xFFFFFFFF)
        steps = stream.steps_of(copy, write) if source.nbytes else stream.steps_of(write)
        self._driver.issue(steps, ctypes.c_void_p(ctypes.addressof(self._queues)))

    def join(self) -> None:
        """What follows on the current stream comes after all that was put."""
        if self._stream is not None:
            torch.cuda.current_stream(self._group.device).wait_stream(self._stream)


@lru_cache(maxsize=1)
def _primitives() -> ctypes.CDLL:
    from .dialects import cpu_library  # loads TileLang, which only CPU ranks of kernels have a use for here

    return ctypes.CDLL(str(cpu_library()))
