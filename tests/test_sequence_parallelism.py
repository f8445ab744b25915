"""Sequence-parallel attention as programs use it beyond one compiled function: checkpoints around compiled blocks, FlexAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import tscompile
from tests.compat import all_gather
from tests.graphs import compile_graphs
from tests.programs import PROGRAMS, Setting, scalar_loss
from tests.programs.attention import SPELLINGS
from tests.worlds import run_world
from tscompile.backend import tilescale
from tscompile.testing import fake_world

pytestmark = pytest.mark.slow
ALWAYS = {"tilescale.fuse": "always"}


def checkpointed(rank: int, size: int, use_reentrant: bool) -> set[tuple[str | None, str, str]]:
    """Two steps of an eager checkpoint around a compiled block; a reentrant one runs it first without and then with gradients."""
    built = PROGRAMS["d3_ulysses_functional"].build(Setting(size, rank))
    compiled = torch.compile(
        built.call, backend=tilescale, fullgraph=True, options={**ALWAYS, "tilescale.inner": "eager"}
    )
    (x,) = built.args
    leaves = [x, *built.parameters.values()]

    def step(call: Any) -> list[Tensor]:
        output = checkpoint(call, x, use_reentrant=use_reentrant)
        torch.autograd.backward(scalar_loss(output))
        grads = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return [output.detach(), *grads]

    expected = step(built.call)
    for _ in range(2):
        for got, want in zip(step(compiled), expected, strict=True):
            assert torch.equal(got, want)
    rows = tscompile.reports().rows
    assert all(row.measured_us is not None for row in rows)
    return {(row.pattern, row.decision, row.phase) for row in rows}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_a_compiled_block(use_reentrant: bool) -> None:
    phases = ("forward", "backward", "inference") if use_reentrant else ("forward", "backward")
    for found in run_world(2, checkpointed, use_reentrant, timeout_s=100):
        assert found == {("all_to_all_attention", "fused", phase) for phase in phases}


heads, sequence = SPELLINGS["yunchang"].heads, SPELLINGS["yunchang"].sequence


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def flex(rank: int, size: int, inner: str) -> list[tuple[str | None, str, str]]:
    """Without gradients: torch has no backward of FlexAttention for CPU."""
    torch.manual_seed(rank)
    args = [torch.randn(2, 64, 4 * size, 16) for _ in range(3)]
    mask = create_block_mask(causal, None, None, 64 * size, 64 * size, device="cpu")

    def between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (heads(t).transpose(1, 2) for t in (q, k, v))
        return sequence(flex_attention(q, k, v, block_mask=mask).transpose(1, 2)).flatten(2)

    compiled = torch.compile(between, backend=tilescale, fullgraph=True, options={**ALWAYS, "tilescale.inner": inner})
    with torch.no_grad():
        got = compiled(*args)
        q, k, v = (heads(t).transpose(1, 2).double() for t in args)
        truth = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        want = sequence(truth.transpose(1, 2)).flatten(2)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    return [(row.pattern, row.decision, row.reason) for row in tscompile.reports().rows]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_flex_attention_stays_and_its_exchanges_are_fused(inner: str) -> None:
    """No op computes FlexAttention by groups of heads, and the report says why; with generated code it is Inductor's kernel."""
    for rows in run_world(2, flex, inner, timeout_s=200):
        assert [row[:2] for row in rows] == [("all_to_all_permute", "fused")] * 2
        assert "all_to_all_attention: FlexAttention is one generated kernel" in rows[0][2]


def test_flex_attention_on_gathered_keys_and_values_is_kept_for_a_reason() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (all_gather(t, 2, dist.group.WORLD) for t in (k, v))
        out: Tensor = flex_attention(q, k, v)  # type: ignore[assignment]
        return out

    with fake_world(4), torch.no_grad():
        rows = compile_graphs(fn, *(torch.randn(2, 4, 32, 16) for _ in range(3))).rows
    assert {(row.pattern, row.decision, row.code) for row in rows} == {("all_gather_attention", "kept", "no-kernel")}
    assert all(row.reason for row in rows)
