"""`explain`: what the backend would do with a function, without running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .options import Options
from .problem import Row
from .report import Report


class _Planned(BaseException):
    """Ends a call once everything is planned; no user code may catch it, so it is no Exception."""


def explain(fn: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Plan `fn(*args, **kwargs)` and report every communication site, forward and backward, without running it.

    Works under a fake process group on one process. Only where a graph break must be passed do the subgraph's original ops run (on
    real ranks: on all of them, so call it on all of them).

    Args:
        fn: a function or module, not compiled.
        options: `tilescale.*` options, as for torch.compile; Inductor's own are ignored.

    Raises:
        OptionError: an unknown option or a bad value.
    """
    from . import backend, hidden
    from .eager_inner import NO_CACHE, eager_inner, no_caches
    from .fx_passes.fusion_pass import collect_rows, telling_phase

    ours, _ = Options.parse(options or {})
    rows: list[Row] = []
    outside: dict[str, None] = {}  # in order

    def plan(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        outside.update(dict.fromkeys(hidden.tell(gm)))
        reason = getattr(gm, "compile_subgraph_reason", None)
        goes_on = bool(getattr(reason, "graph_break", False))
        patches = {**backend.pass_patches(ours, {}), **NO_CACHE}
        compiled: Any = compile_fx(gm, example_inputs, telling_phase(eager_inner), patches)  # type: ignore[arg-type, unused-ignore]
        return compiled if goes_on else _stop

    import torch._functorch.config as functorch_config

    torch._dynamo.reset()
    try:
        with collect_rows(rows.extend), no_caches(), functorch_config.patch(force_non_lazy_backward_lowering=True):
            torch.compile(fn, backend=plan)(*args, **kwargs)
    except _Planned:
        pass
    finally:
        torch._dynamo.reset()
    return Report(rows, outside=outside)


def _stop(*_: Any) -> Any:
    raise _Planned
