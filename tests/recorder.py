"""Post-grad graphs of a program, read where the fusion pass would stand, without the product.

The compiler here runs Inductor's post-grad passes and no code generation, so a program costs about a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx, fake_tensor_prop, view_to_reshape
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V

from tests.programs import Program, Setting, scalar_loss
from tscompile.problem import Phase
from tscompile.testing import collective_counts, collective_name

_GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"})
_VIEWS = {"view", "reshape", "_unsafe_view", "alias", "as_strided", "permute", "transpose", "t", "expand"}
_PARTS = {"unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "getitem", "index"}
_COPIES = {"cat", "stack", "clone", "contiguous", "copy", "copy_", "constant_pad_nd", "empty", "full"}
_CASTS = {"_to_copy", "convert_element_type"}
_MOVEMENT = frozenset(_VIEWS | _PARTS | _COPIES | _CASTS | {"wait_tensor"})
_DEPTH = 16  # longest movement chain that is followed; the longest of the suite has 9 nodes


def _op(node: torch.fx.Node) -> str:
    return (
        node.target._opname if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "")
    )


def _is_product(node: torch.fx.Node) -> bool:
    op = _op(node)
    return op in _GEMMS or op.startswith(("_scaled_dot_product",))


def _is_movement(node: torch.fx.Node) -> bool:
    return _op(node) in _MOVEMENT


def _feeds_product(node: torch.fx.Node, depth: int = 0) -> bool:
    users = [user for user in node.users if user.op == "call_function"]
    return any(
        _is_product(user) or (depth < _DEPTH and _is_movement(user) and _feeds_product(user, depth + 1))
        for user in users
    )


def _fed_by_product(node: torch.fx.Node, depth: int = 0) -> bool:
    inputs = [source for source in node.all_input_nodes if source.op == "call_function"]
    return any(
        _is_product(source)
        or (depth < _DEPTH and (_is_movement(source) or _op(source) == "add") and _fed_by_product(source, depth + 1))
        for source in inputs
    )


def addressable_counts(graph: torch.fx.Graph) -> dict[str, int]:
    """Collectives with a matmul or attention next to them, by short name.

    Next to: reached through data movement alone; above the collective also through additions, since a reduction
    commutes with them. This is the denominator of recall, so it must not depend on what the product can match.
    """
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        name = collective_name(node.target) if node.op == "call_function" else None
        if name is not None and (_fed_by_product(node) or _feeds_product(node)):
            counts[name] += 1
    return dict(counts)


@dataclass
class Snapshot:
    """What one graph shows: its phase, its collectives and the addressable ones among them."""

    phase: Phase
    collectives: dict[str, int]
    addressable: dict[str, int]


class _Observe(CustomGraphPass):
    def __init__(self, see: Callable[[torch.fx.Graph], None]) -> None:
        self.see = see

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.see(graph)

    def uuid(self) -> None:
        return None  # never cached: a cached graph would not be seen


class Recorder:
    """A torch.compile backend that runs programs uncompiled and keeps a snapshot of each post-grad graph."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def inner(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
            phase: Phase = (
                "backward" if kwargs.get("is_backward") else "inference" if kwargs.get("is_inference") else "forward"
            )
            view_to_reshape(gm)
            with torch.no_grad():
                fake_mode = fake_tensor_prop(gm, example_inputs)

            def see(graph: torch.fx.Graph) -> None:
                self.snapshots.append(Snapshot(phase, collective_counts(graph), addressable_counts(graph)))

            with V.set_fake_mode(fake_mode), inductor_config.patch(post_grad_custom_post_pass=_Observe(see)):
                _recursive_post_grad_passes(gm, is_inference=phase == "inference")
            gm.recompile()
            return make_boxed_func(gm.forward)

        return compile_fx(module, inputs, inner_compile=inner)


def record(program: Program, setting: Setting) -> list[Snapshot]:
    """Capture a program in one graph, run it once with its backward, and return what its graphs show."""
    recorder = Recorder()
    built = program.build(setting)
    built.mark_dynamic()
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False),
    ):
        compiled = torch.compile(built.call, backend=recorder, fullgraph=True)
        with program.enter(setting):
            output = compiled(*built.args)
        if program.backward:
            torch.autograd.backward(scalar_loss(output))
    return recorder.snapshots
