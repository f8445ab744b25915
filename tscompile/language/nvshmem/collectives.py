"""Barriers, broadcast and fcollect of all ranks of a group.

NVSHMEM's own wait without a bound, so that a rank which never comes stops all GPUs. Here the payload goes through NVSHMEM
(`putmem_signal`), and the waits are the language's own: they end after the context's time-out, or when a rank has aborted, and then
the call returns false, the record says who was waited for, and `SymmetricGroup.check` raises.

All ranks make the same calls in the same order, each by one thread, warp or block at a time. They need no flags and no epochs from
the
caller: the group counts its turns in memory of its own, so launches can be repeated and captured graphs replayed. Blocks: all
threads call, outside of branches that only some of them take.

Teams: WORLD, SHARED, NODE and GPU_LEADERS are all the ranks of the group of `ctx`; for other ranks make a group of them.
"""

from __future__ import annotations

from typing import Any

from ..addresses import Expr, Operand, address, call, cast
from . import checks
from .enums import Team


def _barrier(suffix: str, ctx: Any, team: Team, site: Expr) -> Expr:
    checks.team(team)
    return checks.waited(checks.nv_call(f"barrier{suffix}", ctx, cast(site, "uint32")))


def _sync(suffix: str, ctx: Any, team: Team, site: Expr) -> Expr:
    checks.team(team)
    return checks.waited(call(f"team_sync{suffix}", "int32", address(ctx), cast(site, "uint32")))


def barrier(ctx: Any, team: Team, *, site: Expr = 0) -> Expr:
    """Complete this thread's transfers, then meet with the other ranks, by one thread of each: true when all came.

    Afterwards what any rank put before is visible to this thread. Lowers to `nvshmem_quiet` and the language's own meeting
    (`st.release.sys`, `ld.acquire.sys`), bounded: false when the wait was given up.

    Args:
        ctx: the context.
        team: see the module; all ranks of the group.
        site: which wait this is, for the record only, uint32.

    Raises:
        ValueError: another team, or a prelude without NVSHMEM.
    """
    return _barrier("", ctx, team, site)


def barrier_warp(ctx: Any, team: Team, *, site: Expr = 0) -> Expr:
    """`barrier` by a warp of each rank, all of whose lanes call; it completes the transfers of all of them."""
    return _barrier("_warp", ctx, team, site)


def barrier_block(ctx: Any, team: Team, *, site: Expr = 0) -> Expr:
    """`barrier` by a block of each rank, all of whose threads call; it completes the transfers of all of them."""
    return _barrier("_block", ctx, team, site)


def barrier_all(ctx: Any, *, site: Expr = 0) -> Expr:
    """`barrier(ctx, Team.WORLD)`: by one thread of each rank; true when all came, false when the wait was given up."""
    return _barrier("", ctx, Team.WORLD, site)


def barrier_all_warp(ctx: Any, *, site: Expr = 0) -> Expr:
    """`barrier_all` by a warp of each rank, all of whose lanes call."""
    return _barrier("_warp", ctx, Team.WORLD, site)


def barrier_all_block(ctx: Any, *, site: Expr = 0) -> Expr:
    """`barrier_all` by a block of each rank, all of whose threads call."""
    return _barrier("_block", ctx, Team.WORLD, site)


def sync(ctx: Any, team: Team, *, site: Expr = 0) -> Expr:
    """Meet with the other ranks, by one thread of each, without completing transfers: true when all came.

    What this thread stored before (stores, not transfers that NVSHMEM may still have under way) is visible to the others
    afterwards. The language's own meeting: no NVSHMEM call, so it needs no NVSHMEM memory, and any SymmetricGroup will do. Bounded:
    false when the wait was given up.

    Args:
        ctx: the context of a SymmetricGroup.
        team, site: as in `barrier`.

    Raises:
        ValueError: another team.
    """
    return _sync("", ctx, team, site)


def sync_warp(ctx: Any, team: Team, *, site: Expr = 0) -> Expr:
    """`sync` by a warp of each rank, all of whose lanes call."""
    return _sync("_warp", ctx, team, site)


def sync_block(ctx: Any, team: Team, *, site: Expr = 0) -> Expr:
    """`sync` by a block of each rank, all of whose threads call."""
    return _sync("_block", ctx, team, site)


def sync_all(ctx: Any, *, site: Expr = 0) -> Expr:
    """`sync(ctx, Team.WORLD)`: by one thread of each rank; true when all came, false when the wait was given up."""
    return _sync("", ctx, Team.WORLD, site)


def sync_all_warp(ctx: Any, *, site: Expr = 0) -> Expr:
    """`sync_all` by a warp of each rank, all of whose lanes call."""
    return _sync("_warp", ctx, Team.WORLD, site)


def sync_all_block(ctx: Any, *, site: Expr = 0) -> Expr:
    """`sync_all` by a block of each rank, all of whose threads call."""
    return _sync("_block", ctx, Team.WORLD, site)


