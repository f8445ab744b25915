"""Tiles between shared memory and global memory of any rank, by TMA bulk copies.

One thread issues them. Sizes and both addresses are multiples of 16 bytes. A kernel that hands shared memory to these functions needs
the pass config `tl.disable_thread_storage_sync`: TileLang would otherwise put a block barrier around each call.
"""

from __future__ import annotations

from typing import Any

from .addresses import Expr, Operand, address, call, cast, succeeded


def _size(num_bytes: Expr) -> Expr:
    if isinstance(num_bytes, int) and (num_bytes % 16 or num_bytes <= 0):
        raise ValueError(f"{num_bytes} bytes: a bulk copy moves a positive multiple of 16")
    return cast(num_bytes, "uint32")


def bulk_put(dst: Operand, src: Operand, num_bytes: Expr) -> Expr:
    """Start a copy from shared memory `src` to global memory `dst` of a peer, by the calling thread.

    What the threads of the block wrote to `src` must be ordered before by a block barrier; the fence to the async proxy is inside.
    `src` may be written again after `bulk_wait_read()`, and the peer may be told after `bulk_wait()`, both by the same thread.

    Raises:
        ValueError: `num_bytes` is a number, and no positive multiple of 16.
    """
    return call("bulk_put", "int32", address(dst), address(src), _size(num_bytes))


def bulk_wait() -> Expr:
    """Wait until all bulk puts of this thread are written at their destination: then `signal` may follow."""
    return call("bulk_wait", "int32")


def bulk_wait_read() -> Expr:
    """Wait until all bulk puts of this thread have read their source. Not enough before a signal."""
    return call("bulk_wait_read", "int32")


def mbarrier_init(barrier: Operand, count: Expr = 1) -> Expr:
    """Make a uint64 of shared memory an mbarrier for `count` arrivals, by one thread; a block barrier must follow."""
    return call("mbarrier_init", "int32", address(barrier), cast(count, "uint32"))


def bulk_get(dst: Operand, src: Operand, num_bytes: Expr, barrier: Operand) -> Expr:
    """Start a copy from global memory `src` of any rank to shared memory `dst`, by the calling thread.

    Arrives at `barrier` with the expected bytes; `mbarrier_wait` says when they are there. The data must have been announced to this
    thread by `wait`, with `fence_async()` after it, or by `warp_wait`.

    Raises:
        ValueError: `num_bytes` is a number, and no positive multiple of 16.
    """
    return call("bulk_get", "int32", address(dst), address(src), _size(num_bytes), address(barrier))


def mbarrier_wait(ctx: Any, barrier: Operand, parity: Expr, *, peer: Expr, site: Expr = 0) -> Expr:
    """Wait for phase `parity` (0, then 1, ...) of an mbarrier: true when it has ended, false when given up, see `wait`.

    Every thread that reads the shared memory must wait.
    """
    numbers = (cast(parity, "uint32"), cast(peer, "int32"), cast(site, "uint32"))
    return succeeded(call("mbarrier_wait", "int32", address(ctx), address(barrier), *numbers))
