"""Expert parallelism: each token goes once to every rank that has one of its experts, and comes back as a sum.

DeepEP's layout, dispatch, cached dispatch and combine within a host, in the package expert_parallel. Routing is another one in each
round: random, skewed, with ranks that have no tokens, and so on. Results are the bits of torch's all_to_all_single.
"""

import itertools
from collections.abc import Iterator

import torch
from common import Example, Kernel, World, assert_equal
from expert_parallel import ExpertExchange, Received, kernels, reference
from expert_parallel.layout import layout_of
from expert_parallel.routing import WAYS, Router

import tscompile.language as tl

DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32, torch.bfloat16)}


def kernels_for(d: tl.Dialect) -> list[Kernel]:
    narrow, wide = (kernels.Sizes(8, 256, 8, 7168, dtype, 1 << 15, 64) for dtype in ("bfloat16", "float32"))
    made = [Kernel(make.__name__, make(d, narrow)) for make in (kernels.layout, kernels.notify, kernels.dispatch)]
    return [*made, *(Kernel(f"combine {s.dtype}", kernels.combine(d, s)) for s in (narrow, wide))]


def run_experts(x: torch.Tensor, topk_weights: torch.Tensor, rank: int) -> torch.Tensor:
    """What stands for the experts of a rank. Those of ranks 0 and 1 cancel, and the others are small beside them: in another order the
    sums would be other ones."""
    if rank % 4 < 2:
        return x * (256 if rank % 4 == 0 else -256)
    return (x.float() * (topk_weights.sum(1, keepdim=True) + 1) / 256).to(x.dtype)


def compare(what: str, got: Received, want: reference.Received) -> None:
    """Everything that a rank receives."""
    for name in ("x", "topk_idx", "topk_weights", "src_idx"):
        assert_equal(f"{what}, {name}", getattr(got, name), getattr(want, name))
    assert_equal(f"{what}, tokens per expert", torch.tensor(got.tokens_per_expert), want.tokens_per_expert.cpu())


def kept(world: World, got: Received) -> Received:
    """Copies: the next dispatch overwrites what is received."""
    x, topk_idx, topk_weights, src_idx = map(world.keep, (got.x, got.topk_idx, got.topk_weights, got.src_idx))
    return Received(x, topk_idx, topk_weights, src_idx, got.tokens_per_expert, got.handle)


def check(world: World, exchange: ExpertExchange, dtype: torch.dtype, ways: Iterator[str]) -> int:
    """Rounds of dispatch, combine, and the way of the first round again; the routing of each is the next of `ways`."""
    args = world.args
    router = Router(args.tokens, args.topk, args.experts, world.size, world.rank, world.dice)
    calls, handle, again = [], None, torch.empty(0)
    for _ in world.rounds():
        way = next(ways)
        topk_idx = router.choose(way).to(world.device)
        x = world.random(len(topk_idx), args.hidden, dtype=dtype)
        topk_weights = world.random(len(topk_idx), args.topk).abs()
        layout = exchange.layout(topk_idx)
        got = exchange.dispatch(x, topk_idx, topk_weights)
        y = exchange.combine_input(got.handle)
        y.copy_(run_experts(got.x, got.topk_weights, world.rank))
        out, out_weights = exchange.combine(y, got.handle, got.topk_weights)
        got = kept(world, got)
        if handle is None:
            handle, again = got.handle, x
        cached = world.keep(exchange.dispatch_cached(again, handle))
        back, _ = exchange.combine(cached, handle)
        calls.append((way, x, topk_idx, topk_weights, layout, got, out, out_weights, cached, back))
    world.group.check()
    rows = 0
    for way, x, topk_idx, topk_weights, layout, got, out, out_weights, cached, back in calls:
        want_layout = layout_of(topk_idx, args.experts, world.size)
        for name in ("is_token_in_rank", "tokens_per_rank", "tokens_per_expert"):
            assert_equal(f"{way}, {name}", getattr(layout, name), getattr(want_layout, name))
        want = reference.dispatch(x, topk_idx, topk_weights, args.experts)
        compare(way, got, want)
        y = run_experts(want.x, want.topk_weights, world.rank)
        assert_equal(f"{way}, combined", out, reference.combine(y, want.sent, len(x)))
        want_weights = reference.combine(want.topk_weights, want.sent, len(x))
        assert_equal(f"{way}, weights combined", out_weights, want_weights)
        assert_equal(f"{way}, cached", cached, calls[0][5].x)
        assert_equal(f"{way}, cached and combined", back, calls[0][9])
        rows += len(got.x)
    return rows


def milliseconds(world: World, exchange: ExpertExchange, dtype: torch.dtype) -> str:
    """Ours and theirs, there and back, for any expert."""
    args = world.args
    topk_idx = Router(args.tokens, args.topk, args.experts, world.size, world.rank, world.dice).choose("any expert")
    topk_idx, x = topk_idx.to(world.device), world.random(args.tokens, args.hidden, dtype=dtype)
    topk_weights = world.random(args.tokens, args.topk)

    def ours() -> None:
        got = exchange.dispatch(x, topk_idx, topk_weights)
        exchange.combine(got.x, got.handle)

    def theirs() -> None:
        got = reference.dispatch(x, topk_idx, topk_weights, args.experts)
        reference.combine(got.x, got.sent, len(x))

    return f"{world.milliseconds(ours):.2f} ms there and back, {world.rival} {world.milliseconds(theirs):.2f} ms"


def run(world: World) -> str:
    args, rows, times, ways = world.args, 0, "", itertools.cycle(WAYS)
    args.experts -= args.experts % world.size  # as many on each rank
    for dtype in DTYPES[world.dialect.name]:
        exchange = ExpertExchange(
            world,
            experts=args.experts,
            topk=args.topk,
            hidden=args.hidden,
            dtype=dtype,
            max_recv_tokens=world.size * args.tokens,
        )
        rows += check(world, exchange, dtype, ways)
        times = times or milliseconds(world, exchange, dtype)
    return f"{rows} rows of {args.hidden} dispatched and combined as {world.rival} has it; {times}"


EXAMPLE = Example(
    run,
    kernels_for,
    {"tokens": (48, 1024), "hidden": (128, 7168), "experts": (8, 256), "topk": (3, 8)},
)

if __name__ == "__main__":
    EXAMPLE.main()
