"""all_to_all_attention on real ranks, whole blocks compiled: right under delays, verified, downgraded, and never hung."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.blocks import Block, kinds
from tests.worlds import run_world
from tscompile.errors import PeerError, TscompileError
from tscompile.lowering import runtime
from tscompile.templates import attention as template

pytestmark = pytest.mark.slow
NAME = "d2_ulysses_yunchang"


def delayed(rank: int, size: int) -> None:
    """Ranks that pause at every group of heads, each at other ones, many times in a row."""
    block = Block(rank, size, NAME, torch.bfloat16)
    expected = block.eager()
    draw, attend = random.Random(rank), template.attend

    def slow(*args: Any) -> Any:
        if draw.random() < 0.3:
            time.sleep(draw.random() * 0.004)
        return attend(*args)

    template.attend = slow
    for _ in range(40):
        for got, want in zip(block.fused(), expected, strict=True):
            torch.testing.assert_close(got, want)
            got.fill_(float("nan"))
    assert kinds() == {("all_to_all_attention", "fused")}


@pytest.mark.parametrize("size", [2, 4])
def test_delays_change_nothing(size: int) -> None:
    run_world(size, delayed, timeout_s=120)


def verified(rank: int, size: int) -> None:
    block = Block(rank, size, NAME, verify=True)
    for got, want in zip(block.fused(), block.eager(), strict=True):
        torch.testing.assert_close(got, want)
    attend = template.attend
    template.attend = lambda *args: tuple(result * 1.01 for result in attend(*args))
    with pytest.raises(TscompileError, match="verify: output"):
        block.fused()


def test_verify_finds_a_wrong_attention() -> None:
    run_world(2, verified, timeout_s=100)


def one_rank_has_other_options(rank: int, size: int) -> None:
    """On one rank the kind is disabled: the ranks must not run different protocols."""
    block = Block(rank, size, NAME, **({"disable": "all_to_all_attention"} if rank else {}))
    for got, want in zip(block.fused(), block.eager(), strict=True):
        torch.testing.assert_close(got, want)
    assert {code for _, code in kinds()} == {"other-sites"}


def test_ranks_with_other_plans_run_the_original_ops() -> None:
    run_world(2, one_rank_has_other_options, timeout_s=100)


def stays_away(rank: int, size: int) -> str:
    """One rank takes part in the exchange before the attention and never sends a result."""
    block = Block(rank, size, NAME, timeout_s=2.0)
    block.fused()
    dist.barrier()
    if rank == size - 1:
        attend = template.attend

        def late(*args: Any) -> Any:
            time.sleep(6.0)
            return attend(*args)

        template.attend = late
        with pytest.raises(PeerError):
            block.fused()
        return "late"
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        block.fused()
    assert time.monotonic() - start < 5.0
    state = runtime._world.by_name[dist.group.WORLD.group_name, "shm"]  # type: ignore[union-attr]
    assert state.error is not None
    return str(caught.value)


def test_a_rank_that_stays_away() -> None:
    said = run_world(2, stays_away, timeout_s=100)
    assert "rank 1 did not answer within 2 s" in said[0]


def dies(rank: int, size: int) -> str:
    block = Block(rank, size, NAME, timeout_s=30.0)
    block.fused()
    dist.barrier()
    if rank == size - 1:
        template.attend = lambda *args: os._exit(1)
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        block.fused()
    assert time.monotonic() - start < 15.0, "nobody waits for the time-out: the process is gone"
    return str(caught.value)


def test_a_rank_that_dies() -> None:
    said = run_world(4, dies, timeout_s=100, dying=(3,))
    assert all("rank 3" in text for text in said[:3]), said
