"""Where a step's GPU time goes: its kernels by name, as torch's profiler saw one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import gpu_harness as gpu

BUSIEST = 30  # names that are kept
COLLECTIVES = ("ncclDevKernel", "ncclKernel", "symm_mem::fused")


Profile = tuple[dict[str, int], dict[str, Any]]


def profile_step(step: Callable[[], object], timer: gpu.Timer) -> Profile | None:
    """One step on GPUs, behind a queue of matmuls as in a race; None on CPUs.

    First the kernels of NCCL and the ops of async TP by name; the latter show whether async TP took part at all. Then `busiest`: [name,
    calls, us] of kernels and copies, this rank's; `busy_us`: of all of them, those that ran side by side counted twice; `span_us`: from
    the first one's start to the last one's end.
    """
    if not timer.cuda:
        return None
    from torch.profiler import ProfilerActivity, profile

    dist.barrier()
    timer.heat()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    return summed(run.events() or ())


def summed(events: Iterable[Any]) -> Profile:
    """The summary of a profiler's events."""
    counts: dict[str, int] = {}
    spent: dict[str, list[float]] = {}
    start, end = float("inf"), 0.0
    for event in events:
        if event.name.startswith(COLLECTIVES):
            name = event.name.split("(")[0]
            counts[name] = counts.get(name, 0) + 1
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            calls_us = spent.setdefault(event.name[:100], [0, 0.0])
            calls_us[0] += 1
            calls_us[1] += event.time_range.elapsed_us()
            start, end = min(start, event.time_range.start), max(end, event.time_range.end)
    ordered = sorted(spent.items(), key=lambda item: -item[1][1])
    return counts, {
        "busiest": [[name, int(calls), round(us, 1)] for name, (calls, us) in ordered[:BUSIEST]],
        "busy_us": round(sum(us for _, us in spent.values()), 1),
        "span_us": round(max(end - start, 0.0), 1) if spent else 0.0,
    }
