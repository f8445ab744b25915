"""Which keys each rank holds: the layout proof of the keys and values of an attention that were gathered along the sequence.

A gathered tensor is the grid `[R, f1, ..., fk]` of exchanges.py. Keys `[B, heads, S, E]` are factors of it, the rank among those of S.
Then S is made of equal *pieces*, each of them a stretch of one rank's shard:

    one view of the gathered tensor     S = (rank, rest): a piece per rank; S = (j, rank, rest): striped, piece j of each rank in turn
    a cat of several views along S      zig-zag, say: pieces in any order

Attention does not mind the order of its keys, but it must be the same for keys and values, and a causal mask goes by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product as combinations

import torch
from torch import fx

from ..problem import Keep, Keys
from .cuts import Placement
from .exchanges import Exchange
from .layout import JOINS, Digit, Prover, View
from .sizes import plain, product

MOST_PIECES = 256  # their numbers stand in the plan
SEQUENCE = 2  # dim of keys and values


@dataclass(frozen=True)
class Gathered:
    """Keys or values `[B, heads, S, E]`: the exchange that they come from, and the views that make up S, one after the other."""

    node: fx.Node
    exchange: Exchange
    views: tuple[View, ...]


@dataclass(frozen=True)
class Pieces:
    """order: number in S of piece j of rank r, as in ChunkedAttention.
    outer: the factors that tell pieces of a shard apart, outermost first. inner: those of a piece.
    kept: the factors of the dims but S. fixed: those that are selected, with their index.
    repeated: the program repeats the heads afterwards.
    """

    order: tuple[tuple[int, ...], ...]
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    fixed: tuple[tuple[int, int], ...]
    repeated: bool


def find_gathered(node: fx.Node, prover: Prover, exchanges: dict[fx.Node, Exchange]) -> Gathered | Keep:
    """How `node` is made of what one of `exchanges` received; cuts its grid so that `find_pieces` can read it."""
    sources = _joined_along_sequence(node, prover)
    views: list[View] = []
    for source in sources:
        view = prover.view(source)
        if not isinstance(view, View):
            return Keep("not-a-strided-view", f"keys or values are no strided view of what is gathered: {view.reason}")
        views.append(view)
    exchange = exchanges.get(views[0].root)
    if exchange is None or any(view.root is not views[0].root for view in views):
        return Keep("no-kernel", "keys and values are not both gathered, and by nothing but movement")
    if any(view.casts for view in views):
        return Keep("lossy-casts", "keys or values are cast after they were gathered")
    if not all(exchange.cuts.cut_for(view, exchange.block) for view in views):
        return Keep("not-a-strided-view", "keys or values read a part of what is gathered, or a part twice")
    return Gathered(node, exchange, tuple(views))


def _joined_along_sequence(node: fx.Node, prover: Prover) -> list[fx.Node]:
    """The inputs of a cat along the sequence that is no strided view as a whole, or of a copy of one; else `node` itself."""
    while not isinstance(prover.view(node), View):
        if node.target in (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default):
            node = node.all_input_nodes[0]
            continue
        dim = node.args[1] if len(node.args) > 1 else 0
        if node.target is JOINS[0] and int(dim) % 4 == SEQUENCE:  # type: ignore[arg-type]
            return list(node.args[0])  # type: ignore[arg-type]
        break
    return [node]


def find_pieces(gathered: Gathered) -> Pieces | Keep:
    """Read the order off the placements; for a grid that is not cut any more."""
    places: list[Placement] = []
    for view in gathered.views:
        place = gathered.exchange.cuts.place(view)
        assert place is not None, "the grid was cut for this view"
        places.append(place)
    dims = [_without_repeats(place) for place in places]
    if any(dim is None for dim in dims):
        return Keep("repeated", "keys or values are repeated after they were gathered, and not head by head")
    known = [dim for dim in dims if dim is not None]
    kept = [tuple(d for i, d in enumerate(dim) if i != SEQUENCE) for dim in known]
    # Factors that single out a piece: fixed in some view, to an index that not all views share.
    common = set(places[0].fixed)
    for place in places[1:]:
        common &= set(place.fixed)
    telling = {f for place in places for f, _ in place.fixed if f not in dict(common)} | {0}
    found = [_split(dim[SEQUENCE], telling) for dim in known]
    inner = found[0][1]
    if any(k != kept[0] for k in kept) or any(rest != inner for _, rest in found) or 0 in dict(common):
        return Keep("not-the-sequence", "the ranks do not hold parts of the sequence of keys and values")
    outer = tuple(sorted((telling | {f for lead, _ in found for f in lead}) - {0}))
    order = _order(gathered.exchange, places, [lead for lead, _ in found], outer)
    if isinstance(order, Keep):
        return order
    return Pieces(order, outer, inner, kept[0], tuple(sorted(common)), any(place.repeats for place in places))


def _without_repeats(place: Placement) -> list[tuple[int, ...]] | None:
    """Factors of each dim. Heads that are repeated one by one are left out: attention reads fewer heads of keys than of queries."""
    dims: list[tuple[int, ...]] = []
    for number, dim in enumerate(place.dims):
        if number == 1 and dim and isinstance(dim[-1], Digit):
            dim = dim[:-1]
        if any(isinstance(factor, Digit) for factor in dim):
            return None
        dims.append(tuple(factor for factor in dim if isinstance(factor, int)))
    return dims


def _split(sequence: tuple[int, ...], telling: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(factors up to the last one that tells pieces apart, the factors of a piece)."""
    last = max((i for i, factor in enumerate(sequence) if factor in telling), default=-1)
    return sequence[: last + 1], sequence[last + 1 :]


def _order(
    exchange: Exchange, places: Sequence[Placement], leads: Sequence[tuple[int, ...]], outer: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | Keep:
    sizes = [plain(size) for size in exchange.cuts.sizes]
    counts: list[int] = []
    for factor in (0, *outer):
        size = sizes[factor]
        if not isinstance(size, int):
            return Keep("symbolic-size", "symbolic sizes do not show in which order the ranks hold the keys")
        counts.append(size)
    per_rank = int(product(counts[1:]))
    if exchange.ranks * per_rank > MOST_PIECES:
        return Keep("not-the-sequence", "the ranks hold many small parts of the sequence of keys and values")
    size_of = dict(zip((0, *outer), counts, strict=True))
    order: list[list[int]] = [[-1] * per_rank for _ in range(exchange.ranks)]
    number = 0
    for place, lead in zip(places, leads, strict=True):
        for indices in combinations(*(range(size_of[factor]) for factor in lead)):
            at = dict(place.fixed) | dict(zip(lead, indices, strict=True))
            if any(factor not in at for factor in (0, *outer)):
                return Keep("not-the-sequence", "the ranks do not hold parts of the sequence of keys and values")
            piece = 0
            for factor in outer:
                piece = piece * size_of[factor] + at[factor]
            order[at[0]][piece] = number
            number += 1
    if number != exchange.ranks * per_rank or any(n < 0 for pieces in order for n in pieces):
        return Keep("not-the-sequence", "a part of the gathered keys or values is missing, or there twice")
    return tuple(tuple(pieces) for pieces in order)


def keys_of(pieces: Pieces, shard: int) -> Keys:
    """For the plan: the input number `shard` as `[B, heads, S / R, E]`, its pieces one after the other."""
    batch, heads, width = pieces.kept
    return Keys(shard, (batch, heads, (*pieces.outer, *pieces.inner), width), pieces.fixed)
