"""Attention on gathered keys and values in many spellings; each rank has its queries and its part of the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from tests.programs.base import Built, Setting

from .compat import TORCH

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def gather(x: Tensor, dim: int) -> Tensor:
    """Differentiable all_gather along `dim`; torch before 2.13 cannot trace it along other dims than 0."""
    group = dist.group.WORLD
    assert group is not None
    if TORCH >= (2, 13):
        return funcol.all_gather_tensor_autograd(x.contiguous(), dim, group)
    gathered = funcol.all_gather_tensor_autograd(x.contiguous(), 0, group)
    gathered = gathered.flatten().view(
        gathered.shape
    )  # whose gradient is contiguous, as NCCL's reduce_scatter wants it
    return torch.cat(gathered.chunk(dist.get_world_size()), dim)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)


# Each takes q [B, heads, L, E], k and v [B, heads, s, E] of this rank.


def separate(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return sdpa(q, gather(k, 2), gather(v, 2), **how)


def stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = gather(torch.stack([k, v]), 3).unbind(0)
    return sdpa(q, k, v)


def joined_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = gather(torch.cat([k, v], 1), 2).chunk(2, 1)
    return sdpa(q, k, v)


def sequence_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[s, B, heads, E] as Megatron has it: the gather along dim 0 is in order as it comes."""
    k, v = (gather(t.permute(2, 0, 1, 3), 0).permute(1, 2, 0, 3) for t in (k, v))
    return sdpa(q, k, v)


def batch_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (gather(t.transpose(1, 2), 1).transpose(1, 2) for t in (k, v))
    return sdpa(q, k, v)


def unlike_layouts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, gather(k, 2), gather(v.permute(2, 0, 1, 3), 0).permute(1, 2, 0, 3))


def in_zigzag_order(x: Tensor) -> Tensor:
    pieces = x.split(x.shape[2] // (2 * dist.get_world_size()), 2)
    return torch.cat([*pieces[0::2], *reversed(pieces[1::2])], 2)


def zigzag(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """Rank r has pieces r and 2 R - 1 - r of the sequence; they are put in order."""
    return sdpa(q, in_zigzag_order(gather(k, 2)), in_zigzag_order(gather(v, 2)), **how)


def striped(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """Two stripes: rank r has pieces r and R + r."""

    def in_order(x: Tensor) -> Tensor:
        b, h, s, e = x.shape
        r = dist.get_world_size()
        return gather(x, 2).view(b, h, r, 2, s // 2, e).transpose(2, 3).reshape(b, h, r * s, e)

    return sdpa(q, in_order(k), in_order(v), **how)


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (gather(t, 2).repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return separate(q, k, v, scale=0.3)


def also_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The gathered values are read by something else, too."""
    k, v = gather(k, 2), gather(v, 2)
    return sdpa(q, k, v) * v.sin().mean()


@dataclass(frozen=True)
class Case:
    """rows: of queries, as a multiple of a rank's keys."""

    call: Attention
    heads: int = 4
    kv_heads: int = 4
    rows: float = 1.0
    fused_backward: bool = True

    def build(self, setting: Setting, batch: int = 2, keys: int = 8, width: int = 16, grad: bool = True) -> Built:
        q = setting.input("q", batch, self.heads, int(self.rows * keys), width, grad=grad)
        k, v = (setting.input(name, batch, self.kv_heads, keys, width, grad=grad) for name in "kv")
        return Built(self.call, (q, k, v))


_causal = partial(separate, is_causal=True)
CASES: dict[str, Case] = {
    "separate": Case(separate),
    "stacked": Case(stacked),
    "joined heads": Case(joined_heads),
    "sequence first": Case(sequence_first),
    "batch first": Case(batch_first),
    "unlike layouts": Case(unlike_layouts),
    "zigzag": Case(zigzag),
    "striped": Case(striped),
    "GQA": Case(separate, kv_heads=2),
    "MQA": Case(separate, kv_heads=1),
    "repeated heads": Case(repeated_heads, kv_heads=2, fused_backward=False),
    "scaled": Case(scaled),
    "also read": Case(also_read, fused_backward=False),
    "few queries": Case(separate, rows=0.25),
    "causal": Case(_causal),
    "causal, few queries": Case(_causal, rows=0.5),
    "causal, many queries": Case(_causal, rows=1.75),
    "causal, all queries": Case(_causal, rows=5.0),
    "causal zigzag": Case(partial(zigzag, is_causal=True), rows=2.5),
    "causal striped": Case(partial(striped, is_causal=True), rows=2.5),
}
