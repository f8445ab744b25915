"""Signals, bounded waits, barriers, and what the threads of a warp tell each other."""

from __future__ import annotations

from typing import Any, Literal

import tilelang.language as T

from . import context
from .addresses import Expr, Operand, address, bits_of, call, cast, dtype_of, from_bits, succeeded, to_bits
from .memory import red_add
from .words import Scope, st

Compare = Literal["eq", "ne", "ge", "gt", "le", "lt", "epoch"]

_COMPARE = {"eq": 0, "ne": 1, "ge": 2, "gt": 3, "le": 4, "lt": 5, "epoch": 6}
_FLAG_TYPES = {"uint32": "u32", "int32": "s32", "uint64": "u64", "int64": "s64"}
ALL_LANES = 0xFFFFFFFF


def signal(
    flag: Operand, value: Expr, op: Literal["set", "add"] = "set", scope: Scope = "sys", dtype: str | None = None
) -> Expr:
    """Tell a peer: set its flag to `value`, or add to it, by the calling thread, with release semantics.

    What this thread wrote, and what other threads wrote before a barrier with it, is visible to whoever then acquires the flag.
    Data that TMA wrote needs `bulk_wait()` by the thread that issued it first.

    Args:
        flag: int32, uint32, int64 or uint64, usually `peer(...)[i]` with region "flags".
        value: cast to the flag's dtype.
        op: "set" for a flag with one writer, "add" for a counter.
        scope: "sys" reaches other GPUs.
        dtype: of the flag; needed where `flag` is an address.

    Raises:
        ValueError: an unknown `op`, scope or dtype.
    """
    if op not in ("set", "add"):
        raise ValueError(f"op {op!r}: set or add")
    bits_of(dtype_of(flag, dtype))  # st takes narrower words, which no wait can read
    return (st if op == "set" else red_add)(flag, value, "release", scope, dtype)


def _wait(
    form: str, ctx: Any, flag: Operand, compare: str, value: Expr, peer: Expr, site: Expr, dtype: str | None
) -> Expr:
    dtype = dtype_of(flag, dtype)
    if dtype not in _FLAG_TYPES:
        raise ValueError(f"{dtype}: a flag is one of {', '.join(_FLAG_TYPES)}")
    if compare not in _COMPARE:
        raise ValueError(f"compare {compare!r}: one of {', '.join(_COMPARE)}")
    arguments = (cast(_COMPARE[compare], "int32"), cast(value, dtype), cast(peer, "int32"), cast(site, "uint32"))
    return succeeded(call(f"{form}_{_FLAG_TYPES[dtype]}", "int32", address(ctx), address(flag), *arguments))


def wait(
    ctx: Any,
    flag: Operand,
    compare: Compare,
    value: Expr,
    *,
    peer: Expr,
    site: Expr = 0,
    dtype: str | None = None,
) -> Expr:
    """Wait until `flag compare value`, by the calling thread: true when it holds, false when the wait was given up.

    Acquire at sys scope: what the signaller released is visible to this thread. Other threads need a barrier with it; TMA that
    reads the data needs `fence_async()` in the thread that issues it (`warp_wait` has it).

    Bounded: a wait ends after the context's `timeout_ns`, or when a rank has aborted. The first to give up writes (1 + rank, peer,
    site, value, seen) to the context's record and the abort word of every rank, which ends all waits of the group. Guarded data must
    then not be trusted; the group is refused by the host afterwards.

    Use the result once (`if tl.wait(...):`, or keep it: `ok = tl.wait(...)`), or not at all where the end of the kernel checks
    `aborted`. In a `T.Pipelined` loop `flag` must be an element of a tensor parameter, never an address: TileLang would place the
    wait beside the matmul instead of beside the loads it guards.

    Args:
        ctx: the context.
        flag: int32, uint32, int64 or uint64 in memory of this rank, or of a peer.
        compare: "eq", "ne", "ge", "gt", "le", "lt" in the flag's signedness; "epoch": at least `value`, modulo the flag's range.
        value: cast to the flag's dtype.
        peer: the group rank that is waited for: for the record only.
        site: which wait this is: for the record only, uint32.
        dtype: of the flag; needed where `flag` is an address.

    Raises:
        ValueError: an unknown comparison, or a dtype that flags do not have.
    """
    return _wait("wait", ctx, flag, compare, value, peer, site, dtype)


