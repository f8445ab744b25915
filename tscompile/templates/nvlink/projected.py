"""A matmul_all_to_all over NVLink: the chunks of columns that its matmuls are computed in, and the copies that send them.

Copy engines send a leg (legs.py) as soon as the chunk that holds its columns is computed, so all but the last chunk's legs travel while
something is computed. What is cut and where depends on sizes alone, so all ranks agree, and the cost model asks here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from itertools import product as every
from math import prod

import torch

from ...problem import Gemm, Plan
from ..gemm_all_to_all import views_sent
from ..template import torch_dtype
from . import widths
from .kernels.config import WORD_BYTES
from .legs import Batches, Layout, Leg, batches_of, worded
from .panels import Parcel

MOST_CHUNKS = 3  # that one matmul is cut into
_MOST_COPIES = 4  # of a leg, to each peer
_MOST_PITCH = (1 << 31) - 1  # bytes between two rows of a copy
_ALIGNMENT = 256  # of chunks in the buffer, in bytes, as cuBLAS has it from torch
# The pass that collects: its start, and reading and writing what a rank receives, at 3.5 TB/s [measured likewise].
_COLLECT_US = 6.0
_COLLECTED_BYTES_PER_US = 3.5e6


@dataclass(frozen=True)
class Chunk:
    """Columns `[first, first + columns)` of the result of a matmul, `rows` of them, contiguous in the buffer from `start` on (items).

    legs: numbers of those that it holds.
    """

    matmul: int
    first: int
    columns: int
    rows: int
    start: int
    legs: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.first + self.columns


@dataclass(frozen=True)
class Projection:
    """How a call computes and sends.

    legs: in words; their sources lie in the buffer.
    parcels: of each leg, what sends its grid, from the buffer to the leg's part of a slot: [batches.count, batches.words].
    items: of the buffer.
    us: predicted until all is computed and received.
    """

    legs: tuple[Leg, ...]
    batches: Batches
    chunks: tuple[Chunk, ...]
    parcels: tuple[tuple[Parcel, ...], ...]
    items: int
    us: float


def project(plan: Plan, ranks: int, gemms: Sequence[Gemm], sizes: Sequence[int]) -> Projection | None:
    """The projection of matmuls of these sizes; None if copy engines cannot send what is exchanged, or the kernel not collect it."""
    dtype = torch_dtype(plan.dtype)
    results = [torch.empty(gemm.m, gemm.n, dtype=dtype, device="meta") for gemm in gemms]
    inputs = views_sent(plan.departures, sizes, results)
    found = worded(plan.deliveries, plan.joins, inputs)
    items = WORD_BYTES // dtype.itemsize
    if found is None or any(x.storage_offset() % items for x in inputs) or any(gemm.n % items for gemm in gemms):
        return None
    legs = [_ordered(leg, inputs[leg.source.tensor].storage_offset() // items) for leg in found]
    owners = [plan.departures[leg.source.tensor].result for leg in found]
    parcels = [_parcels(leg, 0) for leg in legs]
    if any(len(sent) > _MOST_COPIES or sent[0].pitch > _MOST_PITCH for sent in parcels):
        return None
    cuts = []
    for number, gemm in enumerate(gemms):
        own = [(i, _columns(leg, ranks, gemm.n // items)) for i, leg in enumerate(legs) if owners[i] == number]
        cuts.append(_cuts(number, gemm, items, own))
    candidates = [[chunk for cut in chosen for chunk in cut] for chosen in every(*cuts)]
    times = [_overlapped_us(gemms, chunks, legs, parcels, ranks) for chunks in candidates]
    us = min(times)
    chunks, end = _placed(candidates[times.index(us)], _ALIGNMENT // dtype.itemsize)
    for chunk in chunks:
        for i in chunk.legs:
            legs[i] = _into(legs[i], chunk, gemms[chunk.matmul].n // items, items)
    batches = batches_of([leg.words for leg in legs], ranks)
    sent = tuple(_parcels(leg, first * batches.words) for leg, first in zip(legs, batches.firsts, strict=True))
    return Projection(tuple(legs), batches, chunks, sent, end, us)


def _ordered(leg: Leg, start: int) -> Leg:
    """The leg in the order in which its source has it, so that few copies send it. start: of its tensor in the result."""
    order = sorted(range(len(leg.sizes)), key=lambda d: -leg.source.strides[d])

    def turned(layout: Layout) -> Layout:
        return replace(
            layout, strides=tuple(layout.strides[d] for d in order), fixed=tuple(layout.fixed[d] for d in order)
        )

    source = replace(turned(leg.source), start=leg.source.start + start)
    return Leg(tuple(leg.sizes[d] for d in order), source, tuple(map(turned, leg.targets)))


def _columns(leg: Leg, ranks: int, width: int) -> tuple[int, int]:
    """The words [first, end) of a row of `width` that a leg sends of; all of them where its dims do not keep rows and columns apart."""
    first = end = leg.source.start % width
    for size, stride in ((ranks, leg.source.rank_stride), *zip(leg.sizes, leg.source.strides, strict=True)):
        if size > 1 and stride % width:
            end += (size - 1) * stride
    return (first, end + 1) if end < width else (0, width)


def _cuts(matmul: int, gemm: Gemm, items: int, legs: Sequence[tuple[int, tuple[int, int]]]) -> list[list[Chunk]]:
    """All ways to cut the columns of a matmul so that each leg lies in one chunk, fewest chunks first.

    items: of a word. legs: their numbers, and their columns in words.
    """
    groups: list[Chunk] = []
    for number, (first, end) in sorted(legs, key=lambda leg: leg[1]):
        if groups and first * items < groups[-1].end:
            last = groups.pop()
            widest = max(last.end, end * items) - last.first
            groups.append(replace(last, columns=widest, legs=(*last.legs, number)))
        else:
            groups.append(Chunk(matmul, first * items, (end - first) * items, gemm.m, 0, (number,)))
    return [
        [_joined(groups[i:j]) for i, j in pairwise((0, *inner, len(groups)))]
        for count in range(min(MOST_CHUNKS, len(groups)))
        for inner in combinations(range(1, len(groups)), count)
    ]


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    first, last = chunks[0], chunks[-1]
    return replace(first, columns=last.end - first.first, legs=tuple(leg for chunk in chunks for leg in chunk.legs))


def _overlapped_us(
    gemms: Sequence[Gemm],
    chunks: Sequence[Chunk],
    legs: Sequence[Leg],
    parcels: Sequence[Sequence[Parcel]],
    ranks: int,
) -> float:
    """Until all is computed, sent and collected: chunks are computed one after the other, and so are they sent."""
    computed = sent = 0.0
    for chunk in chunks:
        computed += widths.cublas_us(chunk.rows, chunk.columns, gemms[chunk.matmul].k)
        mib, count = 0.0, 0
        for number in chunk.legs:
            rows = widths.row_factor(parcels[number][0].width)
            mib += legs[number].words * WORD_BYTES * rows * (ranks - 1) / (1 << 20)
            count += len(parcels[number]) * (ranks - 1)
        sent = max(computed, sent) + widths.copied_us(mib, count)
    held = sum(leg.words for leg in legs) * WORD_BYTES * ranks
    return max(computed, sent) + _COLLECT_US + 2 * held / _COLLECTED_BYTES_PER_US


def _placed(chunks: Sequence[Chunk], alignment: int) -> tuple[tuple[Chunk, ...], int]:
    """The chunks one behind the other in a buffer, and its length."""
    placed, end = [], 0
    for chunk in chunks:
        placed.append(replace(chunk, start=end))
        end += -(-chunk.rows * chunk.columns // alignment) * alignment
    return tuple(placed), end


def _into(leg: Leg, chunk: Chunk, width: int, items: int) -> Leg:
    """The leg with its source in the buffer: rows are those of the chunk, in place of `width` words."""
    columns = chunk.columns // items

    def stride(words: int) -> int:
        rows, rest = divmod(words, width)
        return rows * columns + rest

    source = leg.source
    start = stride(source.start) - chunk.first // items + chunk.start // items
    return replace(
        leg,
        source=Layout(0, start, stride(source.rank_stride), tuple(map(stride, source.strides)), source.fixed),
    )


def _parcels(leg: Leg, first: int) -> tuple[Parcel, ...]:
    """What sends a leg's grid to where its words lie one behind the other, from word `first` on; as few copies as can be."""
    dims: list[tuple[int, int]] = []  # size and stride
    for size, stride in zip(leg.sizes, leg.source.strides, strict=True):
        if dims and dims[-1][1] == stride * size:
            dims[-1] = dims[-1][0] * size, stride
        else:
            dims.append((size, stride))
    *outer, (width, _) = dims
    target = [width * prod(size for size, _ in outer[d + 1 :]) for d in range(len(outer))]
    if not outer:
        outer, target = [(1, width)], [width]
    longest = max(range(len(outer)), key=lambda d: outer[d][0])
    others = [d for d in range(len(outer)) if d != longest]
    rows, pitch = outer[longest]
    found = []
    for index in every(*(range(outer[d][0]) for d in others)):
        source = leg.source.start + sum(i * outer[d][1] for i, d in zip(index, others, strict=True))
        place = first + sum(i * target[d] for i, d in zip(index, others, strict=True))
        lies = (source, leg.source.rank_stride, width, pitch, place, target[longest])
        start, step, *line = (value * WORD_BYTES for value in lies)
        found.append(Parcel(0, start, step, rows, *line))
    return tuple(found)
