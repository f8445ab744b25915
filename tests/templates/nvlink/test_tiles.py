"""Tables of tiles: every number in its place exactly once, and no order of events that ends in a wait for ever.

Most tests shrink a tile to a few rows, so that small sizes have many tiles.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tscompile.templates.nvlink import gemm_reduce, tiles
from tscompile.templates.nvlink.channel import ACK, DATA_FLAGS
from tscompile.templates.nvlink.sums import PULL_WIDTHS, pulled
from tscompile.templates.nvlink.tiles import Reduction, Row, all_reduce_tiles, gather_tiles, scatter_tiles

from .protocol import Actor, Claims, Gatherer, Puller, Stuck, reduce_all, run_all, tile_count

RANKS = st.integers(2, 8)
# With tiles of 4 rows: tiny, ragged, whole, and ragged ones whose waste is small enough for tiles of one shard only.
INNER = st.one_of(st.integers(1, 13), st.sampled_from([16, 32, 39, 43]))
SEEDS = st.integers(0, 10**6)
QUICK = settings(deadline=None, max_examples=200)


@pytest.fixture(scope="module", autouse=True)
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_M", 4)
        patch.setattr(tiles, "BAND", 3)
        patch.setattr(tiles, "_SHARED_BAND", 2)
        yield


@st.composite
def gathers(draw: st.DrawFn) -> tuple[int, int, int, list[int], int]:
    """ranks, pieces, inner, widths, tile_n"""
    widths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    return draw(RANKS), draw(st.integers(1, 4)), draw(INNER), widths, draw(st.integers(3, 9))


@QUICK
@given(gathers(), st.integers(1, 5), SEEDS)
def test_a_gather(sizes: tuple[int, int, int, list[int], int], workers: int, seed: int) -> None:
    """Whatever arrives when: each element of each result is stored once, from rows that are there."""
    ranks, pieces, inner, widths, tile_n = sizes
    rank = seed % ranks
    made = gather_tiles(rank, ranks, pieces, inner, widths, tile_n)
    gatherer = Gatherer(rank, ranks, pieces, inner, made, widths, tile_n)
    claims, dice = Claims(made.rows), random.Random(seed)
    sources = [source for source in range(ranks) if source != rank]
    dice.shuffle(sources)
    arrivals = Claims([(source,) for source in sources])  # type: ignore[misc]
    engine = Actor(arrivals, 1, lambda row: gatherer.arrive(row[0]) is None)
    run_all([engine, *(Actor(claims, dice.randint(1, 4), gatherer.compute) for _ in range(workers))], seed)
    gatherer.check()


@QUICK
@given(gathers(), SEEDS, st.booleans())
def test_what_a_gathers_tile_says_of_itself(
    sizes: tuple[int, int, int, list[int], int], seed: int, pushed: bool
) -> None:
    ranks, pieces, inner, widths, tile_n = sizes
    rank = seed % ranks
    made = gather_tiles(rank, ranks, pieces, inner, widths, tile_n, pushed=pushed)
    flagged = set(range(ranks)) - (set() if pushed else {rank})  # the copy engine sets no flag of its own rank
    spans, one_source, first_needed = False, True, []
    for row, _, stored, own, _, out_row, mask, _ in made.rows:
        sources = {at // inner % ranks for at in range(out_row, out_row + stored)}
        assert mask == sum(1 << source for source in sources & flagged)
        if own:
            assert sources == {rank} and not pushed
            piece, within = out_row // (ranks * inner), out_row % inner
            assert row == piece * inner + within and within + stored <= inner
        else:
            assert row == out_row
            spans |= rank in sources
        one_source &= len(sources) == 1
        first_needed += [source for source in range(ranks) if mask >> source & 1 and source not in first_needed]
    assert made.spans == (spans and not pushed)
    # Every peer is waited for: two slots suffice only if an op ends after every peer has begun it.
    assert set(first_needed) == flagged
    if all(mask & (mask - 1) == 0 for *_, mask, _ in made.rows):
        order = [(rank + step) % ranks for step in range(ranks)]
        assert first_needed == [source for source in order if source in flagged]  # the order of their arrival
    waits = [
        max((step for step in range(ranks) if row[6] >> (rank + step) % ranks & 1), default=0) for row in made.rows
    ]
    if one_source:
        assert waits == sorted(waits)


@st.composite
def scatters(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    """ranks, outer, inner, n, tile_n, part"""
    return (
        draw(RANKS),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 13)),
        draw(st.integers(1, 20)),
        draw(st.integers(3, 9)),
        draw(st.integers(1, 40)),
    )


@st.composite
def all_reduces(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    """ranks, m, n, tile_n, part, lag"""
    return (
        draw(RANKS),
        draw(st.integers(1, 50)),
        draw(st.integers(1, 20)),
        draw(st.integers(3, 9)),
        draw(st.integers(1, 40)),
        draw(st.integers(0, 4)),
    )


def products_of(ranks: int, m: int, n: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-9, 10, (m, n), generator=generator) for _ in range(ranks)]


@QUICK
@given(scatters(), st.lists(st.integers(1, 5), min_size=8, max_size=8), SEEDS)
def test_a_reduce_scatter(sizes: tuple[int, int, int, int, int, int], workers: list[int], seed: int) -> None:
    """With any number of CTAs and any order of events all ranks end, and have their rows of the sum."""
    ranks, outer, inner, n, tile_n, _ = sizes
    tables = [scatter_tiles(rank, *sizes) for rank in range(ranks)]
    products = products_of(ranks, outer * ranks * inner, n, seed)
    world = reduce_all(tables, products, outer * inner, tile_n, workers, seed)
    total = sum(products[1:], start=products[0]).view(outer, ranks, inner, n)
    for rank, reducer in enumerate(world):
        assert torch.equal(reducer.written, torch.ones_like(reducer.written))
        assert torch.equal(reducer.out, total[:, rank].reshape(-1, n))


@QUICK
@given(all_reduces(), st.lists(st.integers(1, 5), min_size=8, max_size=8), SEEDS)
def test_an_all_reduce(sizes: tuple[int, int, int, int, int, int], workers: list[int], seed: int) -> None:
    """The same; what a rank does not sum itself comes from the sums that the others leave."""
    ranks, m, n, tile_n, _, _ = sizes
    tables = [all_reduce_tiles(rank, *sizes) for rank in range(ranks)]
    products = products_of(ranks, m, n, seed)
    world = reduce_all(tables, products, m, tile_n, workers, seed)
    for reducer in world:
        assert torch.equal(reducer.written, torch.ones_like(reducer.written))
        assert torch.equal(reducer.out, sum(products[1:], start=products[0]))


def own_first(table: Reduction) -> Reduction:
    return replace(table, rows=sorted(table.rows, key=lambda row: not row[3]))


def last_part_first(table: Reduction) -> Reduction:
    return replace(table, pulls=table.pulls[::-1])


@pytest.mark.parametrize("wrong", [own_first, last_part_first])
def test_an_order_that_deadlocks_is_seen(wrong) -> None:
    """What the tests above are for: with own tiles or the last part first, every worker or puller waits for a peer that waits."""
    tables = [wrong(all_reduce_tiles(rank, 2, 16, 8, 4, 2, 1)) for rank in range(2)]
    with pytest.raises(Stuck):
        reduce_all(tables, products_of(2, 16, 8, 0), 16, 4, [1, 1], 0)


class Hoarder(Puller):
    """Tells of a tile behind the first piece of the next one, whether that one's flag is set or not."""

    def may_tell_later(self, there: bool, coming: Row | None) -> bool:
        return coming is not None