def warp_wait(
    ctx: Any,
    flag: Operand,
    compare: Compare,
    value: Expr,
    *,
    peer: Expr,
    site: Expr = 0,
    dtype: str | None = None,
) -> Expr:
    """`wait` by a whole warp, for loads that follow: lane 0 polls, all lanes get the result.

    The guarded data is visible to all lanes, and to TMA that this warp issues. All lanes must call. Never uses threadIdx or a block
    barrier, so it may stand in any branch of a warp-specialised kernel.
    """
    return _wait("warp_wait", ctx, flag, compare, value, peer, site, dtype)


def wait_eq(ctx: Any, flag: Operand, value: Expr, *, peer: Expr, site: Expr = 0, dtype: str | None = None) -> Expr:
    """`wait(ctx, flag, "eq", value, ...)`."""
    return wait(ctx, flag, "eq", value, peer=peer, site=site, dtype=dtype)


def wait_ne(ctx: Any, flag: Operand, value: Expr, *, peer: Expr, site: Expr = 0, dtype: str | None = None) -> Expr:
    """`wait(ctx, flag, "ne", value, ...)`."""
    return wait(ctx, flag, "ne", value, peer=peer, site=site, dtype=dtype)


def wait_ge(ctx: Any, flag: Operand, value: Expr, *, peer: Expr, site: Expr = 0, dtype: str | None = None) -> Expr:
    """`wait(ctx, flag, "ge", value, ...)`."""
    return wait(ctx, flag, "ge", value, peer=peer, site=site, dtype=dtype)


def wait_gt(ctx: Any, flag: Operand, value: Expr, *, peer: Expr, site: Expr = 0, dtype: str | None = None) -> Expr:
    """`wait(ctx, flag, "gt", value, ...)`."""
    return wait(ctx, flag, "gt", value, peer=peer, site=site, dtype=dtype)


def wait_le(ctx: Any, flag: Operand, value: Expr, *, peer: Expr, site: Expr = 0, dtype: str | None = None) -> Expr:
    """`wait(ctx, flag, "le", value, ...)`."""
    return wait(ctx, flag, "le", value, peer=peer, site=site, dtype=dtype)


def wait_lt(ctx: Any, flag: Operand, value: Expr, *, peer: Expr, site: Expr = 0, dtype: str | None = None) -> Expr:
    """`wait(ctx, flag, "lt", value, ...)`."""
    return wait(ctx, flag, "lt", value, peer=peer, site=site, dtype=dtype)


def aborted(ctx: Any) -> Expr:
    """Whether a wait of any rank was given up, bool. Relaxed: look again after the last wait."""
    return succeeded(call("aborted", "int32", address(ctx)))


def barrier(ctx: Any, flags_offset: Expr, epoch: Expr, *, site: Expr = 0) -> Expr:
    """All ranks of the group meet, by one warp per rank (all its lanes): true when all came, false when the wait was given up.

    What the calling block wrote before (ordered by a block barrier before the call) is visible to every rank afterwards. It joins
    ranks, not the blocks of one rank: call it from one block, in a kernel whose other blocks it need not wait for.

    Args:
        ctx: the context.
        flags_offset: bytes from the base of the flags region to `num_ranks` uint32, the same on every rank; never reset.
        epoch: uint32, larger than at the last call with this offset (modulo 2^32), the same on every rank.
        site: for the record, as in `wait`.
    """
    numbers = (cast(flags_offset, "uint64"), cast(epoch, "uint32"), cast(site, "uint32"))
    return succeeded(call("barrier", "int32", address(ctx), *numbers))


