"""Attention on gathered keys and values on real ranks: right in every spelling and under delays, verified, and never hung."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.blocks import Block, errors, kinds
from tests.gathered_programs import CASES, Case
from tests.programs import Setting
from tests.worlds import run_world
from tscompile.errors import PeerError, TscompileError
from tscompile.templates import gathered_attention as template
from tscompile.templates import scattered_attention as scattered

pytestmark = pytest.mark.slow
FORWARD, BACKWARD = "all_gather_attention", "attention_reduce_scatter"


def compare(rank: int, size: int, name: str, case: Case, dtype: torch.dtype) -> None:
    """The compiled program is at most twice as far from float64 as the eager one, and its bits are the same again."""
    block = Block(rank, size, case.build, dtype)
    truth = Block(rank, size, case.build, dtype, truth=True).eager()
    plain, first = block.eager(), block.fused()
    eps = torch.finfo(dtype).eps
    for index, (found, allowed) in enumerate(zip(errors(first, truth), errors(plain, truth), strict=True)):
        assert found <= max(2 * allowed, eps / 2), f"{name}, tensor {index}: error {found}, eager {allowed}"
    assert all(torch.equal(a, b) for a, b in zip(first, block.fused(), strict=True)), f"{name}: other bits"


def every_case(rank: int, size: int, dtype: torch.dtype) -> set[tuple[str | None, str]]:
    for name, case in CASES.items():
        compare(rank, size, name, case, dtype)
    return kinds()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (4, torch.bfloat16)])
def test_every_spelling(size: int, dtype: torch.dtype) -> None:
    for found in run_world(size, every_case, dtype, timeout_s=280):
        assert {(FORWARD, "fused"), (BACKWARD, "fused")} <= found


def delayed(rank: int, size: int, name: str) -> None:
    """Ranks that pause before every chunk, each at other ones, many times in a row."""
    block = Block(rank, size, CASES[name].build, torch.bfloat16)
    first = block.fused()
    draw = random.Random(rank)

    def slow(original: Any) -> Any:
        def call(*args: Any) -> Any:
            if draw.random() < 0.3:
                time.sleep(draw.random() * 0.004)
            return original(*args)

        return call

    template.attend = slow(template.attend)
    scattered.gradients = slow(scattered.gradients)
    for _ in range(40):
        for got, want in zip(block.fused(), first, strict=True):
            assert torch.equal(got, want), "the order of sums does not depend on who was faster"
            got.fill_(float("nan"))
    assert kinds() == {(FORWARD, "fused"), (BACKWARD, "fused")}


@pytest.mark.parametrize(("size", "name"), [(2, "separate"), (4, "stacked"), (4, "causal, many queries")])
def test_delays_change_nothing(size: int, name: str) -> None:
    run_world(size, delayed, name, timeout_s=120)


def verified(rank: int, size: int) -> None:
    block = Block(rank, size, CASES["zigzag"].build, verify=True)
    for got, want in zip(block.fused(), block.eager(), strict=True):
        torch.testing.assert_close(got, want)
    gradients = scattered.gradients
    scattered.gradients = lambda *args: tuple(result * 1.01 for result in gradients(*args))
    with pytest.raises(TscompileError, match=r"verify: output .*\(attention_reduce_scatter\)"):
        block.fused()
    attend = template.attend
    template.attend = lambda *args: tuple(result * 1.01 for result in attend(*args))
    with pytest.raises(TscompileError, match=r"verify: output .*\(all_gather_attention\)"):
        block.fused()


def test_verify_finds_a_wrong_attention() -> None:
    run_world(2, verified, timeout_s=100)


def one_rank_has_other_options(rank: int, size: int, name: str) -> None:
    """On one rank the kinds are disabled: it runs the program as it was, and the others the same collectives beside it."""
    disabled = {"disable": f"{FORWARD},{BACKWARD}"} if rank else {}
    block = Block(rank, size, CASES[name].build, **disabled)
    for got, want in zip(block.fused(), block.eager(), strict=True):
        torch.testing.assert_close(got, want)
    assert "fused" not in {code for _, code in kinds()}


@pytest.mark.parametrize("name", ["stacked", "joined heads", "zigzag", "unlike layouts", "striped"])
def test_ranks_with_other_plans_run_the_original_ops(name: str) -> None:
    run_world(2, one_rank_has_other_options, name, timeout_s=100)


def stays_away(rank: int, size: int, place: str) -> str:
    """One rank does not get to send its keys, or the gradients of its peer's."""
    block = Block(rank, size, CASES["separate"].build, timeout_s=5.0)
    block.fused()
    dist.barrier()
    if rank == size - 1:
        module, what = (template, "keys_view") if place == FORWARD else (scattered, "chunk_of")
        original = getattr(module, what)

        def late(*args: Any) -> Any:
            time.sleep(12.0)
            return original(*args)

        setattr(module, what, late)
        if place == FORWARD:  # it sends before it computes anything
            time.sleep(12.0)
        with pytest.raises(PeerError):  # at once, or at its next op, if it has all that it waits for
            block.fused()
            block.fused()
        return "late"
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        block.fused()
    assert time.monotonic() - start < 10.0
    return str(caught.value)


@pytest.mark.parametrize("place", [FORWARD, BACKWARD])
def test_a_rank_that_stays_away(place: str) -> None:
    said = run_world(2, stays_away, place, timeout_s=100)
    assert "rank 1 did not answer within 5 s" in said[0] and place in said[0]


def dies(rank: int, size: int) -> str:
    block = Block(rank, size, CASES["separate"].build, timeout_s=30.0)
    block.fused()
    dist.barrier()
    if rank == size - 1:
        scattered.chunk_of = lambda *args: os._exit(1)
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        block.fused()
    assert time.monotonic() - start < 15.0, "nobody waits for the time-out: the process is gone"
    return str(caught.value)


def test_a_rank_that_dies() -> None:
    said = run_world(4, dies, timeout_s=100, dying=(3,))
    assert all("rank 3" in text for text in said[:3]), said


def changing_sizes(rank: int, size: int) -> None:
    """Batch and sequence are symbols: one compilation, other sizes."""
    case = CASES["batch first"]
    block = Block(rank, size, case.build)
    block.fused()
    for batch, keys in ((3, 12), (5, 20), (2, 8)):
        built = case.build(Setting(size, rank), batch, keys)
        for tensor in built.args:
            for dim in (0, 2):
                torch._dynamo.mark_dynamic(tensor, dim)
        block.built = built
        for got, want in zip(block.fused(), block.eager(), strict=True):
            torch.testing.assert_close(got, want)
    assert kinds() == {(FORWARD, "fused"), (BACKWARD, "fused")}


def test_symbolic_sizes() -> None:
    run_world(2, changing_sizes, timeout_s=100)
