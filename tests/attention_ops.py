"""The attention ops that torch has for GPUs alone, on CPU tensors, so that what is made of them can be computed without a GPU.

`install()` registers them for this process. They compute in float64, forward and backward, and read their operands as the GPU kernels
do: where those do not ask for a stride, neither do these, so that a slice that is no tensor of its own gives wrong numbers here too.
Contents that torch leaves uninitialised differ from call to call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Optional = Tensor | None
_calls = itertools.count(1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, float]:
    """Scaled products `[B, heads, S, S of the keys]` in float64; key heads are shared by groups of query heads."""
    factor = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ keys.transpose(-1, -2) * factor
    if causal:
        kept = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~kept, -math.inf)
    return scores, factor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output and logsumexp `[B, heads, S]` in float64."""
    scores, _ = _scores(q, k, causal, scale)
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.softmax(scores, -1) @ values, torch.logsumexp(scores, -1)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From the output and the logsumexp `[B, heads, S]`, as FlashAttention computes them (Dao 2023, algorithm 2), in float64."""
    scores, factor = _scores(q, k, causal, scale)
    shared = q.shape[1] // k.shape[1]
    weights = torch.exp(scores - lse.double().unsqueeze(-1))
    keys, values = (t.double().repeat_interleave(shared, 1) for t in (k, v))
    grad = grad.double()
    rows = (grad * out.double()).sum(-1, keepdim=True)
    inner = weights * (grad @ values.transpose(-1, -2) - rows) * factor
    sums = [
        t.unflatten(1, (-1, shared)).sum(2)
        for t in (inner.transpose(-1, -2) @ q.double(), weights.transpose(-1, -2) @ grad)
    ]
    return inner @ keys, sums[0], sums[1]


def _like(x: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(value)


def _by_rows(x: Tensor, value: Tensor) -> Tensor:
    """In the memory order of `[B, S, heads, D]`."""
    return value.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _dense(x: Tensor) -> Tensor:
    """What a kernel reads that takes `x` to be contiguous."""
    strides = [math.prod(x.shape[dim + 1 :]) for dim in range(x.dim())]
    return x.as_strided(x.shape, strides)


def _rows_dense(x: Tensor) -> Tensor:
    """What a kernel reads of `[B, heads, S, D]` that takes its rows to be heads * D elements apart, whatever their stride is."""
    return x.as_strided(x.shape, (x.stride(0), x.stride(1), x.shape[1] * x.shape[3], 1))


def _uninitialised(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.full(shape, next(_calls), dtype=torch.int64).to(dtype)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert not dropout_p and not return_debug_mask
    out, lse = attention(query, key, value, is_causal, scale)
    seed, unused = _uninitialised(2, dtype=torch.uint64), _uninitialised(dtype=torch.uint64)
    lengths = query.shape[2], key.shape[2]
    return _like(query, out), lse.float(), None, None, *lengths, seed, unused, query.new_empty(0)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Optional,
    cum_seq_k: Optional,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    assert (max_q, max_k) == (query.shape[2], key.shape[2]) and cum_seq_q is None and cum_seq_k is None
    assert philox_seed.shape == (2,) and philox_offset.shape == () and not dropout_p
    found = gradients(grad_out, query, key, value, out, _dense(logsumexp), is_causal, scale)
    return tuple(_like(x, grad) for x, grad in zip((query, key, value), found, strict=True))


def _cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Optional,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert attn_bias is None and not dropout_p and not return_debug_mask
    out, lse = attention(query, key, value, is_causal, scale)
    lengths = query.shape[2], key.shape[2]
    kept = lse.float().unsqueeze(-1) if compute_log_sumexp else None
    return _like(query, out), kept, None, None, *lengths, _uninitialised(), _uninitialised(), None


def _cudnn_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Optional,
    cum_seq_q: Optional,
    cum_seq_k: Optional,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    assert attn_bias is None and logsumexp.shape[3:] == (1,)
    lse = logsumexp.squeeze(-1)
    seeds = _uninitialised(2, dtype=torch.uint64), philox_offset
    given = (grad_out, query, key, value, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal)
    return _flash_backward(*given, *seeds, scale=scale)


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Optional,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert attn_bias is None and not dropout_p and query.shape[1] == key.shape[1]
    out, lse = attention(query, key, value, is_causal, scale)
    padded = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32 if compute_log_sumexp else 0), math.inf).float()
    if compute_log_sumexp:
        padded[..., : lse.shape[2]] = lse
    return _by_rows(query, out), padded, _uninitialised(), _uninitialised()


def _efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Optional,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: Sequence[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Optional, ...]:
    assert attn_bias is None and not dropout_p and len(grad_input_mask) == 4 and not grad_input_mask[3]
    assert logsumexp.shape[2] % 32 == 0 and philox_seed.shape == philox_offset.shape == ()
    lse = logsumexp[..., : query.shape[2]]
    found = gradients(grad_out_, query, key, value, _rows_dense(out), lse, is_causal, scale)
    return *(_by_rows(query, grad) for grad in found), None


OPS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}


@lru_cache(maxsize=1)
def install() -> torch.library.Library:
    """Register the ops for CPU tensors, for as long as this process lives."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in OPS.items():
        library.impl(name, function, "CPU")
    return library


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """As scaled_dot_product_attention calls it on GPUs: the scale is given."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=q.shape[-1] ** -0.5)[0]


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    grad = torch.is_grad_enabled() and q.requires_grad
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, grad, 0.0, causal)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    grad = torch.is_grad_enabled() and q.requires_grad
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, grad, 0.0, causal)[0]


FORMS = {"flash": flash, "cudnn": cudnn, "efficient": efficient}
NAMES = {"flash": "flash attention", "cudnn": "cuDNN attention", "efficient": "memory-efficient attention"}
GROUPED = ("flash", "cudnn")  # take fewer key heads than query heads
