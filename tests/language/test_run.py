"""The primitives compiled and run, several ranks in one process: on TileLang's C target, and on a GPU where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tscompile.language as tl

from . import copy_kernels, forms, kernels
from .world import DATA_BYTES, World

COUNT = 32  # operations in kernels.words
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@lru_cache
def compiled(target: tl.Target, name: str, *args: object) -> Callable[..., None]:
    dialect, form = tl.dialect(target), (name, *args)
    return dialect.compile(forms.written(dialect, form), forms.pass_configs(form) if target == "cuda" else None)


class Runner:
    def __init__(self, target: tl.Target) -> None:
        self.target = target
        self.device = "cpu" if target == "cpu" else "cuda"

    def world(self, size: int) -> World:
        return World(size, device=self.device)

    def tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64 if not dtype.is_floating_point else dtype).to(self.device, dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def __call__(self, name: str, *arguments: object, form: tuple = ()) -> None:
        compiled(self.target, name, *form)(*arguments)
        if self.device == "cuda":
            torch.cuda.synchronize()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def run(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3000), start=st.integers(0, 2000), size=st.integers(0, 2000))
def test_copies_of_any_size_and_alignment(run: Runner, at: int, start: int, size: int) -> None:
    world, ways = run.world(2), range(len(copy_kernels.WAYS))
    src = torch.randint(0, 256, (DATA_BYTES,), dtype=torch.uint8)
    want = torch.zeros(DATA_BYTES, dtype=torch.uint8)
    for way in ways:
        want[at + 8192 * way : at + 8192 * way + size] = src[start : start + size]
    world.data(0).copy_(src)
    table = [[1, at + 8192 * way, 0, start, size, way] for way in ways]
    run("copies", world.context(0), run.tensor(table, torch.int64), form=(len(ways),))
    assert torch.equal(world.data(1).cpu(), want)
    assert torch.equal(world.data(0).cpu(), src)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32", "int64", "uint64", "float64"])
def test_loads_stores_and_atomics(run: Runner, dtype: str) -> None:
    kind = getattr(torch, kernels.carrier(dtype))
    cells = run.tensor([7 * i + 100 for i in range(COUNT)], kind)
    before, out = cells.tolist(), run.zeros(COUNT, dtype=kind)
    run("words", cells, out, form=(dtype,))
    after, returned = cells.tolist(), out.tolist()
    assert returned[:6] == before[:6] and returned[30] == before[30]
    assert after[6:12] == [7, 8, 9, 10, 11, 12] and after[31] == 5
    if dtype != "float64":
        assert returned[12:24] == before[12:24]
        assert after[12:24] == [value + 3 for value in before[12:24]]
        assert after[24:30] == [value + 4 for value in before[24:30]]


@pytest.mark.parametrize(
    ("dtype", "element"),
    [
        *((f"int{bits}", f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("", "u")),
        *(("uint8", "uint8"), ("float32", "float32"), ("float64", "float64")),
    ],
)
def test_every_form_of_load_and_store(run: Runner, dtype: str, element: str) -> None:
    kind = getattr(torch, dtype)
    cells, out = run.tensor([100 - i for i in range(64)], kind), run.zeros(32, dtype=kind)
    run("every_word", cells, out, form=(dtype, element))
    assert out.tolist() == [100 - i if i < 17 else 0 for i in range(32)]
    assert cells.tolist() == [i - 31 if 32 <= i < 47 else 100 - i for i in range(64)]


@pytest.mark.parametrize(("dtype", "lanes"), [("float32", 4), ("int16", 8), ("float64", 2)])
def test_every_form_of_128_bits(run: Runner, dtype: str, lanes: int) -> None:
    cells = torch.arange(32 * lanes, device=run.device).to(getattr(torch, dtype)).view(32, lanes)
    want, out = cells.clone(), run.zeros(16, lanes, dtype=cells.dtype)
    want[16:25] = 2 * cells[:9]
    run("every_wide_word", cells, out, form=(dtype, lanes))
    assert torch.equal(cells, want)
    assert torch.equal(out[:11], want[:11]) and not out[11:].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e5m2"])
def test_floats_that_the_c_target_lacks(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"{dtype} elements: not on the C target .*: C has no such type: declare"):
        kernels.every_word(tl.dialect("cpu"), dtype)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_every_comparison(run: Runner, dtype: str) -> None:
    value, world, results = (1000 if dtype.startswith("u") else -5), run.world(2), run.zeros(16)
    flags = [value, value + 1, value, value + 1, value, value - 1, value]
    run(
        "waits",
        world.context(0),
        run.tensor(flags, getattr(torch, kernels.carrier(dtype))),
        value,
        results,
        form=(dtype,),
    )
    assert results.tolist() == [1] * 8 + [0] * 8
    assert world.record(0) == [0] * 5


@pytest.mark.parametrize("dtype", ["int32", "uint64"])
def test_waits_that_end_without_their_flag(run: Runner, dtype: str) -> None:
    """The first one reports and takes the time-out; the others see the abort word and end at once, on all ranks."""
    world, results = run.world(3), run.zeros(16)
    flags = run.tensor([9, 5, 4, 5, 6, 5, 4], getattr(torch, kernels.carrier(dtype)))
    start = time.monotonic()
    run("waits", world.context(1, timeout_s=0.2), flags, 5, results, form=(dtype,))
    assert 0.2 <= time.monotonic() - start < 10
    assert results.tolist() == [0] * 8 + [1] + [0] * 7
    assert world.record(1) == [2, 0, 40, 5, 9]  # 1 + rank, peer, site, expected, seen
    assert [world.abort(rank) for rank in range(3)] == [2, 2, 2]
    start = time.monotonic()
    run("waits", world.context(0, timeout_s=60), flags, 5, results, form=(dtype,))
    assert time.monotonic() - start < 10
    assert world.record(0) == [0] * 5


def test_an_epoch_that_wrapped_around(run: Runner) -> None:
    world, results = run.world(1), run.zeros(16)
    flags = run.tensor([-6, 0, -6, -5, -6, -7, 2], torch.int32)
    run("waits", world.context(0), flags, 2**32 - 6, results, form=("uint32",))  # 2 is 8 epochs later
    assert results.tolist() == [1] * 8 + [0] * 8


def test_short_forms_on_a_peer_and_the_epoch_of_a_launch(run: Runner) -> None:
    world, results = run.world(3), run.zeros(8)
    world.control(1).view(torch.int32)[0] = 30
    world.flags(2, torch.int32)[16:22] = run.tensor([42, 41, 42, 43, 42, 41], torch.int32)
    run("named_waits", world.context(1), 2, 12, results)
    assert results.tolist() == [1] * 6 + [13, 42]


def test_threads_of_a_block(run: Runner) -> None:
    world, out = run.world(1), run.zeros(16)
    x = run.tensor([1.0, 2.0, 4.0, 0.0], torch.float32)
    run("threads", world.context(0), 3, out, x)
    alone = run.target == "cpu"  # a warp of one
    lane = int(out[5])
    assert out[:5].tolist() == [1, 1, int(alone), 1, lane if alone else min(lane + 1, 31)]
    assert x[3] == 7.0
    assert world.flags(0, torch.int32)[64] == 3


def test_a_barrier_that_a_rank_misses(run: Runner) -> None:
    world, out = run.world(2), run.zeros(16)
    out[0] = 1
    run("threads", world.context(1, timeout_s=0.1), 3, out, run.zeros(4, dtype=torch.float32))
    assert out[0] == 0
    assert world.record(1) == [2, 0, 7, 3, 0]
    assert world.flags(0, torch.int32)[65] == 3  # the peer was told all the same


def test_bulk_copies(run: Runner) -> None:
    world, x, ok = run.world(2), torch.randn(1024, device=run.device), run.zeros(1)
    run("bulk", world.context(0), x, 1, ok)
    assert ok[0] == 1
    assert torch.equal(world.data(1, torch.float32)[:2048], torch.cat([x, x]))
    assert world.flags(1, torch.int32)[:2].tolist() == [1, 2]


@pytest.mark.parametrize("one_warp", [False, True])
def test_a_gemm_that_waits(run: Runner, one_warp: bool) -> None:
    world, dtype = run.world(1), "float32" if run.target == "cpu" else "bfloat16"
    a, b, c = (torch.randn(256, 256, device=run.device).to(getattr(torch, dtype)) for _ in range(3))
    arrived = run.tensor([5] * 4, torch.int32)
    run("waiting_gemm", world.context(0), a, b, c, arrived, 5, form=(256, dtype, one_warp))
    torch.testing.assert_close(c.float(), a.float() @ b.float(), rtol=1e-2, atol=1e-1 if dtype == "bfloat16" else 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_two_ranks_of_one_gpu_exchange() -> None:
    """One block per rank, on two streams: each waits for what the other pushes while both run."""
    run, size = Runner("cuda"), 1000
    world, kernel = run.world(2), compiled("cuda", "exchange", size)
    contexts = [world.context(rank, timeout_s=10) for rank in range(2)]
    streams, done = [torch.cuda.Stream() for _ in range(2)], [run.zeros(1) for _ in range(2)]
    outs = [run.zeros(size, dtype=torch.float32) for _ in range(2)]
    for epoch in range(1, 51):
        sent = [torch.randn(size, device="cuda") for _ in range(2)]
        torch.cuda.synchronize()
        for rank in range(2):
            with torch.cuda.stream(streams[rank]):
                kernel(contexts[rank], sent[rank], outs[rank], 1 - rank, epoch, epoch, done[rank])
        torch.cuda.synchronize()
        assert [int(flag) for flag in done] == [epoch, epoch]
        assert torch.equal(outs[0], sent[1]) and torch.equal(outs[1], sent[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_blocks_of_a_grid_meet_in_every_launch() -> None:
    """test_grid.py has the barrier itself; here blocks of one GPU run it, twice in a launch."""
    run, blocks = Runner("cuda"), 64
    context, cells, out = run.world(1).context(0), run.zeros(2, blocks), run.zeros(3, blocks)
    word = run.zeros(2, dtype=torch.int64)
    for launch in range(1, 101):
        run("grid", context, cells, word, out, form=(blocks,))
        assert out.tolist() == [[launch] * blocks, [launch] * blocks, [1, *[0] * (blocks - 1)]]
        assert word.tolist() == [2 * launch << 32, launch << 32]


def test_a_cache_directory_with_a_blank(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a b"))
    with pytest.raises(RuntimeError, match="without any"):
        tl.dialect("cpu").compile_flags()
