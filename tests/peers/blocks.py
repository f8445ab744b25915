"""Attention blocks around the exchange code of sequence-parallel packages, as their users write them.

The packages must have been loaded (packages.py) in the process that builds a block; tests may name blocks without them. The local
attention is torch's SDPA everywhere, where a user on GPUs may call flash-attn.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs import Built, Program, Setting
from tests.programs.attention import BATCH, DIM, HEAD_DIM, HEADS, LENGTH, Checkpointed, Projected
from tests.programs.base import Context

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k, v [b, s, heads, d]; the result's heads may be flat


def local(q: Tensor, k: Tensor, v: Tensor, *_: Any, causal: bool = False, **__: Any) -> Tensor:
    """SDPA of [b, s, heads, d]. What flash-attn would be given besides has its default here."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def yunchang_ulysses(setting: Setting, kv_heads: int, causal: bool) -> Attend:
    yunchang, kernels = importlib.import_module("yunchang"), importlib.import_module("yunchang.kernels")
    module = yunchang.UlyssesAttention(dist.group.WORLD, attn_type=kernels.AttnType.TORCH_FLASH)
    module.attn_fn = local
    return partial(module, causal=causal)


@cache
def _usp_groups() -> Any:
    """yunchang's groups, as its users make them: all ranks exchange, rings have one rank."""
    yunchang = importlib.import_module("yunchang")
    yunchang.set_seq_parallel_pg(dist.get_world_size(), 1, dist.get_rank(), dist.get_world_size())
    return yunchang


def yunchang_usp(setting: Setting, kv_heads: int, causal: bool) -> Attend:
    module = _usp_groups().LongContextAttention()
    module.ring_attn_fn = local
    return partial(module, causal=causal)


def yunchang_packed(setting: Setting, kv_heads: int, causal: bool) -> Attend:
    """One exchange of q, k and v [b, s, 3, heads, d]."""
    module = _usp_groups().LongContextAttentionQKVPacked()
    module.ring_attn_fn = lambda qkv, **how: local(*qkv.unbind(2), **how)
    return lambda q, k, v: module(torch.stack([q, k, v], 2), causal=causal)


def deepspeed_batch_first(setting: Setting, kv_heads: int, causal: bool) -> Attend:
    layer = importlib.import_module("deepspeed.sequence.layer")
    module = layer.DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return partial(module, batch_dim_idx=0, causal=causal)


def deepspeed_sequence_first(setting: Setting, kv_heads: int, causal: bool) -> Attend:
    """[s, b, heads, d], as in Megatron-DeepSpeed."""
    layer = importlib.import_module("deepspeed.sequence.layer")

    def attend(*heads: Tensor) -> Tensor:
        return local(*(t.transpose(0, 1) for t in heads), causal=causal).transpose(0, 1)

    module = layer.DistributedAttention(attend, dist.group.WORLD, scatter_idx=2, gather_idx=0)
    return lambda *heads: module(*(t.transpose(0, 1) for t in heads), batch_dim_idx=1).transpose(0, 1)


def deepspeed_opaque(setting: Setting, kv_heads: int, causal: bool) -> Attend:
    """The module for Hugging Face models, whose exchange is the op `deepspeed::dim_zero_all_to_all`."""
    ulysses_sp = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
        return local(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal), None

    with mock.patch(
        "importlib.metadata.version", return_value="4.51.3"
    ):  # it asks for transformers and uses none of it
        module = ulysses_sp.UlyssesSPAttentionHF(
            attend,
            batch_size=BATCH,
            attn_head_count=HEADS,
            attn_head_size=HEAD_DIM,
            kv_head_count=kv_heads,
            num_hidden_layers=1,
            process_group=dist.group.WORLD,
            local_seq_length=LENGTH,
            global_seq_length=LENGTH * setting.world_size,
        )
    positions = (torch.arange(LENGTH) + setting.rank * LENGTH).expand(BATCH, LENGTH).contiguous()
    owner = nn.Module()

    def run(*heads: Tensor) -> Tensor:
        out: Tensor = module(owner, *(t.transpose(1, 2) for t in heads), None, position_ids=positions)[0]
        return out

    return run


class Block(Projected):
    """Projections around a package's attention."""

    def __init__(self, setting: Setting, make: Callable[..., Attend], kv_heads: int, causal: bool) -> None:
        super().__init__(setting, kv_heads)
        self.attend = make(setting, kv_heads, causal)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.attend(*self.project(x)).flatten(2), self.wo)


def _build(setting: Setting, make: Callable[..., Attend], kv_heads: int, causal: bool, reentrant: bool | None) -> Built:
    module: nn.Module = Block(setting, make, kv_heads, causal)
    if reentrant is not None:
        module = Checkpointed(module, reentrant)
    return Built(module, (setting.input("x", BATCH, LENGTH, DIM),))


def _program(
    name: str,
    make: Callable[..., Attend],
    exchanges: int,
    kv_heads: int = HEADS,
    causal: bool = True,
    context: Context = "grad",
    reentrant: bool | None = None,
) -> Program:
    """A block with `exchanges` in its forward, as many in its backward, and those of the forward again if it is recomputed."""
    builder = partial(_build, make=make, kv_heads=kv_heads, causal=causal, reentrant=reentrant)
    op = "dim_zero_all_to_all" if make is deepspeed_opaque else "all_to_all"
    counts = {op: (exchanges, exchanges)}
    back = {op: (2 * exchanges, 2 * exchanges)} if reentrant is not None else counts
    expected = {"forward": counts, "backward": back} if context == "grad" else {"inference": counts}
    return Program(name, "packages", builder, expected, context=context, numerics=(torch.float32,))  # type: ignore[arg-type]


PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        _program("yunchang", yunchang_ulysses, 4),
        _program("yunchang, full, GQA", yunchang_ulysses, 4, kv_heads=4, causal=False),
        _program("yunchang, no_grad", yunchang_ulysses, 4, context="no_grad"),
        _program("yunchang, checkpoint", yunchang_ulysses, 4, reentrant=False),
        _program("yunchang, reentrant checkpoint", yunchang_ulysses, 4, reentrant=True),
        _program("yunchang USP", yunchang_usp, 4),
        _program("yunchang, packed", yunchang_packed, 2),
        _program("yunchang, packed, full, inference_mode", yunchang_packed, 2, causal=False, context="inference_mode"),
        _program("DeepSpeed", deepspeed_batch_first, 4),
        _program("DeepSpeed, full, GQA", deepspeed_batch_first, 4, kv_heads=2, causal=False),
        _program("DeepSpeed, sequence first", deepspeed_sequence_first, 4),
        _program("DeepSpeed, inference_mode", deepspeed_batch_first, 4, context="inference_mode"),
        _program("DeepSpeed, checkpoint", deepspeed_batch_first, 4, reentrant=False),
        _program("DeepSpeed, reentrant checkpoint", deepspeed_batch_first, 4, reentrant=True),
        _program("DeepSpeed, opaque op", deepspeed_opaque, 4),
        _program("DeepSpeed, opaque op, MQA", deepspeed_opaque, 4, kv_heads=1),
        _program("DeepSpeed, opaque op, full, no_grad", deepspeed_opaque, 4, causal=False, context="no_grad"),
        _program("DeepSpeed, opaque op, checkpoint", deepspeed_opaque, 4, reentrant=False),
    )
}
