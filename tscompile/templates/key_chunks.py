"""Attention whose keys come in chunks: which queries a chunk is for, its partial attention, and how partial results are merged.

A chunk is what one rank holds of the keys. Softmax over all keys is had from softmax over each chunk by their logarithms of the sum of
exponentials (the online softmax of Milakov and Gimelshein, arXiv:1805.02867, as FlashAttention-2 has it for blocks, arXiv:2307.08691,
and Ring Attention for ranks, arXiv:2310.01889):

    lse = log(sum over chunks of exp(lse_c)),    out = sum over chunks of exp(lse_c - lse) * out_c

Backwards, torch's ops take the results of the forward. Given those of all keys, the gradients of a chunk's keys and values are final,
and those of the queries add up.

A causal mask is that of torch's scaled_dot_product_attention: query i sees keys 0 to i of the whole sequence, whatever their numbers
(it is aligned at the top left).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..problem import ChunkedAttention, Keys, Plan

_OF_QUERIES = ("grad_out", "grad_out_", "query", "out", "logsumexp")
SEQUENCE = 2  # dim of queries, keys, values and results


def chunked(plan: Plan) -> ChunkedAttention:
    assert plan.chunks is not None, "the pattern says what is computed"
    return plan.chunks


@dataclass(frozen=True)
class Step:
    """Keys [start, start + length) of a rank's chunk, for the queries from `row` on; `causal`: query row + i sees the first i + 1."""

    start: int
    length: int
    row: int
    causal: bool


@lru_cache(maxsize=1024)
def steps(order: Sequence[Sequence[int]], causal: bool, rank: int, held: int, rows: int) -> tuple[Step, ...]:
    """What is to be computed with the chunk of `rank`: nothing where the mask leaves nothing.

    Args:
        order: of the sequence, as in ChunkedAttention.
        held: keys of a rank.
        rows: queries.
    """
    if not causal:
        return (Step(0, held, 0, False),)
    length = held // len(order[rank])
    found: list[Step] = []
    start = 0
    for first, count in runs(order[rank]):
        if first * length < rows:
            found.append(Step(start, count * length, first * length, True))
        start += count * length
    return tuple(found)


def runs(pieces: Sequence[int]) -> list[tuple[int, int]]:
    """(first piece, how many) of the stretches that a rank holds of the sequence, in the order of its chunk."""
    found: list[tuple[int, int]] = []
    for number in pieces:
        if found and number == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def keys_view(keys: Keys, shard: Tensor) -> Tensor:
    """Keys or values of a rank `[B, heads, S / R, E]`, from its shard `[f1, ..., fk]`: a view if its strides allow that."""
    left = list(range(1, shard.dim() + 1))
    for dim, index in reversed(keys.fixed):
        shard = shard.select(dim - 1, index)
        left.remove(dim)
    wanted = [dim for dims in keys.dims for dim in dims]
    moved = shard.permute([left.index(dim) for dim in wanted])
    sizes, start = [], 0
    for dims in keys.dims:
        sizes.append(prod(moved.shape[start : start + len(dims)]))
        start += len(dims)
    return moved.reshape(sizes)


def in_sequence(order: Sequence[Sequence[int]], chunks: Sequence[Tensor]) -> Tensor:
    """The chunks `[B, heads, S / R, E]` of all ranks put together in the order of the sequence."""
    pieces = {
        number: piece
        for numbers, chunk in zip(order, chunks, strict=True)
        for number, piece in zip(numbers, chunk.chunk(len(numbers), SEQUENCE), strict=True)
    }
    return torch.cat([pieces[number] for number in range(len(pieces))], SEQUENCE)


def chunk_of(order: Sequence[Sequence[int]], rank: int, whole: Tensor) -> Tensor:
    """The chunk of `rank` `[B, heads, S / R, E]` of whole keys or values; a view where it is one stretch of them."""
    length = whole.shape[SEQUENCE] // sum(len(pieces) for pieces in order)
    parts = [whole.narrow(SEQUENCE, first * length, count * length) for first, count in runs(order[rank])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, SEQUENCE)


