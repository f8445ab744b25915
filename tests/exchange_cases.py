"""Exchanges as readers want them: those of sequence parallelism, and random ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscompile.problem import Delivery, Plan
from tscompile.templates.all_to_all import Outputs

Make = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class ExchangeCase:
    """inputs: of a rank, from what makes a contiguous tensor of a shape."""

    name: str
    deliveries: tuple[Delivery, ...]
    joins: tuple[int, ...]
    inputs: Callable[[Make], list[Tensor]]

    def plan(self, executor: str, dtype: torch.dtype) -> Plan:
        name = str(dtype).removeprefix("torch.")
        return Plan("all_to_all_permute", "g/site", executor, name, deliveries=self.deliveries, joins=self.joins)

    def truth(self, inputs: Sequence[Sequence[Tensor]], rank: int) -> list[Tensor]:
        """The outputs of a rank. inputs: of all ranks."""
        outputs = Outputs(self.deliveries, self.joins, [x.shape for x in inputs[0]], inputs[0][0])
        for number in range(len(inputs[0])):
            outputs.deliver(number, 0, torch.stack([sent[number][rank] for sent in inputs]))
        return outputs.tensors


def ulysses(ranks: int, batch: int, tokens: int, heads: int, dim: int) -> list[ExchangeCase]:
    """Before and after an attention of `heads` per rank, `tokens` per rank: q, k and v alone, fused, their gradients joined."""

    def scattered(make: Make) -> list[Tensor]:  # of [batch, tokens, all heads, dim]
        x = [make((batch, tokens, ranks, heads, dim)) for _ in range(3)]
        return [t.permute(2, 0, 1, 3, 4) for t in x]

    def fused(make: Make) -> list[Tensor]:  # of the result of one projection
        return [make((batch, tokens, 3, ranks, heads, dim)).permute(3, 2, 0, 1, 4, 5)]

    def gathered(make: Make) -> list[Tensor]:  # of [batch, heads, all tokens, dim]
        return [make((batch, heads, ranks, tokens, dim)).permute(2, 0, 1, 3, 4)]

    def attended(make: Make) -> list[Tensor]:  # of [batch, all tokens, heads, dim]
        return [make((batch, ranks, tokens, heads, dim)).permute(1, 0, 2, 3, 4) for _ in range(3)]

    to_heads = (1, 3, 0, 2, 4)  # [batch, heads, all tokens, dim]
    return [
        ExchangeCase("q, k, v", tuple(Delivery(i, to_heads) for i in range(3)), (1, 1, 1), scattered),
        ExchangeCase(
            "fused, as its reader wants each",
            tuple(Delivery(0, (2, 4, 0, 3, 5), ((1, i),)) for i in range(3)),
            (1, 1, 1),
            fused,
        ),
        ExchangeCase("back", (Delivery(0, (1, 3, 0, 2, 4)),), (1,), gathered),
        ExchangeCase("joined", tuple(Delivery(i, (1, 2, 0, 3, 4), (), 2) for i in range(3)), (3,), attended),
    ]


def random_case(ranks: int, seed: int, items: int) -> ExchangeCase:
    """items: of a word of 16 bytes."""
    dice = random.Random(seed)
    shapes, orders, deliveries = [], [], []
    for exchange in range(dice.randint(1, 3)):
        inner = [dice.choice([1, 2, 3, 5, 8, 17]) for _ in range(dice.randint(0, 3))]
        shapes.append((ranks, *inner, items * dice.choice([1, 2, 3, 16])))
        order = list(range(len(shapes[-1]) - 1))
        dice.shuffle(order)
        orders.append((*order, len(order)))
        for _ in range(dice.randint(1, 2)):
            walked = list(range(len(order)))
            fixed = []
            if len(walked) > 1 and dice.random() < 0.4:
                dim = dice.choice(walked[1:])
                walked.remove(dim)
                fixed.append((dim, dice.randrange(shapes[-1][dim])))
            dice.shuffle(walked)
            deliveries.append(Delivery(exchange, (*walked, len(order)), tuple(fixed)))

    def inputs(make: Make) -> list[Tensor]:
        found = []
        for shape, order in zip(shapes, orders, strict=True):
            stored = make([*(shape[dim] for dim in order[:-1]), shape[-1] + items])
            found.append(stored[..., items:].permute([order.index(dim) for dim in range(len(order))]))
        return found

    return ExchangeCase(f"random {seed}", tuple(deliveries), (1,) * len(deliveries), inputs)
