"""What a program around distributed kernels wants to know: how long they take, and what each rank has to say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection

import torch

from .group import SymmetricGroup


def perf_fn(call: Callable[[], object], group: SymmetricGroup, *, warmup: int = 5, iters: int = 20) -> float:
    """Time of `call` in milliseconds: the median on the slowest rank. Collective; every rank makes warmup + iters calls.

    The calls follow one another with nothing between them, so whatever waits for peers runs in step after the first ones. On GPUs the
    time is that between events on the current stream, on CPU that of the call. TileLang's own profiler counts time instead of calls:
    with kernels that wait for peers, ranks would stop after different numbers of them.

    Args:
        call: takes no arguments; a kernel that takes an epoch gets the next one, as in `lambda: kernel(..., next(epochs))`.
        group: the ranks that measure.
        warmup, iters: calls before the measurement, and in it.

    Raises:
        ValueError: no calls to measure.
        PeerError: as `SymmetricGroup.barrier`.
    """
    if warmup < 0 or iters < 1:
        raise ValueError(f"warmup={warmup}, iters={iters}: one call or more is measured, after none or more")
    group.barrier()
    for _ in range(warmup):
        call()
    milliseconds = _on_gpu(call, iters) if group.device.type == "cuda" else _on_cpu(call, iters)
    group.barrier()
    return float(max(group._exchange(statistics.median(milliseconds))))


def _on_cpu(call: Callable[[], object], iters: int) -> list[float]:
    stamps = [time.perf_counter()]
    for _ in range(iters):
        call()
        stamps.append(time.perf_counter())
    return [1000 * (stamps[i + 1] - stamps[i]) for i in range(iters)]


def _on_gpu(call: Callable[[], object], iters: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iters + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [events[i].elapsed_time(events[i + 1]) for i in range(iters)]


def dist_print(group: SymmetricGroup, *values: object, ranks: Collection[int] | None = None, sep: str = " ") -> None:
    """Print what ranks have to say, in rank order, from the first rank of the group. Collective.

    Args:
        group: the ranks.
        values: as `print` takes them; each line becomes `[rank r] ...` with the global rank.
        ranks: group ranks to be heard, the same on every rank; all of them if None.
        sep: between the values.

    Raises:
        PeerError: as `SymmetricGroup.barrier`.
    """
    heard = ranks is None or group.rank in ranks
    said = group._exchange(sep.join(map(str, values)) if heard else None)
    if group.rank == 0:
        for rank, text in zip(group._ranks, said, strict=True):
            if text is not None:
                print("\n".join(f"[rank {rank}] {line}" for line in text.split("\n")), flush=True)
