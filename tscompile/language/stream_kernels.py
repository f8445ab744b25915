"""The kernels of stream.py: one thread or warp that signals, waits or meets, for both targets."""

from functools import lru_cache
from typing import Any

import tilelang.language as T

from .addresses import pointer
from .compile import parse
from .context import WORDS
from .dialects import Dialect, Target, dialect
from .nvshmem import sync_all_warp
from .sync import signal, wait


def _signal(d: Dialect, dtype: str, op: Any) -> Any:
    @T.prim_func
    def stream_signal(ctx: T.Tensor((WORDS,), "int64"), flag: T.int64, value: T.int64):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                signal(pointer(flag), value, op, dtype=dtype)

    return stream_signal


def _wait(d: Dialect, dtype: str, compare: Any) -> Any:
    @T.prim_func
    def stream_wait(ctx: T.Tensor((WORDS,), "int64"), flag: T.int64, value: T.int64, peer: T.int32, site: T.int32):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() == 0:
                wait(ctx, pointer(flag), compare, value, peer=peer, site=site, dtype=dtype)

    return stream_wait


def _meet(d: Dialect) -> Any:
    @T.prim_func
    def stream_meet(ctx: T.Tensor((WORDS,), "int64"), site: T.int32):
        with T.Kernel(1, threads=32, prelude=d.prelude) as _:
            if d.thread() < 32:
                sync_all_warp(ctx, site=site)

    return stream_meet


_WRITERS = {"signal": _signal, "wait": _wait, "meet": _meet}


@lru_cache(maxsize=64)
def kernel(target: Target, name: str, *form: str) -> Any:
    """The compiled kernel `name`: "signal" (dtype, op), "wait" (dtype, comparison) or "meet"."""
    d = dialect(target)
    return d.compile(parse(lambda: _WRITERS[name](d, *form)))
