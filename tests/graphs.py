"""The graphs that the backend leaves behind, for tests that look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import fx

from tscompile import backend
from tscompile.eager_inner import NO_CACHE, eager_inner, no_caches
from tscompile.fx_passes.fusion_pass import collect_rows, telling_phase
from tscompile.options import Options
from tscompile.problem import Row


@dataclass
class Compiled:
    """Post-grad graphs after the pass, forward before backward, and the rows of all of them."""

    graphs: list[fx.Graph] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def targets(self) -> list[str]:
        return [str(n.target).removesuffix(".default") for g in self.graphs for n in g.nodes if n.op == "call_function"]

    def codes(self) -> list[str]:
        return [row.code for row in self.rows]

    def kinds(self) -> list[str | None]:
        return [row.pattern for row in self.rows]


def compile_graphs(fn: Callable[..., Any], *args: Any, backward: bool = False, **options: Any) -> Compiled:
    """Compile and run `fn(*args)` (and its backward) with everything fused that can be, under the present process group."""
    found = Compiled()
    ours = Options(**{"fuse": "always", "inner": "eager", **options})

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        run = eager_inner(gm, inputs, **kwargs)
        found.graphs.append(gm.graph)
        return run

    def compile_one(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        patches = {**backend.pass_patches(ours, {}), **NO_CACHE}
        return compile_fx(gm, inputs, telling_phase(inner), patches)  # type: ignore[return-value, arg-type]

    torch._dynamo.reset()
    with collect_rows(found.rows.extend), no_caches(), functorch_config.patch(force_non_lazy_backward_lowering=True):
        out = torch.compile(fn, backend=compile_one, fullgraph=True)(*args)
        if backward:
            outs = out if isinstance(out, (tuple, list)) else (out,)
            sum(o.float().square().sum() for o in outs if o.requires_grad).backward()
    return found
