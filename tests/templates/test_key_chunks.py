"""Attention by chunks of keys is attention: any order of the sequence, any mask that is one, any number of heads that share keys."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tscompile.problem import ChunkedAttention, Keys
from tscompile.templates.key_chunks import Merged, attend, chunk_of, gradients, in_sequence, keys_view, runs, steps
from tscompile.templates.scattered_attention import ChunkGradients

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
OPERANDS = ("grad_out", "query", "key", "value", "out", "logsumexp")


@dataclass(frozen=True)
class Problem:
    order: tuple[tuple[int, ...], ...]
    causal: bool
    piece: int
    rows: int
    batch: int
    kv_heads: int
    shared: int
    width: int

    @property
    def keys(self) -> int:
        return self.piece * sum(len(pieces) for pieces in self.order)

    def chunks(self, op: str, **more: object) -> ChunkedAttention:
        return ChunkedAttention(op, self.causal, 0.3, self.order, (0,), ((0, 1, 2, 3),), **more)  # type: ignore[arg-type]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.kv_heads * self.shared
        shapes = [(heads, self.rows), (self.kv_heads, self.keys), (self.kv_heads, self.keys)]
        q, k, v = (torch.randn(self.batch, n, length, self.width, dtype=torch.float64) for n, length in shapes)
        return q, k, v


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    ranks, each = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    numbers = draw(st.permutations(range(ranks * each)))
    order = tuple(tuple(numbers[r * each : (r + 1) * each]) for r in range(ranks))
    sizes = [draw(st.integers(1, most)) for most in (5, 40, 2, 2, 3)]
    return Problem(order, draw(st.booleans()), *sizes, width=draw(st.sampled_from([1, 4, 8])))


def truth(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """By the definition of torch's scaled_dot_product_attention."""
    k, v = (t.repeat_interleave(problem.shared, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.3
    if problem.causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_merged_chunks_are_the_whole(problem: Problem) -> None:
    torch.manual_seed(0)
    q, k, v = problem.tensors()
    out, lse = truth(problem, q, k, v)
    chunks = problem.chunks(FORWARD)
    for first in range(len(problem.order)):  # whichever rank computes, and begins with its own chunk
        merged = Merged(q)
        for distance in range(len(problem.order)):
            rank = (first + distance) % len(problem.order)
            keys = [chunk_of(problem.order, rank, t) for t in (k, v)]
            for step in steps(problem.order, problem.causal, rank, keys[0].shape[2], problem.rows):
                cut = [t.narrow(2, step.start, step.length) for t in keys]
                merged.add(*attend(chunks, q[:, :, step.row :], cut, step.causal)[:2], step.row)
        found = merged.results()
        torch.testing.assert_close(found[0], out)
        torch.testing.assert_close(found[1], lse)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_gradients_of_chunks_are_those_of_the_whole(problem: Problem) -> None:
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in problem.tensors()]
    out, lse = truth(problem, *leaves)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    q, k, v = (t.detach() for t in leaves)
    chunks = problem.chunks(f"{FORWARD}_backward", operands=OPERANDS)
    computed = ChunkGradients(chunks, [grad, q, k, v, out.detach(), lse.detach()])
    parts = [computed.of_chunk(rank)[1:] for rank in range(len(problem.order))]
    torch.testing.assert_close(computed.query, expected[0])
    for index in (0, 1):
        whole = in_sequence(problem.order, [part[index] for part in parts])
        torch.testing.assert_close(whole, expected[1 + index])


@given(problems())
def test_a_mask_leaves_each_key_to_the_queries_that_see_it(problem: Problem) -> None:
    """Without computing: which (query, key) pairs the steps of all chunks have, each once."""
    seen: list[tuple[int, int]] = []
    held = problem.piece * len(problem.order[0])
    for rank, numbers in enumerate(problem.order):
        positions = [n * problem.piece + i for n in numbers for i in range(problem.piece)]
        for step in steps(problem.order, problem.causal, rank, held, problem.rows):
            for row in range(step.row, problem.rows):
                count = min(step.length, row - step.row + 1) if step.causal else step.length
                seen += [(row, positions[step.start + i]) for i in range(count)]
    wanted = [(r, key) for r in range(problem.rows) for key in range(problem.keys) if not problem.causal or key <= r]
    assert sorted(seen) == wanted


def test_stretches() -> None:
    assert runs((3, 4, 5, 1, 0)) == [(3, 3), (1, 1), (0, 1)]
    # What continues a stretch that the mask hides is hidden, too.
    order = ((0, 5, 6), (1, 2, 3), (4, 7, 8))
    assert [(s.start, s.length, s.row) for s in steps(order, True, 0, 3, 4)] == [(0, 1, 0)]
    assert steps(order, True, 2, 3, 4) == ()


def test_chunks_and_the_sequence() -> None:
    order = ((0, 3), (1, 2))
    whole = torch.arange(8.0).view(1, 1, 8, 1)
    chunks = [chunk_of(order, rank, whole) for rank in (0, 1)]
    assert [c.flatten().tolist() for c in chunks] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert chunks[1].data_ptr() == whole[:, :, 2:].data_ptr(), "one stretch is no copy"
    assert torch.equal(in_sequence(order, chunks), whole)


def test_keys_are_views_of_a_shard() -> None:
    shard = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6)  # [keys or values, S, B, heads, E]
    values = keys_view(Keys(0, ((3,), (4,), (2,), (5,)), ((1, 1),)), shard)
    assert torch.equal(values, shard[1].permute(1, 2, 0, 3)) and values.untyped_storage().data_ptr() == shard.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_partial_results_are_merged_in_float32(dtype: torch.dtype) -> None:
    """The merged result is about as exact as the op's own, though each chunk is rounded once more."""
    torch.manual_seed(0)
    largest = Problem(((0,), (1,)), False, 64, 128, 1, 2, 1, 32)
    q, k, v = (t.to(dtype) for t in largest.tensors())
    out, lse = truth(largest, q.double(), k.double(), v.double())
    chunks = largest.chunks(FORWARD)
    merged = Merged(q)
    for rank in (0, 1):
        merged.add(*attend(chunks, q, [chunk_of(largest.order, rank, t) for t in (k, v)], False)[:2], 0)
    whole = attend(chunks, q, [k, v])
    output, logsumexp = merged.results()
    assert output.dtype == dtype and logsumexp.dtype == torch.float32
    for got, plain, want in ((output, whole[0], out), (logsumexp, whole[1], lse)):
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (got, plain))
        assert error <= 2 * allowed
    given = {"grad_out": out.to(dtype), "query": q, "out": whole[0], "logsumexp": whole[1]}
    backward = largest.chunks(f"{FORWARD}_backward")
    assert [g.dtype for g in gradients(backward, given, [k, v])] == [dtype] * 3
