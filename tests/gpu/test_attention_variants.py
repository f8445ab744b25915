"""Every variant of attention that torch picks on GPUs, between fused ops, captured, forward and backward; grouped heads, dropout.

SDPA kernels have their own needs of streams and state (a seed, a plan cache), so they are captured with ours around them: a gather
before the projections of q, k and v, a scatter after that of the output; in the backward the gather of a gradient and the scatter of
a sum.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest tests/gpu/test_attention_variants.py -x -q
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import tscompile
from benchmarks.gpu_harness import allowed, errors_of
from benchmarks.harness import poison
from tests.fused_programs import GATHER, SCATTER, Draw, gather_autograd, scatter_autograd
from tests.gpu.conftest import World
from tscompile.backend import tilescale
from tscompile.lowering.group import GroupState
from tscompile.problem import Plan

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
DROPOUT = 0.2
DRAWS = 24  # of dropout masks
SAME_MASK = 0.05  # relative: rounding in bfloat16 is some 0.01; another mask makes sqrt(2 * 0.2 / 0.8), or 0.7


@dataclass(frozen=True)
class Variant:
    """op: what it is in a graph; empty for what torch decomposes into matmuls."""

    backend: SDPBackend
    op: str = ""


VARIANTS = {
    "flash": Variant(SDPBackend.FLASH_ATTENTION, "_scaled_dot_product_flash_attention"),
    "cudnn": Variant(SDPBackend.CUDNN_ATTENTION, "_scaled_dot_product_cudnn_attention"),
    "efficient": Variant(SDPBackend.EFFICIENT_ATTENTION, "_scaled_dot_product_efficient_attention"),
    "math": Variant(SDPBackend.MATH),
}
# Without GPUs the decomposed one runs on CPU ranks, uncaptured, to try the tests themselves.
EACH_VARIANT = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.gpu) if v.op else n for n, v in VARIANTS.items()]
)
EACH_HEADS = pytest.mark.parametrize("kv_heads", [pytest.param(HEADS, id="MHA"), pytest.param(KV_HEADS, id="GQA")])


class Picked(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, repeat: bool) -> Tensor:
    """Causal attention of [1, heads, S, d]; `repeat`: with keys and values of the same number of heads, made by the program."""
    if repeat:
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    grouped = k.shape[1] < HEADS
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


def must_repeat(world: World, name: str, kv_heads: int, dropout: float) -> bool:
    """Whether a program must repeat grouped heads itself for this variant. Skips where torch refuses that, too."""
    refusals = []
    for repeat in (False, True) if kv_heads < HEADS else (False,):
        q, k, v = (
            torch.zeros(1, h, 128, HEAD_DIM, dtype=torch.bfloat16, device=world.device, requires_grad=True)
            for h in (HEADS, kv_heads, kv_heads)
        )
        try:
            with sdpa_kernel([VARIANTS[name].backend]), Picked() as picked:
                attend(q, k, v, dropout, repeat)
        except RuntimeError as error:
            refusals.append(str(error).strip().splitlines()[0][:160])
            continue
        fused = {op for op in picked.names if op.startswith("_scaled_dot_product")}
        assert VARIANTS[name].op in fused if VARIANTS[name].op else not fused, picked.names
        return repeat
    pytest.skip(f"this torch has no {name} attention for it: {'; '.join(refusals)}")


def write(repeat: bool, dropout: float = 0.0) -> Callable[..., Tensor]:
    """Sequence-parallel attention: gather, projections, attention, output projection, scatter."""

    def program(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        gathered = gather_autograd(x, 0, dist.group.WORLD)
        q, k, v = (
            F.linear(gathered, w).view(1, -1, w.shape[0] // HEAD_DIM, HEAD_DIM).transpose(1, 2) for w in (wq, wk, wv)
        )
        out = attend(q, k, v, dropout, repeat).transpose(1, 2).reshape(gathered.shape[0], -1)
        scattered: Tensor = scatter_autograd(F.linear(out, wo), "sum", 0, dist.group.WORLD)
        return scattered

    return program


def draw(world: World, kv_heads: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Arguments of the program, and a gradient of its result."""
    values = Draw(world.sizes, dist.group.WORLD, torch.bfloat16, world.device, seed)
    rows, dim = world.sizes.rows, world.sizes.k
    weights = [values.weight(heads * HEAD_DIM, dim) for heads in (HEADS, kv_heads, kv_heads)]
    out = values.normal(dim, HEADS * HEAD_DIM, scale=(HEADS * HEAD_DIM) ** -0.5)
    return [values.normal(rows, dim), *weights, out], values.normal(rows, dim)


