"""A matmul_all_to_all over NVLink: the chunks of columns that its matmuls are computed in, and the copies that send them.

Copy engines send a leg (legs.py) as soon as the chunk that holds its columns is computed, so all but the last chunk's legs travel while
something is computed. Each chunk costs the host a matmul, a fork and copies, so no more of them are cut than are worth it. What is cut
and where depends on sizes alone, so all ranks agree, and the cost model asks here, too.
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
from .kernels.config import GRID_DIMS, WORD_BYTES
from .legs import Batches, Layout, Leg, batches_of, worded
from .panels import Parcel

MOST_CHUNKS = 3  # that one matmul is cut into
_MOST_COPIES = 4  # of a leg, to each peer
_MOST_PITCH = (1 << 31) - 1  # bytes between two rows of a copy
# The pass that collects: its start, and reading and writing what a rank receives, at 3.5 TB/s [measured likewise].
_COLLECT_US = 6.0
_COLLECTED_BYTES_PER_US = 3.5e6
# Host time of a matmul of torch's and of a call of the CUDA driver. [measured 2026-11-28, H200s in a virtual machine,
# benchmarks/driver_calls.py: with one rank at work torch.mm 19 us, a copy 1.9, flags 1.5; with four torch.mm 30, the others scaled]
_MATMUL_HOST_US, _CALL_HOST_US = 30.0, 3.0
# The driver's calls of each chunk beside its copies: two that fork, the flags. Those of the end: the kernel, two that join, the event.
_CHUNK_CALLS, _LAST_CALLS = 3, 4
_AS_GOOD = 1.05  # times that differ by less are the same: predictions of large ops are 5 % off at best


@dataclass(frozen=True)
class Chunk:
    """Columns `[first, first + columns)` of the result of a matmul, `rows` of them, in a contiguous tensor of their own.

    legs: numbers of those that it holds.
    """

    matmul: int
    first: int
    columns: int
    rows: int
    legs: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.first + self.columns


@dataclass(frozen=True)
class Projection:
    """How a call computes and sends.

    legs: in words, those of the first chunk first; the tensor that a source lies in is the chunk's number.
    parcels: of each leg, what sends its grid, from its chunk to the leg's part of a slot: [batches.count, batches.words].
    divisible: more than one leg had to be sent, before any were put together.
    us: predicted until all is computed and received, by the GPU or by the host, whichever needs longer.
    """

    legs: tuple[Leg, ...]
    batches: Batches
    chunks: tuple[Chunk, ...]
    parcels: tuple[tuple[Parcel, ...], ...]
    divisible: bool
    us: float


@dataclass(frozen=True)
class _Way:
    """A way to cut all matmuls. legs: of each chunk. gpu_us, host_us: what it takes the GPU, and the host where nothing is captured."""

    chunks: Sequence[Chunk]
    legs: Sequence[Sequence[Leg]]
    gpu_us: float
    host_us: float

    @property
    def us(self) -> float:
        return max(self.gpu_us, self.host_us)


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
    alone = [_parcels(leg, 0) for leg in legs]
    if any(len(sent) > _MOST_COPIES or sent[0].pitch > _MOST_PITCH for sent in alone):
        return None
    cuts = []
    for number, gemm in enumerate(gemms):
        own = [(i, _columns(leg, ranks, gemm.n // items)) for i, leg in enumerate(legs) if owners[i] == number]
        cuts.append(_cuts(number, gemm, items, own))
    ways = []
    for chosen in every(*cuts):
        chunks = [chunk for cut in chosen for chunk in cut]
        placed = [
            [_into(legs[i], chunk, gemms[chunk.matmul].n // items, items) for i in chunk.legs] for chunk in chunks
        ]
        ways.append(_way(gemms, chunks, [_merged(own) for own in placed], ranks))
    best = _best(ways)
    chunks, ordered = list[Chunk](), list[Leg]()
    for number, (chunk, own_legs) in enumerate(zip(best.chunks, best.legs, strict=True)):
        chunks.append(replace(chunk, legs=tuple(range(len(ordered), len(ordered) + len(own_legs)))))
        ordered += [replace(leg, source=replace(leg.source, tensor=number)) for leg in own_legs]
    batches = batches_of([leg.words for leg in ordered], ranks)
    sent = tuple(_parcels(leg, first * batches.words) for leg, first in zip(ordered, batches.firsts, strict=True))
    return Projection(tuple(ordered), batches, tuple(chunks), sent, len(legs) > 1, best.us)


def _best(ways: Sequence[_Way]) -> _Way:
    """The way that takes least; of those that no prediction can tell apart from it, the one that takes the host least: the rest of the
    program may leave it no time to spare."""
    least = min(way.us for way in ways)
    return min((way for way in ways if way.us <= _AS_GOOD * least), key=lambda way: (way.host_us, way.us))


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
            groups.append(Chunk(matmul, first * items, (end - first) * items, gemm.m, (number,)))
    return [
        [_joined(groups[i:j]) for i, j in pairwise((0, *inner, len(groups)))]
        for count in range(min(MOST_CHUNKS, len(groups)))
        for inner in combinations(range(1, len(groups)), count)
    ]


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    first, last = chunks[0], chunks[-1]
    return replace(first, columns=last.end - first.first, legs=tuple(leg for chunk in chunks for leg in chunk.legs))


def _way(gemms: Sequence[Gemm], chunks: Sequence[Chunk], legs: Sequence[Sequence[Leg]], ranks: int) -> _Way:
    """Until all is computed, sent and collected: chunks are computed one after the other, and so are they sent."""
    computed = sent = 0.0
    calls = _LAST_CALLS
    for chunk, own_legs in zip(chunks, legs, strict=True):
        computed += widths.cublas_us(chunk.rows, chunk.columns, gemms[chunk.matmul].k)
        mib, count = 0.0, 0
        for leg in own_legs:
            parcels = _parcels(leg, 0)
            rows = widths.row_factor(parcels[0].width)
            mib += leg.words * WORD_BYTES * rows * (ranks - 1) / (1 << 20)
            count += len(parcels) * (ranks - 1)
        sent = max(computed, sent) + widths.copied_us(mib, count)
        calls += _CHUNK_CALLS + count
    held = sum(leg.words for own_legs in legs for leg in own_legs) * WORD_BYTES * ranks
    us = max(computed, sent) + _COLLECT_US + 2 * held / _COLLECTED_BYTES_PER_US
    return _Way(chunks, legs, us, len(chunks) * _MATMUL_HOST_US + calls * _CALL_HOST_US)


def _into(leg: Leg, chunk: Chunk, width: int, items: int) -> Leg:
    """The leg with its source in the chunk: rows are those of the chunk, in place of `width` words."""
    columns = chunk.columns // items

    def stride(words: int) -> int:
        rows, rest = divmod(words, width)
        return rows * columns + rest

    source = leg.source
    start = stride(source.start) - chunk.first // items
    strides = tuple(map(stride, source.strides))
    return replace(leg, source=Layout(source.tensor, start, stride(source.rank_stride), strides, source.fixed))


def _merged(legs: Sequence[Leg]) -> list[Leg]:
    """The legs of a chunk, one leg in place of several where that takes fewer copies.

    Legs of the same grid that lie equally far apart, as queries and keys do side by side in each row, are one grid with one dim more.
    A target takes one index of that dim.
    """
    alike: list[list[Leg]] = []
    for leg in legs:
        if alike and _continues(alike[-1], leg):
            alike[-1].append(leg)
        else:
            alike.append([leg])
    found = []
    for row in alike:
        one = _stacked(row)
        fewer = one is not None and len(_parcels(one, 0)) < sum(len(_parcels(leg, 0)) for leg in row)
        found += [one] if one is not None and fewer else row
    return found


def _continues(row: Sequence[Leg], leg: Leg) -> bool:
    """True if a leg lies behind those of a row as each of them behind the one before."""
    last, source = row[-1].source, leg.source
    step = source.start - last.start
    same = (row[-1].sizes, last.rank_stride, last.strides) == (leg.sizes, source.rank_stride, source.strides)
    return same and step > 0 and (len(row) == 1 or step == last.start - row[-2].source.start)


def _stacked(row: Sequence[Leg]) -> Leg | None:
    """Legs that lie equally far apart as one; None if it has too many dims for the kernel, or there is nothing to put together."""
    first = row[0]
    if len(row) == 1 or len(first.sizes) == GRID_DIMS:
        return None
    step = row[1].source.start - first.source.start
    dim = sum(stride >= step for stride in first.source.strides)  # strides descend

    def inserted(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:dim], value, *values[dim:])

    def with_dim(layout: Layout, stride: int, fixed: int) -> Layout:
        return replace(layout, strides=inserted(layout.strides, stride), fixed=inserted(layout.fixed, fixed))

    targets = [with_dim(target, 0, number) for number, leg in enumerate(row) for target in leg.targets]
    return Leg(inserted(first.sizes, len(row)), with_dim(first.source, step, -1), tuple(targets))


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
        found.append(Parcel(leg.source.tensor, start, step, rows, *line))
    return tuple(found)
