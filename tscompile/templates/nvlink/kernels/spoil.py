"""What stands behind kernels that know nothing of aborts: it fills their output with NaN if the group was aborted."""

from typing import Any

import tilelang.language as T

from .gemm import call, prelude

# No postponed annotations here: TileLang evaluates those of a prim_func where it stands.


def spoil_kernel() -> Any:
    """prim_func that runs tsk_spoil on `bytes` bytes at `out`."""
    text = prelude()

    @T.prim_func
    def spoil(context: T.int64, out: T.int64, bytes: T.int64):
        with T.Kernel(1, threads=384, prelude=text):
            call("tsk_spoil", context, out, bytes)

    return spoil
