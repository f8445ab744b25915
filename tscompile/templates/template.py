"""What a template is, and the registry of templates by (kind, executor).

Not for planning: whether a fusion pays is the planner's business; a template only says what it can run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from ..problem import FusionProblem, Plan

SHM_DTYPES = ("float32", "float64", "bfloat16", "float16")


class Template(Protocol):
    """One way to run one kind of fused op. Instances have no state of their own."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        """None if this template can run the problem, otherwise the reason why not. The same answer on every rank."""
        ...

    def scratch_bytes(self, plan: Plan, size: int, *args: Any) -> int:
        """Bytes of each rank's arena that one call needs (of one half of it), from shapes alone; negative if the template cannot
        serve these sizes, which a plan for symbolic sizes may meet: then the original ops run.

        Args:
            plan: the op's plan.
            size: number of ranks.
            args: the op's arguments without token, plan and group name; fake tensors will do.
        """
        ...

    def run(self, channel: Any, plan: Plan, *args: Any) -> list[torch.Tensor]:
        """Run the op on this rank and return its outputs without the token: fresh memory, never views of the heap.

        `channel` is what the executor gives: a Channel ("shm"), a DeviceChannel ("nvlink").
        It must not change its inputs, and must receive at least one signal from every peer before it returns.

        Raises:
            DowngradedError, PeerError: as `Channel.wait`.
        """
        ...


@runtime_checkable
class CompiledTemplate(Template, Protocol):
    """A template that launches kernels of its own."""

    def kernels(self, plan: Plan, size: int, *args: Any) -> list[tuple[Any, ...]]:
        """Kernels that a call launches, as nvlink/jit.py names them, to be compiled ahead; arguments as `scratch_bytes`."""
        ...


_templates: dict[tuple[str, str], Template] = {}
_T = TypeVar("_T", bound=type[Template])


def register_template(kind: str, executor: str = "shm") -> Callable[[_T], _T]:
    """Class decorator that registers an instance of the class as the template of `kind` for `executor`.

    Raises:
        ValueError: the pair has a template already.
    """

    def register(cls: _T) -> _T:
        if (kind, executor) in _templates:
            raise ValueError(
                f"kind {kind!r} has a template for executor {executor!r} already: choose another executor name"
            )
        _templates[kind, executor] = cls()
        return cls

    return register


def find_template(kind: str, executor: str) -> Template | None:
    """The template of `kind` for `executor`, None if there is none."""
    return _templates.get((kind, executor))


def registered() -> tuple[tuple[str, str], ...]:
    """All (kind, executor) pairs that have a template, sorted."""
    return tuple(sorted(_templates))


def shm_refusal(problem: FusionProblem) -> str | None:
    """Why shared memory of one host cannot serve a problem, None if it can. Whether it is there is voted on at run time."""
    if problem.device != "cpu":
        return f"shared memory serves CPU tensors, these are on {problem.device}"
    if problem.group_size < 2:
        return "the group has one rank: there is no communication to hide"
    if not problem.intra_host:
        return "the ranks are on several hosts: shared memory reaches one"
    if problem.dtype not in SHM_DTYPES:
        return f"dtype {problem.dtype} is not one of {', '.join(SHM_DTYPES)}"
    if problem.reduce_op not in ("sum", "avg"):
        return f"reduction {problem.reduce_op} is not a sum or an average"
    return None


def torch_dtype(name: str) -> torch.dtype:
    """torch.float32 for "float32"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
