"""mesh_matmul on 2 x 2 ranks: results in every layout, in graphs and programs, and what becomes of a rank that fails.

Two GPUs have no such mesh: one of its groups would have one rank, and one of the operands nothing to gather.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tscompile
from benchmarks import direct
from benchmarks.bench_mesh import BLOCKS, SUMMA, Groups, Work, mesh_groups
from benchmarks.gpu_harness import allowed, errors_of
from tests.compat import all_gather
from tests.direct_ops import LiveOp, Shape
from tests.fused_programs import GATHER
from tests.gpu.conftest import World
from tests.mesh_cases import LHS, RHS, MeshCase, mesh_case
from tests.one_gpu.test_mesh import LAYOUTS
from tests.worlds import run_world
from tscompile.backend import tilescale
from tscompile.errors import PeerError

Live = tuple[MeshCase, direct.BoundOp, tuple[int, int]]


@pytest.fixture(scope="module")
def groups(world: World) -> Groups:
    if world.size != 4:
        pytest.skip("a mesh of 2 x 2 needs 4 ranks: --nproc-per-node 4")
    return mesh_groups(2)


def live(
    groups: Groups,
    device: torch.device,
    layouts: tuple[str, str],
    seed: int,
    timeout_s: float | None = None,
    **more: Any,
) -> Live:
    """A case, and its op on this rank."""
    case = mesh_case(2, 2, LHS[layouts[0]], RHS[layouts[1]], seed=seed, dtype="bfloat16", scale=32, wide=17, **more)
    place = divmod(dist.get_rank(), 2)
    lhs, rhs, bias, contracted = case.args_on(device, place)
    gathered = case.plan.return_gathered, case.plan.return_second
    uses = (case.plan.uses[0], case.plan.uses[1])
    op = direct.mesh_matmul(lhs, rhs, uses, contracted, bias, groups=groups, gathered=gathered, timeout_s=timeout_s)
    return case, op, place


@pytest.mark.parametrize("layouts", LAYOUTS, ids=" x ".join)
def test_results_and_bits(world: World, groups: Groups, layouts: tuple[str, str]) -> None:
    seed = LAYOUTS.index(layouts)
    case, op, place = live(
        groups, world.device, layouts, seed, bias=seed % 2 == 1, returned=(seed % 2 == 0, seed % 3 == 0)
    )
    first = op()
    case.check(place, first)
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, op(), strict=True)), "other bits"


@pytest.mark.parametrize("layout", [SUMMA, BLOCKS])
def test_large(world: World, groups: Groups, layout: str) -> None:
    """Shards that travel in chunks."""
    work = Work(8192 if world.cuda else 64, layout, groups, world.device, torch.bfloat16)
    op = work.fused()
    for _ in range(3):
        work.refill()
        truth = work.truth()
        limits = allowed(errors_of(work.original(), truth), torch.bfloat16)
        for _ in range(3):
            found = errors_of(op(), truth)
            assert found[0] <= limits[0] and found[1] <= limits[1], (found, limits)


def test_a_queue_of_ops_of_the_mesh_and_of_its_groups(world: World, groups: Groups) -> None:
    """Ranks pause at random; nothing is synchronised between."""
    cases = [live(groups, world.device, layouts, 20 + seed) for seed, layouts in enumerate(LAYOUTS[:4])]
    gathers = [LiveOp(Shape(GATHER, 64, (128,), 128), torch.bfloat16, world.device, group=group) for group in groups]
    truths = [op.truth()[0] for op in gathers]
    order, own = random.Random(5), random.Random(world.rank)
    for _ in range(10):
        results = []
        for _ in range(12):
            if world.cuda and own.random() < 0.3:
                torch.cuda._sleep(int(own.random() * 500_000))
            which = order.randrange(len(cases) + len(gathers))
            call: Callable[[], list[Tensor]] = cases[which][1] if which < 4 else gathers[which - 4].call
            results.append((which, call()))
        world.synchronize()
        for which, outputs in results:
            if which < 4:
                case, _, place = cases[which]
                case.check(place, outputs)
            else:
                assert errors_of(outputs[:1], [truths[which - 4]])[0] <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_graphs_among_eager_calls(world: World, groups: Groups) -> None:
    cases = [live(groups, world.device, layouts, 40 + seed) for seed, layouts in enumerate(LAYOUTS[:3])]
    for _, op, _ in cases:
        op()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [op() for _, op, _ in cases]
    order = random.Random(3)
    for _ in range(20):
        for outputs in captured:
            for output in outputs:
                output.fill_(float("nan"))
        for _ in range(order.randint(1, 3)):
            graph.replay()
        for (case, _, place), outputs in zip(cases, captured, strict=True):
            case.check(place, outputs)
        for _ in range(order.randint(0, 3)):
            case, op, place = order.choice(cases)
            case.check(place, op())


def test_a_program_in_training(world: World, groups: Groups) -> None:
    """SUMMA in functional collectives, compiled: one op instead of two gathers, a cat and a matmul; the backward scatters."""
    row, column = groups
    size = 1024 if world.cuda else 64
    dtype = torch.bfloat16 if world.cuda else torch.float32

    def summa(a: Tensor, b: Tensor) -> Tensor:
        return all_gather(a, 1, row) @ all_gather(b, 0, column)

    inputs = [torch.randn(size // 2, size // 2, device=world.device, dtype=dtype) for _ in range(2)]
    gradient = torch.randn(size // 2, size // 2, device=world.device, dtype=dtype)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(gradient)
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    expected = run(summa)
    compiled = torch.compile(summa, backend=tilescale, options={"tilescale.fuse": "always"})
    for _ in range(3):
        got = run(compiled)
        for a, b in zip(got, expected, strict=True):
            assert errors_of([a], [b])[0] <= 4 * torch.finfo(dtype).eps
    rows = [row for row in tscompile.reports().rows if row.pattern == "mesh_matmul"]
    assert rows and rows[-1].decision == "fused" and len(rows[-1].collectives) == 2


def one_rank_fails(rank: int, size: int, way: str, device: str, timeout_s: float) -> dict[str, Any]:
    """Calls in which all ranks take part, then one in which rank 3 does not. Rank 0 has no group with it."""
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    groups = mesh_groups(2)
    live(groups, here, LAYOUTS[0], 0, timeout_s=100.0)[1]()  # kernels are built, on some ranks sooner than on others
    dist.barrier()
    case, op, place = live(groups, here, LAYOUTS[0], 0, timeout_s=timeout_s)
    for _ in range(3):
        case.check(place, op())
    dist.barrier()
    if rank == 3 and way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 3:
        time.sleep(10 * timeout_s + 60)
    start = time.monotonic()
    try:
        while time.monotonic() - start < 3 * timeout_s + 30:
            op()
            if device == "cuda":
                torch.cuda.synchronize()
    except PeerError as error:
        return {"seconds": time.monotonic() - start, "message": str(error)}
    return {"seconds": float("inf"), "message": "no PeerError"}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("way", ["killed", "silent"])
def test_all_ranks_raise_in_time(world: World, way: str) -> None:
    if world.size != 4:
        pytest.skip("a mesh of 2 x 2 needs 4 ranks: --nproc-per-node 4")
    key = f"mesh failure/{way}"
    if world.rank != 0:  # in the store, not in a collective: the GPUs belong to the other world meanwhile
        world.store.wait([key], timedelta(seconds=230))
        return
    timeout_s = 4.0
    try:
        device = world.device.type
        backend = "nccl" if device == "cuda" else "gloo"
        seen = run_world(4, one_rank_fails, way, device, timeout_s, timeout_s=150.0, dying=(3,), backend=backend)
        for outcome in seen[:3]:
            assert outcome["seconds"] <= 2 * timeout_s + 5, seen
            world.say(f"{way}: {outcome['seconds']:.1f} s, {outcome['message']}")
    finally:
        world.store.set(key, "done")
