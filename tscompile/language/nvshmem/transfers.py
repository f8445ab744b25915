"""NVSHMEM's copies between this PE's memory and another PE's, by a thread, a warp or a block.

All of them take, with the same meaning:

    ctx: the context of a SymmetricGroup whose memory NVSHMEM can address (`SymmetricGroup.nvshmem()`).
    dest, src: memory, see `tl.Operand`. Of a put `dest`, and of a get `src`, is symmetric memory of this rank
        (`SymmetricGroup.tensor`), and the same place in the memory of `pe` is meant; the other side is memory of this GPU. Any
        alignment and dtype, not overlapping.
    nbytes: bytes, at least 0, at run time 64 bits wide.
    pe: rank in the group of `ctx`, int32; the own one is allowed. One that the group does not have is refused when the kernel runs:
    the
        group is aborted, and `SymmetricGroup.check` says so.

Scopes: a form without suffix is made by the calling thread alone. `_warp`: all lanes of a warp call, with the same operands.
`_block`: all threads of the block call, with the same operands, outside of branches that only some of them take (they meet in
`__syncthreads`); a kernel with such calls is compiled without TileLang's warp specialisation.

Raised where the kernel is written: `ValueError` for a negative size, an impossible PE or a prelude without NVSHMEM, `TypeError` for
what is neither memory nor an integer.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..addresses import Expr, Operand, address, cast
from . import checks
from .enums import Amo


def _move(name: str, ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    return checks.nv_call(name, ctx, address(dest), address(src), checks.size(nbytes), checks.rank(pe))


def putmem(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """Copy `nbytes` bytes to `pe`, by the calling thread. On return `src` may be written again.

    The bytes arrive in any order, some time; `fence` orders them before later ones to the same PE, `quiet` and `barrier_all`
    complete them. Lowers to `nvshmem_putmem`. Operands and errors: module docstring of `tl.nvshmem.transfers`.
    """
    return _move("putmem", ctx, dest, src, nbytes, pe)


def putmem_warp(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """`putmem` by a warp, all of whose lanes call. Lowers to `nvshmemx_putmem_warp`."""
    return _move("putmem_warp", ctx, dest, src, nbytes, pe)


def putmem_block(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """`putmem` by a block, all of whose threads call. Lowers to `nvshmemx_putmem_block`."""
    return _move("putmem_block", ctx, dest, src, nbytes, pe)


def putmem_nbi(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """Start a copy to `pe`, by the calling thread. `src` may be written again, and the copy is complete, after `quiet`.

    Unordered until `fence` or `quiet` of the same thread. Lowers to `nvshmem_putmem_nbi`. Operands and errors as `putmem`.
    """
    return _move("putmem_nbi", ctx, dest, src, nbytes, pe)


def putmem_nbi_warp(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """`putmem_nbi` by a warp, all of whose lanes call, and later fence. Lowers to `nvshmemx_putmem_nbi_warp`."""
    return _move("putmem_nbi_warp", ctx, dest, src, nbytes, pe)


def putmem_nbi_block(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """`putmem_nbi` by a block, all of whose threads call, and later fence. Lowers to `nvshmemx_putmem_nbi_block`."""
    return _move("putmem_nbi_block", ctx, dest, src, nbytes, pe)


def getmem(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """Copy `nbytes` bytes from `pe`, by the calling thread. On return they are in `dest`, for this thread.

    What `pe` wrote must have been announced to this thread before (`signal_wait_until`, `barrier_all`). Lowers to `nvshmem_getmem`.
    Operands and errors: module docstring of `tl.nvshmem.transfers`.
    """
    return _move("getmem", ctx, dest, src, nbytes, pe)


def getmem_warp(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """`getmem` by a warp, all of whose lanes call and see the bytes afterwards. Lowers to `nvshmemx_getmem_warp`."""
    return _move("getmem_warp", ctx, dest, src, nbytes, pe)


def getmem_block(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """`getmem` by a block, all of whose threads call and see the bytes afterwards. Lowers to `nvshmemx_getmem_block`."""
    return _move("getmem_block", ctx, dest, src, nbytes, pe)


def getmem_nbi(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """Start a copy from `pe`, by the calling thread. The bytes are in `dest` after `quiet`.

    Lowers to `nvshmem_getmem_nbi`. Operands and errors as `getmem`.
    """
    return _move("getmem_nbi", ctx, dest, src, nbytes, pe)


def getmem_nbi_warp(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """`getmem_nbi` by a warp, all of whose lanes call, and later `quiet`. Lowers to `nvshmemx_getmem_nbi_warp`."""
    return _move("getmem_nbi_warp", ctx, dest, src, nbytes, pe)


def getmem_nbi_block(ctx: Any, dest: Operand, src: Operand, nbytes: Expr, pe: Expr) -> Expr:
    """`getmem_nbi` by a block, all of whose threads call, and later `quiet`. Lowers to `nvshmemx_getmem_nbi_block`."""
    return _move("getmem_nbi_block", ctx, dest, src, nbytes, pe)


def int_p(ctx: Any, dest: Operand, value: Expr, pe: Expr) -> Expr:
    """Store one int32 at `pe`, by the calling thread: at the place of `dest`, an int32 of symmetric memory.

    Ordered as `putmem`. Lowers to `nvshmem_int_p`. Operands and errors as `putmem`; `ValueError` if `dest` is a tensor of another
    dtype.
    """
    if isinstance(dest, tirx.Buffer | tirx.BufferLoad) and str(dest.dtype) != "int32":
        raise ValueError(f"int_p stores an int32, and dest is of {dest.dtype}: putmem copies other dtypes")
    return checks.nv_call("int_p", ctx, address(dest), cast(value, "int32"), checks.rank(pe))


def _put_signal(
    name: str,
    ctx: Any,
    dest: Operand,
    src: Operand,
    nbytes: Expr,
    sig_addr: Operand,
    signal: Expr,
    sig_op: Amo | int,
    pe: Expr,
) -> Expr:
    told = (checks.flag(sig_addr), cast(signal, "uint64"), checks.operation(sig_op), checks.rank(pe))
    return checks.nv_call(name, ctx, address(dest), address(src), checks.size(nbytes), *told)


def putmem_signal(
    ctx: Any, dest: Operand, src: Operand, nbytes: Expr, sig_addr: Operand, signal: Expr, sig_op: Amo, pe: Expr
) -> Expr:
    """`putmem`, and then a signal to the same PE: whoever sees it there (`signal_wait_until`) sees the bytes.

    It orders these bytes only; what this thread put before needs a `fence`. Lowers to `nvshmem_putmem_signal`.

    Args:
        ctx, dest, src, nbytes, pe: as in `putmem`.
        sig_addr: the signal, one uint64 (or int64) of symmetric memory, as an element of this rank's tensor.
        signal: value, cast to uint64; a negative number counts modulo 2^64.
        sig_op: `Amo.SIGNAL_SET`, for a signal that one PE sets, or `Amo.SIGNAL_ADD`, for a counter.

    Raises:
        ValueError: as `putmem`; another `sig_op`, or a signal of another dtype.
    """
    return _put_signal("putmem_signal", ctx, dest, src, nbytes, sig_addr, signal, sig_op, pe)


def putmem_signal_warp(
    ctx: Any, dest: Operand, src: Operand, nbytes: Expr, sig_addr: Operand, signal: Expr, sig_op: Amo, pe: Expr
) -> Expr:
    """`putmem_signal` by a warp, all of whose lanes call; one signal. Lowers to `nvshmemx_putmem_signal_warp`."""
    return _put_signal("putmem_signal_warp", ctx, dest, src, nbytes, sig_addr, signal, sig_op, pe)


def putmem_signal_block(
    ctx: Any, dest: Operand, src: Operand, nbytes: Expr, sig_addr: Operand, signal: Expr, sig_op: Amo, pe: Expr
) -> Expr:
    """`putmem_signal` by a block, all of whose threads call; one signal. Lowers to `nvshmemx_putmem_signal_block`."""
    return _put_signal("putmem_signal_block", ctx, dest, src, nbytes, sig_addr, signal, sig_op, pe)


def putmem_signal_nbi(
    ctx: Any, dest: Operand, src: Operand, nbytes: Expr, sig_addr: Operand, signal: Expr, sig_op: Amo, pe: Expr
) -> Expr:
    """`putmem_signal` that need not be over on return: `src` may be written again after `quiet`.

    Lowers to `nvshmem_putmem_signal_nbi`.
    """
    return _put_signal("putmem_signal_nbi", ctx, dest, src, nbytes, sig_addr, signal, sig_op, pe)


def putmem_signal_nbi_warp(
    ctx: Any, dest: Operand, src: Operand, nbytes: Expr, sig_addr: Operand, signal: Expr, sig_op: Amo, pe: Expr
) -> Expr:
    """`putmem_signal_nbi` by a warp, all of whose lanes call; one signal. Lowers to `nvshmemx_putmem_signal_nbi_warp`."""
    return _put_signal("putmem_signal_nbi_warp", ctx, dest, src, nbytes, sig_addr, signal, sig_op, pe)


def putmem_signal_nbi_block(
    ctx: Any, dest: Operand, src: Operand, nbytes: Expr, sig_addr: Operand, signal: Expr, sig_op: Amo, pe: Expr
) -> Expr:
    """`putmem_signal_nbi` by a block, all of whose threads call; one signal. Lowers to `nvshmemx_putmem_signal_nbi_block`."""
    return _put_signal("putmem_signal_nbi_block", ctx, dest, src, nbytes, sig_addr, signal, sig_op, pe)