class Hasty(Puller):
    """Tells of a tile while its last copies are on their way."""

    def wait_until_written(self, newer: int) -> None:
        super().wait_until_written(newer + 1)


def test_a_puller_that_keeps_what_it_moved_until_a_peer_signals_is_seen() -> None:
    tables = [all_reduce_tiles(rank, 2, 16, 8, 4, 2, 0) for rank in range(2)]
    reduce_all(tables, products_of(2, 16, 8, 0), 16, 4, [1, 1], 0)
    with pytest.raises(Stuck):
        reduce_all(tables, products_of(2, 16, 8, 0), 16, 4, [1, 1], 0, Hoarder)


def test_a_puller_that_tells_before_its_copies_are_written_is_seen() -> None:
    tables = [scatter_tiles(rank, 2, 1, 16, 8, 4, 2) for rank in range(2)]
    reduce_all(tables, products_of(2, 32, 8, 0), 16, 4, [1, 1], 0)
    with pytest.raises(AssertionError, match="written after"):
        reduce_all(tables, products_of(2, 32, 8, 0), 16, 4, [1, 1], 0, Hasty)


@pytest.mark.parametrize("seed", range(20))
def test_sums_may_be_pulled_in_any_order(seed: int) -> None:
    """Nothing waits for the pull of a sum, so its list cannot hold up the others."""
    tables = [all_reduce_tiles(rank, 3, 30, 20, 4, 6, 1) for rank in range(3)]
    for table in tables:
        random.Random(seed).shuffle(table.results)
    reduce_all(tables, products_of(3, 30, 20, 0), 30, 4, [1, 2, 1], seed)


def test_own_tiles_come_some_parts_behind_those_of_the_peers() -> None:
    made = all_reduce_tiles(0, 2, 4 * 12, 8, 8, 4, 2)  # six tiles of each rank, two in a part
    assert [(row[3], row[4]) for row in made.rows] == [
        (own, index) for own, first in ((0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4)) for index in (first, first + 1)
    ]
    assert [pull[2] for pull in made.pulls] == [pull[2] for pull in made.results] == list(range(6))


