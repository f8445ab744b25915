"""What a program of the suite is, and how its tensors are drawn.

A program is built for one rank of a world. Its values come from seeds that name the tensor (and the rank, for what is
sharded), so the same program can be built again in float64 with exactly the values of a low-precision build: that copy
is the truth which numerics tests measure errors against.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from tscompile.problem import Phase

Context = Literal["grad", "no_grad", "inference_mode", "autocast"]
Counts = Mapping[str, tuple[int, int]]  # collective -> (how many, how many of them are addressable)
Expected = Mapping[Phase, Counts]

MODEL_DIM = 64
HEADS = 8
FFN_DIM = 128
VOCAB = 256


@dataclass(frozen=True)
class Setting:
    """Rank, world and dtype that a program is built for.

    dtype: dtype that values are rounded to and, unless `truth`, held in.
    truth: hold the rounded values in float64 and leave out explicit casts and autocast.
    stretch: factor on the dims that a dynamic program marks, for a second call with other sizes.
    """

    world_size: int
    rank: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    truth: bool = False
    stretch: int = 1

    @property
    def held(self) -> torch.dtype:
        return torch.float64 if self.truth else self.dtype

    def explicit(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a cast that is part of the program."""
        return torch.float64 if self.truth else dtype

    def values(self, key: str, *size: int, scale: float = 1.0, sharded: bool = True) -> torch.Tensor:
        """Normal values named `key`: other ones on each rank if `sharded`, else the same on all."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{key}/{self.rank if sharded else 'all'}".encode()))
        drawn = torch.randn(*size, generator=generator) * scale
        return drawn.to(self.dtype).to(device=self.device, dtype=self.held)

    def input(self, key: str, *size: int, sharded: bool = True, grad: bool = True) -> torch.Tensor:
        return self.values(key, *size, sharded=sharded).requires_grad_(grad)

    def parameter(self, key: str, *size: int, fan_in: int | None = None, sharded: bool = True) -> nn.Parameter:
        """A weight at the scale of a trained one: its outputs are as large as its inputs."""
        scale = (fan_in or size[-1]) ** -0.5
        return nn.Parameter(self.values(key, *size, scale=scale, sharded=sharded))

    def fill(self, module: nn.Module) -> nn.Module:
        """Give every parameter of a not yet sharded module seeded values, the same on all ranks."""
        for name, parameter in list(module.named_parameters()):
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            values = self.values(name, *parameter.shape, scale=scale, sharded=False)
            if name.endswith("norm.weight"):
                values = values + 1
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(values))
        return module


@dataclass
class Built:
    """A program ready to call: `call(*args)`; `dynamic` lists (argument, dim) that are marked before compilation."""

    call: Callable[..., Any]
    args: tuple[torch.Tensor, ...]
    dynamic: tuple[tuple[int, int], ...] = ()

    def mark_dynamic(self) -> None:
        for argument, dim in self.dynamic:
            torch._dynamo.mark_dynamic(self.args[argument], dim)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.call.named_parameters()) if isinstance(self.call, nn.Module) else {}


@dataclass(frozen=True)
class Program:
    """One program and the numbers that its graphs must show at world size 4.

    expected: collectives and addressable collectives of each graph phase.
    extra: belongs to the family but not to the collectives of the recall table.
    numerics: storage dtypes that numerics tests run it in.
    """

    name: str
    family: str
    builder: Callable[[Setting], Built]
    expected: Expected
    context: Context = "grad"
    dtype: torch.dtype = torch.float32
    extra: bool = False
    numerics: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16))

    @property
    def backward(self) -> bool:
        return self.context in ("grad", "autocast")

    @property
    def addressable(self) -> int:
        return sum(reachable for counts in self.expected.values() for _, reachable in counts.values())

    def build(self, setting: Setting) -> Built:
        return self.builder(setting)

    def enter(self, setting: Setting) -> contextlib.AbstractContextManager[Any]:
        """The context that the program runs in; a truth knows no autocast."""
        if self.context == "no_grad":
            return torch.no_grad()
        if self.context == "inference_mode":
            return torch.inference_mode()
        if self.context == "autocast" and not setting.truth:
            return torch.autocast(setting.device, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def scalar_loss(output: Any) -> torch.Tensor:
    """Half the squared norm of what the program returned, in float64, so that the loss itself adds no rounding."""
    outputs = output if isinstance(output, tuple | list) else (output,)
    return sum((out.double().square().sum() * 0.5 for out in outputs if out.requires_grad), torch.zeros(()).double())
