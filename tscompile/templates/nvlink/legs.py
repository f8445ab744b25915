"""Exchanges as the kernel of exchange.h takes them: what is sent, and the places that it goes to, as grids of words of 16 bytes.

Pure functions of sizes and strides. How a peer's slot is cut into batches depends on sizes alone, so all ranks agree on it whatever the
strides of their tensors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ...problem import Delivery
from ..all_to_all import Outputs
from .kernels.config import DATA_FLAGS, GRID_DIMS, MAX_LEGS, MAX_TARGETS, UNIT_WORDS, WORD_BYTES

# Each batch takes a fence, but CTAs must share the batches evenly. [measured 2026-11-28, 2x H200, 0.5 to 96 MiB to a peer: 140 or more
# batches where these are shorter than 64 KiB, and no longer ones, are within 4 % of the best; 1000 short ones take twice as long]
_MOST_BATCHES = 280
_LONGEST = 16  # units of a batch, unless the flags of a slot do not suffice
_INT32 = 1 << 31


@dataclass(frozen=True)
class Layout:
    """Where a grid `[f1, ..., fk]` of each rank lies in a tensor: strides and start in items, `fixed` an index of a dim, or -1."""

    tensor: int
    start: int
    rank_stride: int
    strides: tuple[int, ...]
    fixed: tuple[int, ...]


@dataclass(frozen=True)
class Leg:
    """An exchange: the grid that each rank gets of each, where it is sent from, and where it goes to."""

    sizes: tuple[int, ...]
    source: Layout
    targets: tuple[Layout, ...]

    @property
    def words(self) -> int:
        """Of a leg that `in_words` has made."""
        return prod(self.sizes)


def legs_of(
    deliveries: Sequence[Delivery],
    joins: Sequence[int],
    inputs: Sequence[Tensor],
) -> list[Leg]:
    """The exchanges of `inputs`, `[R, f1, ..., fk]` each.

    Args:
        deliveries, joins: as in the plan.
        inputs: their sizes and strides count; meta tensors will do.
    """
    meta = torch.empty(0, device="meta", dtype=inputs[0].dtype)
    outputs = Outputs(deliveries, joins, [x.shape for x in inputs], meta)
    targets: list[list[Layout]] = [[] for _ in inputs]
    for part, index, view in outputs.places():
        dims = inputs[part.exchange].dim()
        strides, fixed = [0] * dims, [-1] * dims
        for dim, stride in zip(part.order, view.stride(), strict=True):
            strides[dim] = stride
        for dim, at in part.fixed:
            fixed[dim] = at
        targets[part.exchange].append(
            Layout(index, int(view.storage_offset()), strides[0], tuple(strides[1:]), tuple(fixed[1:]))
        )
    legs = []
    for number, (x, wanted) in enumerate(zip(inputs, targets, strict=True)):
        source = Layout(number, 0, x.stride(0), tuple(x.stride()[1:]), (-1,) * (x.dim() - 1))
        legs += _split(Leg(tuple(x.shape[1:]), source, tuple(wanted)))
    return legs


def _split(leg: Leg) -> list[Leg]:
    """One leg for each index of a dim of which every target takes one: then no target has words to pass by."""
    taken = [{target.fixed[dim] for target in leg.targets} for dim in range(len(leg.sizes))]
    dim = next(
        (dim for dim, indices in enumerate(taken) if -1 not in indices and len(indices) == leg.sizes[dim] > 1), None
    )
    if dim is None:
        return [leg]
    parts = []
    for index in range(leg.sizes[dim]):
        part = _at(leg, dim, index)
        wanted = [t for t in part.targets if t.fixed[dim] == index]
        free = [replace(t, fixed=(*t.fixed[:dim], -1, *t.fixed[dim + 1 :])) for t in wanted]
        parts.append(replace(part, targets=tuple(free)))
    return parts


def _at(leg: Leg, dim: int, index: int) -> Leg:
    """What of it has this index of a dim, which stays with size 1."""
    sizes = (*leg.sizes[:dim], 1, *leg.sizes[dim + 1 :])

    def moved(layout: Layout) -> Layout:
        return replace(layout, start=layout.start + index * layout.strides[dim])

    return Leg(sizes, moved(leg.source), tuple(moved(target) for target in leg.targets))


def in_words(leg: Leg, item_bytes: int) -> Leg | None:
    """The same with as few dims as possible, sizes and strides in words; None if it does not consist of whole words."""
    layouts = (leg.source, *leg.targets)
    kept = [d for d, size in enumerate(leg.sizes) if size != 1]
    sizes = [leg.sizes[d] for d in kept]
    strides = [[layout.strides[d] for d in kept] for layout in layouts]
    fixed = [[layout.fixed[d] for d in kept] for layout in layouts]
    d = len(sizes) - 2
    while d >= 0:
        runs = all(s[d] == s[d + 1] * sizes[d + 1] for s in strides) and all(f[d] < 0 and f[d + 1] < 0 for f in fixed)
        if runs:
            sizes[d : d + 2] = [sizes[d] * sizes[d + 1]]
            for s, f in zip(strides, fixed, strict=True):
                del s[d], f[d]
        d -= 1
    if not sizes or len(sizes) > GRID_DIMS or sizes[-1] * item_bytes % WORD_BYTES:
        return None
    if any(s[-1] != 1 for s in strides) or any(f[-1] >= 0 for f in fixed):
        return None
    items = WORD_BYTES // item_bytes
    sizes[-1] //= items
    converted = []
    for layout, s, f in zip(layouts, strides, fixed, strict=True):
        outer = [layout.start, layout.rank_stride, *s[:-1]]
        if any(stride % items or abs(stride // items) >= _INT32 for stride in outer):
            return None
        start, rank_stride, *rest = (stride // items for stride in outer)
        converted.append(Layout(layout.tensor, start, rank_stride, (*rest, 1), tuple(f)))
    return Leg(tuple(sizes), converted[0], tuple(converted[1:]))


@dataclass(frozen=True)
class Batches:
    """How what a peer gets is cut. words: of a batch. firsts: the first batch of each leg. count: of all."""

    words: int
    firsts: tuple[int, ...]
    count: int

    def scratch_bytes(self, ranks: int) -> int:
        """Of a slot."""
        return (ranks - 1) * self.count * self.words * WORD_BYTES

    def flags(self, ranks: int) -> int:
        return (ranks - 1) * self.count


def batches_of(words: Sequence[int], ranks: int) -> Batches:
    """Batches of legs of so many words."""

    def cut(units: int) -> Batches:
        firsts, count = [], 0
        for size in words:
            firsts.append(count)
            count += -(-size // (units * UNIT_WORDS))
        return Batches(units * UNIT_WORDS, tuple(firsts), count)

    units = 1
    while True:
        found = cut(units)
        crowded = found.flags(ranks) > DATA_FLAGS
        if not crowded and (units >= _LONGEST or found.flags(ranks) <= _MOST_BATCHES):
            return found
        units *= 2


def worded(
    deliveries: Sequence[Delivery],
    joins: Sequence[int],
    inputs: Sequence[Tensor],
) -> list[Leg] | None:
    """`legs_of` in words, None if the kernel cannot take them."""
    if not 1 <= len(inputs) <= MAX_LEGS or len(deliveries) > MAX_TARGETS:
        return None
    legs = [in_words(leg, inputs[0].element_size()) for leg in legs_of(deliveries, joins, inputs)]
    found = [leg for leg in legs if leg is not None and leg.words]
    return found if len(found) == len(legs) <= MAX_LEGS else None


def rows_of(legs: Sequence[Leg], batches: Batches) -> list[list[int]]:
    """The kernel's table: rows of legs, then of targets, as exchange.h names their words."""
    rows, places, first = [], [], 0
    for leg, batch in zip(legs, batches.firsts, strict=True):
        rows.append([batch, leg.words, first, len(leg.targets), *_place(leg, leg.source)])
        places += [[0, 0, 0, 0, *_place(leg, target)] for target in leg.targets]
        first += len(leg.targets)
    return rows + places


def _place(leg: Leg, layout: Layout) -> list[int]:
    """Dims stand at the end, those that are missing have size 1."""
    missing = GRID_DIMS - len(leg.sizes)
    ones, zeros, free = [1] * missing, [0] * missing, [-1] * missing
    sizes = [*ones, *leg.sizes]
    multipliers, shifts = zip(*(_reciprocal(size) for size in sizes), strict=True)
    return [layout.rank_stride, *sizes, *zeros, *layout.strides, *free, *layout.fixed, *multipliers, *shifts]


def _reciprocal(size: int) -> tuple[int, int]:
    """(multiplier, shift) with `index // size == index * multiplier >> 32 >> shift` for all indices below 2**31; as int32s."""
    if size == 1:
        return 0, 0
    bits = (size - 1).bit_length()
    multiplier = -(-(1 << (31 + bits)) // size)  # rounded up; below 2**32
    return (multiplier + (1 << 31)) % (1 << 32) - (1 << 31), bits - 1
