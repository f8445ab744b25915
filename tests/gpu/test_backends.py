"""Kernels with the primitives, compiled and launched by each of TileLang's execution backends, on memory of `SymmetricGroup`.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest tests/gpu/test_backends.py -x -q

Every rank runs this file. tests/language/test_backends.py compiles the same kernels without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

import tscompile.language as tl
from tests.gpu.conftest import World
from tests.language import backends
from tscompile import switches
from tscompile.errors import BackendError
from tscompile.language.compile import parse

BACKENDS = ("auto", "tvm_ffi", "cython", "nvrtc")
SIZE, STEPS = 1000, 200
_COMPILE_S = 100.0


@pytest.fixture(scope="module")
def memory(world: World) -> Iterator[tl.SymmetricGroup]:
    with tl.SymmetricGroup(nbytes=16 << 20, device=world.device, timeout_s=20.0) as group:
        yield group


@pytest.fixture(scope="module")
def inbox(memory: tl.SymmetricGroup) -> torch.Tensor:
    """The start of the data region, which kernels address by offset."""
    return memory.tensor((4096,), torch.float32)


def compiled(world: World, backend: str, name: str, write: Callable[[Any], Any], pass_configs: dict) -> Callable:
    """On all ranks, or on none: a backend that is not installed on one of them is skipped."""
    refused, kernel = "", None
    try:
        d = tl.dialect("cuda" if world.cuda else "cpu", execution_backend=backend)
        kernel = d.compile(parse(lambda: write(d)), pass_configs if world.cuda else None)
    except BackendError as error:
        refused = str(error)
    keys = [f"backends/{backend}/{name}/{rank}" for rank in range(world.size)]
    world.store.set(keys[world.rank], json.dumps(refused))
    world.store.wait(keys, timedelta(seconds=_COMPILE_S))
    reasons = [reason for key in keys if (reason := json.loads(world.store.get(key)))]
    if reasons:
        pytest.skip(reasons[0])
    assert kernel is not None
    return kernel


def of(world: World, backend: str, name: str) -> Callable:
    _, write, pass_configs = backends.KERNELS[name]
    return compiled(world, backend, name, write, pass_configs)


def partner(world: World) -> int:
    other = world.rank ^ 1
    return other if other < world.size else world.rank


def numbers(rank: int, turn: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * turn + rank))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exchange(world: World, memory: tl.SymmetricGroup, inbox: torch.Tensor, backend: str) -> None:
    """put, signal, warp_wait, get: calls that follow one another without a meeting of the ranks."""
    exchange, to = of(world, backend, "exchange"), partner(world)
    memory.flags[: tl.MAX_RANKS].zero_()
    memory.barrier()
    outs, done = [], torch.zeros(1, dtype=torch.int32, device=world.device)
    for epoch in range(1, 21):
        out = torch.zeros(SIZE, device=world.device)
        exchange(memory.context, numbers(world.rank, epoch).to(world.device), out, to, epoch, epoch, done)
        outs.append(out)
    memory.barrier()
    assert int(done) == 20
    for epoch, out in enumerate(outs, 1):
        assert torch.equal(out.cpu(), numbers(to, epoch)), f"epoch {epoch}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matmul_that_waits_for_a_peer(world: World, memory: tl.SymmetricGroup, inbox: torch.Tensor, backend: str):
    """Launched before the peer says that its rows are there."""
    kernel, size, to = of(world, backend, "waiting_gemm"), 256, partner(world)
    arrived = memory.tensor((size // 64,), torch.int32)
    generator = torch.Generator(world.device).manual_seed(world.rank)
    a, b = (torch.randn(size, size, device=world.device, generator=generator).bfloat16() for _ in range(2))
    aside = torch.cuda.Stream(world.device)
    for epoch in range(1, 6):
        c = torch.full((size, size), float("nan"), device=world.device, dtype=torch.bfloat16)
        kernel(memory.context, a, b, c, arrived, epoch)
        with torch.cuda.stream(aside):
            memory.peers(arrived)[to].fill_(epoch)
        memory.barrier()
        want = a.float() @ b.float()
        ours, theirs = (float((y.float() - want).abs().max() / want.abs().max()) for y in (c, a @ b))
        assert ours <= 2 * theirs, f"epoch {epoch}: {ours:.1e}, torch's {theirs:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_by_tma(world: World, memory: tl.SymmetricGroup, inbox: torch.Tensor, backend: str) -> None:
    kernel, to = of(world, backend, "bulk"), partner(world)
    memory.flags[:2].zero_()
    inbox.zero_()
    memory.barrier()
    ok = torch.zeros(1, dtype=torch.int32, device=world.device)
    kernel(memory.context, numbers(world.rank, 0, 1024).to(world.device), to, ok)
    memory.barrier()
    assert int(ok) == 1 and memory.flags[:2].tolist() == [1, 2]
    assert torch.equal(inbox[:2048].cpu(), numbers(to, 0, 1024).repeat(2))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_device_code_of_ones_own(world: World, memory: tl.SymmetricGroup, inbox: torch.Tensor, backend: str) -> None:
    kernel, to = of(world, backend, "own_header"), partner(world)
    words = memory.tensor((8,), torch.int32)
    words.copy_(torch.arange(8) + 10 * memory.rank)
    out = torch.zeros(1, dtype=torch.int32, device=world.device)
    memory.barrier()
    kernel(memory.context, words, to, out)
    memory.barrier()
    assert int(out) == 28 + 80 * to


def step(d: Any) -> Any:
    """y[i] = x[i + 1] + 1: what another block of the launch before has written, by plain loads."""
    import tilelang.language as T

    count = 132 * 8 * 128

    @T.prim_func
    def step_kernel(x: T.Tensor((count,), "float32"), y: T.Tensor((count,), "float32")):
        with T.Kernel(count // 128, threads=128, prelude=d.prelude) as block:
            i = block * 128 + d.thread()
            y[i] = x[(i + 4096) % count] + 1.0

    return step_kernel


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_in_stream_order(world: World, backend: str) -> None:
    """TileLang's cython launches would begin before the launch in front of them is over; cuda.h sees to it that they do not."""
    kernel = compiled(world, backend, "step", step, {})
    x, y = (torch.zeros(132 * 8 * 128, device=world.device) for _ in range(2))
    for _ in range(STEPS // 2):
        kernel(x, y)
        kernel(y, x)
    assert x.unique().tolist() == [float(STEPS)]


@pytest.mark.gpu
def test_memory_comes_from_where_the_environment_says(memory: tl.SymmetricGroup) -> None:
    """Run the file with TILELANG_USE_NVSHMEM=0, 1 and unset."""
    if switches.switch(switches.NVSHMEM) is False:
        assert memory.provider == "symm_mem"
    else:
        assert memory.provider in ("nvshmem", "symm_mem")


def test_backends_that_cannot_serve_say_why(world: World) -> None:
    with pytest.raises(BackendError, match=r"cutedsl.*drops the CUDA C\+\+ of the prelude.*use"):
        tl.dialect("cuda", execution_backend="cutedsl")
