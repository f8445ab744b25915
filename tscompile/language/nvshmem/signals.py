"""Who a PE is, signals without data, and what orders and completes transfers."""

from __future__ import annotations

from typing import Any

from ..addresses import Expr, Operand, cast, num_ranks
from ..addresses import rank as own_rank
from ..sync import wait
from . import checks
from .enums import Amo, CmpType


def get_pe(ctx: Any) -> Expr:
    """This PE's number, int32: its rank in the group of `ctx`, from 0 on.

    In a group of the whole world it is `nvshmem_my_pe()`. Read from the context, so it needs no NVSHMEM.
    """
    return own_rank(ctx)


def get_pe_num(ctx: Any) -> Expr:
    """PEs of the group of `ctx`, int32; in a group of the whole world `nvshmem_n_pes()`. Read from the context."""
    return num_ranks(ctx)


def signal_op(ctx: Any, sig_addr: Operand, signal: Expr, sig_op: Amo, pe: Expr) -> Expr:
    """Set a signal of `pe`, or add to it, by the calling thread.

    It does not order what was put before: call `fence` first, or use `putmem_signal`. Lowers to `nvshmemx_signal_op`.

    Args:
        ctx: the context.
        sig_addr: the signal, one uint64 (or int64) of symmetric memory, as an element of this rank's tensor.
        signal: value, cast to uint64; a negative number counts modulo 2^64.
        sig_op: `Amo.SIGNAL_SET` or `Amo.SIGNAL_ADD`.
        pe: rank in the group of `ctx`, int32; one that the group does not have is refused when the kernel runs, as by `putmem`.

    Raises:
        ValueError: another `sig_op`, a signal of another dtype, an impossible PE, or a prelude without NVSHMEM.
    """
    arguments = (checks.flag(sig_addr), cast(signal, "uint64"), checks.operation(sig_op), checks.rank(pe))
    return checks.nv_call("signal_op", ctx, *arguments)


def signal_wait_until(
    ctx: Any, sig_addr: Operand, cmp: CmpType, value: Expr, *, peer: Expr = -1, site: Expr = 0
) -> Expr:
    """Wait until the own signal `cmp value` holds, by the calling thread: true when it does, false when the wait was given up.

    Acquire at system scope: what was put with the signal, or before it and a fence, is visible to this thread; others need a
    barrier with it. `nvshmem_signal_wait_until` has no bound, so this lowers to the language's own poll
    (`ld.acquire.sys.global.u64`): it ends after the context's time-out, or when a rank has aborted, and leaves a record as
    `tl.wait` does.

    Args:
        ctx: the context.
        sig_addr: the signal, one uint64 (or int64, compared as uint64) in memory of this rank.
        cmp: one of `CmpType`; unsigned.
        value: cast to uint64.
        peer: which rank it waits for, for the record only; -1: not one rank.
        site: which wait this is, for the record only, uint32.

    Raises:
        ValueError: another `cmp`, or a signal of another dtype.
    """
    return wait(ctx, checks.flag(sig_addr), checks.comparison(cmp), value, peer=peer, site=site, dtype="uint64")


def fence(ctx: Any) -> Expr:
    """Order what this thread put before what it puts and signals afterwards, to each PE on its own.

    Lowers to `nvshmem_fence`, which between the GPUs of one host is a fence at system scope: it waits for this GPU's own stores,
    never for another rank.

    Raises:
        ValueError: a prelude without NVSHMEM.
    """
    return checks.nv_call("fence", ctx)


def quiet(ctx: Any) -> Expr:
    """Complete all transfers of this thread: puts are visible to all PEs, gets are in place, sources may be written again.

    After a transfer by a warp or a block, all its threads call this, and then meet. Lowers to `nvshmem_quiet`, which between the
    GPUs of one host is a fence at system scope: it waits for this GPU's own stores, never for another rank.

    Raises:
        ValueError: a prelude without NVSHMEM.
    """
    return checks.nv_call("quiet", ctx)
