"""Gathers whose kernel pushes the shard: the protocol under a random scheduler, and the device code itself on the host."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tscompile.language import context
from tscompile.templates.nvlink import tiles, widths
from tscompile.templates.nvlink.kernels.config import MAX_SLICES
from tscompile.templates.nvlink.tiles import gather_tiles

from . import host_code
from .protocol import Stuck
from .push_protocol import PushingRank, Sizes, gather_all

SEEDS = st.integers(0, 10**6)


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_M", 4)
        patch.setattr(tiles, "BAND", 3)
        yield


@st.composite
def gathers(draw: st.DrawFn) -> Sizes:
    words = draw(st.integers(1, 9))
    return Sizes(
        draw(st.integers(2, 8)),
        draw(st.integers(1, 3)),
        draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 19]))),
        words,
        draw(st.integers(1, words)),
        draw(st.integers(1, 12)),
    )


def tables(sizes: Sizes, outs: list[int], tile_n: int) -> list[tiles.Gather]:
    return [
        gather_tiles(rank, sizes.ranks, sizes.pieces, sizes.inner, outs, tile_n, pushed=True)
        for rank in range(sizes.ranks)
    ]


@settings(deadline=None, max_examples=60)
@given(
    gathers(),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(3, 9),
    st.lists(st.integers(1, 4), min_size=8, max_size=8),
    SEEDS,
)
def test_a_gather_that_pushes(sizes: Sizes, outs: list[int], tile_n: int, workers: list[int], seed: int) -> None:
    """With any number of CTAs and any order of events all ranks end, each result is stored once, from rows that are there."""
    for rank in gather_all(tables(sizes, outs, tile_n), sizes, outs, tile_n, workers, seed):
        assert torch.equal(rank.slot, rank.whole)
        assert all(torch.equal(written, torch.ones_like(written)) for written in rank.written)
        assert rank.sent == [sizes.units(index) for index in range(sizes.slices)]
        assert len(rank.flags) == sizes.slices * sizes.ranks


def test_a_unit_that_nobody_counts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is for."""
    sizes = Sizes(2, 1, 4, 4, 2, 3)
    monkeypatch.setattr(PushingRank, "count", lambda self, index: None)
    with pytest.raises(Stuck):
        gather_all(tables(sizes, [8], 4), sizes, [8], 4, [1, 1], 0)


@given(st.integers(0, 1 << 16), st.integers(1, 1 << 16))
def test_slices_cover_k(rows: int, k: int) -> None:
    slices, steps = widths.pushed_slices(rows, k)
    assert 1 <= slices <= MAX_SLICES
    assert (slices - 1) * steps < -(-k // 64) <= slices * steps


def test_slices_are_large_enough_to_send_and_many_where_there_is_much() -> None:
    assert widths.pushed_slices(32, 8192) == (2, 64)
    assert widths.pushed_slices(64, 8192) == (4, 32)
    assert widths.pushed_slices(128, 8192) == (8, 16)
    assert widths.pushed_slices(128, 1096) == (1, 18)
    assert widths.pushed_slices(1024, 1096) == (6, 3)


# ---- kernels/push.h on the host --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    tile = host_code.kernel_text("tile.h")
    names = ("TSL int tsk_claim", "enum { TSK_COPIED", "TSL void tsk_copy_words", "TSL void tsk_copy_rows")
    helpers = [host_code.part(tile, name) for name in names]
    runner = (host_code.HERE / "host_push.h").read_text()
    return host_code.build(tmp_path_factory.mktemp("push"), *helpers, host_code.kernel_text("push.h"), runner=runner)


class GatherSizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("seed", "ranks", "ctas", "rows", "inner", "pieces", "k", "slices", "slice_k", "epoch")
    ]


@pytest.mark.parametrize(
    ("ranks", "ctas", "pieces", "inner", "k", "slices", "steps"),
    [
        (2, 1, 1, 3, 8, 1, 1),  # less than a unit
        (2, 2, 1, 32, 256, 2, 2),
        (3, 2, 1, 7, 1096, 6, 3),  # slices that end within a unit, the last one within a step of k
        (2, 1, 3, 5, 520, 5, 2),
        (3, 1, 2, 9, 1536, 8, 3),
        (8, 1, 1, 4, 4096, 8, 8),
    ],
)
def test_the_device_code_sends_every_shard_to_every_rank(
    library: ctypes.CDLL, ranks: int, ctas: int, pieces: int, inner: int, k: int, slices: int, steps: int
) -> None:
    rows, slice_k = pieces * inner, steps * 64
    whole = torch.randint(0, 1 << 15, (pieces, ranks, inner, k), dtype=torch.int16)
    shards = [whole[:, rank].contiguous() for rank in range(ranks)]
    slots, outs = ([torch.full_like(whole, -1) for _ in range(ranks)] for _ in range(2))
    flags = [torch.full((128,), 4, dtype=torch.int32) for _ in range(ranks)]  # epochs of an earlier call
    counters = [torch.zeros(16, dtype=torch.int32) for _ in range(ranks)]
    group = host_code.Group.of(ranks)
    contexts = group.contexts(slots, flags)
    sums = torch.zeros(ranks, ctas, MAX_SLICES, dtype=torch.int64)
    given = GatherSizes(k, ranks, ctas, rows, inner, pieces, k, slices, slice_k, 3)  # and 2 of the cell
    lists = [host_code.pointers(each) for each in (shards, outs, contexts, counters)]
    host_code.call(library.run, group, ctypes.byref(given), *lists, ctypes.c_void_p(sums.data_ptr()))
    for rank in range(ranks):
        assert torch.equal(slots[rank], whole) and torch.equal(outs[rank], whole)
        # Those that are set, and nothing else; the counters are as they were.
        expected = torch.full((16, 8), 4, dtype=torch.int32)
        expected[:slices, :ranks] = 5
        assert torch.equal(flags[rank].view(16, 8), expected)
        assert counters[rank].tolist()[3:] == [0] * 13
    truth = [whole[..., s * slice_k : (s + 1) * slice_k].long().sum() for s in range(slices)]
    assert torch.equal(sums[..., :slices], torch.stack(truth).expand(ranks, ctas, slices))


def test_the_host_and_the_device_count_alike() -> None:
    """Slices of a shard, and the words of `counters` that they take."""
    push = host_code.kernel_text("push.h")
    numbers = {name: int(number) for name, number in re.findall(r"(TSK_\w+) = (\d+)[,} ]", push)}
    assert numbers["TSK_SLICES"] == MAX_SLICES
    assert numbers["TSK_SENT"] + MAX_SLICES <= 16  # words of DeviceLink.counters
    # One look of a warp sees two flags a lane.
    assert MAX_SLICES * context.MAX_RANKS <= 64
