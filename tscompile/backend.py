"""The door: `torch.compile(model, backend="tilescale")`.

Everything but the fused sites is Inductor's: this module composes our pass with the user's Inductor configuration
and hands the graph on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import hidden, observe
from .options import Options

Compiled = Callable[..., Any]
_HOOK = "post_grad_custom_post_pass"


def tilescale(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Compiled:
    """Compile one Dynamo graph; registered as the torch.compile backend "tilescale".

    Args:
        mode: an Inductor mode ("reduce-overhead", "max-autotune", ...).
        options: `tilescale.*` options (tscompile.options) and Inductor's own, which are passed through.

    Raises:
        OptionError: an unknown `tilescale.*` option or a bad value.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    ours, inductor = Options.parse(options or {})
    patches: dict[str, Any] = {**(list_mode_options(mode) if mode else {}), **inductor}
    observe.ledger.outside(hidden.tell(gm))
    if _communicates():
        patches.update(pass_patches(ours, patches))
    from .fx_passes.fusion_pass import PASS_IS_TOLD_PHASE, telling_phase

    if ours.inner == "eager":
        from .eager_inner import NO_CACHE, eager_inner, no_caches

        with no_caches():
            return compile_fx(gm, example_inputs, telling_phase(eager_inner), {**patches, **NO_CACHE})  # type: ignore[return-value, arg-type, unused-ignore]
    inner = compile_fx_inner if PASS_IS_TOLD_PHASE else telling_phase(compile_fx_inner)
    return compile_fx(gm, example_inputs, inner, patches)  # type: ignore[return-value, arg-type, unused-ignore]


def install(**options: Any) -> None:
    """Put the pass into Inductor's own configuration, for code that insists on `backend="inductor"`.

    Args:
        options: as `tilescale.*`, without the prefix. `inner` cannot be chosen here.

    Raises:
        OptionError: an unknown option or a bad value.
    """
    from torch._inductor import config

    ours, _ = Options.parse({f"tilescale.{name}": value for name, value in options.items()})
    for name, value in pass_patches(ours, {}).items():
        setattr(config, name, value)


def pass_patches(ours: Options, patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor settings that run our pass after the user's own pass, and keep async TP out of its way."""
    from torch._inductor import config

    from .fx_passes.fusion_pass import FusionPass

    before = patches.get(_HOOK, getattr(config, _HOOK))
    users = [p for p in _as_list(before) if not isinstance(p, FusionPass)]
    return {_HOOK: _chain([*users, FusionPass(ours, lambda: pass_identity(ours))]), "_micro_pipeline_tp": False}


def _as_list(passes: Any) -> list[Any]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, (list, tuple)) else list(getattr(passes, "chained", [passes]))


def _chain(passes: list[Any]) -> Any:
    if len(passes) == 1:
        return passes[0]
    if hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes"):  # torch >= 2.13 takes a list
        return passes
    from .fx_passes.fusion_pass import chained

    return chained(passes)


def pass_identity(ours: Options) -> str:
    """Cache identity of the pass: its sources, its options, and what its decisions read of the machine.

    Groups enter by name, size and reach, never by their ranks: rank 1 may load what rank 0 compiled.
    """
    facts = [source_digest(), ours.digest(), platform.machine(), repr(sorted(_groups().items()))]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Hash over the package's sources and the version of the tile compiler."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.c"))):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    try:
        digest.update(importlib.metadata.version("tilelang").encode())
    except importlib.metadata.PackageNotFoundError:
        digest.update(b"no tilelang")
    return digest.hexdigest()


def _groups() -> dict[str, tuple[int, bool]]:
    """Size of each process group of this rank, and whether it stays on one host."""
    from torch.distributed import distributed_c10d as c10d

    from .fx_passes.collectives import intra_host

    if not c10d.is_initialized():
        return {}
    groups = {name: tuple(c10d.get_process_group_ranks(pg)) for pg, name in c10d._world.pg_names.items()}
    return {name: (len(ranks), intra_host(ranks)) for name, ranks in groups.items()}


def _communicates() -> bool:
    """True if there is anybody to communicate with; otherwise one line says that Inductor does everything."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        observe.once(
            "no-process-group",
            'backend "tilescale" without an initialised process group: everything runs through Inductor as it is. '
            "Call torch.distributed.init_process_group before the first compiled call (torchrun sets its environment).",
        )
        return False
    if dist.get_world_size() == 1:
        observe.once(
            "one-rank", 'backend "tilescale" on one rank: there is no communication, everything is Inductor\'s.'
        )
        return False
    return True
