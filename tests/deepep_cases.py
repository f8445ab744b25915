"""What the ranks of tests/test_deepep.py do, started as scripts of examples/tilescale are; its modules are on the path."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from common import Example, World, assert_equal
from deepep import check, compare, kernels_for
from expert_parallel import ExchangeRefused, ExpertExchange, reference
from expert_parallel.routing import WAYS, Router

EXPERTS, TOPK, HIDDEN, TOKENS, ROWS = 8, 5, 64, 24, 100  # more experts per token than a rank has
MANY = 40  # tokens of a rank, too many if all go to one rank
DTYPE = torch.float16


def raised(call: Callable[[], object], kind: type[Exception]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def make(world: World, **other: int) -> ExpertExchange:
    numbers = {"experts": EXPERTS, "topk": TOPK, "hidden": HIDDEN, "max_recv_tokens": ROWS, "num_sms": 3} | other
    return ExpertExchange(world, dtype=DTYPE, **numbers)


def tokens_for(world: World, tokens: int, way: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    topk_idx = Router(tokens, TOPK, EXPERTS, world.size, world.rank, world.dice).choose(way)
    return world.random(len(topk_idx), HIDDEN, dtype=DTYPE), topk_idx, world.random(len(topk_idx), TOPK)


def works(world: World, exchange: ExpertExchange, way: str, alignment: int = 1) -> None:
    """One dispatch, compared at once."""
    x, topk_idx, topk_weights = tokens_for(world, TOKENS, way)
    got = exchange.dispatch(x, topk_idx, topk_weights, expert_alignment=alignment)
    want = reference.dispatch(x, topk_idx, topk_weights, EXPERTS)
    if alignment == 1:
        compare(way, got, want)
    assert got.tokens_per_expert == [-(-n // alignment) * alignment for n in want.tokens_per_expert.tolist()]
    world.group.barrier()  # nobody overwrites what another one still compares


def same_words(world: World, words: str) -> str:
    """Every rank said the same."""
    number = torch.tensor([hash_of(words)])
    assert all(int(other) == int(number) for other in world.gather(number)), words
    return words


def hash_of(words: str) -> int:
    return int.from_bytes(words.encode()[:400], "little") % (2**61 - 1)


def refuses_together(world: World, exchange: ExpertExchange) -> None:
    """All ranks raise, nothing that was received before is touched, and the exchange goes on."""
    got = exchange.dispatch(*tokens_for(world, TOKENS, "any expert"))
    everything = (got.x, got.topk_idx, got.topk_weights, got.src_idx)
    before = [part.clone() for part in everything]
    raised(lambda: exchange.dispatch(*tokens_for(world, MANY, "any expert")), ExchangeRefused)
    world.group.barrier()
    assert all(torch.equal(part, kept) for part, kept in zip(everything, before, strict=True)), "rows were sent"
    for way in ("all tokens to the last rank", "any expert"):
        much = tokens_for(world, MANY, way)
        said = same_words(world, raised(lambda: exchange.dispatch(*much), ExchangeRefused))  # noqa: B023
        assert "rows and has room for 100: make the exchange with a larger max_recv_tokens" in said, said
        works(world, exchange, way)
    for wrong in (-2, EXPERTS, 2**40):
        x, topk_idx, topk_weights = tokens_for(world, TOKENS, "any expert")
        if world.rank == world.size - 1:
            topk_idx[3, 1] = topk_idx[7, 0] = wrong
        said = same_words(world, raised(lambda: exchange.dispatch(x, topk_idx, topk_weights), ExchangeRefused))  # noqa: B023
        assert f"2 entries of topk_idx on rank {world.size - 1} are neither -1 nor an expert" in said, said
    works(world, exchange, "any expert")


def refuses_alone(world: World, exchange: ExpertExchange) -> None:
    """Arguments that are wrong on a rank: nothing has been exchanged, so the others need not know."""
    x, topk_idx, topk_weights = tokens_for(world, TOKENS, "any expert")
    for arguments, words in (
        ((x.float(), topk_idx, topk_weights), "x is torch.float32"),
        ((x[:, :32], topk_idx, topk_weights), "x is torch.float16 [24, 32]"),
        ((x, topk_idx.int(), topk_weights), "topk_idx is torch.int32"),
        ((x, topk_idx[:5], topk_weights), "24 tokens in x, 5 in topk_idx"),
        ((x, topk_idx, topk_weights[:5]), "topk_weights is torch.float32 [5, 5]"),
        ((x.T.contiguous().T, topk_idx, topk_weights), "x is not contiguous"),
    ):
        assert words in raised(lambda: exchange.dispatch(*arguments), ValueError)  # noqa: B023
    assert "expert_alignment is 0" in raised(
        lambda: exchange.dispatch(x, topk_idx, topk_weights, expert_alignment=0), ValueError
    )
    got = exchange.dispatch(x, topk_idx, topk_weights)
    assert "y is" in raised(lambda: exchange.combine(got.x[1:], got.handle), ValueError)
    assert "x is" in raised(lambda: exchange.dispatch_cached(x[1:], got.handle), ValueError)
    works(world, exchange, "holes")


def differs(world: World) -> None:
    """Exchanges that the ranks do not make alike, or that cannot be."""
    said = raised(lambda: make(world, experts=EXPERTS * (1 + world.rank % 2)), ValueError)
    assert "ranks differ" in same_words(world, said) and said.endswith("on rank 1")
    assert "7 experts on 4 ranks" in raised(lambda: make(world, experts=7), ValueError)
    assert "rows of 40 bytes" in raised(lambda: make(world, hidden=20), ValueError)
    assert "num_sms is 0" in raised(lambda: make(world, num_sms=0), ValueError)


def combines_in_place_and_not(world: World, exchange: ExpertExchange) -> None:
    """The same sums from memory that peers can read and from other memory, and the same each time."""
    x, topk_idx, topk_weights = tokens_for(world, TOKENS, "any expert")
    got = exchange.dispatch(x, topk_idx, topk_weights)
    elsewhere = got.x * 3
    first, no_weights = exchange.combine(elsewhere, got.handle)
    exchange.combine_input(got.handle).copy_(elsewhere)
    second, _ = exchange.combine(exchange.combine_input(got.handle), got.handle)
    assert_equal("combined in place", second, first)
    assert no_weights is None


def run(world: World) -> str:
    differs(world)
    exchange = make(world)
    if world.args.fail:
        if world.rank == 1:
            raise RuntimeError("this rank fails on purpose")
        exchange.dispatch(*tokens_for(world, TOKENS, "any expert"))
        return "nobody noticed"
    world.args = argparse.Namespace(**vars(world.args), experts=EXPERTS, topk=TOPK, hidden=HIDDEN, tokens=TOKENS)
    rows = check(world, exchange, DTYPE, itertools.cycle(WAYS))
    refuses_alone(world, exchange)
    refuses_together(world, exchange)
    works(world, exchange, "as many tokens as a rank likes", alignment=16)
    combines_in_place_and_not(world, exchange)
    return f"{rows} rows"


EXAMPLE = Example(run, kernels_for, {"fail": (0, 0)}, ranks=4)
