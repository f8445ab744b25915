"""A program of the suite with its gradients, eager and compiled: for tests that run it again and again on real ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import tscompile
from tests.programs import PROGRAMS, Setting, scalar_loss
from tests.programs.base import Built
from tscompile.backend import tilescale

OPTIONS = {"tilescale.inner": "eager", "tilescale.fuse": "always"}


class Block:
    """`build` makes the program for a setting; by default it is the one of that name."""

    def __init__(
        self,
        rank: int,
        size: int,
        program: str | Callable[[Setting], Built],
        dtype: torch.dtype = torch.float32,
        truth: bool = False,
        **options: Any,
    ) -> None:
        torch._dynamo.reset()
        build = PROGRAMS[program].build if isinstance(program, str) else program
        self.built = build(Setting(size, rank, dtype, truth=truth))
        given = {f"tilescale.{name}": value for name, value in options.items()}
        self.compiled = torch.compile(self.built.call, backend=tilescale, fullgraph=True, options={**OPTIONS, **given})

    def run(self, call: Any) -> list[Tensor]:
        """The output, then the gradients of inputs and parameters."""
        leaves = [*self.built.args, *self.built.parameters.values()]
        output = call(*self.built.args)
        return [output.detach(), *torch.autograd.grad(scalar_loss(output), leaves)]

    def eager(self) -> list[Tensor]:
        return self.run(self.built.call)

    def fused(self) -> list[Tensor]:
        return self.run(self.compiled)


def kinds() -> set[tuple[str | None, str]]:
    """(pattern, code) of all sites so far."""
    return {(row.pattern, row.code) for row in tscompile.reports().rows}


def errors(got: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Error of each tensor in the Frobenius norm, relative to the truth where that is not 0."""
    return [float((a.double() - b).norm()) / (float(b.norm()) or 1.0) for a, b in zip(got, truth, strict=True)]
