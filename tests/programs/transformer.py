"""A small Llama and its tensor-parallel plans, as DTensor users write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from .base import FFN_DIM, HEADS, MODEL_DIM, VOCAB


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Attention(nn.Module):
    """Causal self-attention with one projection for q, k and v (`fused`) or one for each.

    The number of heads is read off the projection's output, which is what makes the module work on a shard of them.
    """

    def __init__(self, fused: bool, bias: bool) -> None:
        super().__init__()
        self.head_dim = MODEL_DIM // HEADS
        self.fused = fused
        if fused:
            self.wqkv = nn.Linear(MODEL_DIM, 3 * MODEL_DIM, bias=bias)
        else:
            self.wq = nn.Linear(MODEL_DIM, MODEL_DIM, bias=bias)
            self.wk = nn.Linear(MODEL_DIM, MODEL_DIM, bias=bias)
            self.wv = nn.Linear(MODEL_DIM, MODEL_DIM, bias=bias)
        self.wo = nn.Linear(MODEL_DIM, MODEL_DIM, bias=bias)

    def forward(self, x: torch.Tensor, positions: None = None) -> torch.Tensor:
        batch, length, _ = x.shape
        if self.fused:
            heads = self.wqkv(x).view(batch, length, -1, 3, self.head_dim).unbind(3)
        else:
            heads = tuple(w(x).view(batch, length, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k, v = (head.transpose(1, 2) for head in heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).contiguous().view(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(MODEL_DIM, FFN_DIM, bias=bias)
        self.w2 = nn.Linear(FFN_DIM, MODEL_DIM, bias=bias)
        self.w3 = nn.Linear(MODEL_DIM, FFN_DIM, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, fused: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(MODEL_DIM)
        self.attention = Attention(fused, bias)
        self.ffn_norm = RMSNorm(MODEL_DIM)
        self.feed_forward = FeedForward(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), None)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, MODEL_DIM)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = RMSNorm(MODEL_DIM)
        self.output = nn.Linear(MODEL_DIM, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def parallelize_block(block: Block, mesh: DeviceMesh, sequence_parallel: bool = True) -> Block:
    """Split heads and the hidden dim over the mesh, and with sequence parallelism the residual stream along dim 1."""
    projections = ["wqkv"] if block.attention.fused else ["wq", "wk", "wv"]
    plan: dict[str, ParallelStyle] = {f"attention.{name}": ColwiseParallel() for name in projections}
    plan["feed_forward.w1"] = ColwiseParallel()
    plan["feed_forward.w3"] = ColwiseParallel()
    if sequence_parallel:
        rows = RowwiseParallel(output_layouts=Shard(1))
        plan["attention_norm"] = SequenceParallel()
        plan["ffn_norm"] = SequenceParallel()
        plan["attention"] = PrepareModuleInput(
            input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
        )
        plan["feed_forward"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    else:
        rows = RowwiseParallel()
    plan["attention.wo"] = rows
    plan["feed_forward.w2"] = rows
    parallelize_module(block, mesh, plan)
    return block


def parallelize_llama(model: Llama, mesh: DeviceMesh) -> Llama:
    """Sequence-parallel layers between a vocabulary-parallel embedding and head."""
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    for layer in model.layers:
        assert isinstance(layer, Block)
        parallelize_block(layer, mesh)
    return model
