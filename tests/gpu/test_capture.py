"""CUDA graphs: fused ops captured by hand and by Inductor, replayed any number of times, with attention between them."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tscompile
from benchmarks.gpu_harness import allowed, errors_of
from tests import fused_programs, fused_runs
from tests.compat import all_gather
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


HEADS, HEAD_DIM = 4, 64
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
    """Sequence-parallel attention: gather, projections, SDPA, output projection, scatter."""
    gathered = all_gather(x, 0, dist.group.WORLD)
    q, k, v = (F.linear(gathered, w).view(1, -1, HEADS, HEAD_DIM).transpose(1, 2) for w in (wq, wk, wv))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    flat = out.transpose(1, 2).reshape(gathered.shape[0], -1)
    return fused_programs.scatter(F.linear(flat, wo), dist.group.WORLD)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("backend", ATTENTION)
def test_attention_between_fused_ops_captured(world: World, backend: str) -> None:
    """SDPA kernels have their own needs of streams and state (a seed, a plan cache): capture them with ours around them."""
    draw = Draw(world.sizes, dist.group.WORLD, torch.bfloat16, world.device, seed=1)
    inner, dim = HEADS * HEAD_DIM, world.sizes.k
    x = draw.normal(world.sizes.rows, dim)
    weights = [draw.weight(inner, dim) for _ in range(3)] + [draw.weight(dim, inner)]
    compiled = torch.compile(
        attention, backend=tilescale, fullgraph=True, dynamic=False, options={"tilescale.fuse": "always"}
    )
    with torch.no_grad(), sdpa_kernel([ATTENTION[backend]]):
        try:
            plain = attention(x, *weights).clone()
        except RuntimeError as error:
            pytest.skip(f"this torch has no {backend} for it: {str(error)[:120]}")
        compiled(x, *weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(x, *weights)
        for seed in range(4):
            x.copy_(Draw(world.sizes, dist.group.WORLD, torch.bfloat16, world.device, seed).normal(*x.shape))
            captured.fill_(float("nan"))
            graph.replay()
            plain = attention(x, *weights).clone()
            with sdpa_kernel([SDPBackend.MATH]):
                truth = attention(x.double(), *(w.double() for w in weights)).clone()
            found, limits = errors_of([captured], [truth]), allowed(errors_of([plain], [truth]), torch.bfloat16)
            assert found[0] <= limits[0] and found[1] <= limits[1], (seed, found, limits)