def barrier_blocks(ctx: Any, words: Operand, epoch: Expr, *, site: Expr = 0) -> Expr:
    """`barrier` on words of a symmetric tensor instead of the flags region: all ranks of the group meet, by one warp per rank.

    TileScale's name. Its barrier starts from zero and subtracts what it has added; this one counts epochs, and is never reset.

    Args:
        ctx: the context.
        words: the first of `num_ranks` 32-bit words, the same element on every rank; nothing else writes them.
        epoch, site: as in `barrier`.
    """
    base = ctx[context.FLAGS + T.cast(ctx[context.RANK], "int32")]
    return barrier(ctx, address(words) - cast(base, "uint64"), epoch, site=site)


def sync_blocks(ctx: Any, words: Operand, epoch: Expr, *, site: Expr = 0) -> Expr:
    """`barrier_blocks`: TileScale's `sync_blocks` orders no memory, but a barrier that orders it can stand in its place."""
    return barrier_blocks(ctx, words, epoch, site=site)


def block_sync(barrier_id: Expr, threads: Expr) -> Expr:
    """Meet with `threads` threads of this block (a multiple of 32) at named barrier `barrier_id`.

    TileLang takes ids from 0 upwards for its own use: choose from 8 to 15. Orders memory of this block between those who meet.
    """
    return call("block_sync", "int32", cast(barrier_id, "int32"), cast(threads, "int32"))


def block_arrive(barrier_id: Expr, threads: Expr) -> Expr:
    """Arrive at a named barrier without waiting; `threads` counts those who arrive and those who sync."""
    return call("block_arrive", "int32", cast(barrier_id, "int32"), cast(threads, "int32"))


def warp_sync(mask: Expr = ALL_LANES) -> Expr:
    """Meet with the lanes of `mask`; orders their memory accesses."""
    return call("warp_sync", "int32", cast(mask, "uint32"))


def warp_any(value: Expr, mask: Expr = ALL_LANES) -> Expr:
    """Whether `value` is true in any lane of `mask`, bool."""
    return succeeded(call("warp_any", "int32", cast(value, "int32"), cast(mask, "uint32")))


def warp_all(value: Expr, mask: Expr = ALL_LANES) -> Expr:
    """Whether `value` is true in all lanes of `mask`, bool."""
    return succeeded(call("warp_all", "int32", cast(value, "int32"), cast(mask, "uint32")))


def warp_ballot(value: Expr, mask: Expr = ALL_LANES) -> Expr:
    """The lanes of `mask` in which `value` is true, as bits, uint32."""
    return call("warp_ballot", "uint32", cast(value, "int32"), cast(mask, "uint32"))


def elect() -> Expr:
    """True in exactly one lane of the calling warp, all of whose lanes must call."""
    return succeeded(call("elect", "int32"))


def lane() -> Expr:
    """Number of this thread in its warp, 0 to 31, int32; 0 on the C target."""
    return cast(call("lane", "uint32"), "int32")


def shuffle(value: Expr, lane: Expr, mode: Literal["idx", "xor", "up", "down"] = "idx", mask: Expr = ALL_LANES) -> Expr:
    """`value` as it is in another lane.

    Args:
        value: 32 or 64 bits wide.
        lane: which one ("idx"), or by how much it differs ("xor", "up", "down"), int32.
        mode: as `__shfl_sync` and its kin.
        mask: lanes that take part.

    Raises:
        ValueError: an unknown mode, or a value that is not 32 or 64 bits wide.
    """
    if mode not in ("idx", "xor", "up", "down"):
        raise ValueError(f"mode {mode!r}: one of idx, xor, up, down")
    dtype = str(value.dtype)
    bits, name = bits_of(dtype), "shuffle" if mode == "idx" else f"shuffle_{mode}"
    arguments = (to_bits(value, dtype), cast(lane, "int32"), cast(mask, "uint32"))
    return from_bits(call(f"{name}_u{bits}", f"uint{bits}", *arguments), dtype)