def test_a_scatter_sends_to_all_peers_in_turn_and_sums_last() -> None:
    made = scatter_tiles(1, 3, 1, 4 * 2, 16, 8, 6)  # four tiles of each rank, two in a part
    assert [(row[3], row[6], row[7] % 4) for row in made.rows] == [
        *((0, peer, index) for part in (0, 2) for peer in (2, 0) for index in (part, part + 1)),
        *((1, 0, index) for index in range(4)),
    ]
    # Those that begin first, which are the ranks before this one, are pulled first.
    assert [pull[0] for pull in made.pulls] == [0, 0, 2, 2] * 2


def check_fit(tables: list[Reduction], limit: int) -> None:
    """Tables of all ranks name the same tiles, flags and places."""
    ranks, count = len(tables), tables[0].tiles
    assert {table.tiles for table in tables} == {count}
    assert max(table.flags for table in tables) <= limit
    sends: dict[tuple[int, int, int], tuple[int, int]] = {}  # (from, to, flag): (tile in the slot, landing place)
    sums: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # (owner, flag): (tile, row, column, rows)
    for rank, table in enumerate(tables):
        used = set()
        for row, col, stored, own, index, out_row, peer, flag in table.rows:
            assert 0 <= flag < limit
            if own:
                sums[rank, flag] = (index, out_row, col, stored)
            else:
                assert peer != rank and index not in used
                used.add(index)
                sends[rank, peer, flag] = (index, row)
        assert used <= set(range((ranks - 1) * count))
    for rank, table in enumerate(tables):
        assert len(table.pulls) == sum(to == rank for _, to, _ in sends)
        for peer, flag, source, to, *_ in table.pulls:
            index, _ = sends[peer, rank, flag]
            assert source == index
            own_index = to - peer * count  # where the own tile looks: landing [ranks, tiles]
            assert 0 <= own_index < count and any(row[3] and row[4] == own_index for row in table.rows)
            mine = next(row for row in table.rows if row[3] and row[4] == own_index)
            theirs = next(row for row in tables[peer].rows if not row[3] and row[6] == rank and row[7] == flag)
            assert mine[:3] == theirs[:3]  # the same tile of the product
        assert len({pull[:2] for pull in table.results}) == len(table.results)
        for owner, flag, source, row, col, stored, *_ in table.results:
            assert owner != rank and sums[owner, flag] == (source, row, col, stored)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("width", PULL_WIDTHS)
@pytest.mark.parametrize(("m", "n"), [(8192, 4096), (1000, 1304), (130, 8), (8, 8), (128 * 40, 264)])
def test_tables_of_real_sizes_fit_together(
    monkeypatch: pytest.MonkeyPatch, ranks: int, m: int, n: int, width: int
) -> None:
    monkeypatch.setattr(tiles, "TILE_M", 128)
    monkeypatch.setattr(tiles, "BAND", 8)
    monkeypatch.setattr(tiles, "_SHARED_BAND", 4)
    for outer in (1, 3):
        inner = max(1, m // ranks // outer)
        count = outer * tile_count(inner, n, width)
        assert pulled(ranks * count, width, ranks, False, 0.0).scratch_bytes == (ranks - 1) * count * 128 * width * 2
        made = [scatter_tiles(rank, ranks, outer, inner, n, width, gemm_reduce._SCATTER_PART) for rank in range(ranks)]
        assert made[0].tiles == count
        check_fit(made, min(2 * ranks * count, DATA_FLAGS))
        assert not any(table.results for table in made)
    share = -(-tile_count(m, n, width) // ranks)
    plan = pulled(tile_count(m, n, width), width, ranks, True, 0.0)
    assert plan.scratch_bytes == ranks * share * 128 * width * 2
    made = [all_reduce_tiles(rank, ranks, m, n, width, gemm_reduce._PART, gemm_reduce._LAG) for rank in range(ranks)]
    assert made[0].tiles == share
    check_fit(made, min(2 * ranks * share, DATA_FLAGS))


@QUICK
@given(scatters(), all_reduces())
def test_tables_of_all_ranks_fit_together(
    scatter: tuple[int, int, int, int, int, int], reduce: tuple[int, int, int, int, int, int]
) -> None:
    ranks, outer, inner, n, tile_n, _ = scatter
    check_fit(
        [scatter_tiles(rank, *scatter) for rank in range(ranks)], 2 * ranks * outer * tile_count(inner, n, tile_n)
    )
    ranks, m, n, tile_n, _, _ = reduce
    check_fit(
        [all_reduce_tiles(rank, *reduce) for rank in range(ranks)], 2 * ranks * -(-tile_count(m, n, tile_n) // ranks)
    )


def test_flags_of_data_lie_below_those_of_acknowledgements() -> None:
    largest = DATA_FLAGS // 16  # tiles of each of 8 ranks
    assert pulled(8 * largest, 256, 8, True, 0.0).scratch_bytes > 0
    assert pulled(8 * largest + 1, 256, 8, True, 0.0).scratch_bytes < 0
    assert DATA_FLAGS <= ACK
