"""The same exchange by torch and its all_to_all_single: what results are compared with, and times.

`dispatch` and `combine` send each token once to each rank, as the kernels do. `dispatch_copies` and `combine_copies` send a copy to
each expert, sorted by expert, as is usual where there is nothing but all_to_all_single.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .layout import layout_of, local_experts_of


@dataclass(frozen=True)
class Sent:
    """Rows that went to the ranks in their order: of which tokens, how many to each; and how many came from each."""

    tokens: torch.Tensor
    to: list[int]
    come: list[int]


@dataclass(frozen=True)
class Received:
    """As `exchange.Received`."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    src_idx: torch.Tensor
    tokens_per_expert: torch.Tensor
    sent: Sent


def _exchange(rows: torch.Tensor, out: list[int], come: list[int]) -> torch.Tensor:
    got = rows.new_empty(sum(come), *rows.shape[1:])
    dist.all_to_all_single(got, rows, come, out)
    return got


def _exchange_counts(counts: torch.Tensor) -> torch.Tensor:
    got = torch.empty_like(counts)
    dist.all_to_all_single(got, counts)
    return got


def dispatch(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, experts: int) -> Received:
    """Each token once to each rank that has one of its experts."""
    ranks = dist.get_world_size()
    layout = layout_of(topk_idx, experts, ranks)
    to_rank, tokens = layout.is_token_in_rank.T.nonzero(as_tuple=True)  # by rank, then by token
    counts = torch.stack([layout.tokens_per_rank, _exchange_counts(layout.tokens_per_rank)])
    per_expert = _exchange_counts(layout.tokens_per_expert).view(ranks, -1).sum(0)
    out, come = counts.tolist()
    local = local_experts_of(topk_idx[tokens], to_rank[:, None], experts, ranks)
    weights = torch.where(local >= 0, topk_weights[tokens], 0.0)
    return Received(
        _exchange(x[tokens], out, come),
        _exchange(local, out, come),
        _exchange(weights, out, come),
        _exchange(tokens.to(torch.int32), out, come),
        per_expert,
        Sent(tokens, out, come),
    )


def combine(y: torch.Tensor, sent: Sent, num_tokens: int) -> torch.Tensor:
    """Sums over ranks in float32, in their order."""
    total = torch.zeros(num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
    parts = zip(_exchange(y, sent.come, sent.to).split(sent.to), sent.tokens.split(sent.to), strict=True)
    for rows, tokens in parts:
        total[tokens] += rows.float()  # no token twice
    return total.to(y.dtype)


def dispatch_copies(x: torch.Tensor, topk_idx: torch.Tensor, experts: int) -> tuple[torch.Tensor, Sent]:
    """A copy of a token for each of its experts: rows by source rank, then by expert."""
    chosen = topk_idx.flatten()
    order = torch.sort(chosen, stable=True).indices[int((chosen < 0).sum()) :]
    tokens = order // topk_idx.shape[1]
    per_expert = torch.bincount(chosen[order], minlength=experts)
    per_rank = torch.stack([per_expert, _exchange_counts(per_expert)]).view(2, dist.get_world_size(), -1).sum(2)
    out, come = per_rank.tolist()
    return _exchange(x[tokens], out, come), Sent(tokens, out, come)


def combine_copies(y: torch.Tensor, sent: Sent, num_tokens: int) -> torch.Tensor:
    """Sums over experts."""
    total = torch.zeros(num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
    total.index_add_(0, sent.tokens, _exchange(y, sent.come, sent.to).float())
    return total.to(y.dtype)
