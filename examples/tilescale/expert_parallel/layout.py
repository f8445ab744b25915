"""Who sends what to whom, as small pure functions: what the kernels compute, in words of torch, and what the host makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


class ExchangeRefused(ValueError):
    """What the ranks together want to send cannot be sent, and nothing was. Every rank raises it, with the same words."""


@dataclass(frozen=True)
class Layout:
    """What a rank sends.

    Attributes:
        is_token_in_rank: bool `[tokens, ranks]`, whether one of the token's experts is at that rank.
        tokens_per_rank: int32 `[ranks]`, how many tokens go to it: once each, however many of its experts they have.
        tokens_per_expert: int32 `[experts]`, how many entries of topk_idx name it.
    """

    is_token_in_rank: torch.Tensor
    tokens_per_rank: torch.Tensor
    tokens_per_expert: torch.Tensor


def layout_of(topk_idx: torch.Tensor, experts: int, ranks: int) -> Layout:
    """The layout of `topk_idx`, int64 `[tokens, topk]`, each an expert or -1 for none. Rank r has as many experts as the others, from
    r * experts / ranks on."""
    chosen = topk_idx.flatten()
    per_expert = torch.bincount(chosen[chosen >= 0], minlength=experts)
    at_rank = torch.where(topk_idx >= 0, topk_idx // (experts // ranks), -1)
    in_rank = (at_rank[:, :, None] == torch.arange(ranks, device=topk_idx.device)).any(1)
    return Layout(in_rank, in_rank.sum(0, dtype=torch.int32), per_expert.to(torch.int32))


def local_experts_of(topk_idx: torch.Tensor, rank: int, experts: int, ranks: int) -> torch.Tensor:
    """`topk_idx` as `rank` numbers its experts, from 0; -1 for those of other ranks."""
    local = topk_idx - rank * (experts // ranks)
    return torch.where((local >= 0) & (local < experts // ranks), local, -1)


def aligned(counts: Sequence[int], alignment: int) -> list[int]:
    """Each count rounded up to a multiple of `alignment`, as grouped matmuls want them."""
    return [-(-count // alignment) * alignment for count in counts]


def refusal(rows: Sequence[int], wrong: Sequence[int], room: int, experts: int) -> str:
    """Why an exchange cannot be made, "" if it can. Of all ranks alike, so that all say the same.

    Args:
        rows: per rank, how many it would receive.
        wrong: per rank, how many entries of its topk_idx are no expert.
        room: rows that each rank has room for.
        experts: of all ranks.
    """
    for rank, count in enumerate(wrong):
        if count:
            return f"{count} entries of topk_idx on rank {rank} are neither -1 nor an expert, 0 to {experts - 1}"
    rank = max(range(len(rows)), key=rows.__getitem__)
    if rows[rank] > room:
        return f"rank {rank} would receive {rows[rank]} rows and has room for {room}: make the exchange with a larger max_recv_tokens"
    return ""


def check_sizes(ranks: int, experts: int, topk: int, row_bytes: int, room: int, blocks: int, sms: int) -> None:
    """Whether an exchange can be made with these numbers.

    Raises:
        ValueError: it cannot; the message says what to change.
    """
    if experts < ranks or experts % ranks:
        raise ValueError(f"{experts} experts on {ranks} ranks: make it a multiple, so that each rank has as many")
    if topk < 1 or room < 1:
        raise ValueError(f"topk is {topk} and max_recv_tokens {room}: both are 1 or more")
    if row_bytes < 16 or row_bytes % 16:
        raise ValueError(f"rows of {row_bytes} bytes: rows travel in words of 16 bytes, so pad hidden")
    if not 1 <= blocks <= sms:
        raise ValueError(f"num_sms is {blocks}: it is 1 to {sms}, of which the device has as many")