def _call(name: str, given: Mapping[str, Any]) -> tuple[Any, ...]:
    """An attention op of aten: of its arguments those that it has, by name, without dropout and masks."""
    op: Any = getattr(torch.ops.aten, name).default
    plain: dict[str, Any] = {
        "attn_bias": None,
        "compute_log_sumexp": True,
        "cum_seq_q": None,
        "cum_seq_k": None,
        "dropout_p": 0.0,
        "grad_input_mask": [True, True, True, False],
    }
    known = plain | dict(given)
    names = [argument.name for argument in op._schema.arguments]
    results: tuple[Any, ...] = op(**{name: known[name] for name in names if name in known})
    return results


def attend(
    chunks: ChunkedAttention, query: Tensor, keys: Sequence[Tensor], causal: bool | None = None
) -> tuple[Any, ...]:
    """The forward op for (keys, values): its results, the output `[B, heads, L, E]` and the logsumexp first.

    causal: whether the mask of a causal attention cuts these keys; by default, if the attention is one.
    """
    key, value = keys
    mask = chunks.causal if causal is None else causal
    given = {"query": query, "key": key, "value": value, "is_causal": mask, "scale": chunks.scale}
    return _call(chunks.op, given)


def as_returned(lse: Tensor, like: Tensor) -> Tensor:
    """The logsumexp `[B, heads, L]` in the shape and dtype of `like`, which an op returned: with a dim more, or rows of padding."""
    whole = like.clone(memory_format=torch.contiguous_format)
    whole.view(*like.shape[:2], -1)[:, :, : lse.shape[2]].copy_(lse)
    return whole


def gradients(
    chunks: ChunkedAttention,
    given: Mapping[str, Tensor],
    keys: Sequence[Tensor],
    row: int = 0,
    causal: bool | None = None,
) -> tuple[Tensor, ...]:
    """The backward op for (keys, values) and the queries from `row` on: gradients of queries, keys and values.

    Args:
        given: the op's other tensors by name, of all queries.
        causal: as for `attend`.
    """
    key, value = keys
    mask = chunks.causal if causal is None else causal
    cut = {name: t[:, :, row:] if name in _OF_QUERIES else t for name, t in given.items()}
    more = {
        "max_q": cut["query"].shape[SEQUENCE],
        "max_k": key.shape[SEQUENCE],
        "is_causal": mask,
        "scale": chunks.scale,
    }
    return _call(chunks.op, {**cut, **more, "key": key, "value": value})[:3]


class Merged:
    """The output and the logsumexp over all chunks that were added, summed in float32 (float64 for float64 queries).

    Partial results are kept until all are there: then each is read once, in its own dtype. Weighing the sum so far anew for each chunk
    would read and write all of it as often. Every score must be finite: for a row whose scores are all -inf torch's op on CPU
    says that their logsumexp is 0.

    Args:
        query: `[B, heads, L, E]`.
    """

    def __init__(self, query: Tensor) -> None:
        self._query = query
        self._wide = torch.promote_types(query.dtype, torch.float32)
        self._parts: list[tuple[int, Tensor, Tensor]] = []

    def add(self, out: Tensor, lse: Tensor, row: int) -> None:
        """The results of a chunk, fresh memory, for the queries from `row` on; `lse` may have a dim more, or rows of padding."""
        batch, heads, rows, _ = self._query.shape
        self._parts.append((row, out, lse.reshape(batch, heads, -1, 1)[:, :, : rows - row].to(self._wide)))

    def results(self) -> tuple[Tensor, Tensor]:
        """`[B, heads, L, E]` in the dtype of the queries, and `[B, heads, L]`."""
        # Some part has all rows: whatever the mask, the first query sees a key.
        (_, out, lse), *others = sorted(self._parts, key=lambda part: part[0])
        total = lse.clone()
        for row, _, part in others:
            total[:, :, row:] = torch.logaddexp(total[:, :, row:], part)
        merged = out * torch.exp(lse - total)
        for row, out, lse in others:
            merged[:, :, row:].addcmul_(out, torch.exp(lse - total[:, :, row:]))
        return merged.to(self._query.dtype), total.squeeze(-1)
