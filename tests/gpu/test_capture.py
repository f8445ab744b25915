"""CUDA graphs: fused ops captured by hand and by Inductor, replayed any number of times."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist

import tscompile
from benchmarks.gpu_harness import allowed, errors_of
from tests import fused_runs
from tests.direct_ops import LiveOp, Pool, Shape
from tests.fused_programs import GATHER, PROGRAMS, REDUCE, SCATTER, Draw
from tests.gpu.conftest import World
from tscompile.backend import tilescale
from tscompile.lowering import nvlink

pytestmark = pytest.mark.gpu


def shapes(world: World) -> list[Shape]:
    return [
        Shape(GATHER, 256, (1024,), 1024),
        Shape(SCATTER, 256 * world.size, (1024,), 1024),
        Shape(REDUCE, 256, (1024,), 1024),
    ]


@pytest.mark.parametrize("ops", [1, 2, 3, 5])
def test_odd_and_even_captures_among_eager_calls(world: World, ops: int) -> None:
    """A graph with `ops` fused ops; random numbers of replays and of eager calls of the same ops follow each other."""
    pools = [Pool(LiveOp(shape, torch.bfloat16, world.device)) for shape in shapes(world)]
    used = [pools[i % len(pools)] for i in range(ops)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for pool in used:
            pool.op.call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = [pool.op.call()[0] for pool in used]
    order, worst = random.Random(3), torch.zeros((), device=world.device)
    for step in range(40):
        for pool in pools:
            pool.op.x.copy_(pool.inputs[step % 3])
        for output in captured:
            output.fill_(float("nan"))
        for _ in range(order.randint(1, 3)):
            graph.replay()
        for pool, output in zip(used, captured, strict=True):
            worst = torch.maximum(worst, pool.judge(step % 3, output).nan_to_num(nan=1e9))
        for _ in range(order.randint(0, 3)):
            worst = torch.maximum(worst, order.choice(pools).call(step).nan_to_num(nan=1e9))
    assert worst.item() <= 1, f"error is {worst.item():.2f} of its limit"


def test_a_capture_takes_its_time(world: World) -> None:
    """The watchdog looks at its event meanwhile, which must not end the capture."""
    pool = Pool(LiveOp(shapes(world)[0], torch.bfloat16, world.device))
    pool.call(0)  # from now on the watchdog has an event to look at
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pool.op.x.copy_(pool.inputs[1])
        time.sleep(5 * nvlink._LOOK_EVERY_S)
        output = pool.op.call()[0]
    output.fill_(float("nan"))
    graph.replay()
    error = pool.judge(1, output).nan_to_num(nan=1e9)
    assert error.item() <= 1, f"error is {error.item():.2f} of its limit"


def test_two_graphs_alternate(world: World) -> None:
    pools = [Pool(LiveOp(shape, torch.bfloat16, world.device)) for shape in shapes(world)]
    graphs, outputs = [], []
    for pool in pools:
        pool.op.call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(pool.op.call()[0])
        graphs.append(graph)
    order, worst = random.Random(4), torch.zeros((), device=world.device)
    for step in range(60):
        i = order.randrange(len(pools))
        pools[i].op.x.copy_(pools[i].inputs[step % 3])
        outputs[i].fill_(float("nan"))
        graphs[i].replay()
        worst = torch.maximum(worst, pools[i].judge(step % 3, outputs[i]).nan_to_num(nan=1e9))
    assert worst.item() <= 1, f"error is {worst.item():.2f} of its limit"


@pytest.mark.timeout(300)
def test_reduce_overhead_training_step(world: World) -> None:
    """Inductor's own CUDA graphs around fused ops, forward and backward; the third step is the first that replays."""
    program = PROGRAMS["block, forward and backward"]
    draw = Draw(world.sizes, dist.group.WORLD, torch.bfloat16, world.device)
    function, _ = program.build(draw)
    compiled = torch.compile(function, backend=tilescale, mode="reduce-overhead", fullgraph=True, dynamic=False)
    with tscompile.patch(fuse="always"):
        for seed in range(1, 8):
            args = program.build(Draw(world.sizes, dist.group.WORLD, torch.bfloat16, world.device, seed))[1]
            truth = fused_runs.results(function, [arg.double() for arg in args], backward=True)
            plain = fused_runs.results(function, args, backward=True)
            torch.compiler.cudagraph_mark_step_begin()
            got = [t.clone() for t in fused_runs.results(compiled, args, backward=True)]
            for index, (a, p, t) in enumerate(zip(got, plain, truth, strict=True)):
                found, limits = errors_of([a], [t]), allowed(errors_of([p], [t]), torch.bfloat16)
                assert found[0] <= limits[0] and found[1] <= limits[1], (seed, index, found, limits)
    assert any(row.decision == "fused" and row.measured_us is not None for row in tscompile.reports().rows)
