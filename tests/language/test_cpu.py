"""The primitives on TileLang's C target: compiled and run, several ranks in one process."""

from __future__ import annotations

import time
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tscompile.language as tl

from . import kernels
from .world import DATA_BYTES, World

D = tl.dialect("cpu")
COUNT = 32  # operations in kernels.words


@lru_cache
def compiled(name: str, *args: str):
    return D.compile(getattr(kernels, name)(D, *args))


@settings(deadline=None, max_examples=150)
@given(at=st.integers(0, 3000), start=st.integers(0, 2000), size=st.integers(0, 2000))
def test_copies_of_any_size_and_alignment(at: int, start: int, size: int) -> None:
    world = World(2)
    src = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    want = torch.zeros(DATA_BYTES, dtype=torch.uint8)
    for place in range(4):
        want[at + 8192 * place : at + 8192 * place + size] = src[start : start + size]
    compiled("copies")(world.context(0), src, 1, at, start, size)
    assert torch.equal(world.data(1), want)
    assert not world.data(0).any()


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32", "int64", "uint64", "float64"])
def test_loads_stores_and_atomics(dtype: str) -> None:
    kind = getattr(torch, kernels.carrier(dtype))
    cells = torch.arange(COUNT, dtype=torch.int64).mul(7).add(100).to(kind)
    before, out = cells.tolist(), torch.zeros(COUNT, dtype=kind)
    compiled("words", dtype)(cells, out)
    after, returned = cells.tolist(), out.tolist()
    assert returned[:6] == before[:6] and returned[30] == before[30]
    assert after[6:12] == [7, 8, 9, 10, 11, 12] and after[31] == 5
    if dtype != "float64":
        assert returned[12:24] == before[12:24]
        assert after[12:24] == [value + 3 for value in before[12:24]]
        assert after[24:30] == [value + 4 for value in before[24:30]]


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_every_comparison(dtype: str) -> None:
    signed = not dtype.startswith("u")
    value, world = (-5 if signed else 1000), World(2)
    flags = torch.tensor([value, value + 1, value, value + 1, value, value - 1, value], dtype=torch.int64)
    results = torch.zeros(16, dtype=torch.int32)
    compiled("waits", dtype)(world.context(0), flags.to(getattr(torch, kernels.carrier(dtype))), value, results)
    assert results.tolist() == [1] * 8 + [0] * 8
    assert world.record(0) == [0] * 5


@pytest.mark.parametrize("dtype", ["int32", "uint64"])
def test_waits_that_end_without_their_flag(dtype: str) -> None:
    """The first one reports and takes the time-out; the others see the abort word and end at once, on all ranks."""
    world, results = World(3), torch.zeros(16, dtype=torch.int32)
    flags = torch.tensor([9, 5, 4, 5, 6, 5, 4], dtype=torch.int64).to(getattr(torch, kernels.carrier(dtype)))
    start = time.monotonic()
    compiled("waits", dtype)(world.context(1, timeout_s=0.2), flags, 5, results)
    assert 0.2 <= time.monotonic() - start < 2
    assert results.tolist() == [0] * 8 + [1] + [0] * 7
    assert world.record(1) == [2, 0, 40, 5, 9]  # 1 + rank, peer, site, expected, seen
    assert [world.abort(rank) for rank in range(3)] == [2, 2, 2]
    start = time.monotonic()
    compiled("waits", dtype)(world.context(0, timeout_s=60), flags, 5, results)
    assert time.monotonic() - start < 2
    assert world.record(0) == [0] * 5


def test_an_epoch_that_wrapped_around() -> None:
    world, results = World(1), torch.zeros(16, dtype=torch.int32)
    flags = torch.tensor([-6, 0, -6, -5, -6, -7, 2], dtype=torch.int64).to(torch.int32)
    compiled("waits", "uint32")(world.context(0), flags, 2**32 - 6, results)  # 2 is 8 epochs later
    assert results.tolist() == [1] * 8 + [0] * 8


def test_short_forms_on_a_peer_and_the_epoch_of_a_launch() -> None:
    world, results = World(3), torch.zeros(8, dtype=torch.int32)
    world.control(1).view(torch.int32)[0] = 30
    world.flags(2, torch.int32)[16:22] = torch.tensor([42, 41, 42, 43, 42, 41])
    compiled("named_waits")(world.context(1), 2, 12, results)
    assert results.tolist() == [1] * 6 + [13, 42]


def test_threads_of_a_block_of_one() -> None:
    world = World(1)
    out, x = torch.zeros(16, dtype=torch.int32), torch.tensor([1.0, 2.0, 4.0, 0.0])
    compiled("threads")(world.context(0), 3, out, x)
    assert out[:6].tolist() == [1, 1, 1, 1, 0, 0]
    assert x[3] == 7.0
    assert world.flags(0, torch.int32)[64] == 3


def test_a_barrier_that_a_rank_misses() -> None:
    world = World(2)
    out = torch.ones(16, dtype=torch.int32)
    compiled("threads")(world.context(1, timeout_s=0.1), 3, out, torch.zeros(4))
    assert out[0] == 0
    assert world.record(1) == [2, 0, 7, 3, 0]
    assert world.flags(0, torch.int32)[65] == 3  # the peer was told all the same


def test_bulk_copies() -> None:
    world, x, ok = World(2), torch.randn(1024), torch.zeros(1, dtype=torch.int32)
    compiled("bulk")(world.context(0), x, 1, ok)
    assert ok[0] == 1
    assert torch.equal(world.data(1, torch.float32)[:2048], torch.cat([x, x]))
    assert world.flags(1, torch.int32)[:2].tolist() == [1, 2]


def test_a_gemm_that_waits() -> None:
    world = World(1)
    a, b, c = torch.randn(256, 256), torch.randn(256, 256), torch.zeros(256, 256)
    kernel = D.compile(kernels.waiting_gemm(D, 256, "float32"))
    kernel(world.context(0), a, b, c, torch.full((4,), 5, dtype=torch.int32), 5)
    torch.testing.assert_close(c, a @ b, rtol=1e-4, atol=1e-3)


def test_a_cache_directory_with_a_blank(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a b"))
    with pytest.raises(RuntimeError, match="without any"):
        D.compile_flags()
