"""Kernels of one warp around the fused ones: open a captured call, tell the peers that a slot was read."""

from functools import lru_cache
from typing import Any

import tilelang.language as T

from ..jit import entry
from .gemm import compile_kernel, prelude

# No postponed annotations here: TileLang evaluates those of a prim_func where it stands.


def service_program(name: str) -> Any:
    """prim_func that runs the device function `name` of tile.h: tsk_open or tsk_acknowledge."""
    text = prelude()

    @T.prim_func
    def service(context: T.Tensor((32,), "int64"), epoch: T.int32, site: T.int32, ack: T.int32):
        with T.Kernel(1, threads=32, prelude=text):
            T.call_extern("handle", name, T.access_ptr(context[0], "r"), epoch, site, ack)

    return service


@lru_cache
def service_kernel(name: str) -> Any:
    """The compiled program."""
    return entry(compile_kernel(service_program(name)))
