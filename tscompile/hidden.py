"""Communication that no FX pass can see, said once per cause: what a graph break leaves outside, and what wrappers do in hooks.

A user who expects overlap and reads nothing about a collective in the report should learn here why it is not there.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import fx

from . import observe
from .versions import known_problems

_WORDS = (
    "async_op",
    "distributed",
    "collective",
    "c10d",
    "ProcessGroup",
    "all_to_all",
    "all_gather",
    "reduce_scatter",
    "_maybe_view_chunk_cat",  # inside all_gather_tensor, torch 2.11
)
_WRAPPERS = {
    "FSDPModule": "FSDP2 (fully_shard) gathers parameters and scatters gradients in hooks",
    "FullyShardedDataParallel": "FullyShardedDataParallel gathers parameters and scatters gradients in hooks",
    "DistributedDataParallel": "DistributedDataParallel reduces gradients in its own C++ reducer",
}
_CALLERS = ("torch/nn/modules/module.py", "torch/nn/parallel/distributed.py")


def tell(gm: fx.GraphModule) -> None:
    """Called for every graph that is compiled, while the user's call is still on the stack."""
    _tell_graph_break(gm)
    _tell_wrong_gradients(gm)
    for name in sorted(_wrappers_on_stack(sys._getframe(1))):
        observe.once(
            f"wrapper:{name}",
            "%s, outside of every compiled graph: that communication cannot be fused and is not in the report. Collectives inside "
            "the compiled module (tensor or sequence parallelism, SimpleFSDP) are.",
            _WRAPPERS[name],
        )


def _tell_graph_break(gm: fx.GraphModule) -> None:
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return
    text = str(reason.reason).strip()
    first = text.splitlines()[0] if text else ""
    if not any(word in text for word in _WORDS):
        # The reason may name nothing but what Dynamo could not trace within the collective: its options, say.
        inside = [frame.name for frame in getattr(reason, "user_stack", ()) if "torch/distributed/" in frame.filename]
        if not inside:
            return
        first = f"{inside[-1]}: {first}"
    observe.once(
        f"graph-break:{first}",
        "graph break on communication: %s. What runs between two graphs cannot be fused. async_op=True handles, list-form "
        "all_to_all inside autograd.Function and torch.distributed.nn.functional break the graph: call the blocking form, or "
        "torch.distributed._functional_collectives, and leave the overlap to the compiler.",
        first,
    )


def _tell_wrong_gradients(gm: fx.GraphModule) -> None:
    """torch 2.11: an autograd.Function with collectives in its body may get wrong gradients, from any backend."""
    problem = next((p for p in known_problems(torch.__version__) if p.what == "autograd.Function"), None)
    if problem is None:
        return
    bodies = [m for name, m in gm.named_modules() if name and isinstance(m, fx.GraphModule)]
    if any("c10d" in str(node.target) for body in bodies for node in body.graph.nodes):
        observe.once("autograd.Function", "%s: %s", problem.detail, problem.action)


def _wrappers_on_stack(frame: FrameType | None) -> set[str]:
    """Names of data-parallel wrappers among the modules that are being called."""
    found: set[str] = set()
    while frame is not None:
        if frame.f_code.co_filename.endswith(_CALLERS):
            module = frame.f_locals.get("self")
            found.update(cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS)
        frame = frame.f_back
    return found
