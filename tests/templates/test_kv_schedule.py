"""The schedule of attention over gathered keys, against the mask itself, for random cuts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tscompile.templates.kv_schedule import Cut, KvSchedule, Step, tables


@st.composite
def schedules(draw: st.DrawFn) -> KvSchedule:
    ranks, causal = draw(st.integers(1, 5)), draw(st.booleans())
    queries = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    more = draw(st.lists(st.integers(0, 20), min_size=len(queries), max_size=len(queries)))
    keys = [length + extra for length, extra in zip(queries, more, strict=True)]
    if not causal and draw(st.booleans()):
        queries, keys = keys, queries
    tile = st.integers(1, 17)
    return KvSchedule(
        Cut(tuple(queries), ranks, draw(st.booleans())),
        Cut(tuple(keys), ranks, draw(st.booleans())),
        causal,
        draw(tile),
        draw(tile),
    )


def keys_at(schedule: KvSchedule) -> dict[int, tuple[int, int]]:
    """Row of the gathered buffer -> (sequence, position) of the key that lies there."""
    found = {}
    for rank in range(schedule.keys.ranks):
        for run in schedule.keys.runs(rank):
            row = schedule.gathered.row(rank, run.part, run.sequence)
            begin, end = schedule.gathered.slab(rank * schedule.keys.parts + run.part)
            assert row % schedule.tile_keys == 0 and begin <= row and row + run.stop - run.start <= end
            for position in range(run.start, run.stop):
                assert row + position - run.start not in found
                found[row + position - run.start] = run.sequence, position
    return found


def seen(schedule: KvSchedule, sequence: int, query: int) -> set[tuple[int, int]]:
    """What the mask lets a query see."""
    length = schedule.keys.lengths[sequence]
    stop = query + 1 + length - schedule.queries.lengths[sequence] if schedule.causal else length
    return {(sequence, key) for key in range(stop)}


def passed(schedule: KvSchedule, step: Step, query: int) -> list[int]:
    """Rows of the gathered buffer that a query of the tile sees in a step."""
    return [step.row + j for j in range(schedule.tile_keys) if j < step.valid and j <= query + step.diagonal]


@settings(deadline=None, max_examples=150)
@given(schedules())
def test_every_query_sees_every_key_of_the_mask_once(schedule: KvSchedule) -> None:
    keys = keys_at(schedule)
    for rank in range(schedule.queries.ranks):
        queries = {
            run.row + i: (run.sequence, run.start + i)
            for run in schedule.queries.runs(rank)
            for i in range(run.stop - run.start)
        }
        assert sorted(queries) == list(range(schedule.queries.rows(rank)))
        met = Counter()
        for tile in schedule.tiles(rank):
            assert 0 < tile.rows <= schedule.tile_rows and tile.steps
            for i in range(tile.rows):
                sequence, position = queries[tile.row + i]
                rows = [row for step in tile.steps for row in passed(schedule, step, i)]
                assert len(rows) == len(set(rows))
                assert {keys[row] for row in rows} == seen(schedule, sequence, position)
                met[tile.row + i] += 1
        assert met == Counter(queries.keys())


@settings(deadline=None, max_examples=150)
@given(schedules())
def test_steps_are_needed_come_in_order_and_stay_in_their_slab(schedule: KvSchedule) -> None:
    for rank in range(schedule.queries.ranks):
        order, used = schedule.slabs_in_order(rank), set()
        assert sorted(order) == list(range(schedule.gathered.slabs))
        assert [slab // schedule.keys.parts for slab in order[: schedule.keys.parts]] == [rank] * schedule.keys.parts
        tiles = schedule.tiles(rank)
        assert sorted(tiles, key=lambda tile: -len(tile.steps)) == tiles
        for tile in tiles:
            slabs = [step.slab for step in tile.steps]
            assert slabs == sorted(slabs, key=order.index)
            used |= set(slabs)
            for step in tile.steps:
                assert passed(schedule, step, tile.rows - 1), "no query sees anything"
                begin, end = schedule.gathered.slab(step.slab)
                assert begin <= step.row and step.row + schedule.tile_keys <= end
        assert used == {slab for slab in order if schedule.needs(rank, slab)}


@settings(deadline=None)
@given(schedules())
def test_what_is_used_is_sent_once_and_nothing_else(schedule: KvSchedule) -> None:
    ranks, parts = schedule.keys.ranks, schedule.keys.parts
    for rank in range(ranks):
        got = [(peer, slab) for peer in range(ranks) for to, slab in schedule.sends(peer) if to == rank]
        assert all(slab // parts == peer for peer, slab in got)
        used = {step.slab for tile in schedule.tiles(rank) for step in tile.steps}
        assert sorted(slab for _, slab in got) == sorted(slab for slab in used if slab // parts != rank)


@given(schedules())
def test_tables_say_the_same(schedule: KvSchedule) -> None:
    tiles = schedule.tiles(0)
    tile_rows, step_rows = tables(tiles)
    assert len(tile_rows) == len(tiles)
    for (row, rows, first, count), tile in zip(tile_rows, tiles, strict=True):
        assert (row, rows) == (tile.row, tile.rows)
        assert tuple(Step(*words) for words in step_rows[first : first + count]) == tile.steps


@given(schedules())
def test_a_mask_is_asked_for_only_where_it_takes_something(schedule: KvSchedule) -> None:
    for tile in schedule.tiles(schedule.queries.ranks - 1):
        for step in tile.steps:
            whole = step.valid == schedule.tile_keys and step.diagonal >= schedule.tile_keys - 1
            taken = any(len(passed(schedule, step, i)) < schedule.tile_keys for i in range(tile.rows))
            assert taken != whole


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_gives_all_ranks_the_same_work(ranks: int) -> None:
    def work(zigzag: bool) -> list[int]:
        cut = Cut((128 * 16 * ranks,), ranks, zigzag)
        schedule = KvSchedule(cut, cut, True, 128, 128)
        return [sum(len(tile.steps) for tile in schedule.tiles(rank)) for rank in range(ranks)]

    assert len(set(work(True))) == 1
    contiguous = work(False)
    assert contiguous[-1] > 1.4 * sum(contiguous) / ranks and sum(contiguous) == sum(work(True))


def test_causal_chunks_that_nobody_needs_are_not_sent() -> None:
    cut = Cut((64, 32), 4)
    schedule = KvSchedule(cut, cut, True, 8, 8)
    assert [schedule.sends(rank) for rank in range(4)] == [[(3, 0), (2, 0), (1, 0)], [(3, 1), (2, 1)], [(3, 2)], []]


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "tile", "message"),
    [
        (((8,), 2), ((8,), 3), False, 4, "queries on 2 ranks, keys on 3"),
        (((8,), 2), ((8, 8), 2), False, 4, "1 sequences of queries, 2 of keys"),
        (((8, 9), 2), ((8, 8), 2), True, 4, "sequence 1: 9 queries, 8 keys"),
        (((8,), 2), ((8,), 2), True, 0, "both must be positive"),
        (((8, 0), 2), ((8, 8), 2), True, 4, "none of them empty"),
        (((), 2), ((), 2), True, 4, "at least one sequence"),
        (((8,), 0), ((8,), 0), True, 4, "0 ranks"),
    ],
)
def test_what_does_not_go_together_is_refused(queries, keys, causal: bool, tile: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KvSchedule(Cut(*queries), Cut(*keys), causal, tile, tile)
