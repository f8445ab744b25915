"""Kernels of one warp around others: open a captured call, wait for a rank, tell the peers that a slot was read."""

from typing import Any

import tilelang.language as T

from .gemm import call, prelude

# No postponed annotations here: TileLang evaluates those of a prim_func where it stands.


def service_kernel(name: str) -> Any:
    """prim_func that runs the device function `name` of tile.h: tsk_open, tsk_acknowledge, or tsk_wait_rank for the rank `ack`."""
    text = prelude()

    @T.prim_func
    def service(context: T.int64, epoch: T.int32, site: T.int32, ack: T.int32):
        with T.Kernel(1, threads=32, prelude=text):
            call(name, context, epoch, site, ack)

    return service
