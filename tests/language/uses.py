"""One use of every primitive, in a kernel of its own: for the table in docs/primitives.md, and to see what the C target refuses.

A primitive without a use fails the tests, so a new one cannot be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import tilelang.language as T

import tscompile.language as tl
from tscompile.language.compile import parse
from tscompile.language.dialects import Dialect

from .kernels import CTX

MODULES = {
    "addresses": "Who and where",
    "memory": "Copies, atomics, fences",
    "words": "Loads and stores",
    "sync": "Signals, waits, barriers, lanes",
    "bulk": "Tiles by TMA",
    "grid": "All blocks of one GPU",
}
"""Modules of tscompile.language whose public functions are primitives, with the headings of the table. Names of a module that is
itself part of the language's interface, `tl.<module>.<name>`, come from its `__all__`."""


@dataclass(frozen=True)
class Place:
    """What a use can name: parameters and memory of the kernel it stands in."""

    ctx: Any
    x: Any  # float32
    flags: Any  # int32
    words: Any  # int64
    to: Any  # a rank, int32
    epoch: Any  # int32
    thread: Any
    tile: Any  # float32, shared memory
    arrived: Any  # an mbarrier
    own: Any  # float32, registers


def _wait(name: str) -> Callable[[Place], Any]:
    return lambda p: getattr(tl, name)(p.ctx, p.flags[0], p.epoch, peer=p.to)


def _forms_of_wait(name: str) -> Callable[[Place], Any]:
    return lambda p: getattr(tl, name)(p.ctx, p.flags[0], "ge", p.epoch, peer=p.to)


USES: dict[str, Callable[[Place], Any]] = {
    "rank": lambda p: tl.rank(p.ctx),
    "num_ranks": lambda p: tl.num_ranks(p.ctx),
    "epoch": lambda p: tl.epoch(p.ctx, p.epoch),
    "peer_address": lambda p: tl.peer_address(p.ctx, p.to, 64),
    "peer": lambda p: tl.peer(p.ctx, p.to, 64, (8,), "int32")[0],
    "remote": lambda p: tl.remote(p.ctx, p.x[0], p.to),
    "pointer": lambda p: tl.pointer(p.words[0]),
    "put_block": lambda p: tl.put_block(tl.remote(p.ctx, p.x[0], p.to), p.x[32], 128, p.thread, 128),
    "put_warp": lambda p: tl.put_warp(tl.remote(p.ctx, p.x[0], p.to), p.x[32], 128),
    "get_block": lambda p: tl.get_block(p.x[0], tl.remote(p.ctx, p.x[32], p.to), 128, p.thread, 128),
    "get_warp": lambda p: tl.get_warp(p.x[0], tl.remote(p.ctx, p.x[32], p.to), 128),
    "atomic_add": lambda p: tl.atomic_add(tl.remote(p.ctx, p.words[0], p.to), 1, dtype="int64"),
    "red_add": lambda p: tl.red_add(tl.remote(p.ctx, p.words[0], p.to), 1, dtype="int64"),
    "fence": lambda p: tl.fence(),
    "fence_async": lambda p: tl.fence_async(),
    "ld": lambda p: tl.ld(p.flags[0]),
    "st": lambda p: tl.st(p.flags[0], p.epoch),
    "ld128": lambda p: tl.ld128(p.own[0], p.x[0]),
    "st128": lambda p: tl.st128(p.x[0], p.own[0]),
    "signal": lambda p: tl.signal(tl.remote(p.ctx, p.flags[0], p.to), p.epoch, dtype="int32"),
    "wait": _forms_of_wait("wait"),
    "warp_wait": _forms_of_wait("warp_wait"),
    **{name: _wait(name) for name in ("wait_eq", "wait_ne", "wait_ge", "wait_gt", "wait_le", "wait_lt")},
    "aborted": lambda p: tl.aborted(p.ctx),
    "barrier": lambda p: tl.barrier(p.ctx, 0, p.epoch),
    "barrier_blocks": lambda p: tl.barrier_blocks(p.ctx, p.flags[0], p.epoch),
    "sync_blocks": lambda p: tl.sync_blocks(p.ctx, p.flags[0], p.epoch),
    "block_sync": lambda p: tl.block_sync(9, 128),
    "block_arrive": lambda p: tl.block_arrive(9, 128),
    "warp_sync": lambda p: tl.warp_sync(),
    "warp_any": lambda p: tl.warp_any(p.epoch),
    "warp_all": lambda p: tl.warp_all(p.epoch),
    "warp_ballot": lambda p: tl.warp_ballot(p.epoch),
    "elect": lambda p: tl.elect(),
    "lane": lambda p: tl.lane(),
    "shuffle": lambda p: tl.shuffle(p.epoch, 1),
    "bulk_put": lambda p: tl.bulk_put(tl.remote(p.ctx, p.x[0], p.to), p.tile[0], 128),
    "bulk_wait": lambda p: tl.bulk_wait(),
    "bulk_wait_read": lambda p: tl.bulk_wait_read(),
    "mbarrier_init": lambda p: tl.mbarrier_init(p.arrived[0]),
    "bulk_get": lambda p: tl.bulk_get(p.tile[0], tl.remote(p.ctx, p.x[0], p.to), 128, p.arrived[0]),
    "mbarrier_wait": lambda p: tl.mbarrier_wait(p.ctx, p.arrived[0], 0, peer=p.to),
    "gpu_arrive": lambda p: tl.gpu_arrive(p.words[0], 1, 0),
    "gpu_wait": lambda p: tl.gpu_wait(p.ctx, p.words[0], 1),
    "grid_sync": lambda p: tl.grid_sync(p.ctx, p.words[0], 1, 0),
}


def primitives() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Every primitive: (module, name as one writes it after `tl.`, function), in the order of the modules."""
    for module in MODULES:
        found, direct = import_module(f"tscompile.language.{module}"), module in tl._MODULES
        for name in tl._MODULES[module].split() if direct else found.__all__:
            yield module, name if direct else f"{module}.{name}", getattr(found, name)


def symbol(name: str) -> str:
    """Of the kernel that uses a primitive."""
    return f"use_{name.replace('.', '_')}"


def written(d: Dialect, name: str) -> Any:
    """A kernel that uses one primitive and stores what it returned.

    Raises:
        ValueError: the target of `d` does not have it.
    """
    use = USES[name]

    @T.prim_func
    def kernel(
        ctx: CTX,
        x: T.Tensor((64,), "float32"),
        flags: T.Tensor((8,), "int32"),
        words: T.Tensor((8,), "int64"),
        to: T.int32,
        epoch: T.int32,
        out: T.Tensor((1,), "int64"),
    ):
        with T.Kernel(1, threads=128, prelude=d.prelude) as _:
            tile = d.alloc_shared((32,), "float32")
            arrived = d.alloc_shared((1,), "uint64")
            own = T.alloc_local((4,), "float32")
            out[0] = T.cast(use(Place(ctx, x, flags, words, to, epoch, d.thread(), tile, arrived, own)), "int64")

    return kernel.with_attr("global_symbol", symbol(name))


def function_of(d: Dialect, name: str) -> Any:
    return parse(lambda: written(d, name))
