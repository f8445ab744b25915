"""Worlds in which one rank stops taking part: what the others must do is raise PeerError in time. For CPU and GPU ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.direct_ops import LiveOp, Shape
from tests.fused_programs import GATHER
from tests.worlds import run_world
from tscompile.errors import PeerError

WAYS = {
    "killed": "its process ends",
    "stopped": "its process exists and does not run",
    "silent": "it lives and never starts the op, so that its signal is never sent",
    "busy": "its device is busy for longer than the time-out",
}
CALLS_BEFORE = 3


def one_rank_fails(
    rank: int, size: int, shape: Shape, way: str, device: str, timeout_s: float, captured: bool
) -> dict[str, Any]:
    """A few calls in which all ranks take part, then one in which the last rank does not; what this rank saw.

    If `captured`, the calls are replays of a CUDA graph, of which the host hears nothing.
    """
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    LiveOp(
        shape, torch.bfloat16, here, timeout_s=100.0
    ).check()  # kernels are built, on some ranks sooner than on others
    dist.barrier()
    op = LiveOp(shape, torch.bfloat16, here, timeout_s=timeout_s)
    for _ in range(CALLS_BEFORE):
        op.check(repeats=1)
    call: Callable[[], object] = op.call
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            op.call()
        call = graph.replay
        for _ in range(CALLS_BEFORE):
            call()
        torch.cuda.synchronize()
    dist.barrier()
    if rank == size - 1:
        _fail(way, here, timeout_s)
    start = time.monotonic()
    try:
        while time.monotonic() - start < 3 * timeout_s + 30:
            call()
            if here.type == "cuda":
                torch.cuda.synchronize()
    except PeerError as error:
        return {"peer": error.rank, "seconds": time.monotonic() - start, "message": str(error)}
    return {"peer": None, "seconds": time.monotonic() - start, "message": "no PeerError"}


def _fail(way: str, device: torch.device, timeout_s: float) -> None:
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif way == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif way == "silent":
        time.sleep(10 * timeout_s + 60)
    elif device.type == "cuda":
        for _ in range(int(timeout_s) + 5):  # then the op, which finds that the others have given up
            torch.cuda._sleep(2_000_000_000)
    else:
        time.sleep(timeout_s + 3)


def survivors_of(
    way: str, shape: Shape, size: int, device: str, timeout_s: float = 4.0, captured: bool = False
) -> list[dict[str, Any]]:
    """Run such a world in processes of its own; returns what the ranks that live on saw.

    Raises:
        AssertionError: one of them saw no PeerError, or saw it too late.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    args = (shape, way, device, timeout_s, captured)
    seen = run_world(size, one_rank_fails, *args, timeout_s=150.0, dying=(size - 1,), backend=backend)[:-1]
    for rank, outcome in enumerate(seen):
        assert outcome["peer"] is not None, (way, rank, outcome)
        # what passes beyond the time-out: starting the watch, waking up, saying it
        assert outcome["seconds"] <= 2 * timeout_s + 5, (way, rank, outcome)
        # Ranks may wait for one that waits itself, but for its shard each rank waits for the last one alone.
        if size == 2 or (device == "cuda" and shape.kind == GATHER):
            assert outcome["peer"] == size - 1, (way, rank, outcome)
    return seen
