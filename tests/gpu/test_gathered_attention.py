"""Attention on gathered keys and values, fused over NVLink: every attention op that CUDA has, forward and backward, in graphs and under
delays, and what becomes of a rank that fails.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest tests/gpu/test_gathered_attention.py -x -q
"""

from __future__ import annotations

import random
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tscompile
from benchmarks.gpu_harness import allowed, errors_of
from benchmarks.harness import poison
from tests.blocks import Block
from tests.direct_ops import pause
from tests.fused_programs import FULL
from tests.gathered_programs import CASES, Case
from tests.gpu.conftest import World
from tests.programs import Setting
from tests.programs.base import Built
from tests.worlds import run_world
from tscompile.errors import PeerError

FORWARD, BACKWARD = "all_gather_attention", "attention_reduce_scatter"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NOT_CAUSAL = [name for name, case in CASES.items() if "causal" not in name and case.kv_heads == case.heads]


def sizes(world: World, large: bool = False) -> dict[str, int]:
    if not world.cuda:
        return {"batch": 2, "keys": 8, "width": 16}
    return {"batch": 1, "keys": 2048 if large else 256, "width": 128 if large else 64}


def block(world: World, case: Case, dtype: torch.dtype = torch.bfloat16, truth: bool = False, **more: Any) -> Block:
    """`large` in `more` asks for sizes of a model."""
    how = sizes(world, more.pop("large", False))

    def build(setting: Setting) -> Built:
        return case.build(Setting(world.size, world.rank, setting.dtype, world.device.type, setting.truth), **how)

    return Block(world.rank, world.size, build, dtype, truth, **more)


def same_bits(first: list[Tensor], again: list[Tensor], where: str) -> None:
    for index, (a, b) in enumerate(zip(first, again, strict=True)):
        assert torch.equal(a, b), f"{where}, tensor {index}: other bits"


def check(world: World, name: str, case: Case, repeats: int = 3, **more: Any) -> None:
    """Twice as far from float64 as NCCL with torch's attention at most; memory full of NaN in between; the same bits again."""
    fused = block(world, case, **more)
    with sdpa_kernel(SDPBackend.MATH):  # no other op takes float64
        truth = block(world, case, truth=True, **more).eager()
    plain = fused.eager()
    poison(plain)
    first = [t.clone() for t in fused.fused()]
    for index, (got, base, want) in enumerate(zip(first, plain, truth, strict=True)):
        if not want.any():  # keys that no query sees
            assert not got.any()
            continue
        found, limits = errors_of([got], [want]), allowed(errors_of([base], [want]), base.dtype)
        assert found[0] <= limits[0] and found[1] <= limits[1], (
            f"{name}, tensor {index}: errors {found}, limits {limits}"
        )
    for _ in range(repeats):
        poison(plain)
        same_bits(first, fused.fused(), name)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_every_spelling(world: World, name: str) -> None:
    check(world, name, CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_attention_op(world: World, backend: str) -> None:
    with sdpa_kernel(BACKENDS[backend]):
        check(world, backend, CASES["separate"])
    rows = [row for row in tscompile.reports().rows if row.decision == "fused"]
    assert {FORWARD, BACKWARD} <= {row.pattern for row in rows}, [(r.pattern, r.code, r.reason) for r in rows]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "cuDNN"])
@pytest.mark.parametrize("name", ["GQA", "MQA"])
def test_fewer_heads_of_keys(world: World, backend: str, name: str) -> None:
    with sdpa_kernel(BACKENDS[backend]):
        check(world, name, CASES[name])


@pytest.mark.gpu
def test_large(world: World) -> None:
    """Where transport and attention take hundreds of microseconds each."""
    check(world, "large", Case(CASES["separate"].call, heads=16, kv_heads=16), large=True)


@pytest.mark.gpu
def test_causal_is_kept(world: World) -> None:
    before = {row.site for row in tscompile.reports().rows}
    check(world, "causal", CASES["causal, many queries"], repeats=0)
    new = [row for row in tscompile.reports().rows if row.site not in before and row.pattern in (FORWARD, BACKWARD)]
    assert all(row.decision == "kept" for row in new), [(row.pattern, row.reason) for row in new]


def test_delays_change_nothing(world: World) -> None:
    """Ranks whose streams pause before their calls, each before other ones, many times in one queue."""
    fused = block(world, CASES["separate"])
    first = [t.clone() for t in fused.fused()]
    own = random.Random(1000 + world.rank)
    wrong = torch.zeros((), device=world.device, dtype=torch.int64)
    for _ in range(300 if world.cuda else 20):
        if own.random() < 0.5:
            pause(world.device, own.random() * 300)
        for a, b in zip(first, fused.fused(), strict=True):
            wrong += (a != b).any()
    assert not wrong.item()


@pytest.mark.gpu
def test_captured(world: World) -> None:
    """A CUDA graph that is replayed again and again with new inputs, delays in between."""
    fused = block(world, CASES["separate"])
    q, k, v = fused.built.args
    with torch.no_grad():
        fused.compiled(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = fused.compiled(q, k, v)
    own = random.Random(2000 + world.rank)
    for _ in range(20):
        with torch.no_grad():
            for tensor in (q, k, v):
                tensor.normal_()
            expected = fused.built.call(q, k, v)
        if own.random() < 0.5:
            pause(world.device, own.random() * 300)
        graph.replay()
        norm, largest = errors_of([out], [expected.float()])
        eps = torch.finfo(out.dtype).eps  # both are rounded
        assert norm <= 2 * eps and largest <= 4 * eps, (norm, largest)


def failing(rank: int, size: int) -> str:
    """A rank that stays away: the others' outputs are NaN, and they are told who it was, within the time-out."""
    world = World(rank, size, torch.device("cuda", rank), FULL)
    fused = block(world, CASES["separate"], timeout_s=5.0)
    fused.fused()
    with torch.no_grad():  # a graph of its own, on which the ranks agree here
        fused.compiled(*fused.built.args)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == size - 1:
        time.sleep(15.0)
        return ""
    start = time.monotonic()
    with torch.no_grad():
        out = fused.compiled(*fused.built.args)
    torch.cuda.synchronize()
    assert time.monotonic() - start < 12.0
    assert out.isnan().all(), "nothing that looks like a result"
    with pytest.raises(PeerError) as caught:
        fused.fused()
    return str(caught.value)


@pytest.mark.gpu
def test_a_rank_that_stays_away(world: World) -> None:
    key = "gathered attention failure"
    if world.rank != 0:  # in the store, not in a collective: the GPUs belong to the other world meanwhile
        world.store.wait([key], timedelta(seconds=230))
        return
    try:
        said = run_world(2, failing, timeout_s=150, backend="nccl", dying=(1,))
        assert "rank 1" in said[0] and FORWARD in said[0], said
        world.say(said[0])
    finally:
        world.store.set(key, "done")
