"""How much of the compile time of a training graph is spent in our pass.

Method: a stack of Llama blocks (the example's, tensor and sequence parallel) runs forward and backward once with
cold Inductor caches, which compiles both graphs. The wall time of that first step with `backend="inductor"` is the
base; with our backend, the pass itself keeps the time it took. The share is pass time / base, on the slowest
rank.

Traps: a warm C++ cache makes Inductor look ten times faster than a user's first run, and one rank warms it for the
other; hence a fresh cache directory per rank and compile. The pass runs once per graph, and not at all on a cache
hit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor.utils import fresh_cache
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.harness import slowest
from examples.train_llama_tp import Llama, parallelize


def first_step_seconds(backend: str | Callable[..., Any], layers: int = 2, dim: int = 512) -> float:
    """Wall time of the first forward and backward on this rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch._dynamo.reset()
    model = torch.compile(parallelize(Llama(layers, dim), mesh), backend=backend, fullgraph=True, dynamic=False)
    tokens = torch.zeros(2, 128, dtype=torch.long)
    with fresh_cache():
        dist.barrier()
        start = time.perf_counter()
        model(tokens).mean().backward()
        return time.perf_counter() - start


def compile_share(backend: str | Callable[..., Any]) -> dict[str, float]:
    """Seconds of the first step with Inductor and with `backend`, seconds in our pass, and the share."""
    from tscompile.fx_passes.fusion_pass import pass_seconds

    first_step_seconds("aot_eager")  # imports and DTensor's own caches are charged to neither
    base = first_step_seconds("inductor")
    before = pass_seconds()
    ours = first_step_seconds(backend)
    base, ours, in_pass = slowest([base, ours, pass_seconds() - before])
    if not in_pass:
        raise RuntimeError("our pass did not run: the backend is not tscompile's, or a cache answered")
    return {"inductor_s": base, "ours_s": ours, "pass_s": in_pass, "share": in_pass / base}