def compiled(world: World, program: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With CUDA graphs by Inductor, as `mode="reduce-overhead"` makes them, and the random numbers of eager execution."""
    options = {"tilescale.fuse": "always", "fallback_random": True}
    options |= {"triton.cudagraphs": True} if world.cuda else {"tilescale.inner": "eager"}
    return torch.compile(program, backend=tilescale, fullgraph=True, dynamic=False, options=options)


def step(function: Callable[..., Tensor], args: list[Tensor], gradient: Tensor, seed: int = 0) -> list[Tensor]:
    """The result and the gradients of all arguments, drawn from `seed`; copies, since a replay overwrites what it returned."""
    torch.manual_seed(seed)
    torch.compiler.cudagraph_mark_step_begin()
    leaves = [arg.detach().clone().requires_grad_() for arg in args]
    output: Any = function(*leaves)
    output = output.wait() if hasattr(output, "wait") else output
    grads = torch.autograd.grad(output, leaves, gradient)
    return [t.detach().clone() for t in (output, *grads)]


def exactly(program: Callable[..., Tensor], args: list[Tensor], gradient: Tensor) -> list[Tensor]:
    with sdpa_kernel([SDPBackend.MATH]):
        return step(program, [arg.double() for arg in args], gradient.double())


Launches = dict[tuple[str, str], bool]


@pytest.fixture
def launches(world: World, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """(phase, kind) of each op that runs fused, and whether it was captured. The report cannot say: equal sites have equal names."""
    found: Launches = {}
    launch = GroupState.launch

    def spy(state: GroupState, plan: Plan, *rest: Any) -> tuple[list[Tensor], bool]:
        outputs, fused = launch(state, plan, *rest)
        key = plan.site.partition("-")[0], plan.kind
        if fused:
            found[key] = found.get(key, False) or (world.cuda and torch.cuda.is_current_stream_capturing())
        return outputs, fused

    monkeypatch.setattr(GroupState, "launch", spy)
    return found


def check_launches(world: World, launches: Launches, *phases: str) -> None:
    story = [f"{row.phase} {row.pattern} {row.decision} [{row.code}] {row.reason}" for row in tscompile.reports().rows]
    assert launches == {(phase, kind): world.cuda for phase in phases for kind in (GATHER, SCATTER)}, story[-8:]


@EACH_HEADS
@EACH_VARIANT
def test_training_step(world: World, launches: Launches, name: str, kv_heads: int) -> None:
    """The third step is the first that replays; every one is compared with float64."""
    repeat = must_repeat(world, name, kv_heads, 0.0)
    program = write(repeat)
    with sdpa_kernel([VARIANTS[name].backend]):
        run = compiled(world, program)
        for seed in range(1, 7):
            args, gradient = draw(world, kv_heads, seed)
            truth, plain = exactly(program, args, gradient), step(program, args, gradient)
            poison(plain)
            for index, (a, p, t) in enumerate(zip(step(run, args, gradient), plain, truth, strict=True)):
                found, limits = errors_of([a], [t]), allowed(errors_of([p], [t]), torch.bfloat16)
                assert found[0] <= limits[0] and found[1] <= limits[1], (seed, index, found, limits)
    check_launches(world, launches, "forward", "backward")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@EACH_HEADS
@EACH_VARIANT
def test_dropout(world: World, launches: Launches, name: str, kv_heads: int) -> None:
    """A seed gives what it gives the eager program, in a replay as well; other seeds give other masks, which are right on average.

    Result and gradients are linear in the mask, so their mean over many masks is that without dropout: of DRAWS independent ones it is
    off by one draw's deviation over sqrt(DRAWS).
    """
    repeat = must_repeat(world, name, kv_heads, DROPOUT)
    program = write(repeat, DROPOUT)
    args, gradient = draw(world, kv_heads, 1)
    truth = exactly(write(repeat), args, gradient)
    seeds = [1000 * world.rank + seed for seed in range(DRAWS)]
    sums, squares = [torch.zeros_like(t) for t in truth], [0.0] * len(truth)
    first: dict[int, Tensor] = {}
    with sdpa_kernel([VARIANTS[name].backend]):
        run = compiled(world, program)
        for index, seed in enumerate(seeds):
            got = step(run, args, gradient, seed)
            first[seed] = got[0]
            if index < 4:  # the first runs, the second is captured, the others are replayed
                off = [relative(a, b) for a, b in zip(got, step(program, args, gradient, seed), strict=True)]
                assert max(off) < SAME_MASK, f"seed {seed}: other results than eagerly: {off}"
            for i, (a, t) in enumerate(zip(got, truth, strict=True)):
                sums[i] += a.double()
                squares[i] += relative(a, t) ** 2 / DRAWS
        for seed in (seeds[-1], seeds[0]):
            assert torch.equal(step(run, args, gradient, seed)[0], first[seed]), f"seed {seed} gave other bits again"
    one = [math.sqrt(square) for square in squares]
    assert 0.5 < one[0] / math.sqrt(DROPOUT / (1 - DROPOUT)) < 2, f"a mask makes a difference of {one[0]:.2f}"
    for index, (total, t) in enumerate(zip(sums, truth, strict=True)):
        ratio = relative(total / DRAWS, t) / one[index] * math.sqrt(DRAWS)
        assert 0.5 < ratio < 2, f"tensor {index}: the mean of {DRAWS} draws is off by {ratio:.2f} of what it should be"
    check_launches(world, launches, "forward", "backward")


@pytest.mark.gpu
@EACH_VARIANT
def test_inference_captured_by_hand(world: World, launches: Launches, name: str) -> None:
    repeat = must_repeat(world, name, KV_HEADS, 0.0)
    program = write(repeat)
    args, _ = draw(world, KV_HEADS, 1)
    options = {"tilescale.fuse": "always"}
    run = torch.compile(program, backend=tilescale, fullgraph=True, dynamic=False, options=options)
    with torch.no_grad(), sdpa_kernel([VARIANTS[name].backend]):
        run(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(*args)
        for seed in range(4):
            args[0].copy_(draw(world, KV_HEADS, seed)[0][0])
            captured.fill_(float("nan"))
            graph.replay()
            plain = program(*args).clone()
            with sdpa_kernel([SDPBackend.MATH]):
                truth = program(*(arg.double() for arg in args)).clone()
            found, limits = errors_of([captured], [truth]), allowed(errors_of([plain], [truth]), torch.bfloat16)
            assert found[0] <= limits[0] and found[1] <= limits[1], (seed, found, limits)
    check_launches(world, launches, "inference")