def _broadcast(
    suffix: str, ctx: Any, team: Team, dest: Operand, src: Operand, nbytes: Expr, root: Expr, site: Expr
) -> Expr:
    checks.team(team)
    arguments = (address(dest), address(src), nbytes, checks.rank(root, "root"), cast(site, "uint32"))
    return checks.waited(checks.nv_call(f"broadcast{suffix}", ctx, *arguments))


def broadcast(
    ctx: Any,
    team: Team,
    dest: Operand,
    src: Operand,
    nelems: Expr,
    root: Expr,
    *,
    site: Expr = 0,
    dtype: str | None = None,
) -> Expr:
    """Copy `nelems` elements from `src` at `root` to `dest` at every rank, `root` too, by one thread of each: true when they are
    here.

    On return `dest` of this rank is written, and visible to this thread; `src` may be written again. Other ranks may not be that
    far: before `dest` takes the next broadcast, all must be done with this one (`sync_all`). Lowers to `nvshmem_putmem_signal` from
    the root to each rank, and a bounded wait elsewhere.

    Args:
        ctx: the context.
        team: see the module; all ranks of the group.
        dest: symmetric memory of this rank.
        src: symmetric memory of this rank, or `dest` itself; read at the root only.
        nelems: elements, at least 0.
        root: rank in the group, int32, the same on all ranks.
        site: which wait this is, for the record only, uint32.
        dtype: of the elements; needed where `dest` is an address.

    Raises:
        ValueError: dtypes that differ, another team, an impossible root, a negative size, or a prelude without NVSHMEM.
    """
    return _broadcast("", ctx, team, dest, src, checks.elements(dest, src, nelems, dtype), root, site)


def broadcast_warp(
    ctx: Any,
    team: Team,
    dest: Operand,
    src: Operand,
    nelems: Expr,
    root: Expr,
    *,
    site: Expr = 0,
    dtype: str | None = None,
) -> Expr:
    """`broadcast` by a warp of each rank, all of whose lanes call. Lowers to `nvshmemx_putmem_signal_warp`."""
    return _broadcast("_warp", ctx, team, dest, src, checks.elements(dest, src, nelems, dtype), root, site)


def broadcast_block(
    ctx: Any,
    team: Team,
    dest: Operand,
    src: Operand,
    nelems: Expr,
    root: Expr,
    *,
    site: Expr = 0,
    dtype: str | None = None,
) -> Expr:
    """`broadcast` by a block of each rank, all of whose threads call. Lowers to `nvshmemx_putmem_signal_block`."""
    return _broadcast("_block", ctx, team, dest, src, checks.elements(dest, src, nelems, dtype), root, site)


def broadcastmem_block(
    ctx: Any, team: Team, dest: Operand, src: Operand, nbytes: Expr, root: Expr, *, site: Expr = 0
) -> Expr:
    """`broadcast_block` of `nbytes` bytes, whatever the dtypes."""
    return _broadcast("_block", ctx, team, dest, src, checks.size(nbytes), root, site)


def _fcollect(
    suffix: str, ctx: Any, team: Team, dest: Operand, src: Operand, nelems: Expr, site: Expr, dtype: str | None
) -> Expr:
    checks.team(team)
    nbytes = checks.elements(dest, src, nelems, dtype)
    arguments = (address(dest), address(src), nbytes, cast(site, "uint32"))
    return checks.waited(checks.nv_call(f"fcollect{suffix}", ctx, *arguments))


def fcollect(
    ctx: Any, team: Team, dest: Operand, src: Operand, nelems: Expr, *, site: Expr = 0, dtype: str | None = None
) -> Expr:
    """Gather `nelems` elements from `src` of every rank, in rank order, in `dest` at every rank, by one thread of each: true when
    all are here.

    On return `dest` of this rank, `num_ranks * nelems` elements, is written and visible to this thread; `src` may be written again.
    Before `dest` takes the next one, all ranks must be done with this one (`sync_all`). Lowers to `nvshmem_putmem_signal` to each
    rank and a bounded wait for each.

    Args:
        ctx: the context.
        team: see the module; all ranks of the group.
        dest: symmetric memory of this rank.
        src: memory of this rank; may be its place in `dest`.
        nelems: elements of one rank, at least 0, the same on all ranks.
        site: which wait this is, for the record only, uint32.
        dtype: of the elements; needed where `dest` is an address.

    Raises:
        ValueError: dtypes that differ, another team, a negative size, or a prelude without NVSHMEM.
    """
    return _fcollect("", ctx, team, dest, src, nelems, site, dtype)


def fcollect_warp(
    ctx: Any, team: Team, dest: Operand, src: Operand, nelems: Expr, *, site: Expr = 0, dtype: str | None = None
) -> Expr:
    """`fcollect` by a warp of each rank, all of whose lanes call. Lowers to `nvshmemx_putmem_signal_warp`."""
    return _fcollect("_warp", ctx, team, dest, src, nelems, site, dtype)


def fcollect_block(
    ctx: Any, team: Team, dest: Operand, src: Operand, nelems: Expr, *, site: Expr = 0, dtype: str | None = None
) -> Expr:
    """`fcollect` by a block of each rank, all of whose threads call. Lowers to `nvshmemx_putmem_signal_block`."""
    return _fcollect("_block", ctx, team, dest, src, nelems, site, dtype)
