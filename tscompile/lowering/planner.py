"""Fuse or keep: a pure function of the problem, the options and the machine kind, so every rank decides alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..nvshmem.device import SLOTS
from ..options import Options
from ..problem import Decision, Fuse, FusionProblem, Keep, Plan
from ..templates.nvlink.jit import compile_ahead
from ..templates.template import CompiledTemplate, find_template
from . import cost_model

EXECUTORS = {"cpu": "shm", "cuda": "nvlink"}
# Not proved on several GPUs: never chosen where the user has not asked for it.
UNPROVEN = {
    ("all_gather_attention", "nvlink"),
    ("attention_reduce_scatter", "nvlink"),
}
# How a site runs of which not everything is fused.
_LESS = {
    "mesh_matmul": "with one gather fused",
    "all_to_all_matmul": "with the exchange and its permutes fused",
    "matmul_all_to_all": "with the exchange and its permutes fused",
}


def plan(problem: FusionProblem, plan: Plan, options: Options) -> Decision:
    """Decide on one site. Reads nothing that may differ between ranks.

    Returns:
        Fuse with the executor's name and both predicted times, or Keep with a stable code and a reason for the user.
    """
    if problem.kind in options.disable:
        return Keep("disabled", f'kind {problem.kind} is disabled by the option "tilescale.disable"')
    if problem.group_size < 2:
        return Keep("one-rank", "the group has one rank: there is no communication to hide")
    executor = EXECUTORS.get(problem.device)
    if executor == "nvlink":
        problem = replace(problem, capability=_capability())
    template = find_template(problem.kind, executor) if executor else None
    if executor is None or template is None:
        return Keep("no-executor", f"no kernel for {problem.kind} on {problem.device} tensors in this version")
    if problem.comm_bytes == 0:
        return Keep("empty", "a tensor without elements is exchanged")
    refusal = template.supports(problem, plan)
    if refusal is not None:
        return Keep("unsupported", refusal)
    # A call that needs more than there is runs as it was, which ranks across a mesh would not hear of.
    need = max(problem.comm_bytes, problem.second_comm_bytes)
    if problem.second_group_size and executor == "nvlink" and need > (options.heap_bytes or need * SLOTS) // SLOTS:
        return Keep("no-room", f"it takes {need} bytes four times, more than tilescale.heap_bytes allows")
    if options.fuse == "auto" and (plan.kind, executor) in UNPROVEN:
        instead = f", so it runs {_LESS[plan.kind]}" if plan.kind in _LESS else ""
        return Keep("unproven", f"it is not proved on several GPUs yet{instead}; tilescale.fuse=always uses it")
    prediction = cost_model.predict(problem, plan.uses, plan)
    if options.fuse == "auto" and not cost_model.pays(problem, prediction):
        other = f"{prediction.original_us:.0f} us as it is"
        if prediction.partial_us < prediction.original_us:
            other = f"{prediction.partial_us:.0f} us {_LESS[plan.kind]}"
        return Keep("no-gain", f"predicted {prediction.fused_us:.0f} us fused against {other}")
    return Fuse(executor, prediction.fused_us, prediction.original_us, cost_model.schedule(problem))


def _capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU. Ranks whose GPUs differ plan differently, and the vote tells them."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def prepare(plan: Plan, ranks: int, args: Sequence[Any]) -> int:
    """Have the kernels of a fused op compiled in the background, unless its sizes are symbolic.

    Returns:
        Bytes of the arena that it needs, 0 if its sizes are symbolic: then the first launch grows the arena.
    """
    values = pytree.tree_leaves(args)
    values = [v for v in values if v is not None and not isinstance(v, str)]
    sizes = [size for v in values for size in (v.shape if isinstance(v, torch.Tensor) else (v,))]
    template = find_template(plan.kind, plan.executor)
    if template is None or not all(isinstance(size, int) for size in sizes):
        return 0
    need = max(0, template.scratch_bytes(plan, ranks, *args))
    if need and isinstance(template, CompiledTemplate) and torch.cuda.is_available():
        for kernel in template.kernels(plan, ranks, *args):
            compile_ahead(*kernel)
    return need
