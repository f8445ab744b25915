"""Copies, atomics and fences on global memory of this and of other ranks."""

from __future__ import annotations

from .addresses import Expr, Operand, address, bits_of, call, cast, dtype_of, from_bits, to_bits
from .words import Scope, Semantics, order


def put_block(dst: Operand, src: Operand, num_bytes: Expr, thread: Expr, threads: Expr) -> Expr:
    """Copy `num_bytes` bytes from `src` to `dst` (of a peer) with `threads` threads.

    Any size (0 too), any alignment, any dtype; global memory on both sides, not overlapping. Words of 16 bytes where both sides
    can be aligned together, else the widest that can.

    Ordering: none, and no barrier inside. Before the peer is told, all threads that copied must meet (`T.sync_threads()` or
    `block_sync`), then one signals with release at sys scope.

    Args:
        dst: where to, see `Operand`.
        src: where from.
        num_bytes: bytes, int64.
        thread: number of the calling thread among those that copy, 0 <= thread < threads.
        threads: how many copy. Pass them: in a warp-specialised kernel neither threadIdx nor blockDim says it.
    """
    return call(
        "copy_block",
        "int32",
        address(dst),
        address(src),
        cast(num_bytes, "int64"),
        cast(thread, "int32"),
        cast(threads, "int32"),
    )


def put_warp(dst: Operand, src: Operand, num_bytes: Expr) -> Expr:
    """`put_block` by the calling warp, all of whose lanes must call. Ends with `__syncwarp`, so that any lane may signal."""
    return call("copy_warp", "int32", address(dst), address(src), cast(num_bytes, "int64"))


def get_block(dst: Operand, src: Operand, num_bytes: Expr, thread: Expr, threads: Expr) -> Expr:
    """`put_block` with the peer on the side of `src`. The data must have been announced to this thread (`wait`)."""
    return put_block(dst, src, num_bytes, thread, threads)


def get_warp(dst: Operand, src: Operand, num_bytes: Expr) -> Expr:
    """`put_warp` with the peer on the side of `src`."""
    return put_warp(dst, src, num_bytes)


def _addend(operand: Operand, value: Expr, dtype: str | None) -> tuple[str, str, Expr, str]:
    """Suffix of the entry point, dtype it works in, the value in it, and the dtype of the element.

    Raises:
        ValueError: no atomic addition for this dtype.
    """
    dtype = dtype_of(operand, dtype)
    if dtype == "float32":
        return "f32", dtype, cast(value, dtype), dtype
    if dtype == "float64":
        raise ValueError("float64: atomic addition works on float32 and on integers of 32 or 64 bits")
    bits = bits_of(dtype)
    return f"u{bits}", f"uint{bits}", to_bits(value, dtype), dtype


def atomic_add(
    dst: Operand, value: Expr, semantics: Semantics = "acq_rel", scope: Scope = "sys", dtype: str | None = None
) -> Expr:
    """Add atomically and return the old value. Integers wrap around.

    Use the result exactly once, or store it in a `T.alloc_var`.

    Args:
        dst: int32, uint32, int64, uint64 or float32 in global memory, local or of a peer.
        value: cast to the dtype of `dst`.
        semantics: "relaxed", "acquire", "release" or "acq_rel".
        scope: between whom it is atomic and ordered.
        dtype: of the element; needed where `dst` is an address.

    Raises:
        ValueError: semantics, scope or dtype that atomics do not have.
    """
    suffix, word, addend, dtype = _addend(dst, value, dtype)
    form = order(semantics, scope, ("relaxed", "acquire", "release", "acq_rel"))
    return from_bits(call(f"atom_add_{form}_{suffix}", word, address(dst), addend), dtype)


def red_add(
    dst: Operand, value: Expr, semantics: Semantics = "release", scope: Scope = "sys", dtype: str | None = None
) -> Expr:
    """`atomic_add` without the old value, which spares the way back: "relaxed" or "release"."""
    suffix, _, addend, dtype = _addend(dst, value, dtype)
    form = order(semantics, scope, ("relaxed", "release"))
    return call(f"red_add_{form}_{suffix}", "int32", address(dst), addend)


def fence(scope: Scope = "sys") -> Expr:
    """Acquire-release fence of the calling thread at "cta", "gpu" or "sys" scope.

    In a warp that issues wgmma it stalls the warpgroup until the tile has drained: fence in another warp.

    Raises:
        ValueError: no such scope.
    """
    order("relaxed", scope, ("relaxed",))
    return call(f"fence_{scope}", "int32")


def fence_async() -> Expr:
    """Order ordinary accesses of this thread before its TMA (the async proxy), for global and shared memory alike."""
    return call("fence_async", "int32")
