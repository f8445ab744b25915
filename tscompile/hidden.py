"""Communication that no FX pass can see, said once per cause: what a graph break leaves outside, and what wrappers do in hooks.

A user who expects overlap and reads nothing about a collective in the report should learn here why it is not there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from traceback import FrameSummary
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
_BLOCKING = (
    "Call the blocking form (no async_op=True, no handle), or a function of torch.distributed._functional_collectives, and leave the "
    "overlap to the compiler."
)
# Of functions of torch.distributed that no torch captures: why, and what to write instead.
_ADVICE = {
    "all_to_all": (
        "torch.compile does not capture list-form all_to_all",
        "Send one tensor, in an autograd.Function too: `sent = torch.stack(parts)`, `got = torch.empty_like(sent)`, "
        "`dist.all_to_all_single(got, sent)`; `got[i]` is what rank i sent.",
    ),
}
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_CALLERS = ("torch/nn/modules/module.py", "torch/nn/parallel/distributed.py")


def tell(gm: fx.GraphModule) -> list[str]:
    """Called for every graph that is compiled, while the user's call is still on the stack.

    Returns what communicates outside of the graphs, one text for each cause, in the words that are logged the first time.
    """
    _tell_wrong_gradients(gm)
    texts = [
        f"{_WRAPPERS[name]}, outside of every compiled graph: that communication cannot be fused and has no row in the report. "
        "Collectives inside the compiled module (tensor or sequence parallelism, SimpleFSDP) have."
        for name in sorted(_wrappers_on_stack(sys._getframe(1)))
    ]
    if broken := _graph_break(gm):
        texts.append(broken)
    for text in texts:
        observe.once(text, "%s", text)
    return texts


def _graph_break(gm: fx.GraphModule) -> str:
    """Where the graph ended, why, and what to write instead; empty unless it ended at communication."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return ""
    text = str(reason.reason).strip()
    cause = text.splitlines()[0] if text else "no reason is given"
    stack: list[FrameSummary] = list(getattr(reason, "user_stack", ()))
    # The reason may name nothing but what Dynamo could not trace within the collective: its options, say.
    inside = [frame.name for frame in stack if "torch/distributed/" in frame.filename]
    if not inside and not any(word in text for word in _WORDS):
        return ""
    callee = next((name for name in inside if name in _ADVICE), inside[-1] if inside else "")
    cause, advice = _ADVICE.get(callee) or (f"{callee}: {cause}" if callee else cause, _BLOCKING)
    users = [frame for frame in stack if not frame.filename.startswith(_TORCH)]
    where = f" at {users[-1].filename}:{users[-1].lineno}, `{users[-1].line}`" if users else ""
    return (
        f"graph break on communication{where}: {cause}. What runs between two graphs cannot be fused and has no row in the report. "
        f"{advice}"
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
