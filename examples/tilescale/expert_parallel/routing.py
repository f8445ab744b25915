"""Ways in which tokens choose experts, to check the exchange with."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

Choice = Callable[["Router"], torch.Tensor]


class Router:
    """What one rank's tokens choose. All ranks know the name of the way; the rest is random.

    Args:
        tokens: of this rank at most.
    """

    def __init__(self, tokens: int, topk: int, experts: int, ranks: int, rank: int, dice: random.Random) -> None:
        self.tokens, self.topk, self.experts, self.ranks, self.rank = tokens, topk, experts, ranks, rank
        self.dice = dice

    def choose(self, way: str) -> torch.Tensor:
        """topk_idx, int64 `[tokens, topk]`, on the CPU."""
        return WAYS[way](self).contiguous()

    def random(self, tokens: int, experts: range) -> torch.Tensor:
        """Other experts for each entry of a token as long as there are enough."""
        scores = torch.rand(tokens, -(-self.topk // len(experts)) * len(experts), generator=self._generator())
        return torch.argsort(scores, dim=1)[:, : self.topk] % len(experts) + experts.start

    def masked(self, chosen: torch.Tensor, share: float) -> torch.Tensor:
        """Some entries say none."""
        return torch.where(torch.rand(chosen.shape, generator=self._generator()) < share, -1, chosen)

    def some(self) -> int:
        return self.dice.randint(0, self.tokens)

    def experts_of(self, rank: int) -> range:
        each = self.experts // self.ranks
        return range(rank * each, (rank + 1) * each)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.dice.getrandbits(32))


WAYS: dict[str, Choice] = {
    "any expert": lambda r: r.random(r.tokens, range(r.experts)),
    "as many tokens as a rank likes": lambda r: r.random(r.some(), range(r.experts)),
    "all tokens to the last rank": lambda r: r.random(r.tokens, r.experts_of(r.ranks - 1)),
    "rank 0 has no tokens": lambda r: r.random(r.tokens if r.rank else 0, range(r.experts)),
    "holes": lambda r: r.masked(r.random(r.some(), range(r.experts)), 0.7),
    "none of an odd rank's tokens": lambda r: r.masked(r.random(r.tokens, range(r.experts)), float(r.rank % 2)),
    "each rank to itself": lambda r: r.random(r.tokens, r.experts_of(r.rank)),
    "nobody sends": lambda r: r.random(0, range(r.experts)),
    "the same expert again": lambda r: r.random(r.tokens, range(r.experts))[:, :1].expand(-1, r.topk),
}
"""Name: what each rank does. "All tokens to the last rank" is what needs most room: the tokens of all ranks."""
