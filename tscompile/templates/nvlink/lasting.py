"""Tensors that outlive the call that makes them.

While CUDA graph trees (`mode="reduce-overhead"`) warm up or record, what the calling thread allocates belongs to the graph's memory
pool, and a tensor that is still alive afterwards is an error. So lasting tensors are made by a thread of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ...nvshmem import stream

_T = TypeVar("_T")


@lru_cache(maxsize=1)
def _maker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="tscompile-memory")


def lasting(make: Callable[[], _T], device: torch.device) -> _T:
    """What `make` returns, once the tensors in it are filled. Modes of the calling thread (inference, fake tensors) do not reach
    it."""

    def run() -> _T:
        if device.type != "cuda":
            return make()
        with torch.cuda.device(device):
            stream.load().relax_captures()  # the calling thread may capture, and allocating would end that
            made = make()
            torch.cuda.current_stream().synchronize()
            return made

    return _maker().submit(run).result()


def lasting_tables(rows: Sequence[Sequence[Sequence[int]]], device: torch.device) -> list[Tensor]:
    """Each table of rows of eight numbers as an int32 tensor [rows, 8]."""
    return lasting(
        lambda: [torch.tensor(table, dtype=torch.int32, device=device).view(-1, 8) for table in rows], device
    )
