"""Every kind at sizes of every regime, in every layout: called directly, judged against float32."""

from __future__ import annotations

import pytest
import torch

from benchmarks.direct import NotFusedError
from tests import direct_gathers
from tests.direct_gathers import LEFT_SUM, RIGHT, RIGHT_SUM, UNSERVED, Gather, LiveGather
from tests.direct_ops import LiveOp, Shape, sweep
from tests.fused_programs import GATHER, REDUCE, SCATTER
from tests.gpu.conftest import World
from tscompile.templates.nvlink import widths

NAMES = [str(shape) for shape in sweep(4, tiny=False)]
GATHERS = [str(shape) for shape in direct_gathers.sweep(tiny=False)]


def one(world: World, shape: Shape | Gather, dtype: torch.dtype) -> None:
    try:
        op = (LiveGather if isinstance(shape, Gather) else LiveOp)(shape, dtype, world.device)  # type: ignore[operator]
    except NotFusedError as kept:
        if world.cuda and shape != UNSERVED:
            raise
        pytest.skip(f"not fused: {kept}")
    for _ in range(2):
        op.check()


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_results_and_bits(world: World, index: int) -> None:
    shapes = sweep(world.size, tiny=not world.cuda)
    if index >= len(shapes):
        pytest.skip("tiny sizes are fewer")
    one(world, shapes[index], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [i for i, name in enumerate(NAMES) if name.startswith(GATHER)])
def test_gathers_in_the_form_that_their_sizes_do_not_choose(
    world: World, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that the kernel pushes by the copy engine, and the other way round."""
    chosen = widths.pushes
    monkeypatch.setattr(widths, "pushes", lambda *sizes: not chosen(*sizes))
    one(world, sweep(world.size, tiny=False)[index], torch.bfloat16)


@pytest.mark.parametrize("index", range(len(GATHERS)), ids=GATHERS)
def test_gathers_that_are_read_otherwise(world: World, index: int) -> None:
    """Ranks that are summed over, and gathered tensors on the right."""
    one(world, direct_gathers.sweep(tiny=not world.cuda)[index], torch.bfloat16)


def test_gathers_that_are_read_otherwise_in_float16(world: World) -> None:
    for shape in direct_gathers.sweep(tiny=not world.cuda)[::5]:
        one(world, shape, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("use", [LEFT_SUM, RIGHT_SUM, RIGHT], ids=str)
def test_large_gathers_that_are_read_otherwise(world: World, use: direct_gathers.Use) -> None:
    one(world, Gather((use,), 1, 8192 // world.size, 4096, 2752), torch.bfloat16)


@pytest.mark.parametrize("kind", [GATHER, SCATTER, REDUCE])
def test_float16(world: World, kind: str) -> None:
    """A few sizes: building kernels takes longer than running them, and layouts do not depend on the dtype."""
    shapes = [shape for shape in sweep(world.size, tiny=not world.cuda) if shape.kind == kind]
    for shape in shapes[1::4]:
        one(world, shape, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [GATHER, SCATTER, REDUCE])
def test_large(world: World, kind: str) -> None:
    """Sizes of a model, where a wave of tiles is not the whole work."""
    rows = 8192 // world.size if kind == GATHER else 8192
    one(world, Shape(kind, rows, (2752 if kind == GATHER else 4096,), 4096), torch.bfloat16)


def test_shapes_change_and_come_back(world: World) -> None:
    """One site after the other, small after large: what a larger op left in shared memory must not show in a smaller one."""
    shapes = [s for s in sweep(world.size, tiny=not world.cuda) if not s.bias][::3]
    ops = []
    for shape in shapes:
        try:
            ops.append(LiveOp(shape, torch.bfloat16, world.device))
        except NotFusedError as kept:
            world.say(f"not fused: {shape}: {kept}")
    for op in [*ops, *reversed(ops), *ops]:
        op.check(repeats=1)
