"""Kernel of exchanges between ranks: pushes what the peers want to their slots, and lays out what arrives as the outputs want it."""

from typing import Any

import tilelang.language as T

from .config import MAX_LEGS
from .gemm import call, prelude, value

# No postponed annotations here: TileLang evaluates those of a prim_func where it stands.

THREADS = 512


def exchange_kernel(ctas: int) -> Any:
    """prim_func of a launch of `ctas` CTAs, any number of which may be resident; exchange.h says what it does.

    Arguments of the kernel: X0 to X7 the addresses of what is sent, Y0 to Y7 those of the places that what arrives goes to; table the
    rows of both, `legs` of X (legs.py of templates/nvlink makes it); `batches` of `batch_words` words of 16 bytes that a peer gets,
    their flags from `first_flag` on, their data `offset` bytes behind the start of a slot. If `copied`, copy engines send, and there
    is a flag for each leg.
    """
    text = prelude("exchange.h")
    numbers = tuple(range(MAX_LEGS))  # a tuple, so that TileLang unrolls the loop where it reads it

    @T.prim_func
    def exchange(
        X0: T.int64,
        X1: T.int64,
        X2: T.int64,
        X3: T.int64,
        X4: T.int64,
        X5: T.int64,
        X6: T.int64,
        X7: T.int64,
        Y0: T.int64,
        Y1: T.int64,
        Y2: T.int64,
        Y3: T.int64,
        Y4: T.int64,
        Y5: T.int64,
        Y6: T.int64,
        Y7: T.int64,
        table: T.int64,
        legs: T.int32,
        batches: T.int32,
        batch_words: T.int32,
        first_flag: T.int32,
        offset: T.int64,
        copied: T.int32,
        context: T.int64,
        counters: T.int64,
        epoch: T.int32,
        site: T.int32,
        ack: T.int32,
    ):
        with T.Kernel(ctas, threads=THREADS, prelude=text):
            thread = T.get_thread_binding()
            for i in numbers:
                call("tsx_address", i, (X0, X1, X2, X3, X4, X5, X6, X7)[i])
                call("tsx_address", MAX_LEGS + i, (Y0, Y1, Y2, Y3, Y4, Y5, Y6, Y7)[i])
            call(
                "tsk_exchange",
                context,
                counters,
                table,
                legs,
                batches,
                batch_words,
                first_flag,
                offset,
                copied,
                epoch,
                site,
            )
            if thread >= 128:
                if thread < 384:
                    if value("tsk_last", counters) != 0:
                        if value("tsk_aborted", context) != 0:
                            call("tsk_report", context)
                            call("tsk_exchange_nan", context, table, legs)
                        call("tsk_finish", context, counters, epoch, ack)

    return exchange
