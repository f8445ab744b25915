"""Sequence parallelism around attention: Ulysses (exchanges trade sequence for heads) and context parallelism (gathered keys, values).

The libraries' exchanges are re-created by what they move where: an exchange to heads takes `[b, s, H, d]` of a rank's part of the
sequence to `[b, S, H/P, d]`, an exchange to the sequence takes it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..compat import TORCH
from .base import Built, Counts, Expected, Program, Setting

LENGTH = 8  # of a rank's part of the sequence
BATCH = 2
HEADS = 8
HEAD_DIM = 16
DIM = HEADS * HEAD_DIM


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _swap_blocks(x: Tensor) -> Tensor:
    """all_to_all_single of equal blocks along dim 0, in place over c10d."""
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


class _Differentiable(torch.autograd.Function):
    """An exchange whose gradient is the exchange back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.there, ctx.back = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Differentiable.apply(grad, ctx.back, ctx.there), None, None


def _deepspeed_heads(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    sent = x.reshape(b, s, p, h // p, d).contiguous().permute(2, 0, 1, 3, 4).contiguous()
    return _swap_blocks(sent).permute(1, 0, 2, 3, 4).contiguous().reshape(b, p * s, h // p, d)


def _deepspeed_sequence(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    sent = x.reshape(b, p, s // p, h, d).contiguous().permute(1, 0, 2, 3, 4).contiguous()
    return _swap_blocks(sent).permute(1, 2, 0, 3, 4).contiguous().reshape(b, s // p, p * h, d)


def _yunchang_heads(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    got = _swap_blocks(x.reshape(b, s, p, h // p, d).transpose(0, 2).contiguous())
    return got.reshape(p * s, b, h // p, d).transpose(0, 1).contiguous().reshape(b, p * s, h // p, d)


def _yunchang_sequence(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    sent = x.reshape(b, p, s // p, h, d).transpose(0, 3).transpose(0, 1).contiguous()
    got = _swap_blocks(sent.reshape(p, h, s // p, b, d)).reshape(p * h, s // p, b, d)
    return got.transpose(0, 2).contiguous().reshape(b, s // p, p * h, d)


def _functional_heads(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    sent = x.reshape(b, s, p, h // p, d).permute(2, 1, 0, 3, 4).contiguous()
    got = funcol.all_to_all_single_autograd(sent, None, None, _world())
    return got.reshape(p * s, b, h // p, d).permute(1, 0, 2, 3).contiguous()


def _functional_sequence(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    sent = x.reshape(b, p, s // p, h, d).permute(1, 3, 0, 2, 4).contiguous()
    got = funcol.all_to_all_single_autograd(sent, None, None, _world())
    return got.reshape(p * h, b, s // p, d).permute(1, 2, 0, 3).contiguous()


def _reshard(x: Tensor, gather_dim: int, shard_dim: int) -> Tensor:
    """What DTensor's redistribute from Shard(gather_dim) to Shard(shard_dim) calls for GPUs; for CPU ranks it gathers instead."""
    return torch.ops._dtensor.shard_dim_alltoall(x.contiguous(), gather_dim, shard_dim, _world().group_name)


if not hasattr(
    torch.ops.deepspeed, "dim_zero_all_to_all"
):  # the op that newer DeepSpeed registers, unless it is installed

    @torch.library.custom_op("deepspeed::dim_zero_all_to_all", mutates_args=())
    def _dim_zero(input: Tensor, group_name: str) -> Tensor:
        out = torch.empty_like(input)
        dist.all_to_all_single(out, input, group=dist.distributed_c10d._resolve_process_group(group_name))  # type: ignore[arg-type, unused-ignore]
        return out

    _dim_zero.register_fake(lambda input, group_name: torch.empty_like(input))
    _dim_zero.register_autograd(
        lambda ctx, grad: (torch.ops.deepspeed.dim_zero_all_to_all(grad.contiguous(), ctx.group_name), None),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "group_name", inputs[1]),
    )


def _opaque_heads(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    sent = x.view(b, s, p, h // p, d).permute(2, 0, 1, 3, 4).contiguous()
    got = torch.ops.deepspeed.dim_zero_all_to_all(sent, _world().group_name)
    return got.permute(1, 0, 2, 3, 4).reshape(b, p * s, h // p, d)


def _opaque_sequence(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    sent = x.reshape(b, p, s // p, h, d).permute(1, 0, 2, 3, 4).contiguous()
    got = torch.ops.deepspeed.dim_zero_all_to_all(sent, _world().group_name)
    return got.permute(1, 2, 0, 3, 4).reshape(b, s // p, p * h, d)


@dataclass(frozen=True)
class _Spelling:
    heads: Callable[[Tensor], Tensor]
    sequence: Callable[[Tensor], Tensor]


def _by_function(heads: Callable[[Tensor], Tensor], sequence: Callable[[Tensor], Tensor]) -> _Spelling:
    return _Spelling(
        lambda x: _Differentiable.apply(x, heads, sequence),  # type: ignore[no-any-return]
        lambda x: _Differentiable.apply(x, sequence, heads),  # type: ignore[no-any-return]
    )


SPELLINGS = {
    "deepspeed": _by_function(_deepspeed_heads, _deepspeed_sequence),
    "yunchang": _by_function(_yunchang_heads, _yunchang_sequence),
    "functional": _Spelling(_functional_heads, _functional_sequence),
    "dtensor": _by_function(partial(_reshard, gather_dim=1, shard_dim=2), partial(_reshard, gather_dim=2, shard_dim=1)),
    "opaque": _Spelling(_opaque_heads, _opaque_sequence),
}


class Projected(nn.Module):
    """One projection for q, k and v, attention in between, one for the output."""

    def __init__(self, setting: Setting, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.wqkv = setting.parameter("wqkv", (HEADS + 2 * kv_heads) * HEAD_DIM, DIM, sharded=False)
        self.wo = setting.parameter("wo", DIM, DIM, sharded=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: [b, s, heads, d]."""
        b, s, _ = x.shape
        heads = F.linear(x, self.wqkv).view(b, s, -1, HEAD_DIM)
        q, k, v = heads.split([HEADS, self.kv_heads, self.kv_heads], 2)
        return q, k, v


class Ulysses(Projected):
    def __init__(self, setting: Setting, spelling: str, causal: bool = True, kv_heads: int = HEADS) -> None:
        super().__init__(setting, kv_heads)
        self.exchange = SPELLINGS[spelling]
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        p = dist.get_world_size()
        if self.kv_heads < p:  # fewer heads than ranks: they are repeated before the exchange
            k, v = (t.repeat_interleave(p // self.kv_heads, 2) for t in (k, v))
        q, k, v = (self.exchange.heads(t).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.kv_heads < HEADS)
        return F.linear(self.exchange.sequence(out.transpose(1, 2)).flatten(2), self.wo)


class UlyssesSeparate(Ulysses):
    """A projection with a bias for each of q, k and v."""

    def __init__(self, setting: Setting, spelling: str) -> None:
        super().__init__(setting, spelling, causal=False)
        del self.wqkv
        self.projections = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        setting.fill(self.projections)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = x.shape
        q, k, v = (projection(x).view(b, s, HEADS, HEAD_DIM) for projection in self.projections)
        return q, k, v


class UlyssesFused(Projected):
    """One exchange for q, k and v together: `stacked` after the projection, or as the projection lays them out."""

    def __init__(self, setting: Setting, spelling: str, stacked: bool = False, causal: bool = False) -> None:
        super().__init__(setting, HEADS)
        self.exchange = SPELLINGS[spelling]
        self.stacked = stacked
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        p = dist.get_world_size()
        if self.stacked:
            qkv = torch.stack([t.sin() for t in self.project(x)], 2)  # made apart, as with rotary embeddings
        else:
            qkv = F.linear(x, self.wqkv).view(b, s, 3, HEADS, HEAD_DIM)
        by_rank = qkv.view(b, s, 3, p, HEADS // p, HEAD_DIM).transpose(2, 3).reshape(b, s, 3 * HEADS, HEAD_DIM)
        q, k, v = self.exchange.heads(by_rank).view(b, p * s, 3, HEADS // p, HEAD_DIM).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return F.linear(self.exchange.sequence(out.transpose(1, 2)).flatten(2), self.wo)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


def _gather(x: Tensor, dim: int) -> Tensor:
    """Differentiable all_gather along `dim`; torch before 2.13 cannot trace it along other dims than 0."""
    if TORCH >= (2, 13):
        return funcol.all_gather_tensor_autograd(x, dim, _world())
    return torch.cat(funcol.all_gather_tensor_autograd(x, 0, _world()).chunk(dist.get_world_size()), dim)


class ContextParallel(Projected):
    """Every rank keeps its queries and gathers all keys and values along the sequence."""

    def __init__(self, setting: Setting, stacked: bool = False, kv_heads: int = HEADS) -> None:
        super().__init__(setting, kv_heads)
        self.stacked = stacked

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if self.stacked:
            k, v = _gather(torch.stack([k, v]), 3).unbind(0)
        else:
            k, v = (_gather(t.contiguous(), 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads < HEADS)
        return F.linear(out.transpose(1, 2).reshape(b, s, DIM), self.wo)


class ContextParallelZigZag(Projected):
    """Causal and balanced: of 2P pieces of the sequence rank r holds pieces r and 2P - 1 - r.

    The gathered pieces are put in order, and the mask is that of this rank's rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        p, half = dist.get_world_size(), s // 2
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        k, v = (self.in_order(_gather(t.contiguous(), 2), p, half) for t in (k, v))
        rank = dist.get_rank()
        rows = torch.arange(half, device=x.device)
        rows = torch.cat([rows + rank * half, rows + (2 * p - 1 - rank) * half])
        mask = rows[:, None] >= torch.arange(p * s, device=x.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.linear(out.transpose(1, 2).reshape(b, s, DIM), self.wo)

    @staticmethod
    def in_order(x: Tensor, ranks: int, half: int) -> Tensor:
        pieces = x.split(half, 2)
        return torch.cat([*pieces[0::2], *reversed(pieces[1::2])], 2)


def _build(
    setting: Setting, make: Callable[..., nn.Module], batch: int = BATCH, grad: bool = True, **how: Any
) -> Built:
    x = setting.input("x", batch, LENGTH * setting.stretch, DIM, grad=grad)
    return Built(make(setting, **how), (x,))


def _checkpointed(setting: Setting, use_reentrant: bool = False, **how: Any) -> Built:
    return Built(Checkpointed(Ulysses(setting, **how), use_reentrant), (setting.input("x", BATCH, LENGTH, DIM),))


def _dynamic(setting: Setting, make: Callable[..., nn.Module], **how: Any) -> Built:
    built = _build(setting, make, **how)
    return Built(built.call, built.args, ((0, 1),))


_FLOAT32 = (torch.float32,)
_BOTH = (torch.float32, torch.bfloat16)
_ULYSSES = "Ulysses"
_CP = "context parallel"


def _exchanges(there: int, op: str = "all_to_all", back: int = 1) -> Counts:
    return {op: (there + back, there + back)}


_SEPARATE: Expected = {"forward": _exchanges(3), "backward": _exchanges(3)}
_FUSED: Expected = {"forward": _exchanges(1), "backward": _exchanges(1)}
_RESHARD: Expected = {
    "forward": _exchanges(3, "shard_dim_alltoall"),
    "backward": _exchanges(3, "shard_dim_alltoall"),
}
_OPAQUE: Expected = {"forward": _exchanges(3, "dim_zero_all_to_all"), "backward": _exchanges(3, "dim_zero_all_to_all")}
_RECOMPUTED: Expected = {"forward": _exchanges(3), "backward": {"all_to_all": (8, 8)}}
_TWO: Expected = {"forward": {"all_gather": (2, 2)}, "backward": {"reduce_scatter": (2, 2)}}
_ONE: Expected = {"forward": {"all_gather": (1, 1)}, "backward": {"reduce_scatter": (1, 1)}}


def _ulysses(name: str, spelling: str, expected: Expected = _SEPARATE, extra: bool = False, **how: Any) -> Program:
    builder = partial(_build, make=Ulysses, spelling=spelling, **how)
    return Program(name, _ULYSSES, builder, expected, extra=extra, numerics=_FLOAT32 if extra else _BOTH)


PROGRAMS: tuple[Program, ...] = (
    _ulysses("d1_ulysses_deepspeed", "deepspeed"),
    _ulysses("d2_ulysses_yunchang", "yunchang"),
    _ulysses("d3_ulysses_functional", "functional"),
    Program("d5_ulysses_fusedqkv", _ULYSSES, partial(_build, make=UlyssesFused, spelling="deepspeed"), _FUSED),
    _ulysses("d6_ulysses_dtensor", "dtensor", _RESHARD),
    Program(
        "d7_ulysses_yunchang_nograd",
        _ULYSSES,
        partial(_build, make=Ulysses, spelling="yunchang", grad=False),
        {"inference": _exchanges(3)},
        context="no_grad",
    ),
    _ulysses("d8_ulysses_opaque", "opaque", _OPAQUE, extra=True),
    _ulysses("d1_ulysses_deepspeed_full_B1", "deepspeed", extra=True, causal=False, batch=1),
    _ulysses("d2_ulysses_yunchang_gqa", "yunchang", extra=True, kv_heads=4),
    _ulysses("d3_ulysses_functional_mqa", "functional", extra=True, kv_heads=1),
    Program(
        "d5_ulysses_fusedqkv_stacked",
        _ULYSSES,
        partial(_build, make=UlyssesFused, spelling="yunchang", stacked=True),
        _FUSED,
        extra=True,
        numerics=_FLOAT32,
    ),
    Program(
        "d5_ulysses_fusedqkv_causal_nograd",
        _ULYSSES,
        partial(_build, make=UlyssesFused, spelling="yunchang", causal=True, grad=False),
        {"inference": _exchanges(1)},
        context="no_grad",
        extra=True,
        numerics=_FLOAT32,
    ),
    Program(
        "d7_ulysses_deepspeed_full_gqa_inference",
        _ULYSSES,
        partial(_build, make=Ulysses, spelling="deepspeed", causal=False, kv_heads=4, grad=False),
        {"inference": _exchanges(3)},
        context="inference_mode",
        extra=True,
        numerics=_FLOAT32,
    ),
    Program(
        "d9_ulysses_checkpoint",
        _ULYSSES,
        partial(_checkpointed, spelling="yunchang"),
        _RECOMPUTED,
        extra=True,
        numerics=_FLOAT32,
    ),
    Program(
        "d9_ulysses_checkpoint_reentrant",
        _ULYSSES,
        partial(_checkpointed, spelling="yunchang", use_reentrant=True),
        _RECOMPUTED,
        extra=True,
        numerics=_FLOAT32,
    ),
    Program(
        "d10_ulysses_dynamic",
        _ULYSSES,
        partial(_dynamic, make=Ulysses, spelling="deepspeed"),
        _SEPARATE,
        extra=True,
        numerics=_FLOAT32,
    ),
    Program(
        "d11_ulysses_separate",
        _ULYSSES,
        partial(_build, make=UlyssesSeparate, spelling="functional"),
        _SEPARATE,
        extra=True,
        numerics=_FLOAT32,
    ),
    Program("h1_cp_kv_separate", _CP, partial(_build, make=ContextParallel), _TWO, numerics=_BOTH),
    Program("h1_cp_kv_stacked", _CP, partial(_build, make=ContextParallel, stacked=True), _ONE, numerics=_BOTH),
    Program("h1_cp_kv_separate_B1", _CP, partial(_build, make=ContextParallel, batch=1), _TWO, numerics=_BOTH),
    Program("h2_cp_gqa", _CP, partial(_build, make=ContextParallel, kv_heads=2), _TWO, extra=True, numerics=_FLOAT32),
    Program(
        "h3_cp_zigzag", _CP, partial(_build, make=ContextParallelZigZag, kv_heads=HEADS), _TWO, extra=True, numerics=()
    ),
)
# Programs that train through an autograd.Function over the in-place collective.
IN_PLACE = tuple(
    program.name
    for program in PROGRAMS
    if program.backward and program.name.startswith(("d1_", "d2_", "d5_", "d9_", "d10_"))
)
