"""Attention on gathered keys and values on real ranks: right in every spelling and under delays, verified, and never hung."""

from __future__ import annotations

import pytest
import torch

from tests.blocks import Block, errors, kinds
from tests.gathered_programs import CASES, Case
from tests.worlds import run_world

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_every_spelling(size: int, dtype: torch.dtype) -> None:
    for found in run_world(size, every_case, dtype, timeout_s=240):
        assert {(FORWARD, "fused"), (BACKWARD, "fused")} <= found
