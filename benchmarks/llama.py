"""Llama 3 blocks for the model benchmark: parallelised by DTensor, and as plain local modules without communication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

Form = Literal["sequence", "replicated"]


@dataclass(frozen=True)
class Config:
    """form: "sequence": activations are sharded along the sequence between blocks; "replicated": every rank has all of them,
    and row-parallel layers end in an all_reduce, as in the tensor-parallel plans of Hugging Face models."""

    name: str
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    layers: int
    length: int
    form: Form = "sequence"
    batch: int = 1

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def configs(layers: int | None = None) -> list[Config]:
    small = (4096, 32, 8, 14336, layers or 4)
    large = (8192, 64, 8, 28672, layers or 2)
    return [
        Config("8B S8192", *small, 8192),
        Config("70B S8192", *large, 8192),
        Config("8B S2048", *small, 2048),
        Config("70B S2048", *large, 2048),
        Config("8B S8192 all_reduce", *small, 8192, "replicated"),
        Config("8B S2048 all_reduce", *small, 2048, "replicated"),
    ]


def tiny_configs() -> list[Config]:
    return [
        Config("tiny", 64, 4, 2, 128, 2, 32),
        Config("tiny all_reduce", 64, 4, 2, 128, 2, 32, "replicated"),
    ]


class Attention(nn.Module):
    """Causal grouped-query attention; the number of heads follows from the projections, which may be shards."""

    def __init__(self, config: Config, share: int = 1) -> None:
        super().__init__()
        d, kv = config.dim // share, config.kv_heads * config.head_dim // share
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, d, bias=False)
        self.wk = nn.Linear(config.dim, kv, bias=False)
        self.wv = nn.Linear(config.dim, kv, bias=False)
        self.wo = nn.Linear(d, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: Config, share: int = 1) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden // share, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden // share, bias=False)
        self.w2 = nn.Linear(config.hidden // share, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: Config, share: int = 1) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config, share)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.feed_forward = FeedForward(config, share)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Copies(torch.autograd.Function):
    """In place of a gather: `ranks` copies of the shard; backward, in place of a scatter, this rank's part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.repeat(1, ranks, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, : grad.shape[1] // ctx.ranks].clone(), None


class _Part(torch.autograd.Function):
    """In place of a scatter: this rank's part; backward, in place of a gather, `ranks` copies of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x[:, : x.shape[1] // ranks].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.repeat(1, ctx.ranks, 1), None


class LocalBlock(Block):
    """What one rank computes, with local copies of the right sizes in place of collectives: the roof of any overlap."""

    def __init__(self, config: Config, ranks: int) -> None:
        super().__init__(config, ranks)
        self.ranks = ranks if config.form == "sequence" else 1

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks == 1:  # an all_reduce leaves the size as it is
            return super().forward(x)
        x = x + _Part.apply(self.attention(_Copies.apply(self.attention_norm(x), self.ranks)), self.ranks)
        return x + _Part.apply(self.feed_forward(_Copies.apply(self.ffn_norm(x), self.ranks)), self.ranks)


def _initialise(module: nn.Module) -> None:
    """Weights of a trained model's size: outputs as large as inputs."""
    for parameter in module.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def build_local(config: Config, ranks: int, device: torch.device, dtype: torch.dtype) -> Stack:
    with torch.device(device):
        model = Stack([LocalBlock(config, ranks) for _ in range(config.layers)]).to(dtype)
    _initialise(model)
    return model


def build(config: Config, mesh: DeviceMesh, dtype: torch.dtype, held: torch.dtype | None = None) -> Stack:
    """The parallel model. Equal calls have equal weights: values of `dtype`, stored in `held` (for a truth) if given."""
    torch.manual_seed(7)  # the same on all ranks
    with torch.device(mesh.device_type):
        model = Stack([Block(config) for _ in range(config.layers)]).to(dtype)
    _initialise(model)
    model.to(held or dtype)
    for block in model.blocks:
        _parallelize(block, mesh, config.form)
    if config.form == "sequence":
        layouts = {"input_layouts": (Shard(1),), "desired_input_layouts": (Shard(1),), "use_local_output": False}
        parallelize_module(model, mesh, {"blocks.0": PrepareModuleInput(**layouts)})
    return model


def _parallelize(block: nn.Module, mesh: DeviceMesh, form: Form) -> None:
    plan: dict[str, Any] = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    plan |= {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
    if form == "sequence":
        gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        rows = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        plan |= {"attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel()}
        plan |= {"attention": gather, "feed_forward": gather}
    else:
        rows = RowwiseParallel()
    plan |= {"attention.wo": rows, "feed_forward.w2": rows}
    parallelize_module(block, mesh, plan)


def local_input(config: Config, ranks: int, rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """This rank's activations, from a seed: a part of the sequence, or the same whole on every rank."""
    torch.manual_seed(100 + (rank if config.form == "sequence" else 0))
    length = config.length // ranks if config.form == "sequence" else config.length
    return torch.randn(config.batch, length, config.dim, device=device, dtype=dtype).requires_grad_()


def loss_of(output: Tensor) -> Tensor:
    """A number of this rank's part of the output; its gradient is as large as the output."""
    local = output.to_local() if isinstance(output, DTensor) else output
    return local.float().pow(2).mean()
